"""What bench/count.py counts of norms, heads, gates, sampling and a round, by hand."""

from __future__ import annotations

import pytest
from bench_scripts import Row, count, rows_of, sized_calls

from pyengine import ops
from pyengine.sampling.settings import Sampling

# Norms, heads and gates


@pytest.fixture(scope="module")
def layers() -> list[Row]:
    return rows_of(count.layers())


def test_rows_are_loaded_once(layers: list[Row]) -> None:
    names = ["rms_norm", "residual_norm", "glu"]
    names += len(sized_calls.HEADS) * ["prepare_qkv", "norm_rope"]
    want = [(op, M) for op in names for M in sized_calls.LAYER_ROWS]
    want += len(sized_calls.HEADS) * [("copy_pages", 1)]
    assert sorted((r["op"], r["M"]) for r in layers) == sorted(want)
    for r in layers:
        assert r.get("row_ratio", 1) == 1 and r["launches"] == 1, r
        assert ("row_ratio" in r) == (r["op"] != "copy_pages"), r  # which has pages, and no rows
        assert r["threadgroup_bytes"] <= 4 * 512 * 4, r


def test_bytes_that_are_needed_and_weights_once_per_threadgroup(layers: list[Row]) -> None:
    """A row reads its weights; four heads share one copy, which is as long as two of them."""
    E = 2 * sized_calls.WIDTH
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
    return rows_of(count.rules(vocab=65536, rows=(1, 6)))


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
    rows = {r["op"]: r for r in count.count_round()}
    assert not {"filter_logits", "softcap"} & set(rows)
    told = {op: (r["calls"], r["launches"]) for op, r in rows.items()}
    assert told["quantized_filter_logits"] == (6, 12)
    assert told["draw_token"] == (5, 5) and told["accept_block"] == (1, 1)
    assert told["block_attention"][1] == 3 * told["block_attention"][0]
    assert list(rows)[-1] == "MLX" and set(rows) - {"MLX"} <= set(ops.__all__)
    for op, (calls, launches) in told.items():
        assert calls > 0 and (launches is None) == (op == "MLX")
    fewer = {r["op"]: r for r in count.count_round(2, Sampling(temperature=0.0))}
    assert fewer["quantized_filter_logits"]["calls"] == 3 and "draw_token" not in fewer
