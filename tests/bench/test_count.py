"""What bench/count.py counts of single calls, matrices and attention, by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from bench_scripts import Row, count, rows_of, sized_calls

from pyengine import ops

DENSE = ("quantized_matmul", "quantized_matmuls", "quantized_gated_matmul", "dense_matmul")


# One call


def test_one_call_needs_its_result_alone() -> None:
    """Two rows of 512 bytes and the weight's, each read by its own threadgroup; two rows out."""
    x, weight = mx.ones((2, 256), mx.bfloat16), mx.ones(256, mx.bfloat16)
    made = count.count(ops.rms_norm(x, weight))
    assert (made.launches, made.kernel) == (1, "rms_norm_bfloat16")
    assert made.buffers == {
        "x": count.Moved(needed=1024, read=1024, written=0, loaded=1024),
        "weight": count.Moved(needed=512, read=1024, written=0, loaded=1024),
        "out": count.Moved(needed=1024, read=0, written=1024, loaded=0),
    }


# Matrices


# One row, and on both sides of where a kernel changes its form; tests/metal has every number
ROWS = (1, 3, 4, 6, 7, 8, 9, 16)


def matrices() -> Iterator[Any]:
    for M in ROWS:
        yield from count.matmuls(M, 32, 1024)
    for M in ROWS:
        yield from count.experts(M, 16, 1024)


@pytest.fixture(scope="module")
def matmuls() -> list[Row]:
    """At a width whose rows of factors are whole sectors."""
    return rows_of(matrices())


def one(rows: list[Row], **labels: Any) -> Row:
    """The row that has these labels."""
    [found] = [r for r in rows if labels.items() <= r.items()]
    return found


def test_every_kernel_is_counted(matmuls: list[Row]) -> None:
    named = [(r["op"], r["M"]) for r in matmuls if r["source"] == "ours"]
    every = (*DENSE, "quantized_expert_matmul")
    assert sorted(named) == sorted((op, M) for op in every for M in ROWS)
    mlx = [(r["kernel"].partition("<")[0], r["M"]) for r in matmuls if r["source"] == "mlx"]
    fast, wide = "affine_qmv_fast", "affine_qmv_wide"
    assert mlx == [(fast, 1), (fast, 6), (wide, 6), (fast, 16), (wide, 16)]


def test_the_tables_cover_the_models() -> None:
    assert sized_calls.WIDTHS == (5376, 21504, 3840, 15360, 1536, 6144)
    assert sized_calls.COLUMNS == 128
    assert sized_calls.ROWS == (1, 6, 16) and list(sized_calls.EVERY_ROW) == list(range(1, 17))
    assert [(g.group, g.D, g.window) for g in sized_calls.GEOMETRIES] == [
        *((2, 256, 1024), (8, 512, None), (8, 256, 512), (16, 512, None))
    ]


