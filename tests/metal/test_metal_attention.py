"""block_attention on Metal, in the workbench: the processor's bits, its edges, faults, traffic."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launched import launched, launches_of
from matmuls import bits_of, normal
from test_positions import unseen

from pyengine import _ext, ops
from pyengine.ops import block_attention, block_attention_reference

# As in tests/ops/test_block_attention.py
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
# What lies between the launches has room for every span that some offset could need
BETWEEN = {"scores", "values", "states"}


def native(q, k, v, offset, *, scale=1.0, window=None, start=None) -> mx.array:
    """Lazy; that its position is wrong is not known before it is evaluated."""
    start = None if start is None else mx.array(start)
    return block_attention(q, k, v, unseen(offset), scale=scale, window=window, start=start)


def launches(q, k, **options: Any) -> list[Any]:
    return launches_of(native(q, k, k, 0, **options))


def metal(q, k, v, offset, *, scale=1.0, window=None, start=None, **how: Any):
    """The output of the launches, and their report."""
    result = native(q, k, v, offset, scale=scale, window=window, start=start)
    (out,), report = launched(result, **how)
    return out, report


def reference(q, k, v, offset, *, scale=1.0, window=None, start=None) -> mx.array:
    start = None if start is None else mx.array(start)
    offset = mx.array(offset)
    return block_attention_reference(q, k, v, offset, scale=scale, window=window, start=start)


def inputs(seed, B, T, H, K, C, D, dtype=mx.float32) -> tuple[mx.array, mx.array, mx.array]:
    shapes = (B, T, H, D), (B, K, C, D), (B, K, C, D)
    q, k, v = (normal(seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes))
    return q, k, v


def assert_right(out: mx.array, *call: Any, **options: Any) -> None:
    """Near the definition, and the processor's bits where it has fused multiply-adds too."""
    expected = reference(*call, **options)
    assert out.dtype == expected.dtype and out.shape == expected.shape
    a, b = (np.array(x.astype(mx.float32)) for x in (out, expected))
    np.testing.assert_allclose(a, b, rtol=TOLERANCE[out.dtype], atol=TOLERANCE[out.dtype])
    if _ext.instruction_set() != "portable":
        assert np.array_equal(bits_of(out), bits_of(native(*call, **options)))


# B, T, H, K, C, D, offset, window. Gemma 4's head geometries, with fewer key heads; widths that end
# inside a tile of 64 elements and a slice of 128 columns; lengths about chunks of 64 and spans of
# 512; rings; more than 64 rows, in equal tiles and unequal ones; slices.
CASES = {
    "31b-sliding": (1, 6, 4, 2, 205, 256, 900, 200),
    "31b-full": (1, 6, 8, 1, 1100, 512, 1030, None),
    "e4b-sliding": (1, 1, 8, 2, 516, 256, 700, 512),
    "12b-full": (1, 5, 16, 1, 530, 512, 520, None),
    "26b-full": (1, 16, 16, 2, 200, 512, 130, None),
    "one-key": (1, 1, 3, 3, 1, 16, 0, None),
    "begin": (2, 4, 4, 2, 9, 48, 0, None),
    "begin-of-window": (1, 4, 2, 1, 68, 80, 30, 64),
    "chunk": (1, 1, 2, 1, 64, 144, 63, None),
    "chunk-and-one": (1, 1, 2, 1, 70, 32, 64, None),
    "span": (1, 2, 2, 1, 1024, 16, 510, None),
    "span-and-one": (1, 3, 2, 1, 600, 16, 511, None),
    "many-spans": (1, 2, 2, 1, 5200, 16, 5100, None),
    "window-over-spans": (1, 16, 1, 1, 600, 16, 1530, 520),
    "window-of-one": (1, 16, 4, 1, 40, 16, 77, 1),
    "odd-rows": (1, 7, 11, 1, 90, 32, 70, 50),
    "slices": (1, 21, 4, 2, 90, 64, 60, None),
    "slices-in-a-ring": (1, 33, 2, 1, 80, 16, 300, 40),
}


@pytest.mark.parametrize("name", CASES)
def test_the_processors_bits(name):
    *sizes, offset, window = CASES[name]
    for dtype in (mx.bfloat16,) if sizes[-1] == 512 else (mx.bfloat16, mx.float32):
        call = *inputs(1, *sizes, dtype=dtype), offset
        options = {"scale": 2 * sizes[-1] ** -0.5, "window": window}
        assert_right(metal(*call, **options)[0], *call, **options)


