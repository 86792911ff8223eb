"""quantized_matmul against mx.quantized_matmul, on weights that no cache holds.

Run: pytest bench/bench_quantized_matmul.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import quantized_matmul, quantized_matmul_reference

# The call of docs/ops.md
SMALL = {"N": 128, "K": 1536, "bits": 8, "M": 6}
GROUP = 64


@pytest.mark.parametrize("M", [1, 2, 4, 6, 8, 16])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("N, K", [(4096, 4096), (5376, 21504)])
def test_quantized_matmul(benchmark, N, K, bits, M):
    # Weights, scales and biases; x and results
    nbytes = N * K * bits // 8 + 2 * N * K // GROUP * 2 + M * K * 2 + M * N * 2
    x = timing.normal(0, M, K)
    matrix = timing.quantized(1, N, K, group_size=GROUP, bits=bits)
    turns = timing.turns(*matrix, nbytes=nbytes)

    def kernel(*q):
        return quantized_matmul(x, *q, GROUP, bits)

    def mlx(*q):
        return mx.quantized_matmul(x, *q, True, GROUP, bits)

    expected = quantized_matmul_reference(x, *turns[0], GROUP, bits)
    timing.check(kernel(*turns[0]), expected, rtol=2**-6, atol=2)
    labels = {"N": N, "K": K, "bits": bits, "M": M}
    timing.compare(benchmark, kernel, mlx, turns, nbytes=nbytes, baseline_calls=1, **labels)
