"""bench kernels --count: the numbers that MLX's kernels and ours are known by."""

import json

import pytest
from typer.testing import CliRunner

from pyengine import cli, kernel_counts
from pyengine.kernel_counts import COLUMNS, EVERY_ROW, ROWS, WIDTHS, count_kernels, markdown

DENSE = ("quantized_matmul", "quantized_matmuls", "quantized_gated_matmul", "dense_matmul")
OPS = (*DENSE, "quantized_expert_matmul")


@pytest.fixture(scope="module")
def counts():
    """Every number of rows, at a width whose rows of factors are whole sectors."""
    return list(count_kernels((1024,), (1, 6), 32, every_row_width=1024, expert_width=1024))


def test_every_kernel_is_counted_at_every_number_of_rows(counts):
    ours = [(c.op, c.M) for c in counts if c.source == "ours"]
    assert sorted(ours) == sorted((op, M) for op in OPS for M in range(1, 17))
    mlx = [(c.kernel.partition("<")[0], c.M) for c in counts if c.source == "mlx"]
    assert mlx == [("affine_qmv_fast", 1), ("affine_qmv_fast", 6), ("affine_qmv_wide", 6)]


def test_what_a_mac_user_is_told_covers_the_models():
    assert WIDTHS == (5376, 21504, 3840, 15360, 1536, 6144) and COLUMNS == 128
    assert ROWS == (1, 6, 16) and list(EVERY_ROW) == list(range(1, 17))


def test_weights_are_read_once_and_by_mlx_more_often(counts):
    for c in counts:
        passes = {"affine_qmv_fast": c.M, "affine_qmv_wide": 2}.get(c.kernel.partition("<")[0], 1)
        assert c.weight_ratio == passes, c
        assert c.launches == 1 and c.written_bytes >= 2 * c.M * c.N
        if c.source == "ours":
            assert c.weight_load_ratio == c.matrix_ratio == c.matrix_load_ratio == 1, c


@pytest.mark.parametrize(
    "K", [1536, *(pytest.param(K, marks=pytest.mark.long) for K in WIDTHS if K != 1536)]
)
def test_matrices_are_loaded_once_at_the_layers_of_the_models(K):
    """The packed weights exactly, with scales and biases but for sectors that two rows share."""
    counted = count_kernels((K,), ROWS, COLUMNS, every_row_width=None, expert_width=None)
    ours = [c for c in counted if c.source == "ours"]
    assert {c.M for c in ours} == set(ROWS) and "quantized_matmul" in {c.op for c in ours}
    for c in ours:
        assert c.weight_ratio == c.weight_load_ratio == c.matrix_ratio == 1, c
        assert c.matrix_load_ratio <= 1.02, c
        assert c.load_ratio <= (2 if c.M <= 6 else 3), c


def test_ratio_is_over_all_that_must_move(counts):
    q8 = next(c for c in counts if c.op == "quantized_matmul" and c.M == 6 and c.source == "ours")
    matrix = 32 * 1024 + 2 * 32 * 16 * 2
    needed = matrix + 6 * 1024 * 2 + 6 * 32 * 2
    assert q8.compulsory_bytes == needed
    assert q8.ratio == (q8.read_bytes + q8.written_bytes) / needed
    assert q8.load_ratio == (matrix + 6 * 1024 * 2) / matrix
    assert q8.threadgroup_bytes == 6 * 1024 + 8 * 512  # rows of x; factors of 32 columns


def test_one_launch_moves_what_three_do(counts):
    for M in (1, 6):
        q8, shared = (
            next(c for c in counts if (c.op, c.M, c.source) == (op, M, "ours"))
            for op in ("quantized_matmul", "quantized_matmuls")
        )
        # 16 + 8 + 8 columns make three threadgroups, 32 make one: two more read x
        assert shared.compulsory_bytes == q8.compulsory_bytes
        assert shared.read_bytes - q8.read_bytes == 2 * M * 1024 * 2
        assert shared.launches == 1


def test_table_and_json(counts, monkeypatch, count_command):
    table = [line for line in markdown(counts).splitlines() if line.startswith("| ")]
    assert len(table) == 2 + sum(c.M in ROWS for c in counts)
    monkeypatch.setattr(kernel_counts, "EVERY_ROW_WIDTH", 1024)
    table = [line for line in markdown(counts).splitlines() if line.startswith("| ")]
    assert len(table) == 2 + sum(c.M in ROWS for c in counts) + 2 + 16
    rows = json.loads(count_command(kernels=counts)[1])
    assert rows == [c.to_dict() for c in counts]
    fields = "op kernel source M N K dtype launches read_bytes written_bytes compulsory_bytes"
    ratios = "weight_ratio matrix_ratio ratio weight_load_ratio matrix_load_ratio load_ratio"
    assert set(rows[0]) == {*fields.split(), *ratios.split(), "threadgroup_bytes"}


def test_nothing_is_timed():
    shown = CliRunner().invoke(cli.app, ["bench", "kernels"])
    assert shown.exit_code == 2 and "--count must be given" in shown.output
