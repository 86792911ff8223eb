"""What the doctor calls ops with: the shapes of the published pairs and of the embedded one."""

from __future__ import annotations

from typing import Any

from pyengine import ops, task
from pyengine.checkpoint.published import PUBLISHED, published
from pyengine.doctor import shapes
from pyengine.ops.sizes import Limits


def test_the_published_shapes_are_the_pairs_own() -> None:
    cases = shapes.real(Limits(1e12))
    assert not any(case.scaled for case in cases)
    assert {case.op for case in cases} == set(ops.dispatch.OPS)
    assert {name for case in cases for name in case.where} == set(PUBLISHED)

    def settings(op: str, pair: str) -> list[dict[str, Any]]:
        return [case.settings for case in cases if case.op == op and pair in case.where]

    target, assistant = published("31B")
    gates = {(x["N"], x["K"]) for x in settings("quantized_gated_matmul", "31B")}
    assert gates == {(21504, 5376), (8192, 1024), (10752, 5376)}
    assert {(x["V"], x["K"]) for x in settings("quantized_filter_logits", "31B")} == {
        (target.vocab_size, target.hidden_size),
        (target.vocab_size, assistant.hidden_size),
    }
    columns = {tuple(x["columns"]) for x in settings("quantized_matmuls", "31B")}
    # Keys double as values in full layers; of DFlash a block's, and those of what it reads
    dflash = {(8192, 1024, 1024), (1024, 1024)}
    assert columns == {(8192, 4096, 4096), (16384, 2048), *dflash}
    widths = {(x["K"], x["N"]) for x in settings("quantized_matmul", "31B")}
    assert {(21504, 5376), (16384, 5376), (8192, 5376), (10752, 1024)} <= widths
    assert {(6 * 5376, 5376), (10752, 5376), (5376, target.vocab_size)} <= widths  # of DFlash
    heads = {(x["H"], x["K"], x["D"], x["window"]) for x in settings("block_attention", "31B")}
    dflash_heads = {(64, 8, 128, 2048), (16 * 64, 8, 128, None)}  # a block of 16 as one row
    assert heads == {(32, 16, 256, 1024), (32, 16, 256, 1023), (32, 4, 512, None), *dflash_heads}
    silu = {
        (case.op, name)
        for case in cases
        for name in case.where
        if case.settings.get("activation") == "silu"
    }
    with_dflash = ("12B", "26B-A4B", "31B")
    assert silu == {(op, name) for op in ("glu", "quantized_gated_matmul") for name in with_dflash}
    unnormed = [x for x in settings("prepare_qkv", "31B") if x.get("norm_values") is False]
    assert [(x["H"], x["K"], x["D"]) for x in unnormed] == [(64, 8, 128)]
    experts = {
        (x["X"], x["U"], x["N"], x["K"]) for x in settings("quantized_expert_matmul", "26B-A4B")
    }
    assert experts == {(128, 8, 704, 2816), (128, 8, 2816, 704)}
    (centroids, _) = settings("quantized_expert_matmul", "E2B")
    assert [centroids[name] for name in "XUNK"] == [2048, 32, 128, 256]
    filters = {(x["V"], x["filter"]) for x in settings("filter_logits", "E2B")}
    assert filters == {(262144, name) for name in ("greedy", "64", "256")}
    assert {x["bits"] for x in settings("quantized_matmul", "E2B")} == {4, 8}


def test_what_does_not_fit_is_scaled_and_says_so() -> None:
    whole, small = (shapes.real(Limits(size)) for size in (1e12, 1e6))
    assert {case.op for case in small} == {case.op for case in whole}
    heads = [case for case in small if case.op == "quantized_filter_logits"]
    assert heads and all(case.scaled == {"V": 262144} for case in heads)
    for case in small:
        for name, true in case.scaled.items():
            own = case.settings[name]
            assert (sum(own) if isinstance(own, list) else own) < true


def test_the_embedded_shapes_are_the_pairs_own() -> None:
    pair = task.embedded_pair()
    limits = Limits(1e12)
    own = {case.name for case in shapes.of_loaded(pair, limits)}
    assert own and own < {case.name for case in shapes.embedded(limits)}
    assert {case.op for case in shapes.embedded(limits)} == set(ops.dispatch.OPS)
