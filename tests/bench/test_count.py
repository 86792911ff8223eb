"""Published numbers: what bench/count.py counts, and each cell of its tables, by hand."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from pyengine import ops
from pyengine.sampling.settings import Sampling

BENCH = Path(__file__).parents[2] / "bench"
DENSE = ("quantized_matmul", "quantized_matmuls", "quantized_gated_matmul", "dense_matmul")
Row = dict[str, Any]


def module(name: str) -> ModuleType:
    """A file of the bench folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


bench = module("count")


def rows_of(calls: Iterator[Any]) -> list[Row]:
    return [bench.row(call) for call in calls]


# One call


def test_one_call_needs_its_result_alone() -> None:
    """Two rows of 512 bytes and the weight's, each read by its own threadgroup; two rows out."""
    x, weight = mx.ones((2, 256), mx.bfloat16), mx.ones(256, mx.bfloat16)
    made = bench.count(ops.rms_norm(x, weight))
    assert (made.launches, made.kernel) == (1, "rms_norm_bfloat16")
    assert made.buffers == {
        "x": bench.Moved(needed=1024, read=1024, written=0, loaded=1024),
        "weight": bench.Moved(needed=512, read=1024, written=0, loaded=1024),
        "out": bench.Moved(needed=1024, read=0, written=1024, loaded=0),
    }


# Matrices


# One row, and on both sides of where a kernel changes its form; tests/metal has every number
ROWS = (1, 3, 4, 6, 7, 8, 9, 16)


def matrices() -> Iterator[Any]:
    for M in ROWS:
        yield from bench.matmuls(M, 32, 1024)
    for M in ROWS:
        yield bench.experts(M, 16, 1024)


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
    assert bench.WIDTHS == (5376, 21504, 3840, 15360, 1536, 6144) and bench.COLUMNS == 128
    assert bench.ROWS == (1, 6, 16) and list(bench.EVERY_ROW) == list(range(1, 17))
    assert [(g.group, g.D, g.window) for g in bench.GEOMETRIES] == [
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
    "K", [1536, *(pytest.param(K, marks=pytest.mark.long) for K in bench.WIDTHS if K != 1536)]
)
def test_matrices_are_loaded_once_at_the_layers_of_the_models(K: int) -> None:
    """The packed weights exactly, with scales and biases but for sectors that two rows share."""
    calls = (call for M in bench.ROWS for call in bench.matmuls(M, bench.COLUMNS, K))
    rows = rows_of(call for call in calls if not isinstance(call.result, bench.MlxKernel))
    assert {(r["op"], r["M"]) for r in rows} == {(op, M) for op in DENSE for M in bench.ROWS}
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
        bench.Geometry("sliding", 2, 256, 200),
        bench.Geometry("full", 8, 512, None),
    )
    return rows_of(bench.attention(small, (1, 6, 16), 300))


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


# Norms, heads and gates


@pytest.fixture(scope="module")
def layers() -> list[Row]:
    return rows_of(bench.layers())


def test_rows_are_loaded_once(layers: list[Row]) -> None:
    names = ["rms_norm", "residual_norm", "glu"]
    names += len(bench.HEADS) * ["prepare_qkv", "norm_rope"]
    want = [(op, M) for op in names for M in bench.LAYER_ROWS]
    want += len(bench.HEADS) * [("copy_pages", 1)]
    assert sorted((r["op"], r["M"]) for r in layers) == sorted(want)
    for r in layers:
        assert r.get("row_ratio", 1) == 1 and r["launches"] == 1, r
        assert ("row_ratio" in r) == (r["op"] != "copy_pages"), r  # which has pages, and no rows
        assert r["threadgroup_bytes"] <= 4 * 512 * 4, r


def test_bytes_that_are_needed_and_weights_once_per_threadgroup(layers: list[Row]) -> None:
    """A row reads its weights; four heads share one copy, which is as long as two of them."""
    E = 2 * bench.WIDTH
    for r in layers:
        M, moved = r["M"], (r["read_bytes"], r["written_bytes"])
        if r["op"] == "rms_norm":
            assert moved == (2 * M * E, M * E)
        elif r["op"] == "residual_norm":
            scalar = 32 * M  # a sector for its two bytes
            assert moved == (4 * M * E + scalar, 2 * M * E)
        elif r["op"] == "glu":
            assert 1 <= r["ratio"] < 1.04, r
        elif r["op"] == "copy_pages":
            # A threadgroup of 4096 bytes has two sectors for two numbers
            assert moved[1] == (r["compulsory_bytes"] - 8) // 2, r
            assert moved[0] == moved[1] + 2 * 32 * moved[1] // 4096, r
        else:
            assert r["ratio"] < 1.35, r