@pytest.mark.parametrize("name", ["e4b-sliding", "odd-rows", "window-over-spans"])
def test_float16(name):
    *sizes, offset, window = CASES[name]
    call = *inputs(4, *sizes, dtype=mx.float16), offset
    assert_right(metal(*call, scale=0.2, window=window)[0], *call, scale=0.2, window=window)


def test_random_shapes_and_starts():
    rng = np.random.default_rng(13)
    for seed in range(20):
        B, K, G, T = (int(rng.integers(1, n)) for n in (3, 3, 9, 19))
        D = int(rng.choice([16, 32, 176]))
        window = None if rng.random() < 0.3 else int(rng.integers(1, 200))
        offset = int(rng.integers(0, 1500 if window else 600))
        needed = offset + T if window is None else min(offset + T, window - 1 + T)
        C = needed + int(rng.integers(0, 9))
        start = int(rng.integers(-50, offset + 1)) if window and rng.random() < 0.7 else None
        call = *inputs(seed, B, T, K * G, K, C, D), offset
        options = {"scale": 0.3, "window": window, "start": start}
        assert_right(metal(*call, **options)[0], *call, **options)


@pytest.mark.parametrize("window", [None, 100])
def test_rows_are_stable(window):
    """A row's bits are those of the row alone: in blocks and slices, other rings and caches."""
    T, H, K, D, offset = 22, 6, 2, 64, 500
    total = offset + T
    q, k, v = inputs(7, 1, T, H, K, total, D, dtype=mx.bfloat16)
    options = {"scale": 0.2, "window": window}
    alone = [
        bits_of(metal(q[:, t : t + 1], k, v, offset + t, **options)[0])[:, 0] for t in range(T)
    ]
    for first, last in ((0, T), (3, 5), (6, 22), (2, 20), *((0, n) for n in range(2, 17))):
        out = bits_of(metal(q[:, first:last], k, v, offset + first, **options)[0])
        for t in range(first, last):
            assert np.array_equal(out[:, t - first], alone[t]), (first, last, t)
    whole = np.stack(alone, axis=1)
    slots = np.arange(total)
    for start in (17, 499):  # the same keys, turned: position j in slot (j - start) % C
        turned = mx.array((slots + start) % total)
        out, _ = metal(q, k[:, :, turned], v[:, :, turned], offset, start=start, **options)
        assert np.array_equal(bits_of(out), whole)
    more = mx.full((1, K, 600, D), float("nan"), dtype=mx.bfloat16)
    out, _ = metal(q, *(mx.concatenate([a, more], axis=2) for a in (k, v)), offset, **options)
    assert np.array_equal(bits_of(out), whole)
    # One key head beside others, and one batch beside another
    out, _ = metal(q[:, :, :3], k[:, :1], v[:, :1], offset, **options)
    assert np.array_equal(bits_of(out), whole[:, :, :3])
    both = [mx.concatenate([a, normal(8, *a.shape, dtype=a.dtype)]) for a in (q, k, v)]
    assert np.array_equal(bits_of(metal(*both, offset, **options)[0])[:1], whole)


def test_hidden_slots_may_hold_anything():
    """Before the window, behind the block, and later rows of the block itself."""
    T, window, offset = 7, 90, 200
    q, k, v = inputs(10, 1, T, 4, 2, 300, 32)
    expected = bits_of(metal(q, k, v, offset, window=window)[0])
    for junk in (float("nan"), float("inf"), -1e38):
        spoilt = [mx.array(a) for a in (k, v)]
        for a in spoilt:
            a[:, :, : offset - window + 1] = junk
            a[:, :, offset + T :] = junk
        out = bits_of(metal(q, *spoilt, offset, window=window)[0])
        assert np.array_equal(out, expected)
        for t in range(T):  # what rows t and earlier do not see; and what later rows do not
            late, early = ([mx.array(a) for a in (k, v)] for _ in range(2))
            for a, b in zip(late, early, strict=True):
                a[:, :, offset + t + 1 :] = junk
                b[:, :, : offset + t - window + 1] = junk
            out = bits_of(metal(q, *late, offset, window=window)[0])
            assert np.array_equal(out[:, : t + 1], expected[:, : t + 1])
            out = bits_of(metal(q, *early, offset, window=window)[0])
            assert np.array_equal(out[:, t:], expected[:, t:])


