"""bench kernels --count: bytes of the kernels between the matmuls."""

import json

import pytest

from pyengine.layer_counts import HEADS, ROWS, WIDTH, count_layers, markdown


@pytest.fixture(scope="module")
def counts():
    return list(count_layers())


def test_rows_are_loaded_once(counts):
    ops = ["rms_norm", "residual_norm", "geglu"]
    ops += len(HEADS) * ["prepare_qkv", "norm_rope", "write_cache"]
    assert sorted((c.op, c.M) for c in counts) == sorted((op, M) for op in ops for M in ROWS)
    for c in counts:
        assert c.row_ratio == 1 and c.launches == 1, c
        assert c.threadgroup_bytes <= 4 * 512 * 4, c


def test_bytes_that_are_needed_and_weights_once_a_threadgroup(counts):
    """A row reads its weights; four heads share one copy, which is as long as two of them."""
    E = 2 * WIDTH
    for c in counts:
        if c.op == "rms_norm":
            assert (c.read_bytes, c.written_bytes) == (2 * c.M * E, c.M * E)
        elif c.op == "residual_norm":
            scalar = 32 * c.M  # a sector for its two bytes
            assert (c.read_bytes, c.written_bytes) == (4 * c.M * E + scalar, 2 * c.M * E)
        elif c.op in ("geglu", "write_cache"):
            assert 1 <= c.ratio < 1.04, c  # with the offset
        else:
            assert c.ratio < 1.35, c


def test_table_and_json(counts, count_command):
    table = markdown(counts)
    assert len([line for line in table.splitlines() if line.startswith("| ")]) == 2 + len(counts)
    text, rows = count_command(layers=counts)
    assert table in text and json.loads(rows) == [c.to_dict() for c in counts]
