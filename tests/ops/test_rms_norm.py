"""rms_norm: kernel against reference, edges, row-stability, errors."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near_sum

from pyengine.ops import rms_norm, rms_norm_reference

# Both sides round a float32 result once; the float32 sums differ in their last bits, so the
# rounded values differ by at most one unit in the last place: 2**-7 relative in bfloat16, 2**-10 in
# float16, and a few units of float32 itself.
TOLERANCE = {mx.float32: 1e-6, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
DTYPES = list(TOLERANCE)


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def bits(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def assert_close(out: mx.array, expected: mx.array) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    a, b = (np.array(x.astype(mx.float32)) for x in (out, expected))
    np.testing.assert_allclose(a, b, rtol=TOLERANCE[out.dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [(128,), (1, 1, 128), (16, 128), (3, 5, 31), (2, 32), (2, 33), (1, 4, 2, 512), (5, 5376)],
)
def test_matches_reference(shape, dtype):
    x = normal(1, *shape, dtype=dtype)
    weight = normal(2, shape[-1], dtype=dtype)
    assert_close(rms_norm(x, weight), rms_norm_reference(x, weight))
    assert_close(rms_norm(x), rms_norm_reference(x))
    assert_close(rms_norm(x, weight, 0.5), rms_norm_reference(x, weight, 0.5))


def test_every_width():
    for width in [*range(1, 70), 255, 256, 257]:
        x, weight = normal(width, 3, width), normal(99, width)
        assert_close(rms_norm(x, weight), rms_norm_reference(x, weight))


def test_weight_is_plain():
    x = normal(3, 4, 64)
    assert not np.any(np.array(rms_norm(x, mx.zeros(64))))
    assert np.array_equal(bits(rms_norm(x, mx.ones(64))), bits(rms_norm(x)))


def test_small_rows():
    assert not np.any(np.array(rms_norm(mx.zeros((2, 64)))))
    tiny = mx.full((1, 64), 1e-4)  # mean square 1e-8, far below eps
    assert_close(rms_norm(tiny), rms_norm_reference(tiny))
    assert rms_norm(mx.zeros((0, 64))).shape == (0, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 128, 5376])
def test_row_stable(width, dtype):
    x, weight = normal(4, 40, width, dtype=dtype), normal(5, width, dtype=dtype)
    whole = bits(rms_norm(x, weight))
    for t in range(40):
        assert np.array_equal(bits(rms_norm(x[t : t + 1], weight))[0], whole[t])
    spoilt = mx.concatenate([mx.full((1, width), float("nan"), dtype=dtype), x[1:]])
    assert np.array_equal(bits(rms_norm(spoilt, weight))[1:], whole[1:])


def test_many_rows_equal_few():
    x = normal(6, 700, 1024)
    whole = bits(rms_norm(x))
    for t in range(0, 700, 70):
        assert np.array_equal(bits(rms_norm(x[t : t + 70])), whole[t : t + 70])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided(dtype):
    x, weight = normal(7, 6, 8, 64, dtype=dtype), normal(8, 128, dtype=dtype)
    for view in (x[:, ::2], x.transpose(1, 0, 2), x[..., ::-1], x.transpose(2, 1, 0), x[:, 3]):
        w = weight[::2][: view.shape[-1]]
        assert np.array_equal(bits(rms_norm(view, w)), bits(rms_norm(mx.contiguous(view), w)))
    row = mx.broadcast_to(x[0, 0], (5, 64))
    assert np.array_equal(bits(rms_norm(row)), np.tile(bits(rms_norm(x[0, 0])), (5, 1)))


def test_two_threads():
    x = normal(9, 300, 700)
    expected, found = bits(rms_norm(x)), {}

    def run(name: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            found[name] = [bits(rms_norm(x)) for _ in range(10)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(out, expected) for i in range(2) for out in found[i])


def test_errors():
    x = normal(10, 2, 64)
    with pytest.raises(ValueError, match=r"\[rms_norm\] x must .* but got int32\."):
        rms_norm(x.astype(mx.int32))
    with pytest.raises(ValueError, match=r"\[rms_norm\] x must .* but got \[\]\."):
        rms_norm(mx.array(1.0))
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight must .*\[64\] but got \[32\]\."):
        rms_norm(x, mx.ones(32))
    with pytest.raises(ValueError, match=r"\[rms_norm\] weight must .* but got bfloat16\."):
        rms_norm(x, mx.ones(64, dtype=mx.bfloat16))
    with pytest.raises(ValueError, match=r"\[rms_norm\] eps must be positive but got 0"):
        rms_norm(x, eps=0.0)


def random_call(d: Draw) -> Call:
    shape = d.pick(((), (1,), (5,), (2, 3), (0,)))
    D, dtype = d.size(1, 5, 16, 63, 64, 65, 1023, 1024, 1100, 3000), d.dtype()
    x, weight = d.array(*shape, D, dtype=dtype), d.array(D, dtype=dtype)
    return Call((x, None if d.chance(0.3) else weight, d.number(1e-6, 1.0)), {}, near_sum)


# The largest call of a kind that the Metal kernel takes
LIMITS = {"elements of a row": (16384, lambda n: rms_norm(mx.zeros((1, n))))}

# What bench/bench_rms_norm.py has to say that its SMALL call moves: 6 rows of 3072 bytes in and
# out, and the weight
BENCH_BYTES = 2 * 6 * 3072 + 3072