def test_visible_nan_and_extreme_scores():
    q, k, v = inputs(14, 1, 3, 2, 1, 600, 64)
    call = 40 * q, k, v, 590  # scores near 1000
    assert np.array_equal(bits_of(metal(*call)[0]), bits_of(native(*call)))
    spoilt = mx.array(v)
    spoilt[:, :, 100] = float("nan")
    assert np.isnan(np.array(metal(q, k, spoilt, 590)[0])).all()
    spoilt = mx.array(k)
    spoilt[:, :, 591] = float("nan")  # row 1 on
    out = np.array(metal(q, spoilt, v, 590)[0])
    assert np.isfinite(out[:, 0]).all() and np.isnan(out[:, 1:]).all()


CHECKED = {
    # name: dtype, B, T, H, K, C, D, offset, window, start
    "ring": (mx.bfloat16, 1, 5, 6, 2, 108, 144, 1000, 100, None),
    "spans": (mx.bfloat16, 1, 3, 2, 1, 700, 16, 650, None, None),
    "tiles": (mx.bfloat16, 1, 5, 16, 1, 75, 16, 70, None, None),
    "turned": (mx.float32, 2, 2, 3, 1, 140, 80, 530, 130, -3),
    "slices": (mx.float32, 1, 19, 2, 1, 60, 16, 300, 40, 7),
}


@pytest.mark.parametrize("name", CHECKED)
def test_no_fault(name):
    """In every order of lanes, which change no bit; only spans that nobody needs stay unwritten."""
    dtype, *sizes, offset, window, start = CHECKED[name]
    call = *inputs(20, *sizes, dtype=dtype), offset
    options = {"scale": 0.3, "window": window, "start": start}
    # A slice writes its own rows; all but NaN as the processor has them, so none stays unwritten
    unwritten = BETWEEN | ({"out"} if sizes[1] > 16 else set())
    for order in ("forward", "reverse", "random"):
        out, report = metal(*call, **options, mode="check", order=order, raising=False)
        bad = [
            f for f in report.findings if f.kind != "unwritten-output" or f.buffer not in unwritten
        ]
        assert not bad, "\n".join(map(str, bad))
        assert_right(out, *call, **options)
        assert report.threadgroup_bytes <= 32768


@pytest.mark.parametrize(
    "offset, window",
    [
        (18, None),
        (2000, 700),
        (-9, None),
        (-(2**31), 3),
        (2**30, 3),
        (2**31 - 1, 3),
        (-1, 2**31 - 1),
    ],
)
def test_wrong_positions_read_nothing(offset, window):
    q, k, v = inputs(22, 1, 3, 2, 1, 20, 16, dtype=mx.bfloat16)
    for start in (None, -(2**31), 2**31 - 1):
        options = {"window": window, "start": start}
        how = {"mode": "count", "raising": False}
        out, report = metal(q, k, v, offset, **options, **how)
        faults = {(f.kind, f.buffer in BETWEEN) for f in report.findings}
        assert faults <= {("unwritten-output", True)}
        assert np.isnan(np.array(out.astype(mx.float32))).all()
        assert not any(report.traffic[n].read_bytes for n in ("k", "v") if n in report.traffic)


@pytest.mark.parametrize("start", [-(2**31), -1, 2**31 - 1])
def test_any_start_stays_in_bounds(start):
    call = *inputs(22, 1, 3, 2, 1, 20, 16, dtype=mx.bfloat16), 2**30 - 3
    options = {"window": 18, "start": start}
    out, report = metal(*call, **options, mode="check", raising=False)
    assert {(f.kind, f.buffer in BETWEEN) for f in report.findings} <= {("unwritten-output", True)}
    assert_right(out, *call, **options)


def test_contraction_changes_nothing():
    call = *inputs(23, 1, 5, 4, 1, 1100, 80), 1090  # float32: a rounding would hide much
    plain, fused = (bits_of(metal(*call, scale=0.3, contract=c)[0]) for c in ("off", "fast"))
    assert np.array_equal(plain, fused)


