"""residual_norm: kernel against reference and against the ops it fuses, edges, errors."""

import threading
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near_sum

from pyengine.ops import residual_norm, residual_norm_reference, rms_norm

# One rounding of float32 results that differ in their last bits: one unit in the last place. The
# sum may cancel, hence the same again relative to 1, the size of the terms. The next norm is of the
# rounded sum: a unit there and a unit of its own.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}
DTYPES = list(TOLERANCE)


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def bits(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def assert_close(out: mx.array, expected: mx.array) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    a, b = (np.array(x.astype(mx.float32)) for x in (out, expected))
    np.testing.assert_allclose(a, b, rtol=TOLERANCE[out.dtype], atol=TOLERANCE[out.dtype])


def inputs(*shape: int, dtype: mx.Dtype):
    h, y = normal(1, *shape, dtype=dtype), normal(2, *shape, dtype=dtype)
    return h, y, normal(3, shape[-1], dtype=dtype), normal(4, shape[-1], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64,), (1, 128), (2, 3, 33), (16, 128), (1, 5, 2560)])
def test_matches_reference(shape, dtype):
    h, y, weight, next_weight = inputs(*shape, dtype=dtype)
    for scalar in (None, mx.array([0.6], dtype=dtype)):
        for following in (None, next_weight):
            args = {"scalar": scalar, "next_weight": following}
            out, x = residual_norm(h, y, weight, **args)
            expected, expected_x = residual_norm_reference(h, y, weight, **args)
            assert_close(out, expected)
            assert (x is None) == (following is None)
            if x is not None:
                assert_close(x, expected_x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_its_parts_bit_for_bit(dtype):
    h, y, weight, next_weight = inputs(9, 130, dtype=dtype)
    scalar = mx.array([0.7], dtype=dtype)
    out, x = residual_norm(h, y, weight, scalar=scalar, next_weight=next_weight)
    wide = [a.astype(mx.float32) for a in (h, y, weight, scalar)]
    total = (wide[0] + rms_norm(wide[1], wide[2])) * wide[3]
    assert np.array_equal(bits(out), bits(total.astype(dtype)))
    assert np.array_equal(bits(x), bits(rms_norm(out, next_weight)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 128, 2816])
def test_row_stable(width, dtype):
    h, y, weight, next_weight = inputs(40, width, dtype=dtype)
    whole = residual_norm(h, y, weight, next_weight=next_weight)
    for t in range(40):
        rows = h[t : t + 1], y[t : t + 1]
        row = residual_norm(*rows, weight, next_weight=next_weight)
        assert np.array_equal(bits(row[0])[0], bits(whole[0])[t])
        assert np.array_equal(bits(row[1])[0], bits(whole[1])[t])
        assert np.array_equal(bits(residual_norm(*rows, weight)[0]), bits(row[0]))


def test_strided():
    h, y, weight, next_weight = inputs(6, 8, 64, dtype=mx.bfloat16)
    views = (h[:, ::2], y[:, 1::2], weight[::-1])
    out = residual_norm(*views, next_weight=next_weight)
    plain = residual_norm(*(mx.contiguous(a) for a in views), next_weight=next_weight)
    assert all(np.array_equal(bits(a), bits(b)) for a, b in zip(out, plain, strict=True))


def test_one_output_unused():
    """The graph may drop either output; the other is unchanged."""
    h, y, weight, next_weight = inputs(3, 64, dtype=mx.float32)
    out, x = residual_norm(h, y, weight, next_weight=next_weight)
    expected = bits(x)
    del out
    assert np.array_equal(
        bits(residual_norm(h, y, weight, next_weight=next_weight)[1] * 1), expected
    )
    assert residual_norm(mx.zeros((0, 64)), mx.zeros((0, 64)), weight)[0].shape == (0, 64)


def test_two_threads():
    h, y, weight, next_weight = inputs(200, 640, dtype=mx.float32)
    expected = [bits(a) for a in residual_norm(h, y, weight, next_weight=next_weight)]
    found = {}

    def run(name: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            found[name] = [
                [bits(a) for a in residual_norm(h, y, weight, next_weight=next_weight)]
                for _ in range(10)
            ]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(outs, expected) for i in range(2) for outs in found[i])


def test_errors():
    h, y, weight, next_weight = inputs(2, 64, dtype=mx.float32)
    with pytest.raises(ValueError, match=r"\[residual_norm\] h must .* but got int32\."):
        residual_norm(h.astype(mx.int32), y, weight)
    with pytest.raises(ValueError, match=r"\[residual_norm\] h must .* but got \[\]\."):
        residual_norm(mx.array(1.0), y, weight)
    with pytest.raises(ValueError, match=r"\[residual_norm\] y must .* but got \[1, 64\]\."):
        residual_norm(h, y[:1], weight)
    with pytest.raises(ValueError, match=r"\[residual_norm\] y must .* but got float16\."):
        residual_norm(h, y.astype(mx.float16), weight)
    with pytest.raises(ValueError, match=r"\[residual_norm\] weight must .* but got \[63\]\."):
        residual_norm(h, y, weight[:63])
    with pytest.raises(ValueError, match=r"\[residual_norm\] scalar must .* but got \[\]\."):
        residual_norm(h, y, weight, scalar=mx.array(1.0))
    with pytest.raises(ValueError, match=r"\[residual_norm\] scalar must .* but got bfloat16\."):
        residual_norm(h, y, weight, scalar=mx.array([1.0], dtype=mx.bfloat16))
    with pytest.raises(ValueError, match=r"\[residual_norm\] next_weight must .* but got \[1\]\."):
        residual_norm(h, y, weight, next_weight=next_weight[:1])
    with pytest.raises(ValueError, match=r"\[residual_norm\] eps must be positive but got 0"):
        residual_norm(h, y, weight, eps=0.0)


def random_call(d: Draw) -> Call:
    shape = d.pick(((), (1,), (5,), (2, 3), (0,)))
    E, dtype = d.size(1, 5, 16, 63, 64, 65, 1024, 1100), d.dtype()
    h, y = (d.array(*shape, E, dtype=dtype) for _ in range(2))
    options: dict[str, Any] = {"eps": d.number(1e-6, 1.0)}
    if d.chance(0.5):
        options["scalar"] = d.array(1, dtype=dtype)
    if d.chance(0.5):
        options["next_weight"] = d.array(E, dtype=dtype)
    return Call((h, y, d.array(E, dtype=dtype)), options, near_sum)


# The largest call of a kind that the Metal kernel takes
LIMITS = {
    "elements of a row": (16384, lambda n: residual_norm(*2 * [mx.zeros((1, n))], mx.ones(n)))
}

# What bench/bench_residual_norm.py has to say that its SMALL call moves: stream, branch, sum and
# norm: 6 rows of 3072 bytes each; two weights
BENCH_BYTES = 4 * 6 * 3072 + 2 * 3072
