"""block_attention: kernel against reference, window and ring edges, row-stability, errors."""

import threading
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from draw import INT32, Call, Draw, near_sum

from pyengine import _ext
from pyengine.model.memory import TILES_IN_FLIGHT
from pyengine.ops import block_attention, block_attention_reference, dispatch, write_cache

# Outputs are means of values of size 1. Both sides work in float32 (sums of up to D products and of
# up to 1500 weights in different orders) and round once.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
DTYPES = list(TOLERANCE)


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def bits(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def assert_close(out: mx.array, expected: mx.array) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    a, b = (np.array(x.astype(mx.float32)) for x in (out, expected))
    np.testing.assert_allclose(a, b, rtol=TOLERANCE[out.dtype], atol=TOLERANCE[out.dtype])


def both(q, k, v, offset, **options):
    offset = mx.array(offset)
    if options.get("start") is not None:
        options["start"] = mx.array(options["start"])
    out = block_attention(q, k, v, offset, **options)
    return out, block_attention_reference(q, k, v, offset, **options)


@pytest.fixture
def threads() -> Iterator[None]:
    before = _ext.threads()
    yield
    _ext.set_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1100])
def test_linear_lengths(length, dtype):
    """One position against `length` keys, itself the last; the slots behind hold NaN."""
    q = normal(1, 1, 1, 4, 32, dtype=dtype)
    k, v = normal(2, 1, 2, length, 32, dtype=dtype), normal(3, 1, 2, length, 32, dtype=dtype)
    out, expected = both(q, k, v, length - 1, scale=0.3)
    assert_close(out, expected)
    junk = mx.full((1, 2, 7, 32), float("nan"), dtype=dtype)
    k, v = (mx.concatenate([a, junk], axis=2) for a in (k, v))
    longer = block_attention(q, k, v, mx.array(length - 1), scale=0.3)
    assert np.array_equal(bits(longer), bits(out))


@pytest.mark.parametrize("G", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("T", [1, 2, 5, 15, 16, 17, 40])
def test_blocks_and_groups(T, G):
    q = normal(4, 2, T, 3 * G, 16)
    k, v = normal(5, 2, 3, 90 + T, 16), normal(6, 2, 3, 90 + T, 16)
    for window in (None, 1, 2, 64, 70):
        assert_close(*both(q, k, v, 90, window=window))


@pytest.mark.parametrize("D", [16, 32, 48, 80, 256, 512])
@pytest.mark.parametrize("dtype", DTYPES)
def test_head_widths(D, dtype):
    q = normal(7, 1, 6, 8, D, dtype=dtype)
    k, v = normal(8, 1, 2, 200, D, dtype=dtype), normal(9, 1, 2, 200, D, dtype=dtype)
    assert_close(*both(q, k, v, 190, scale=D**-0.5))
    assert_close(*both(q, k, v, 190, scale=D**-0.5, window=100))


@pytest.mark.parametrize("window", [1, 5, 33, 256])
def test_ring(window):
    """Positions past several windows, in a ring as small as a block of 5 allows."""
    T, C = 5, window - 1 + 5
    k, v = normal(10, 1, 2, C, 32), normal(11, 1, 2, C, 32)
    q = normal(12, 1, T, 4, 32)
    for offset in (0, 1, window - 1, window, C - 1, C, 3 * C + 2, 10 * window + 7):
        for start in (None, 0, 3, -2, offset):
            assert_close(*both(q, k, v, offset, window=window, start=start))


def test_random_shapes():
    rng = np.random.default_rng(13)
    for _ in range(25):
        B, K, G, T = (int(rng.integers(1, n)) for n in (3, 4, 9, 41))
        D = int(rng.choice([16, 32, 64]))
        window = None if rng.random() < 0.4 else int(rng.integers(1, 200))
        offset = int(rng.integers(0, 1500))
        needed = offset + T if window is None else min(offset + T, window - 1 + T)
        C = needed + int(rng.integers(0, 9))
        start = int(rng.integers(-50, offset + 1)) if window and rng.random() < 0.5 else None
        q = normal(14, B, T, K * G, D)
        k, v = normal(15, B, K, C, D), normal(16, B, K, C, D)
        assert_close(*both(q, k, v, offset, scale=0.3, window=window, start=start))


def test_by_hand():
    """Window 2: equal scores, so each row is the mean of the newest two values."""
    q, k = mx.zeros((1, 3, 1, 16)), normal(17, 1, 1, 4, 16)
    v = mx.arange(4.0)[:, None] * mx.ones((1, 1, 4, 16))  # slot s holds s
    out = block_attention(q, k, v, mx.array(5), window=2)  # positions 4, 5, 6, 7 in slots 0..3
    assert out[0, :, 0, 0].tolist() == [0.5, 1.5, 2.5]
    out = block_attention(q, k, v, mx.array(0))
    assert out[0, :, 0, 0].tolist() == [0, 0.5, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 100])