# H, K, D, cached positions, window: 31B with an eighth and a half of its key heads, E2B as it is
GEOMETRIES = {
    "31b-sliding": (4, 2, 256, 1500, 1024),
    "31b-full": (16, 2, 512, 700, None),
    "e2b-sliding": (8, 1, 256, 900, 512),
    "e2b-full": (8, 1, 512, 700, None),
}


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_visible_byte_is_read_once(name, T):
    H, K, D, offset, window = GEOMETRIES[name]
    C = 1024 if window is None else window - 1 + 8
    q, k, v = inputs(26, 1, T, H, K, C, D, dtype=mx.bfloat16)
    _, report = metal(q, k, v, offset, window=window, mode="count", allow={"unwritten-output"})
    seen = T + (offset if window is None else window - 1)
    for entry in (report.traffic["k"], report.traffic["v"]):
        assert entry.read_bytes == entry.device_read_bytes == seen * K * D * 2
        assert entry.read_lines * 64 == entry.read_bytes
    R, traffic = T * H // K, report.traffic
    assert report.launches == 3 and report.threadgroup_bytes <= 32768
    # Scores: whole chunks, once written, and read once for every 128 columns
    assert traffic["scores"].written_bytes <= (seen + 127) * K * R * 4
    assert traffic["scores"].read_bytes <= (seen + 127) * K * R * 4 * (D // 128)
    spans = (offset + T - 1) // 512 - (offset + T - seen) // 512 + 1
    assert traffic["values"].written_bytes == spans * K * R * D * 4
    assert traffic["values"].device_read_bytes <= spans * K * R * D * 4


def test_more_rows_read_again():
    """16 positions of eight heads: two tiles of 64 rows, two reads."""
    q, k, v = inputs(29, 1, 16, 8, 1, 100, 128, dtype=mx.bfloat16)
    _, report = metal(q, k, v, 84, mode="count", allow={"unwritten-output"})
    for entry in (report.traffic["k"], report.traffic["v"]):
        # The first tile's rows end at position 91
        assert entry.read_bytes == (92 + 100) * 128 * 2


def test_launches_are_data():
    q, k, _ = inputs(30, 1, 20, 32, 4, 3000, 512, dtype=mx.bfloat16)
    scores, values, fold, *rest = launches(q, k)
    assert len(rest) == 3
    assert [a.kernel for a in (scores, values, fold)] == [
        f"block_attention_{stage}_bfloat16" for stage in ("scores", "values", "fold")
    ]
    # 6 spans; 128 rows in two tiles of 64
    assert (tuple(scores.grid), tuple(scores.threadgroup)) == ((6 * 16, 4, 2), (512, 1, 1))
    assert (tuple(values.grid), tuple(values.threadgroup)) == ((6 * 4, 4, 2), (256, 1, 1))
    assert (tuple(fold.grid), tuple(fold.threadgroup)) == ((128, 4, 1), (128, 1, 1))
    assert tuple(rest[0].grid) == (6 * 16, 4, 1) and rest[2].buffers[3].role == "inout"
    # 6 positions of a window of 1024 in a ring: 1029 may touch four spans; 12 rows meet 64 keys
    ring = launches(q[:, :6, :8], k[:, :, :1039], window=1024, start=0)
    # A thread starts two loads of a tile: 76 rows and keys have 608
    assert tuple(ring[0].grid) == (4 * 8, 4, 1) and tuple(ring[0].threadgroup) == (320, 1, 1)
    assert launches(q[:, :6, :8], k[:, :, :1026], window=1020)[0].grid[0] == 3 * 8
    assert tuple(ring[1].grid) == (4 * 4, 4, 1) and tuple(ring[1].threadgroup) == (128, 1, 1)
    one = launches(q[:, :1, :8], k)  # 2 rows: most threads only load
    assert [tuple(a.threadgroup) for a in one] == [(288, 1, 1), (128, 1, 1), (128, 1, 1)]
    # What eval_gpu and the op hand over, in this order
    read, written = _ext.launch_arguments(ring)
    assert [b.name for b in read] == ["q", "k", "offset", "start", "v"]
    assert [b.name for b in written] == ["out"]


def test_the_switch_runs_it(monkeypatch):
    ran = []
    run = ops.workbench.run
    monkeypatch.setattr(ops.workbench, "run", lambda *a: ran.append(len(a[0])) or run(*a))
    q, k, v = inputs(33, 1, 130, 2, 1, 140, 16)
    strided = k.swapaxes(1, 2).reshape(1, 140, 1, 16).swapaxes(1, 2)[:, :, ::2]
    calls = [
        ((q[:, :3], k, v, 100), {}, 3),
        ((q[:, :40], k, v, 100), {"window": 70, "start": 5}, 9),
        ((q[:, :3], strided, v[:, :, ::2], 60), {}, 3),
        ((q[:, :128], k, v, 5), {}, 24),
        ((q, k, v, 5), {}, 0),  # prefill
        ((q[:, :0], k, v, 5), {}, 0),
    ]
    expected = [bits_of(native(*call, **options)) for call, options, _ in calls]
    ops.use("workbench")
    try:
        for (call, options, number), right in zip(calls, expected, strict=True):
            ran.clear()
            out = bits_of(native(*call, **options))
            assert sum(ran) == number and np.array_equal(out, right)
    finally:
        ops.use("native")