# Sampling rules


@pytest.fixture(scope="module")
def rules() -> list[Row]:
    return rows_of(bench.rules(vocab=65536, rows=(1, 6)))


def test_logits_are_read_once_and_little_lies_between(rules: list[Row]) -> None:
    filters = [r for r in rules if r["op"] == "filter_logits"]
    assert [(r["M"], r["N"], r["launches"]) for r in filters] == [(1, 65536, 2), (6, 65536, 2)]
    for r in filters:
        assert r["logits_ratio"] <= 1.02
        lists = r["M"] * (65536 // 4096) * 64 * 8  # a list for every slice, written and read
        assert 2 * lists <= r["between_bytes"] <= 2.2 * lists
        assert r["threadgroup_bytes"] <= 13 * 1024


def test_the_fused_head_reads_weights_once_and_leaves_no_logits(rules: list[Row]) -> None:
    heads = [r for r in rules if r["op"] == "quantized_filter_logits"]
    assert [(r["M"], r["N"], r["launches"]) for r in heads] == [(1, 2048, 2), (6, 2048, 2)]
    for r in heads:
        lists = r["M"] * (2048 // 128) * 64 * 8  # of slices of 128 at so small a vocabulary
        assert 2 * lists <= r["between_bytes"] <= 2.1 * lists and "logits_ratio" not in r
        assert r["weight_ratio"] == 1
        # Weights and factors of 2048 rows; x again for every 128 of them
        assert r["ratio"] < 1 + (r["between_bytes"] + 20 * r["M"] * 1536 * 2) / (2048 * 1536)
        assert r["threadgroup_bytes"] <= 15 * 1024


def test_small_ops_move_what_they_must(rules: list[Row]) -> None:
    """One launch each; a table of 512 bytes is touched as a whole or not at all."""
    small = {r["op"]: r for r in rules if "filter_logits" not in r["op"]}
    assert set(small) == {"draw_token", "accept_block"}
    for r in small.values():
        assert r["launches"] == 1 and r["between_bytes"] == 0 and "logits_ratio" not in r
        assert 0.5 < r["ratio"] < 1.3


def test_launches_of_a_round() -> None:
    """Five drafts: five filters and draws of the assistant, one filter of the target's rows."""
    rows = {r["op"]: r for r in bench.count_round()}
    assert not {"filter_logits", "softcap"} & set(rows)
    told = {op: (r["calls"], r["launches"]) for op, r in rows.items()}
    assert told["quantized_filter_logits"] == (6, 12)
    assert told["draw_token"] == (5, 5) and told["accept_block"] == (1, 1)
    assert told["block_attention"][1] == 3 * told["block_attention"][0]
    assert list(rows)[-1] == "MLX" and set(rows) - {"MLX"} <= set(ops.__all__)
    for op, (calls, launches) in told.items():
        assert calls > 0 and (launches is None) == (op == "MLX")
    fewer = {r["op"]: r for r in bench.count_round(2, Sampling(temperature=0.0))}
    assert fewer["quantized_filter_logits"]["calls"] == 3 and "draw_token" not in fewer


# What is printed


def figures(**changes: Any) -> Row:
    told = {
        "op": "quantized_matmul",
        "kernel": "quantized_matmul_bfloat16<6>",
        "source": "ours",
        "M": 6,
        "N": 128,
        "K": 5376,
        "launches": 2,
        "read_bytes": 31,
        "written_bytes": 32,
        "compulsory_bytes": 33,
        "between_bytes": 34,
        "ratio": 3.25,
        "threadgroup_bytes": 777,
        "weight_ratio": 1.125,
        "matrix_ratio": 2.0625,
        "weight_load_ratio": 4.375,
        "matrix_load_ratio": 5.1875,
        "load_ratio": 6.75,
    }
    return {**told, **changes}


def mlx(**changes: Any) -> Row:
    """MLX's kernels have no figures by load."""
    told = figures(kernel="affine_qmv<bfloat, 64>", source="mlx", launches=1, **changes)
    return {name: value for name, value in told.items() if "load" not in name}


def table(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]


def test_every_cell_of_the_matrices() -> None:
    """Other numbers of rows are left to the second table, which has our kernels alone."""
    rows = [
        figures(),
        mlx(M=1),
        figures(M=5),
        figures(K=1536, M=2, weight_load_ratio=1.5, matrix_load_ratio=2.5, ratio=3.5),
        mlx(K=1536, M=2, ratio=9.0),
        figures(op="other", K=2816, M=3, weight_load_ratio=6.5, matrix_load_ratio=7.5, ratio=8.5),
    ]
    ours = "quantized_matmul|`quantized_matmul_bfloat16`|6|128|5376|2|1.12|2.062|4.38, 5.188"
    theirs = "quantized_matmul|`affine_qmv` (MLX)|1|128|5376|1|1.12|2.062|||3.25|777"
    assert table(bench.markdown(bench.MATRICES_SHOWN, rows)) == [
        [
            *("op", "kernel", "M", "N", "K", "launches", "weights", "w+s+b", "by load"),
            *("all loads", "total", "threadgroup memory"),
        ],
        ["---", "---", *["--:"] * 10],
        [*ours.split("|"), "6.75", "3.25", "777"],
        theirs.split("|"),
    ]
    assert table(bench.every_row(rows)) == [
        ["M", "quantized_matmul", "other"],
        ["--:", "--:", "--:"],
        ["2", "1.50, 2.500, 3.50", ""],
        ["3", "", "6.50, 7.500, 8.50"],
    ]


def test_every_cell_of_attention() -> None:
    labels = {"layer": "31B full", "D": 512, "rows": 48, "keys": 1506}
    ratios = {"kv_load_ratio": 1.0625, "q_load_ratio": 2.5, "between_ratio": 3.75, "ratio": 4.25}
    row = figures(**labels, **ratios, threadgroup_bytes=555)
    assert table(bench.markdown(bench.ATTENTION_SHOWN, [row])) == [
        [
            *("layer", "D", "T", "rows", "keys", "launches", "keys + values", "q", "between"),
            *("total", "threadgroup memory"),
        ],
        ["---", *["--:"] * 10],
        ["31B full", "512", "6", "48", "1506", "2", "1.062", "2.50", "3.75", "4.25", "555"],
    ]


def test_every_cell_of_the_layers() -> None:
    row = figures(op="rms_norm", shape="32 of 256", row_ratio=2.25, launches=4)
    assert table(bench.markdown(bench.LAYERS_SHOWN, [row])) == [
        [
            *("op", "M", "shape", "launches", "read", "written", "rows", "total"),
            "threadgroup memory",
        ],
        ["---", *["--:"] * 8],
        ["rms_norm", "6", "32 of 256", "4", "31", "32", "2.25", "3.25", "777"],
    ]


def test_every_cell_of_the_rules_and_the_round() -> None:
    rows = [figures(op="filter_logits", logits_ratio=1.25), figures(op="draw_token")]
    assert table(bench.markdown(bench.RULES_SHOWN, rows)) == [
        ["op", "rows", "n", "launches", "logits", "between", "total", "threadgroup memory"],
        ["---", *["--:"] * 7],
        ["filter_logits", "6", "128", "2", "1.25", "34", "3.25", "777"],
        ["draw_token", "6", "128", "2", "", "34", "3.25", "777"],
    ]
    rounds = [
        {"op": "embed", "source": "round", "calls": 7, "launches": 14},
        {"op": "MLX", "source": "round", "calls": 23, "launches": None},
    ]
    assert table(bench.markdown(bench.ROUND_SHOWN, rounds)) == [
        ["op", "calls", "launches"],
        ["---", "--:", "--:"],
        ["embed", "7", "14"],
        ["MLX", "23", "MLX"],
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_chosen_ops_are_counted_told_and_printed(
    capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    bench.main(["--ops", "draw_token", *["--json"] * as_json])
    out, err = capsys.readouterr()
    assert err == "rules: draw_token, M = 1, N = 64\n"
    if as_json:
        counted, in_round = json.loads(out)
        assert (counted["op"], counted["source"], counted["M"]) == ("draw_token", "ours", 1)
        assert (
            counted["ratio"]
            == (counted["read_bytes"] + counted["written_bytes"]) / (counted["compulsory_bytes"])
        )
        assert in_round == {"op": "draw_token", "source": "round", "calls": 5, "launches": 5}
    else:
        assert "# What the Metal kernels" not in out and "## Norms" not in out
        assert [row[0] for row in table(out)] == ["op", "---", "draw_token"] * 2


def test_an_op_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        bench.main(["--ops", "rms_norm", "rmsnorm"])
    assert refused.value.code == 2
    assert "--ops must name ops but got rmsnorm." in capsys.readouterr().err


def test_the_page_has_the_heading_and_columns_of_each_table() -> None:
    page = (BENCH / "KERNELS.md").read_text()
    shown = (bench.MATRICES_SHOWN, bench.ATTENTION_SHOWN, bench.LAYERS_SHOWN)
    for one_table in (*shown, bench.RULES_SHOWN, bench.ROUND_SHOWN):
        assert bench.markdown(one_table, []) in page
