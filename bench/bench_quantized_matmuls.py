"""quantized_matmuls against a quantized_matmul for each matrix: what one launch saves.

Run: pytest bench/bench_quantized_matmuls.py --benchmark-columns=median,iqr,rounds
"""

import pytest
import timing

from pyengine.ops import quantized_matmul, quantized_matmuls, quantized_matmuls_reference

GROUP, BITS = 64, 8
# Columns of q, k and v, and K: the embedded pair's target, a sliding and a full layer of E2B.
SHAPES = {
    "nano": ((256, 256, 256), 128),
    "e2b-sliding": ((2048, 256, 256), 1536),
    "e2b-full": ((4096, 512, 512), 1536),
}
# The call of docs/ops.md
SMALL = {"shape": "nano", "M": 6}


@pytest.mark.parametrize("M", [1, 4, 6, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantized_matmuls(benchmark, shape, M):
    columns, K = SHAPES[shape]
    N = sum(columns)
    # Weights, scales and biases; x and results
    nbytes = N * K * BITS // 8 + 2 * N * K // GROUP * 2 + M * K * 2 + M * N * 2
    x = timing.normal(0, M, K)
    turns = timing.turns(*(timing.quantized(n, n, K) for n in columns), nbytes=nbytes)

    def kernel(*matrices):
        return quantized_matmuls(x, matrices, GROUP, BITS)

    def separate(*matrices):
        return [quantized_matmul(x, *matrix, GROUP, BITS) for matrix in matrices]

    expected = quantized_matmuls_reference(x, turns[0], GROUP, BITS)
    timing.check(kernel(*turns[0]), expected, rtol=2**-6, atol=2)
    timing.check(separate(*turns[0]), kernel(*turns[0]))
    timing.compare(benchmark, kernel, separate, turns, nbytes=nbytes, shape=shape, M=M)
