"""bench kernels --count: the numbers that MLX's kernels and ours are known by."""

import json

import pytest
from typer.testing import CliRunner

from pyengine import cli, kernel_counts, rule_counts
from pyengine.kernel_counts import count_kernels, markdown


@pytest.fixture(scope="module")
def counts():
    return list(count_kernels(widths=(512,), rows=(1, 6), columns=32))


def test_every_kernel_is_counted_at_every_shape(counts):
    ours = [(c.op, c.M) for c in counts if c.source == "ours"]
    ops = ("q8_matmul", "q8_gated_matmul", "dense_matmul", "q8_expert_matmul")
    assert sorted(ours) == sorted((op, M) for op in ops for M in (1, 6))
    mlx = [(c.kernel.partition("<")[0], c.M) for c in counts if c.source == "mlx"]
    assert mlx == [("affine_qmv_fast", 1), ("affine_qmv_fast", 6), ("affine_qmv_wide", 6)]


def test_weights_are_read_once_and_by_mlx_more_often(counts):
    for c in counts:
        passes = {"affine_qmv_fast": c.M, "affine_qmv_wide": 2}.get(c.kernel.partition("<")[0], 1)
        assert c.weight_ratio == passes, c
        assert c.launches == 1 and c.written_bytes >= 2 * c.M * c.N


def test_ratio_is_over_all_that_must_move(counts):
    q8 = next(c for c in counts if c.op == "q8_matmul" and c.M == 6 and c.source == "ours")
    needed = 32 * 512 + 2 * 32 * 8 * 2 + 6 * 512 * 2 + 6 * 32 * 2
    assert q8.compulsory_bytes == needed
    assert q8.ratio == (q8.read_bytes + q8.written_bytes) / needed
    assert q8.threadgroup_bytes == 6 * 1024 + 8 * 512  # rows of x; factors of 32 columns


def test_table_and_json(counts, monkeypatch):
    table = [line for line in markdown(counts).splitlines() if line.startswith("| ")]
    assert len(table) == 2 + len(counts)
    monkeypatch.setattr(kernel_counts, "count_kernels", lambda: iter(counts))
    monkeypatch.setattr(rule_counts, "count_rules", lambda: iter([]))
    monkeypatch.setattr(rule_counts, "count_round", list)
    shown = CliRunner().invoke(cli.app, ["bench", "kernels", "--count", "--json"])
    assert shown.exit_code == 0, shown.output
    rows = json.loads(shown.stdout)["kernels"]
    assert rows == [c.to_dict() for c in counts]
    fields = "op kernel source M N K dtype launches read_bytes written_bytes compulsory_bytes"
    assert set(rows[0]) == {*fields.split(), "weight_ratio", "ratio", "threadgroup_bytes"}


def test_nothing_is_timed():
    shown = CliRunner().invoke(cli.app, ["bench", "kernels"])
    assert shown.exit_code == 2 and "--count must be given" in shown.output