def test_weights_are_read_once_and_by_mlx_more_often(matmuls: list[Row]) -> None:
    for r in matmuls:
        M = r["M"]
        passes = {"affine_qmv_fast": M, "affine_qmv_wide": -(-M // 4)}
        assert r["weight_ratio"] == passes.get(r["kernel"].partition("<")[0], 1), r
        assert r["launches"] == 1 and r["written_bytes"] >= 2 * M * r["N"]
        if r["source"] == "ours":
            assert r["weight_load_ratio"] == r["matrix_ratio"] == r["matrix_load_ratio"] == 1, r
        else:
            assert not {"weight_load_ratio", "matrix_load_ratio", "load_ratio"} & set(r)


@pytest.mark.parametrize(
    "K", [1536, *(pytest.param(K, marks=pytest.mark.long) for K in sized_calls.WIDTHS if K != 1536)]
)
def test_matrices_are_loaded_once_at_the_layers_of_the_models(K: int) -> None:
    """The packed weights exactly, with scales and biases but for sectors that two rows share."""
    calls = (call for M in sized_calls.ROWS for call in count.matmuls(M, sized_calls.COLUMNS, K))
    rows = rows_of(call for call in calls if not isinstance(call.result, sized_calls.MlxKernel))
    assert {(r["op"], r["M"]) for r in rows} == {(op, M) for op in DENSE for M in sized_calls.ROWS}
    for r in rows:
        assert r["weight_ratio"] == r["weight_load_ratio"] == r["matrix_ratio"] == 1, r
        assert r["matrix_load_ratio"] <= 1.02, r
        assert r["load_ratio"] <= (2 if r["M"] <= 6 else 3), r


def test_ratio_is_over_all_that_must_move(matmuls: list[Row]) -> None:
    r = one(matmuls, op="quantized_matmul", M=6, source="ours")
    matrix = 32 * 1024 + 2 * 32 * 16 * 2
    needed = matrix + 6 * 1024 * 2 + 6 * 32 * 2
    assert r["compulsory_bytes"] == needed
    assert r["ratio"] == (r["read_bytes"] + r["written_bytes"]) / needed
    # Two threadgroups of 16 columns: each reads x
    assert r["load_ratio"] == (matrix + 2 * 6 * 1024 * 2) / matrix
    assert r["threadgroup_bytes"] == 6 * 1024 + 4 * 512  # rows of x; factors of 16 columns


def test_of_experts_only_those_that_are_used_are_needed(matmuls: list[Row]) -> None:
    """One token: 8 of 16, each of two matrices of 16 columns; x, ids and a row for each."""
    r = one(matmuls, op="quantized_expert_matmul", M=1)
    matrices = 8 * 2 * (16 * 1024 + 2 * 16 * 16 * 2)
    assert r["compulsory_bytes"] == matrices + 1024 * 2 + 8 * 4 + 8 * 16 * 2


def test_one_launch_moves_what_three_do(matmuls: list[Row]) -> None:
    for M in (1, 6):
        single, shared = (one(matmuls, op=op, M=M, source="ours") for op in DENSE[:2])
        # 16 + 8 + 8 columns make three threadgroups, 32 make two: one more reads x
        assert shared["compulsory_bytes"] == single["compulsory_bytes"]
        assert shared["read_bytes"] - single["read_bytes"] == M * 1024 * 2


# Attention


@pytest.fixture(scope="module")
def attention() -> list[Row]:
    small = (
        sized_calls.Geometry("sliding", 2, 256, 200),
        sized_calls.Geometry("full", 8, 512, None),
    )
    return rows_of(count.attention(small, (1, 6, 16), 300))


def test_visible_keys_and_values_are_loaded_once(attention: list[Row]) -> None:
    assert [(r["layer"], r["M"], r["rows"], r["keys"]) for r in attention] == [
        *(("sliding", 1, 2, 200), ("sliding", 6, 12, 205), ("sliding", 16, 32, 215)),
        *(("full", 1, 8, 301), ("full", 6, 48, 306), ("full", 16, 128, 316)),
    ]
    for r in attention:
        assert r["launches"] == 3 and r["threadgroup_bytes"] <= 28 * 1024
        if r["rows"] <= 64:
            assert r["kv_load_ratio"] == 1, r
        else:  # two tiles of rows, of which the first does not see the newest keys
            assert 1.9 < r["kv_load_ratio"] < 2, r


def test_ratios_of_attention_are_over_what_must_move(attention: list[Row]) -> None:
    r = one(attention, layer="full", M=6)
    keys, rows, D = 306, 48, 512
    visible = 2 * keys * D * 2
    # q, out, a length and five pages beside keys and values
    assert r["compulsory_bytes"] == visible + 2 * rows * D * 2 + 4 + 5 * 4
    assert r["ratio"] == (r["read_bytes"] + r["written_bytes"]) / r["compulsory_bytes"]
    # Scores of whole chunks written, and by four slices of columns read; states of one span, twice
    scores, states = rows * 4 * (320 + 4 * keys), 2 * rows * (D + 2) * 4
    assert r["between_bytes"] == r["between_ratio"] * visible
    assert 0.95 * (scores + states) < r["between_bytes"] < 1.1 * (scores + states)
    # q goes to each of ten threadgroups of 32 keys
    assert r["q_load_ratio"] == 10 * rows * D * 2 / visible