def test_row_stable(window, dtype, threads):
    """Bits of a row: alone or in a block of 40, in any ring, whoever shares the work."""
    T, K, G, D, offset = 40, 2, 3, 64, 600
    total = offset + T
    k, v = normal(18, 1, K, total, D, dtype=dtype), normal(19, 1, K, total, D, dtype=dtype)
    q = normal(20, 1, T, K * G, D, dtype=dtype)
    options = {"scale": 0.2, "window": window}
    whole = bits(block_attention(q, k, v, mx.array(offset), **options))
    for t in range(T):
        row = block_attention(q[:, t : t + 1], k, v, mx.array(offset + t), **options)
        assert np.array_equal(bits(row)[:, 0], whole[:, t]), t
    for first, count in ((3, 2), (7, 16), (20, 19)):
        some = block_attention(
            q[:, first : first + count], k, v, mx.array(offset + first), **options
        )
        assert np.array_equal(bits(some), whole[:, first : first + count])
    for count in (1, 2, 3, 5):
        _ext.set_threads(count)
        assert np.array_equal(bits(block_attention(q, k, v, mx.array(offset), **options)), whole)
    slots = np.arange(total)
    for start in (1, 17, 599):  # the same keys, turned: position j in slot (j - start) % C
        turned = mx.array((slots + start) % total)
        out = block_attention(
            q, k[:, :, turned], v[:, :, turned], mx.array(offset), start=mx.array(start), **options
        )
        assert np.array_equal(bits(out), whole)


def test_later_rows_do_not_leak():
    """What later rows of the block put into the cache cannot change an earlier row's bits."""
    k, v, q = normal(21, 1, 1, 80, 32), normal(22, 1, 1, 80, 32), normal(23, 1, 8, 2, 32)
    expected = bits(block_attention(q, k, v, mx.array(60)))[:, :3]
    for junk in (float("nan"), float("inf"), 1e30):
        spoilt = [mx.concatenate([a[:, :, :63], mx.full((1, 1, 17, 32), junk)], 2) for a in (k, v)]
        out = block_attention(q, *spoilt, mx.array(60))
        assert np.array_equal(bits(out)[:, :3], expected)


@pytest.mark.parametrize("instruction_set", _ext.instruction_sets())
def test_instruction_sets(instruction_set):
    q, k, v = normal(24, 1, 9, 4, 80), normal(25, 1, 1, 300, 80), normal(26, 1, 1, 300, 80)
    before = _ext.instruction_set()
    _ext.use_instruction_set(instruction_set)
    try:
        out, expected = both(q, k, v, 290, scale=0.1)
        assert_close(out, expected)
    finally:
        _ext.use_instruction_set(before)
    if instruction_set != "portable" and before != "portable":
        assert np.array_equal(bits(out), bits(both(q, k, v, 290, scale=0.1)[0]))


@pytest.mark.parametrize("start", [None, 5])
def test_few_heads_and_a_long_cache(start, threads):
    """One head: threads share its spans, and the bits stay."""
    q, k, v = normal(27, 1, 2, 8, 64), normal(28, 1, 1, 9000, 64), normal(29, 1, 1, 9000, 64)
    _ext.set_threads(1)
    alone, expected = both(q, k, v, 8990, scale=0.2, start=start)
    alone = bits(alone)
    for count in (2, 3, 7):
        _ext.set_threads(count)
        out = block_attention(
            q, k, v, mx.array(8990), scale=0.2, start=None if start is None else mx.array(start)
        )
        assert np.array_equal(bits(out), alone)
    assert_close(out, expected)


def test_extreme_scores():
    q, k, v = 40 * normal(30, 1, 3, 2, 64), normal(31, 1, 1, 200, 64), normal(32, 1, 1, 200, 64)
    out, expected = (np.array(a) for a in both(q, k, v, 190))
    # Scores near 1000: their own rounding, 3e-5, is the error of the weights
    np.testing.assert_allclose(out, expected, rtol=3e-4, atol=3e-4)
    nan = mx.concatenate([v[:, :, :100], mx.full((1, 1, 100, 64), float("nan"))], axis=2)
    assert np.isnan(np.array(block_attention(q, k, nan, mx.array(190)))).all()


def test_strided():
    wide = normal(33, 2, 6, 8, 64, dtype=mx.bfloat16)
    cache = normal(34, 2, 2, 2, 50, 32, dtype=mx.bfloat16)
    views = [
        (wide[:, ::2, 1::2, ::2], cache[:, 0], cache[:, 1]),
        (wide[..., 32:], cache[:, :, 0], cache[:, :, 1, ::-1]),
        (wide[..., :16], cache[:, 0, :, :, ::2], cache[:, 1, :, :, 1::2]),
        (wide[:, :, ::-1, :32], mx.broadcast_to(cache[:, :1, 0], (2, 2, 50, 32)), cache[:, 1]),
    ]
    for view in views:
        out = block_attention(*view, mx.array(40), window=20)
        plain = block_attention(*(mx.contiguous(a) for a in view), mx.array(40), window=20)
        assert np.array_equal(bits(out), bits(plain))


