"""metal/route_experts.metal and weigh_experts.metal in the workbench: the processor's bits."""

import mlx.core as mx
import numpy as np
import pytest
from launched import launched
from matmuls import bits_of, normal

from pyengine import ops


def route(logits: mx.array, scales: mx.array, used: int, **options) -> list[np.ndarray]:
    (ids, weights), _ = launched(list(ops.route_experts(logits, scales, used)), **options)
    return [np.array(ids), bits_of(weights)]


def logits_of(T: int, X: int) -> mx.array:
    logits = np.round(np.array(normal(3, T, X)) * 4, 1).astype(np.float32)  # with ties
    logits[-1, ::3] = np.nan
    logits[-2] = 1.0
    return mx.array(logits)


@pytest.mark.parametrize("X, used", [(128, 8), (33, 32), (1, 1), (40, 3)])
def test_experts_are_the_processors(X, used):
    logits, scales = logits_of(6, X), mx.abs(normal(4, X))
    ids, weights = ops.route_experts(logits, scales, used)
    want = [np.array(ids), np.array(weights).view(np.uint32)]
    for order in ("forward", "random"):
        got = route(logits, scales, used, mode="check", order=order)
        assert np.array_equal(got[0], want[0])
        assert np.array_equal(got[1][:-1], want[1][:-1])
        assert np.isnan(got[1][-1].view(np.float32)).all()
    fast = route(logits, scales, used, mode="fast", contract="fast")
    assert np.array_equal(fast[1][:-1], want[1][:-1])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_sums_are_the_processors(dtype):
    parts, weights = normal(5, 3, 8, 300), mx.abs(normal(6, 3, 8))
    want = bits_of(ops.weigh_experts(parts, weights, dtype))
    for options in ({"mode": "check", "order": "random"}, {"mode": "fast", "contract": "fast"}):
        (out,), _ = launched(ops.weigh_experts(parts, weights, dtype), **options)
        assert np.array_equal(bits_of(out), want)
