"""quantized_matmul against mx.quantized_matmul, on weights that no cache holds.

Run: pytest bench/bench_quantized_matmul.py --benchmark-columns=median,iqr,rounds
"""

import itertools

import mlx.core as mx
import pytest
from timing import cold_copies, compare

from pyengine.ops import quantized_matmul, quantized_matmul_reference

GROUP = 64


@pytest.mark.parametrize("M", [1, 2, 4, 6, 8, 16])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("N, K", [(4096, 4096), (5376, 21504)])
def test_quantized_matmul(benchmark, N, K, bits, M):
    # Weights, scales and biases; x and out are at most a few thousandths of them.
    nbytes = N * K * bits // 8 + 2 * N * K // GROUP * 2
    x = mx.random.normal((M, K), key=mx.random.key(0)).astype(mx.bfloat16)
    first = mx.quantize(mx.random.normal((N, K)).astype(mx.bfloat16), GROUP, bits)
    copies = [first] + [tuple(a + 0 for a in first) for _ in range(cold_copies(nbytes) - 1)]
    mx.eval(x, copies)
    expected = quantized_matmul_reference(x, *first, GROUP, bits)
    assert mx.allclose(quantized_matmul(x, *first, GROUP, bits), expected, rtol=2**-6, atol=2)

    turns = itertools.cycle(copies)
    compare(
        benchmark,
        lambda: mx.eval([quantized_matmul(x, *q, GROUP, bits) for q in copies]),
        lambda: mx.eval(mx.quantized_matmul(x, *next(turns), True, GROUP, bits)),
        calls=len(copies),
        nbytes=nbytes,
        N=N,
        K=K,
        bits=bits,
        M=M,
    )
