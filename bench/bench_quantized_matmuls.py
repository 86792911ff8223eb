"""quantized_matmuls against a quantized_matmul for each matrix: what one launch saves.

Run: pytest bench/bench_quantized_matmuls.py --benchmark-columns=median,iqr,rounds
"""

from itertools import pairwise

import pytest
import timing
from sized_calls import BITS, GROUP, Call, quantized, random

from pyengine.ops import quantized_matmul, quantized_matmuls, quantized_matmuls_reference

# Columns of q, k and v, and K: the embedded pair's target, a sliding and a full layer of E2B.
SHAPES = {
    "nano": ((256, 256, 256), 128),
    "e2b-sliding": ((2048, 256, 256), 1536),
    "e2b-full": ((4096, 512, 512), 1536),
}
# The call of docs/ops.md
SMALL = {"shape": "nano", "M": 6}
TABLE = "matrices"  # of bench/count.py


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


def counted(M, N, K):
    """q, k and v with the columns of one matrix between them, in E2B's proportions but for
    rounding."""
    w, scales, biases = quantized(1, N, K)
    ends = (0, N // 2, 3 * N // 4, N)
    parts = [(w[i:j], scales[i:j], biases[i:j]) for i, j in pairwise(ends)]
    result = quantized_matmuls(random(0, M, K), parts, GROUP, BITS)
    yield Call("quantized_matmuls", result, {"M": M, "N": N, "K": K})
