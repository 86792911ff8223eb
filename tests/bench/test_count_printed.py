"""What bench/count.py prints: each cell of its tables, by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bench_scripts import BENCH, Row, count


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
    assert table(count.markdown(count.MATRICES_SHOWN, rows)) == [
        [
            *("op", "kernel", "M", "N", "K", "launches", "weights", "w+s+b", "by load"),
            *("all loads", "total", "threadgroup memory"),
        ],
        ["---", "---", *["--:"] * 10],
        [*ours.split("|"), "6.75", "3.25", "777"],
        theirs.split("|"),
    ]
    assert table(count.every_row(rows)) == [
        ["M", "quantized_matmul", "other"],
        ["--:", "--:", "--:"],
        ["2", "1.50, 2.500, 3.50", ""],
        ["3", "", "6.50, 7.500, 8.50"],
    ]


def test_every_cell_of_attention() -> None:
    labels = {"layer": "31B full", "D": 512, "rows": 48, "keys": 1506}
    ratios = {"kv_load_ratio": 1.0625, "q_load_ratio": 2.5, "between_ratio": 3.75, "ratio": 4.25}
    row = figures(**labels, **ratios, threadgroup_bytes=555)
    assert table(count.markdown(count.ATTENTION_SHOWN, [row])) == [
        [
            *("layer", "D", "T", "rows", "keys", "launches", "keys + values", "q", "between"),
            *("total", "threadgroup memory"),
        ],
        ["---", *["--:"] * 10],
        ["31B full", "512", "6", "48", "1506", "2", "1.062", "2.50", "3.75", "4.25", "555"],
    ]


def test_every_cell_of_the_layers() -> None:
    row = figures(op="rms_norm", shape="32 of 256", row_ratio=2.25, launches=4)
    assert table(count.markdown(count.LAYERS_SHOWN, [row])) == [
        [
            *("op", "M", "shape", "launches", "read", "written", "rows", "total"),
            "threadgroup memory",
        ],
        ["---", *["--:"] * 8],
        ["rms_norm", "6", "32 of 256", "4", "31", "32", "2.25", "3.25", "777"],
    ]


def test_every_cell_of_the_rules_and_the_round() -> None:
    rows = [figures(op="filter_logits", logits_ratio=1.25), figures(op="draw_token")]
    assert table(count.markdown(count.RULES_SHOWN, rows)) == [
        ["op", "rows", "n", "launches", "logits", "between", "total", "threadgroup memory"],
        ["---", *["--:"] * 7],
        ["filter_logits", "6", "128", "2", "1.25", "34", "3.25", "777"],
        ["draw_token", "6", "128", "2", "", "34", "3.25", "777"],
    ]
    rounds = [
        {"op": "embed", "source": "round", "calls": 7, "launches": 14},
        {"op": "MLX", "source": "round", "calls": 23, "launches": None},
    ]
    assert table(count.markdown(count.ROUND_SHOWN, rounds)) == [
        ["op", "calls", "launches"],
        ["---", "--:", "--:"],
        ["embed", "7", "14"],
        ["MLX", "23", "MLX"],
    ]


@pytest.mark.parametrize("as_json", [False, True])
def test_chosen_ops_are_counted_told_and_printed(
    capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    count.main(["--ops", "draw_token", *["--json"] * as_json])
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
        count.main(["--ops", "rms_norm", "rmsnorm"])
    assert refused.value.code == 2
    assert "--ops must name ops but got rmsnorm." in capsys.readouterr().err


def test_the_page_has_the_heading_and_columns_of_each_table() -> None:
    page = (BENCH / "KERNELS.md").read_text()
    shown = (count.MATRICES_SHOWN, count.ATTENTION_SHOWN, count.LAYERS_SHOWN)
    for one_table in (*shown, count.RULES_SHOWN, count.ROUND_SHOWN):
        assert count.markdown(one_table, []) in page
