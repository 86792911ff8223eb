"""softcap: kernel against reference and float64, edges, row-stability, errors."""

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near

from pyengine import _ext
from pyengine.ops import softcap, softcap_reference


def bits(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32))


def normal(seed: int, *shape: int, scale: float = 40.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32))


@pytest.mark.parametrize("shape", [(), (1,), (15,), (3, 33), (2, 3, 17), (5, 40000)])
@pytest.mark.parametrize("cap", [30.0, 0.7])
def test_matches_reference_and_float64(shape, cap):
    x = normal(1, *shape)
    out = softcap(x, cap)
    assert out.dtype == mx.float32 and out.shape == shape
    exact = cap * np.tanh(np.array(x, np.float64) / cap)
    # tanh within 1.5 units in the last place, then a product; the quotient's rounding is within one
    for y in (out, softcap_reference(x, cap)):
        np.testing.assert_allclose(np.array(y, np.float64), exact, rtol=5e-7, atol=1e-30)


def test_ends():
    x = mx.array([mx.inf, -mx.inf, mx.nan, 0.0, -0.0, 3e38, 1e-30])
    out = np.array(softcap(x, 30.0))
    assert out[:2].tolist() == [30, -30] and np.isnan(out[2])
    assert out[3:6].tolist() == [0, 0, 30] and 0 < out[6] <= 1e-30


def test_a_number_has_the_same_bits_anywhere():
    x = normal(2, 7, 20000)
    whole = bits(softcap(x, 30.0))
    for t in range(7):
        assert np.array_equal(bits(softcap(x[t : t + 1], 30.0))[0], whole[t])
    assert np.array_equal(bits(softcap(x[:, 3:40], 30.0)), whole[:, 3:40])
    assert np.array_equal(bits(softcap(x.T, 30.0)), whole.T)


def test_fused_instruction_sets_agree():
    x, name, found = normal(3, 1000), _ext.instruction_set(), []
    try:
        for each in _ext.instruction_sets():
            _ext.use_instruction_set(each)
            out = softcap(x, 30.0)
            mx.eval(out)
            if each != "portable":
                found.append(bits(out))
    finally:
        _ext.use_instruction_set(name)
    assert all(np.array_equal(each, found[0]) for each in found)


def test_inside_compile_and_of_nothing():
    x = normal(4, 3, 20)
    compiled = mx.compile(lambda x: softcap(x + 1, 5.0) - softcap(x + 1, 6.0))
    assert np.array_equal(bits(compiled(x)), bits(softcap(x + 1, 5.0) - softcap(x + 1, 6.0)))
    assert softcap(mx.zeros((0, 4)), 1.0).shape == (0, 4)
    mx.eval(softcap(mx.zeros((0, 4)), 1.0))


def test_errors():
    with pytest.raises(ValueError) as error:
        softcap(mx.zeros(3, mx.bfloat16), 30.0)
    assert str(error.value) == "[softcap] x must be float32 but got bfloat16."
    with pytest.raises(ValueError) as error:
        softcap(mx.zeros(3), 0.0)
    assert str(error.value) == "[softcap] cap must be above 0 but got 0."


def random_call(d: Draw) -> Call:
    shape = d.pick(((), (1,), (15,), (16,), (17,), (3, 100), (0, 5)))
    cap = d.number(30.0, 1.0)
    return Call((d.array(*shape) * 20, cap), {}, near if 1e-6 < cap < 1e9 else None)


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_softcap.py has to say that its SMALL call moves: 6 rows of 8192 numbers of four
# bytes, in and out
BENCH_BYTES = 2 * 6 * 32768
