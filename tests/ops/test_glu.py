"""glu: kernel against reference and float64, edges, row-stability, errors."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near

from pyengine.ops import glu, glu_reference

# One rounding of float32 results. The reference computes 1 + tanh, which cancels below about -3:
# there it is off by 2**-24 of the gate, hence the absolute part.
TOLERANCE = {mx.float32: 2e-6, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
DTYPES = list(TOLERANCE)
ACTIVATIONS = ("gelu", "silu")


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def bits(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (31,), (1, 1, 512), (3, 33), (5, 21504)])
def test_matches_reference(shape, dtype, activation):
    gate, up = 2 * normal(1, *shape, dtype=dtype), normal(2, *shape, dtype=dtype)
    out, expected = glu(gate, up, activation), glu_reference(gate, up, activation)
    assert out.dtype == dtype and out.shape == gate.shape
    a, b = (np.array(x.astype(mx.float32)) for x in (out, expected))
    np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=2e-6)


def test_against_float64():
    """Relative error, also where the output is tiny: the sigmoid form does not cancel."""
    gate = np.linspace(-9, 9, 20001).astype(np.float32)
    g = gate.astype(np.float64)
    u = np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
    expected = g / (1 + np.exp(-2 * u))
    out = np.array(glu(mx.array(gate), mx.ones(gate.size)))
    some = np.abs(u) < 40
    assert np.abs(out - expected)[some].max() < 1e-6
    # The exponent 2u is rounded to float32: up to 2u * 2**-24 relative error in e^2u.
    assert (np.abs(out - expected) <= 1e-6 * (2 + np.abs(u)) * np.abs(expected) + 1e-37).all()


def test_silu_against_float64():
    gate = np.linspace(-80, 80, 20001).astype(np.float32)
    expected = gate / (1 + np.exp(-gate.astype(np.float64)))
    out = np.array(glu(mx.array(gate), mx.ones(gate.size), "silu"))
    assert (np.abs(out - expected) <= 5e-7 * np.abs(expected) + 1e-37).all()


def test_far_gates():
    gate = mx.array([-1e30, -100.0, -20.0, 0.0, 20.0, 100.0, 1e10])
    out = np.array(glu(gate, mx.full((7,), 2.0)))
    assert np.array_equal(out, [0, 0, 0, 0, 40, 200, 2e10])
    out = np.array(glu(gate, mx.full((7,), 2.0), "silu"))
    assert np.allclose(out, [0, 0, -8.244614e-08, 0, 40, 200, 2e10], rtol=1e-6, atol=1e-40)
    for activation in ACTIVATIONS:
        assert np.isnan(np.array(glu(mx.array([float("nan")]), mx.ones(1), activation))).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_stable(dtype, activation):
    gate, up = normal(3, 40, 333, dtype=dtype), normal(4, 40, 333, dtype=dtype)
    whole = bits(glu(gate, up, activation))
    for t in range(40):
        alone = glu(gate[t : t + 1], up[t : t + 1], activation)
        assert np.array_equal(bits(alone)[0], whole[t])


def test_strided_and_large():
    both = normal(5, 300, 2, 700, dtype=mx.bfloat16)
    out = glu(both[:, 0], both[:, 1])
    plain = glu(mx.contiguous(both[:, 0]), mx.contiguous(both[:, 1]))
    assert np.array_equal(bits(out), bits(plain))
    assert np.array_equal(bits(out[7]), bits(glu(both[7, 0], both[7, 1])))
    assert glu(mx.zeros((0, 4)), mx.zeros((0, 4))).shape == (0, 4)


def test_two_threads():
    gate, up = normal(6, 200, 700), normal(7, 200, 700)
    expected, found = bits(glu(gate, up)), {}

    def run(name: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            found[name] = [bits(glu(gate, up)) for _ in range(10)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(out, expected) for i in range(2) for out in found[i])


def test_errors():
    gate = normal(8, 2, 64)
    with pytest.raises(ValueError, match=r"\[glu\] gate must .* but got int32\."):
        glu(gate.astype(mx.int32), gate)
    with pytest.raises(ValueError, match=r"\[glu\] up must .*\[2, 64\] but got \[1, 64\]\."):
        glu(gate, gate[:1])
    with pytest.raises(ValueError, match=r"\[glu\] up must .* but got float16\."):
        glu(gate, gate.astype(mx.float16))
    with pytest.raises(ValueError, match=r"\[glu\] activation must be gelu or silu but got relu\."):
        glu(gate, gate, "relu")


def random_call(d: Draw) -> Call:
    shape = d.pick(((), (1,), (15,), (16,), (17,), (3, 100), (0, 5), (70000,)))
    dtype = d.dtype()
    settings = {"activation": d.pick(ACTIVATIONS)}
    return Call((d.array(*shape, dtype=dtype), d.array(*shape, dtype=dtype)), settings, near)


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_glu.py has to say that its SMALL call moves: gate, up and product: 6 rows of
# 6144 numbers of two bytes each
BENCH_BYTES = 3 * 6 * 12288
