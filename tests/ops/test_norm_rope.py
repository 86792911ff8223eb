"""norm_rope: kernel against reference and float64, edges, row-stability, errors."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near_sum

from pyengine import _ext, ops
from pyengine.ops import norm_rope, norm_rope_reference, rms_norm

# One rounding of float32 results that differ in their last bits: one unit in the last place of the
# larger of the two terms, so the bound is relative to the head's size, not to each element.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
DTYPES = list(TOLERANCE)


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def bits(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def sliding(D: int) -> mx.array:
    return mx.array((10000.0 ** (-2 * np.arange(D // 2) / D)).astype(np.float32))


def proportional(D: int) -> mx.array:
    inv_freq = 1e6 ** (-2 * np.arange(D // 2) / D)
    inv_freq[D // 8 :] = 0
    return mx.array(inv_freq.astype(np.float32))


def assert_close(out: mx.array, expected: mx.array) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    a, b = (np.array(x.astype(mx.float32)) for x in (out, expected))
    tolerance = TOLERANCE[out.dtype]
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max(initial=0))


def at(*positions: int) -> mx.array:
    return mx.array(np.array(positions, dtype=np.int32))


def onwards(position: int, R: int) -> mx.array:
    return mx.array(position + np.arange(R, dtype=np.int32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 1, 1023, 100_003])
@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 4, 32), (6, 2, 256), (17, 1, 512)])
def test_matches_reference(shape, position, dtype):
    R, _, D = shape
    x, weight = normal(1, *shape, dtype=dtype), normal(2, D, dtype=dtype)
    for inv_freq in (sliding(D), proportional(D)):
        args = (x, weight, onwards(position, R), inv_freq)
        assert_close(norm_rope(*args), norm_rope_reference(*args))


def test_every_width():
    for D in [*range(2, 70, 2), 130]:
        args = (normal(D, 3, 2, D), normal(3, D), at(77, 0, 5), sliding(D))
        assert_close(norm_rope(*args), norm_rope_reference(*args))


def test_far_positions_against_float64():
    """At 1 radian a position the angles reach 262144 and the error stays that of float32."""
    R, D = 256, 4
    x = mx.array([1.0, 1.0, 0.0, 0.0]) * mx.ones((R, 1, D))
    weight, inv_freq = mx.full((D,), 2.0**-0.5), mx.array([1.0, 0.37])
    for position in (0, 65_536, 262_144 - R):
        out = np.array(norm_rope(x, weight, onwards(position, R), inv_freq, 1e-12))[:, 0]
        angles = (position + np.arange(R, dtype=np.float32))[:, None] * np.array(inv_freq)
        angles = angles.astype(np.float32).astype(np.float64)  # the product is rounded to float32
        assert np.abs(out[:, :2] - np.cos(angles)).max() < 4e-7
        assert np.abs(out[:, 2:] - np.sin(angles)).max() < 4e-7


def test_unrotated_is_rms_norm():
    x, weight = normal(4, 6, 2, 64, dtype=mx.bfloat16), normal(5, 64, dtype=mx.bfloat16)
    out = norm_rope(x, weight, onwards(9, 6), mx.zeros(32))
    assert mx.array_equal(out, rms_norm(x, weight))
    half = norm_rope(x, weight, onwards(9, 6), proportional(64))
    kept = [*range(8, 32), *range(40, 64)]
    assert mx.array_equal(half[..., kept], rms_norm(x, weight)[..., kept])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["native", "workbench"])
def test_row_stable(dtype, implementation):
    """Rows of any sequences, in any order: each has the bits of itself alone, and of one head."""
    R = 40 if implementation == "native" else 9
    positions = np.random.default_rng(1).integers(0, 2**18, R).astype(np.int32)
    positions[:4] = 0, 63, 64, positions[4]  # the same position twice
    x, weight = normal(6, R, 3, 256, dtype=dtype), normal(7, 256, dtype=dtype)
    whole = bits(norm_rope(x, weight, mx.array(positions), sliding(256)))
    ops.use(implementation)
    try:
        together = norm_rope(x, weight, mx.array(positions), sliding(256))
        assert not fused(implementation) or np.array_equal(bits(together), whole)
        for r in range(R):
            own = mx.array(positions[r : r + 1])
            row = norm_rope(x[r : r + 1], weight, own, sliding(256))
            assert np.array_equal(bits(row)[0], bits(together)[r])
            head = norm_rope(x[r : r + 1, 1:2], weight, own, sliding(256))
            assert np.array_equal(bits(head)[0, 0], bits(together)[r, 1])
    finally:
        ops.use("native")


def fused(implementation: str) -> bool:
    """Whether an implementation has the processor's bits: portable has no fused multiply-add."""
    return implementation == "native" or _ext.instruction_set() != "portable"


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(dtype):
    x, weight = normal(8, 10, 6, 64, dtype=dtype), normal(9, 64, dtype=dtype)
    rest = (weight[::-1], onwards(3, 20)[::2], sliding(128)[::2])
    for view in (x[::2, 1::2], x.swapaxes(0, 1), x[..., ::-1], x.swapaxes(1, 2)):
        weight_, positions, inv_freq = rest
        positions = positions[: view.shape[0]]
        if view.shape[-1] != 64:
            weight_, inv_freq = weight_[: view.shape[-1]], inv_freq[: view.shape[-1] // 2]
        out = norm_rope(view, weight_, positions, inv_freq)
        plain = [mx.contiguous(a) for a in (view, weight_, positions)]
        assert np.array_equal(bits(out), bits(norm_rope(*plain, inv_freq)))


def test_two_threads():
    x, weight, inv_freq = normal(10, 64, 4, 256), normal(11, 256), sliding(256)
    positions = onwards(12, 64)
    mx.eval(x, weight, inv_freq, positions)
    expected, found = bits(norm_rope(x, weight, positions, inv_freq)), {}

    def run(name: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            found[name] = [bits(norm_rope(x, weight, positions, inv_freq)) for _ in range(10)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(out, expected) for i in range(2) for out in found[i])


def test_mlx_turns_the_same_rows():
    """MLX's own kernels round once more, and have other sines."""
    R, D = 9, 64
    positions = np.random.default_rng(2).integers(0, 2**12, R).astype(np.int32)
    for inv_freq in (sliding(D), proportional(D)):
        args = (normal(13, R, 3, D), normal(14, D), mx.array(positions), inv_freq)
        want = norm_rope(*args)
        ops.use("mlx")
        try:
            out = norm_rope(*args)
        finally:
            ops.use("native")
        assert not mx.array_equal(out, want)
        assert mx.allclose(out, want, rtol=1e-3, atol=1e-3)


def test_errors():
    x, weight, positions, inv_freq = normal(12, 2, 3, 16), mx.ones(16), at(0, 1), sliding(16)
    with pytest.raises(ValueError, match=r"\[norm_rope\] x must .* but got \[3, 16\]\."):
        norm_rope(x[0], weight, positions, inv_freq)
    with pytest.raises(ValueError, match=r"\[norm_rope\] x must .* but got uint8\."):
        norm_rope(x.astype(mx.uint8), weight, positions, inv_freq)
    with pytest.raises(ValueError, match=r"\[norm_rope\] D must be even .* but got 15\."):
        norm_rope(x[..., :15], weight[:15], positions, inv_freq)
    with pytest.raises(ValueError, match=r"\[norm_rope\] weight must .* but got \[8\]\."):
        norm_rope(x, weight[:8], positions, inv_freq)
    with pytest.raises(ValueError, match=r"\[norm_rope\] weight must .* but got float16\."):
        norm_rope(x, weight.astype(mx.float16), positions, inv_freq)
    with pytest.raises(ValueError, match=r"\[norm_rope\] inv_freq must .* but got \[16\]\."):
        norm_rope(x, weight, positions, sliding(32))
    with pytest.raises(ValueError, match=r"\[norm_rope\] inv_freq must .* but got bfloat16\."):
        norm_rope(x, weight, positions, inv_freq.astype(mx.bfloat16))
    with pytest.raises(ValueError, match=r"\[norm_rope\] positions must .* but got \[3\]\."):
        norm_rope(x, weight, at(0, 1, 2), inv_freq)
    with pytest.raises(ValueError, match=r"\[norm_rope\] positions must .* but got float32\."):
        norm_rope(x, weight, mx.zeros(2), inv_freq)
    with pytest.raises(ValueError, match=r"\[norm_rope\] eps must be positive but got -1"):
        norm_rope(x, weight, positions, inv_freq, -1.0)


def turns_alike(positions: np.ndarray) -> bool:
    """Whether angles are small enough for two sines to agree."""
    return bool(((positions >= 0) & (positions <= 2**14)).all())


def frequencies(d: Draw, D: int) -> mx.array:
    inv_freq = d.array(D // 2)
    return inv_freq * d.pick((1.0, 0.0, 1e-3)) if inv_freq.dtype == mx.float32 else inv_freq


def random_call(d: Draw) -> Call:
    R, H = d.size(1, 2, 17), d.size(1, 3, 8)
    D, dtype = d.size(2, 6, 16, 34, 64, 256, 512, 1024, 1026, 7), d.dtype()
    positions = d.positions(R, 100)
    x, weight = d.array(R, H, D, dtype=dtype), d.array(D, dtype=dtype)
    alike = near_sum if turns_alike(np.array(positions)) else None
    args = (x, weight, positions, frequencies(d, D), d.number(1e-6, 1.0))
    return Call(args, {}, alike)


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_norm_rope.py has to say that its SMALL call moves: 48 heads of 512 bytes in and
# out; the weight, 128 frequencies, 6 positions
BENCH_BYTES = 2 * 48 * 512 + 512 + 512 + 24
