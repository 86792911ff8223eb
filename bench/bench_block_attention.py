"""block_attention against MLX's attention, on Gemma 4's shapes and the embedded pair's.

Run: pytest bench/bench_block_attention.py --benchmark-columns=median,iqr,rounds
"""

import math

import mlx.core as mx
import pytest
import timing

from pyengine.ops import block_attention, block_attention_reference

# Name: H, K, D, cached positions S, window.
SHAPES = {
    "embedded_sliding": (4, 1, 256, 256, 256),
    "embedded_full": (4, 1, 512, 700, None),
    "31b_sliding": (32, 16, 256, 1024, 1024),
    "31b_full": (32, 4, 512, 4096, None),
    "e2b_full": (8, 1, 512, 4096, None),
}
# The call of docs/ops.md
SMALL = {"shape": "embedded_sliding", "T": 5}


@pytest.mark.parametrize("T", [1, 5, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_block_attention(benchmark, shape, T):
    H, K, D, S, window = SHAPES[shape]
    C = S if window is None else S - 1 + T
    q, offset, scale = timing.normal(0, 1, T, H, D), mx.array(C - T), 1 / math.sqrt(D)
    # Keys and values of all C places once, queries and results
    nbytes = (2 * K * C * D + 2 * T * H * D) * 2 + 4
    turns = timing.turns(timing.normal(1, 1, K, C, D), timing.normal(2, 1, K, C, D), nbytes=nbytes)
    turned = mx.contiguous(q.swapaxes(1, 2))  # [B, H, T, D], as MLX's attention wants it
    mask = None
    if T > 1:
        rows, columns = mx.arange(C - T, C)[:, None], mx.arange(C)
        mask = (columns <= rows) & (columns > rows - (window or C))
    mx.eval(q, turned, mask, offset)

    def kernel(k, v):
        return block_attention(q, k, v, offset, scale=scale, window=window)

    def mlx(k, v):
        return mx.fast.scaled_dot_product_attention(turned, k, v, scale=scale, mask=mask)

    expected = block_attention_reference(q, *turns[0], offset, scale=scale, window=window)
    timing.check(kernel(*turns[0]), expected, atol=2**-7)
    timing.check(mlx(*turns[0]).swapaxes(1, 2), expected, atol=2**-5)
    timing.compare(benchmark, kernel, mlx, turns, nbytes=nbytes, shape=shape, T=T)
