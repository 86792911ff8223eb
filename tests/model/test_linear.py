"""A Linear is its matrix, however it is stored."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_pairs import bits, gap

from pyengine import ops
from pyengine.model.linear import Linear, side_by_side


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


@pytest.mark.parametrize(
    "packings, shared",
    [
        (((64, 8), (64, 8), (64, 8)), True),
        (((32, 4), (32, 4)), True),
        (((64, 8), (64, 4), (64, 8)), False),
        (((64, 8), (32, 8)), False),
        (((64, 8), None), False),
        ((None, (64, 8)), False),
        ((None, None, None), False),
        (((64, 8),), False),
    ],
)
def test_matrices_packed_alike_share_a_launch(packings, shared, monkeypatch):
    calls = []
    op = ops.quantized_matmuls
    monkeypatch.setattr(ops, "quantized_matmuls", lambda *args: calls.append(args) or op(*args))
    x = mx.random.normal((5, 64), key=mx.random.key(2))
    matrices = []
    for i, packing in enumerate(packings):
        w = mx.random.normal((8 * (i + 1), 64), key=mx.random.key(i))
        matrices.append(
            Linear(*mx.quantize(w, *packing), packing[1], packing[0]) if packing else Linear(w)
        )
    outs = side_by_side(matrices, x)
    assert [out.shape for out in outs] == [(5, 8 * (i + 1)) for i in range(len(packings))]
    for out, matrix in zip(outs, matrices, strict=True):
        assert np.array_equal(bits(out), bits(matrix(x)))
    assert len(calls) == shared