def test_with_write_cache():
    """A decoder's use: random blocks, random commits, a ring and a linear cache side by side."""
    window, T_max, K, D = 40, 6, 2, 16
    rng, length = np.random.default_rng(35), 0
    ring = [mx.zeros((1, K, window - 1 + T_max, D)) for _ in range(2)]
    line = [mx.zeros((1, K, 400, D)) for _ in range(2)]
    while length < 300:
        T, offset = int(rng.integers(1, T_max + 1)), mx.array(length)
        new = [normal(length + i, 1, T, K, D) for i in (1000, 2000)]
        q = normal(length + 3000, 1, T, 2 * K, D)
        ring = [write_cache(c, x, offset) for c, x in zip(ring, new, strict=True)]
        line = [write_cache(c, x, offset) for c, x in zip(line, new, strict=True)]
        a = block_attention(q, *ring, offset, window=window)
        b = block_attention(q, *line, offset, window=window)
        assert np.array_equal(bits(a), bits(b))
        length += int(rng.integers(1, T + 1))
    assert_close(a, block_attention_reference(q, *line, offset, window=window))


def test_two_threads(threads):
    _ext.set_threads(2)
    q, k, v = normal(36, 1, 16, 8, 64), normal(37, 1, 4, 700, 64), normal(38, 1, 4, 700, 64)
    offset = mx.array(680)
    expected, found = bits(block_attention(q, k, v, offset)), {}

    def run(name: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            found[name] = [bits(block_attention(q, k, v, offset)) for _ in range(8)]

    workers = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(out, expected) for i in range(2) for out in found[i])


def test_plan():
    plan = _ext.block_attention_plan(B=2, T=17, H=32, K=4, C=300, D=256)
    assert (plan.slices, plan.groups, plan.columns) == (2, 2 * 4, 8 * 256)
    assert plan.group_scratch == 16 * 8 * (256 + 2 * 258)
    assert plan.work == 2 * 2 * 16 * 32 * 300 * 256


def test_a_cache_too_small_is_refused():
    q, k = normal(39, 1, 4, 2, 16), mx.zeros((1, 1, 20, 16))
    mx.eval(block_attention(q, k, k, mx.array(16)))  # positions 0..19
    mx.eval(block_attention(q, k, k, mx.array(500), window=17))  # 484..503
    for offset, window in ((17, None), (500, 18)):
        with pytest.raises(ValueError, match=r"\[block_attention\] C must be at least 21 .* 20\."):
            block_attention(q, k, k, mx.array(offset), window=window)


def test_errors():
    q, k, offset = normal(40, 1, 3, 4, 32), normal(41, 1, 2, 9, 32), mx.array(0)

    def refused(pattern, *args, **options):
        with pytest.raises(ValueError, match=r"\[block_attention\] " + pattern):
            block_attention(*args, **options)

    refused(r"q must be .* but got int32\.", q.astype(mx.int32), k, k, offset)
    refused(r"q must have .* but got \[3, 4, 32\]\.", q[0], k, k, offset)
    refused(r"k must have .* but got \[2, 9, 32\]\.", q, k[0], k, offset)
    refused(r"k must have .* but got \[1, 2, 9, 16\]\.", q, k[..., :16], k, offset)
    refused(r"v must have .* but got \[1, 2, 8, 32\]\.", q, k, k[:, :, :8], offset)
    refused(r"k must have the dtype .* but got float16\.", q, k.astype(mx.float16), k, offset)
    refused(r"v must have the dtype .* but got bfloat16\.", q, k, k.astype(mx.bfloat16), offset)
    refused(r"D must be .* at most 512 but got 24\.", q[..., :24], k[..., :24], k, offset)
    wide = mx.zeros((1, 1, 4, 528))
    refused(r"D must be .* at most 512 but got 528\.", wide, wide, wide, offset)
    refused(r"H must be a multiple of K 2 but got 3\.", q[:, :, :3], k, k, offset)
    refused(r"T must be at most the capacity 2 .* 3\.", q, k[:, :, :2], k[:, :, :2], offset)
    refused(r"offset must have shape \[\] but got \[1\]\.", q, k, k, offset[None])
    refused(r"offset must be int32 but got float32\.", q, k, k, mx.array(0.0))
    refused(r"window must be at least 1 and below 2\*\*31 but got 0\.", q, k, k, offset, window=0)
    refused(r"start must have shape \[\] but got \[2\]\.", q, k, k, offset, start=mx.array([1, 2]))
    refused(r"start must be int32 but got uint32\.", q, k, k, offset, start=mx.array(1, mx.uint32))


