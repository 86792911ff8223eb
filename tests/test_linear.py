"""A Linear is its matrix, however it is stored."""

import mlx.core as mx
import numpy as np
from tiny_pairs import gap

from pyengine.linear import Linear


def test_linear_is_its_matrix():
    w = mx.random.normal((32, 64), key=mx.random.key(1))
    x = mx.random.normal((5, 64), key=mx.random.key(2))
    for linear in (Linear(w), Linear(*mx.quantize(w, 64, 8), 8, 64)):
        expected = np.array(x, dtype=np.float64) @ np.array(linear.values(), dtype=np.float64).T
        np.testing.assert_allclose(np.array(linear(x)), expected, rtol=1e-4, atol=1e-4)
        half = linear.astype(mx.bfloat16)
        assert half.dtype == mx.bfloat16
        out = half(x.astype(mx.bfloat16), mx.float32)
        assert out.dtype == mx.float32 and gap(out, mx.array(expected, mx.float32)) < 0.5
    stack = Linear(*mx.quantize(w.reshape(4, 8, 64), 64, 8), 8, 64)
    rows = stack.take(mx.array([2, 0])).joined().values()
    assert np.array_equal(np.array(rows[:8]), np.array(stack.member(2).values()))
    assert np.array_equal(np.array(rows[8:]), np.array(stack.member(0).values()))
