"""mathfn.h: errors in units in the last place against float64, on every instruction set."""

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from pyengine import _ext

# What mathfn.h states. `portable` has no fused multiply-add and rounds once more here and there.
ULPS = {"exp": 1.1, "tanh": 1.5, "sin": 1.7, "cos": 1.7}
FLOAT64 = {"exp": np.exp, "tanh": np.tanh, "sin": np.sin, "cos": np.cos}


@pytest.fixture(params=_ext.instruction_sets())
def instruction_set(request) -> Iterator[str]:
    before = _ext.instruction_set()
    _ext.use_instruction_set(request.param)
    yield request.param
    _ext.use_instruction_set(before)


def apply(name: str, x: np.ndarray) -> np.ndarray:
    return np.array(_ext.mathfn(name, mx.array(x.astype(np.float32))))


def worst_ulps(name: str, x: np.ndarray) -> float:
    x = x.astype(np.float32)
    exact = FLOAT64[name](x.astype(np.float64))
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float((np.abs(apply(name, x) - exact) / unit).max())


def uniform(low: float, high: float, n: int = 1 << 18) -> np.ndarray:
    return np.random.default_rng(0).uniform(low, high, n)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("exp", -87.3, 88.7),
        ("exp", -1e-3, 1e-3),
        ("tanh", -0.7, 0.7),
        ("tanh", -10, 10),
        ("sin", -10, 10),
        ("cos", -10, 10),
        ("sin", 0, 2**18),
        ("cos", 0, 2**18),
    ],
)
def test_error(instruction_set, name, low, high):
    assert worst_ulps(name, uniform(low, high)) < ULPS[name]


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_error_at_every_position(instruction_set, name):
    """Angles of the fastest pair, 1 radian a position, over the longest context."""
    assert worst_ulps(name, np.arange(2**18)) < ULPS[name]


def test_special_values(instruction_set):
    inf, nan = np.inf, np.nan
    x = np.array([0.0, -0.0, -87.33, -88, -1e30, -inf, 88.72, 88.73, inf, nan])
    out = apply("exp", x)
    assert np.array_equal(out[[0, 1, 3, 4, 5, 7, 8]], [1, 1, 0, 0, 0, inf, inf])
    assert 0 < out[2] < 1.2e-38 and 3.3e38 < out[6] < inf and np.isnan(out[9])
    out = apply("tanh", np.array([0.0, 1e-30, inf, -inf, 50, -50, nan]))
    assert np.array_equal(out[:6], np.float32([0, 1e-30, 1, -1, 1, -1])) and np.isnan(out[6])
    assert apply("sin", np.zeros(1)) == 0 and apply("cos", np.zeros(1)) == 1
    for name in ("sin", "cos"):
        assert np.isnan(apply(name, np.array([inf, -inf, nan]))).all()


def test_same_bits_with_fused_multiply_add():
    """avx2, avx512 and neon agree; `portable` need not."""
    before = _ext.instruction_set()
    fused = [name for name in _ext.instruction_sets() if name != "portable"]
    found = []
    for name in fused:
        _ext.use_instruction_set(name)
        found.append([apply(function, uniform(-80, 80)).tobytes() for function in FLOAT64])
    _ext.use_instruction_set(before)
    assert all(bits == found[0] for bits in found)


def test_errors():
    with pytest.raises(ValueError, match=r"\[mathfn\] name must be one of .* but got log\."):
        _ext.mathfn("log", mx.zeros(1))
    with pytest.raises(ValueError, match=r"\[mathfn\] x must be float32 but got float16\."):
        _ext.mathfn("exp", mx.zeros(1, dtype=mx.float16))
