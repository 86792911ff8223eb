"""quantized_filter_logits and softcap on Metal: the bits of the separate kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launched import launched, launches_of
from test_filter_logits import random_mask
from test_metal_filter import assert_same_bits
from test_quantized_filter_logits import head, normal, random_edits, same

from pyengine import _ext, ops
from pyengine.ops.filter_logits import Edits, Filtered


@contextmanager
def in_workbench() -> Iterator[None]:
    ops.use("workbench")
    try:
        yield
    finally:
        ops.use("native")


def composed(x, q, group_size=64, bits=8, *, softcap=None, **settings) -> Filtered:
    """The Metal kernels of the three ops."""
    with in_workbench():
        logits = ops.quantized_matmul(x, *q, group_size, bits, out_dtype=mx.float32)
        if softcap is not None:
            logits = ops.softcap(logits, softcap)
        return ops.filter_logits(logits, **settings)


def metal(
    x: mx.array,
    q: tuple[mx.array, ...],
    group_size: int = 64,
    bits: int = 8,
    *,
    softcap: float | None = None,
    temperature: float = 1.0,
    top_k: int = 64,
    top_p: float = 1.0,
    min_p: float = 0.0,
    mask: mx.array | None = None,
    edits: Edits | None = None,
    **options: Any,
) -> tuple[Filtered, Any]:
    """The two launches, and their report."""
    out = ops.quantized_filter_logits(
        x,
        *q,
        group_size,
        bits,
        softcap=softcap,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        mask=mask,
        edits=edits,
    )
    outputs, report = launched(list(out), **options)
    return Filtered(*outputs), report


def zeros(T: int, V: int, E: int, top_k: int, bits: int) -> list[mx.array]:
    """The lazy result of a call of these sizes, whose memory nobody asks for."""
    x, w = (mx.zeros((rows, E), mx.bfloat16) for rows in (T, V))
    q = mx.quantize(w, 64, bits)
    return list(ops.quantized_filter_logits(x, *q, 64, bits, softcap=30.0, top_k=top_k, top_p=0.95))


# T, V, E, group_size, bits, dtype, count of candidates, edits: ragged in every direction
CASES = [
    (1, 1, 32, 32, 8, mx.float32, 1, 0),
    (6, 300, 320, 64, 8, mx.bfloat16, 64, 40),
    (3, 701, 96, 32, 6, mx.float16, 33, 3),
    (16, 450, 64, 64, 8, mx.bfloat16, 64, 0),
    (17, 130, 128, 128, 6, mx.float16, 5, 9),
    (4, 1300, 64, 64, 4, mx.float32, 256, 200),
    (2, 257, 64, 64, 8, mx.float32, 256, 0),
]
IDS = [f"{c[0]}x{c[1]}-{c[4]}bit-top{c[6]}" for c in CASES]


def inputs(case: tuple) -> tuple[mx.array, tuple[mx.array, ...], tuple[int, int], dict[str, Any]]:
    T, V, E, group_size, bits, dtype, count, edited = case
    x, q = normal(V, T, E, dtype=dtype), head(V, V, E, group_size, bits, dtype)
    settings: dict[str, Any] = {"top_k": count, "top_p": 0.95, "temperature": 0.8}
    if edited:
        settings["edits"] = random_edits(V, T, V, edited)
    return x, q, (group_size, bits), settings


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("masked", [False, True])
def test_no_fault_and_the_bits_of_three_kernels(case, masked):
    x, q, packing, settings = inputs(case)
    if masked:
        settings["mask"] = random_mask(np.random.default_rng(1), *case[:2])
    settings["softcap"] = 30.0 if case[1] % 2 == 0 else None
    out, _ = metal(x, q, *packing, mode="check", **settings)
    assert same(out, composed(x, q, *packing, **settings))
    for order in ("reverse", "random"):
        again, _ = metal(x, q, *packing, mode="check", order=order, **settings)
        assert same(again, out), order


def test_equal_logits_fill_the_lists():
    """Every logit may be among the best: lists are cut at each tile, and lower ids stay."""
    pattern = mx.array(np.random.default_rng(1).integers(0, 3, 900))
    x, q = normal(2, 6, 64), tuple(a[pattern] for a in head(3, 3, 64))
    for settings in ({"top_k": 64}, {"top_k": 256}, {"temperature": 0.0}):
        out, _ = metal(x, q, mode="check", **settings)
        assert same(out, composed(x, q, **settings))
        order = np.argsort(-np.array(ops.quantized_matmul(x, *q)), axis=-1, kind="stable")
        assert np.array_equal(np.array(out.ids), order[:, : out.ids.shape[1]])


@pytest.mark.parametrize("rising", [True, False])
def test_sorted_logits(rising):
    """Rising, every logit enters a list; falling, none after the first ones."""
    steps = mx.arange(2000, dtype=mx.float32)[:, None] * (1 if rising else -1)
    q = list(head(4, 2000, 64))
    q[0], q[1], q[2] = mx.zeros_like(q[0]), mx.ones_like(q[1]), steps / 64
    x = mx.ones((3, 64))
    out, _ = metal(x, q, mode="check")
    best = np.arange(64)
    assert np.array_equal(np.array(out.ids[1]), 1999 - best if rising else best)
    assert same(out, composed(x, q))


@pytest.mark.parametrize("rank", range(5))
def test_a_late_logit_takes_its_place(rank):
    """Lists are cut after two tiles; what comes in the last one may be the worst that stays."""
    logits = np.zeros(128, np.float32)
    logits[[3, 40, 41, 60]] = 100, 90, 80, 70
    logits[127] = 105 - 10 * rank
    q = list(head(4, 128, 64))
    q[0], q[1], q[2] = mx.zeros_like(q[0]), mx.ones_like(q[1]), mx.array(logits[:, None] / 64)
    out, _ = metal(mx.ones((2, 64)), q, top_k=4)
    order = np.argsort(-logits, kind="stable")
    assert np.array_equal(np.array(out.ids[1]), order[:4])


@pytest.mark.parametrize(("bias", "flag"), [(mx.nan, 2), (mx.inf, 2), (-mx.inf, 1)])
def test_flags(bias, flag):
    q = list(head(5, 300, 64))
    q[2] = mx.where(mx.arange(300)[:, None] == 170, bias, q[2])
    x = mx.abs(normal(6, 2, 64)) + 0.1
    taken = Edits(mx.array([[170]], mx.int32), mx.ones((2, 1)), mx.full((2, 1), -mx.inf))
    for edits in (None, taken):
        out, _ = metal(x, q, mode="check", edits=edits)
        assert out.flags.tolist() == [flag] * 2
        assert_same_bits(out, composed(x, q, edits=edits))
    away = Edits(mx.arange(300)[None], mx.ones((2, 300)), mx.full((2, 300), -mx.inf))
    assert metal(x, head(5, 300, 64), edits=away)[0].flags.tolist() == [2, 2]


def test_rows_are_stable():
    x, q, packing, settings = inputs((22, 500, 128, 64, 8, mx.bfloat16, 64, 50))
    together, _ = metal(x, q, *packing, **settings)
    edits = settings.pop("edits")
    for first, last in ((0, 1), (15, 17), (16, 22)):
        rows = slice(first, last)
        own = Edits(edits.ids, edits.factors[rows], edits.deltas[rows])
        out, _ = metal(x[rows], q, *packing, edits=own, **settings)
        assert same(out, Filtered(*(part[rows] for part in together)))


def test_contraction_changes_nothing():
    x, q, packing, settings = inputs(CASES[1])
    out, _ = metal(x, q, *packing, softcap=30.0, **settings)
    again, _ = metal(x, q, *packing, softcap=30.0, contract="fast", **settings)
    assert same(again, out)


def test_a_mask_is_read_once():
    x, q = normal(7, 6, 256, dtype=mx.bfloat16), head(8, 4096, 256, dtype=mx.bfloat16)
    mask = random_mask(np.random.default_rng(7), 6, 4096)
    _, report = metal(x, q, mask=mask, mode="count")
    # A slice of 128 columns has 16 bytes, half of what memory gives at once
    assert report.traffic["mask"].group_read_sectors * 32 == 2 * mask.nbytes
    assert report.traffic["w"].device_read_bytes == report.traffic["w"].size


@pytest.mark.parametrize("T", [1, 6, 16])
def test_weights_are_read_once_and_no_logits_written(T):
    V, E = 4096, 256
    x, q = normal(7, T, E, dtype=mx.bfloat16), head(8, V, E, dtype=mx.bfloat16)
    _, report = metal(x, q, softcap=30.0, mode="count")
    traffic = report.traffic
    assert traffic["w"].read_bytes == traffic["w"].device_read_bytes == traffic["w"].size
    assert "logits" not in traffic and report.launches == 2
    lists = traffic["candidates"]
    slices = 4096 // 128
    assert lists.size == T * slices * 64 * 8
    assert report.threadgroup_bytes <= (15 if T <= 6 else 30) * 1024


def test_lists_of_a_whole_vocabulary_are_short():
    """What is written of 262144 logits: a sixteenth of them, in 8 bytes each."""
    for T in (1, 6, 16):
        launch, merge = launches_of(zeros(T, 262144, 1536, 64, 8))
        assert tuple(launch.grid) == (256, 1, 1) and tuple(launch.threadgroup) == (128, 1, 1)
        lists = next(b for b in launch.buffers if b.name == "candidates")
        assert lists.shape == [T, 256, 64] and 64 * 256 * 16 == 262144
        assert sum(size for _, size in launch.threadgroup_memory) <= 30208
        assert tuple(merge.grid) == (T, 1, 1)


def test_limits():
    def has(*sizes: int) -> bool:
        return _ext.launches_of(zeros(*sizes))[0] is not None

    V = 262144
    assert has(16, V, 1536, 64, 8) and has(8, V, 1536, 256, 8) and has(12, V, 64, 64, 4)
    assert not has(16, V, 1536, 256, 8) and not has(16, V, 1536, 64, 4)
    assert not has(1, V, 0, 64, 8) and not has(1, 2**23, 64, 256, 8)
    x, q = normal(9, 16, 64), head(10, 400, 64)
    with in_workbench():  # 16 lists of 256 do not fit: the processor's kernel
        out = ops.quantized_filter_logits(x, *q, top_k=256)
    assert same(out, ops.quantized_filter_logits(x, *q, top_k=256))


def test_switch_runs_it(monkeypatch):
    ran = []
    run = ops.workbench.run
    monkeypatch.setattr(
        ops.workbench, "run", lambda launches, *rest: ran.append(launches) or run(launches, *rest)
    )
    x, q = normal(11, 2, 64), head(12, 500, 64)
    with in_workbench():
        out = ops.quantized_filter_logits(x, *q, softcap=3.0, top_p=0.9)
        empty = Edits(mx.zeros((1, 0), mx.int32), mx.ones((2, 0)), mx.zeros((2, 0)))
        again = ops.quantized_filter_logits(x, *q, softcap=3.0, top_p=0.9, edits=empty)
    kernels = [[launch.library for launch in launches] for launches in ran]
    assert kernels == [["quantized_filter_logits", "merge_candidates"]] * 2
    assert same(out, again) and same(out, composed(x, q, softcap=3.0, top_p=0.9))


@pytest.mark.skipif(
    _ext.instruction_set() == "portable", reason="the portable kernels have no fused multiply-add"
)
@pytest.mark.parametrize("shape", [(1,), (3, 300), (2, 2, 129)])
def test_softcap_has_the_processors_bits(shape):
    x = normal(13, *shape, scale=40.0)
    x = mx.where(x > 60, mx.inf, x)
    native = np.array(ops.softcap(x, 30.0))
    for options in ({"mode": "check"}, {"mode": "check", "order": "random"}, {"contract": "fast"}):
        (out,), _ = launched(ops.softcap(x, 30.0), **options)
        assert np.array_equal(np.array(out).reshape(shape), native)
    with in_workbench():
        assert np.array_equal(np.array(ops.softcap(x, 30.0)), native)
        assert ops.softcap(x[:0], 30.0).size == 0
