"""Published numbers: each cell of the tables of `bench kernels --count`, from counts given here."""

from __future__ import annotations

from typing import Any

import pytest

from pyengine import attention_counts, kernel_counts, layer_counts, rule_counts
from pyengine.attention_counts import AttentionCount
from pyengine.kernel_counts import Count
from pyengine.layer_counts import LayerCount
from pyengine.rule_counts import RoundCount, RuleCount


def count(**changes: Any) -> Count:
    told: dict[str, Any] = {
        "op": "quantized_matmul",
        "kernel": "quantized_matmul_bfloat16<6>",
        "source": "ours",
        "M": 6,
        "N": 128,
        "K": 5376,
        "dtype": "bfloat16",
        "launches": 2,
        "read_bytes": 31,
        "written_bytes": 32,
        "compulsory_bytes": 33,
        "weight_ratio": 1.125,
        "matrix_ratio": 2.0625,
        "ratio": 3.25,
        "weight_load_ratio": 4.375,
        "matrix_load_ratio": 5.1875,
        "load_ratio": 6.75,
        "threadgroup_bytes": 777,
    }
    return Count(**{**told, **changes})


RULE = RuleCount(
    op="filter_logits",
    kernel="filter",
    source="ours",
    M=6,
    N=262144,
    K=None,
    dtype="float32",
    launches=3,
    read_bytes=41,
    written_bytes=42,
    compulsory_bytes=43,
    weight_ratio=9.5,
    logits_ratio=1.25,
    between_bytes=44,
    ratio=7.75,
    threadgroup_bytes=888,
)
LAYER = LayerCount(
    op="rms_norm",
    kernel="norm",
    source="ours",
    M=6,
    shape="32 of 256",
    dtype="bfloat16",
    launches=4,
    read_bytes=51,
    written_bytes=52,
    compulsory_bytes=53,
    ratio=1.5,
    row_ratio=2.25,
    threadgroup_bytes=999,
)
ATTENTION = AttentionCount(
    op="block_attention",
    source="ours",
    layer="31B full",
    M=6,
    rows=48,
    D=512,
    keys=1506,
    dtype="bfloat16",
    launches=2,
    read_bytes=61,
    written_bytes=62,
    compulsory_bytes=63,
    kv_load_ratio=1.0625,
    q_load_ratio=2.5,
    between_ratio=3.75,
    ratio=4.25,
    threadgroup_bytes=555,
)


def table(text: str) -> list[list[str]]:
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_every_cell_of_the_matrices() -> None:
    """Rows of other numbers of rows are left to the second table, which has our kernels alone."""
    counts = [
        count(),
        count(M=1, source="mlx", kernel="affine_qmv<bfloat, 64>", launches=1),
        count(M=5),
        count(K=1536, M=2, weight_load_ratio=1.5, matrix_load_ratio=2.5, ratio=3.5),
        count(K=1536, M=2, source="mlx", ratio=9.0),
        count(op="other", K=2816, M=3, weight_load_ratio=6.5, matrix_load_ratio=7.5, ratio=8.5),
    ]
    heads = ["op", "kernel", "M", "N", "K", "launches", "weights", "w+s+b", "by load"]
    ours = [
        "quantized_matmul",
        "`quantized_matmul_bfloat16`",
        "6",
        "128",
        "5376",
        "2",
        "1.12",
        "2.062",
    ]
    mlx = ["quantized_matmul", "`affine_qmv` (MLX)", "1", "128", "5376", "1", "1.12", "2.062"]
    assert table(kernel_counts.markdown(counts)) == [
        [*heads, "all loads", "total", "threadgroup memory"],
        ["---", "---", *["--:"] * 10],
        [*ours, "4.38, 5.188", "6.75", "3.25", "777"],
        [*mlx, "", "", "3.25", "777"],
        ["M", "quantized_matmul", "other"],
        ["--:", "--:", "--:"],
        ["2", "1.50, 2.500, 3.50", ""],
        ["3", "", "6.50, 7.500, 8.50"],
    ]
    assert len(table(kernel_counts.markdown(counts[:3]))) == 4


def test_every_cell_of_attention() -> None:
    assert table(attention_counts.markdown([ATTENTION])) == [
        [
            *("layer", "D", "T", "rows", "keys", "launches", "keys + values", "q", "between"),
            *("total", "threadgroup memory"),
        ],
        ["---", *["--:"] * 10],
        ["31B full", "512", "6", "48", "1506", "2", "1.062", "2.50", "3.75", "4.25", "555"],
    ]


def test_every_cell_of_the_layers() -> None:
    assert table(layer_counts.markdown([LAYER])) == [
        [
            *("op", "M", "shape", "launches", "read", "written", "rows", "total"),
            "threadgroup memory",
        ],
        ["---", *["--:"] * 8],
        ["rms_norm", "6", "32 of 256", "4", "51", "52", "2.25", "1.50", "999"],
    ]


def test_every_cell_of_the_rules_and_the_round() -> None:
    none = RuleCount(**{**RULE.to_dict(), "op": "draw_token", "logits_ratio": None})
    rounds = [RoundCount("embed", 7, 14), RoundCount("MLX", 23, None)]
    assert table(rule_counts.markdown([RULE, none], rounds)) == [
        ["op", "rows", "n", "launches", "logits", "between", "total", "threadgroup memory"],
        ["---", *["--:"] * 7],
        ["filter_logits", "6", "262144", "3", "1.25", "44", "7.75", "888"],
        ["draw_token", "6", "262144", "3", "", "44", "7.75", "888"],
        ["op", "calls", "launches"],
        ["---", "--:", "--:"],
        ["embed", "7", "14"],
        ["MLX", "23", "MLX"],
    ]


@pytest.mark.parametrize("made", [count(), RULE, LAYER, ATTENTION, RoundCount("embed", 7, 14)])
def test_json_has_every_field(made: Any) -> None:
    source = {"source": "round"} if isinstance(made, RoundCount) else {}
    assert made.to_dict() == {**source, **vars(made)}
