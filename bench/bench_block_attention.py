"""block_attention against MLX's attention, on Gemma 4's shapes and the embedded pair's.

Run: pytest bench/bench_block_attention.py --benchmark-columns=median,iqr,rounds
"""

import math

import mlx.core as mx
import pytest

from pyengine.ops import block_attention, block_attention_reference

# Name: H, K, D, cached positions S, window.
SHAPES = {
    "embedded_sliding": (4, 1, 256, 256, 256),
    "embedded_full": (4, 1, 512, 700, None),
    "31b_sliding": (32, 16, 256, 1024, 1024),
    "31b_full": (32, 4, 512, 4096, None),
    "e2b_full": (8, 1, 512, 4096, None),
}


@pytest.mark.parametrize("implementation", ["mlx", "native"])
@pytest.mark.parametrize("T", [1, 5, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_block_attention(benchmark, shape, T, implementation):
    H, K, D, S, window = SHAPES[shape]
    C = S if window is None else S - 1 + T
    dtype = mx.bfloat16
    q = mx.random.normal((1, T, H, D), key=mx.random.key(0)).astype(dtype)
    k, v = (mx.random.normal((1, K, C, D), key=mx.random.key(i)).astype(dtype) for i in (1, 2))
    offset, scale = mx.array(C - T), 1 / math.sqrt(D)
    turned = mx.contiguous(q.swapaxes(1, 2))  # [B, H, T, D], as MLX's attention wants it
    mask = None
    if T > 1:
        rows, columns = mx.arange(C - T, C)[:, None], mx.arange(C)
        mask = (columns <= rows) & (columns > rows - (window or C))
    mx.eval(q, k, v, turned, mask, offset)

    def native() -> mx.array:
        return block_attention(q, k, v, offset, scale=scale, window=window)

    def mlx() -> mx.array:
        return mx.fast.scaled_dot_product_attention(turned, k, v, scale=scale, mask=mask)

    expected = block_attention_reference(q, k, v, offset, scale=scale, window=window)
    assert mx.allclose(native(), expected, atol=2**-7)
    assert mx.allclose(mlx().swapaxes(1, 2), expected, atol=2**-5)

    run = native if implementation == "native" else mlx
    benchmark.group = f"{shape} T={T}"
    benchmark.pedantic(lambda: mx.eval(run()), warmup_rounds=2, rounds=9)
    moved = k.nbytes + v.nbytes + 2 * q.nbytes  # what has to cross the bus once
    benchmark.extra_info["GB/s"] = round(moved / benchmark.stats.stats.median / 1e9, 2)