# As a GPU runs a long block, forced here: (positions, slots, offset, window, position in slot 0)
LONG = [
    (512, 1536, 1024, None, None),  # a chunk over tiles that end at 512, 1024, 1536
    (512, 2048, 1024, None, None),  # and with a tile that nobody sees
    (512, 767, 1024, 256, 769),  # a chunk and the window before it
    (512, 767, 0, 256, -255),  # before which there is nothing: rows that meet no key at first
    (300, 700, 350, 100, None),
    (129, 129, 0, None, None),
]


@pytest.mark.parametrize("case", LONG)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_blocks_by_tiles(case, dtype, monkeypatch):
    T, C, offset, window, start = case
    q, k, v = (
        normal(3, 1, T, 4, 64, dtype=dtype),
        normal(4, 1, 2, C, 64, dtype=dtype),
        normal(5, 1, 2, C, 64, dtype=dtype),
    )
    options = {"window": window, "start": None if start is None else mx.array(start), "scale": 0.3}
    expected = block_attention(q, k, v, mx.array(offset), **options)
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    out = block_attention(q, k, v, mx.array(offset), **options)
    assert_close(out, expected)


def test_blocks_of_128_positions_are_the_kernels_on_a_gpu_too(monkeypatch):
    """Decoding after a prompt, and the end of a prompt, run nothing of MLX's."""
    q, k, v = normal(1, 1, 129, 4, 32), normal(2, 1, 2, 300, 32), normal(3, 1, 2, 300, 32)
    expected = block_attention(q, k, v, mx.array(171))
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    for T in (1, 16, 128):
        out = block_attention(q[:, :T], k, v, mx.array(171))
        assert np.array_equal(bits(out), bits(expected[:, :T]))
    assert not np.array_equal(bits(block_attention(q, k, v, mx.array(171))), bits(expected))


def test_long_blocks_keep_a_tile_of_scores(monkeypatch):
    """Peak memory does not go with the number of keys, and is what model/memory.py counts."""
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    q, peaks = normal(0, 1, 130, 4, 256), []
    for C in (4096, 8192):
        k = v = normal(1, 1, 2, C, 256)
        mx.eval(q, k)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(block_attention(q, k, v, mx.array(C - 130)))
        peaks.append(mx.get_peak_memory() - before)
    tile = 4 * (4 * 130 * (512 + 256) + 2 * 512 * 256)
    # Twice the keys; MLX may run a little further ahead of its results
    assert peaks[1] < 1.3 * peaks[0] and peaks[1] < 1.1 * TILES_IN_FLIGHT * tile


def test_tile_borders_are_absolute(monkeypatch):
    """A chunk's rows have the same bits in a cache with more room in front, where a window begins
    inside of a tile: slots are counted from the chunk's end."""
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    k, v = normal(1, 1, 1, 1536, 32), normal(2, 1, 1, 1536, 32)
    q, offset = normal(3, 1, 512, 2, 32), mx.array(1024)
    want = block_attention(q, k, v, offset, window=700)
    for first in (1, 100, 325):
        less = [a[:, :, first:] for a in (k, v)]
        got = block_attention(q, *less, offset, window=700, start=mx.array(first))
        assert np.array_equal(bits(got), bits(want))


def random_call(d: Draw) -> Call:
    B, K, G = d.size(1, 2), d.size(1, 2), d.size(1, 2, 5)
    T, C, dtype = d.size(1, 2, 5, 17, 40), d.size(1, 5, 16, 64, 70, 600), d.dtype()
    D = d.size(16, 32, 80, 256, 512, 24)
    H = K * G if d.chance(0.97) else K * G + 1
    q = d.array(B, T, H, D, dtype=dtype)
    k, v = (d.array(B, K, C, D, dtype=dtype) for _ in range(2))
    window = None if d.chance(0.5) else d.integer(1, 3, max(C - T + 1, 1), 512)
    fitting = C - T if window is None or window >= C else 3 * C
    offset = d.whole(d.offset(max(fitting, 0)))
    start = None if d.chance(0.5) else d.whole(d.pick((*INT32, 0, 3, -5, C)))
    options = {"scale": d.pick((0.0, 0.1, -1.0)), "window": window, "start": start}
    return Call((q, k, v, offset), options, near_sum)


# The largest call of a kind that the Metal kernel takes
LIMITS = {
    "positions": (128, lambda n: block_attention(*3 * [mx.zeros((1, n, n, 16))], mx.array(0)))
}

# What bench/bench_block_attention.py has to say that its SMALL call moves: keys and values of 260
# places of 256, queries and results of 5 * 4; the offset
BENCH_BYTES = 2 * 260 * 512 + 2 * 20 * 512 + 4
