"""quantized_gated_matmul against the three ops it stands for: what one pass over x saves.

Run: pytest bench/bench_quantized_gated_matmul.py --benchmark-columns=median,iqr,rounds
"""

import pytest
import timing
from sized_calls import BITS, GROUP, Call, quantized, random

from pyengine.ops import (
    glu,
    quantized_gated_matmul,
    quantized_gated_matmul_reference,
    quantized_matmul,
)

# The call of docs/ops.md
SMALL = {"N": 128, "K": 1536, "bits": 8, "M": 6}
TABLE = "matrices"  # of bench/count.py


@pytest.mark.parametrize("M", [1, 6, 16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("N, K", [(6144, 1536)])
def test_quantized_gated_matmul(benchmark, N, K, bits, M):
    # Both matrices with their scales and biases; x and results
    nbytes = 2 * (N * K * bits // 8 + 2 * N * K // GROUP * 2) + M * K * 2 + M * N * 2
    x = timing.normal(0, M, K)
    pair = (timing.quantized(i, N, K, group_size=GROUP, bits=bits) for i in (1, 2))
    turns = timing.turns(*pair, nbytes=nbytes)

    def kernel(gate, up):
        return quantized_gated_matmul(x, gate, up, GROUP, bits)

    def separate(gate, up):
        return glu(*(quantized_matmul(x, *matrix, GROUP, bits) for matrix in (gate, up)))

    expected = quantized_gated_matmul_reference(x, *turns[0], GROUP, bits)
    timing.check(kernel(*turns[0]), expected, rtol=2**-5, atol=8)
    timing.check(separate(*turns[0]), kernel(*turns[0]))
    timing.compare(benchmark, kernel, separate, turns, nbytes=nbytes, N=N, K=K, bits=bits, M=M)


def counted(M, N, K):
    x, gate, up = random(0, M, K), quantized(1, N, K), quantized(2, N, K)
    result = quantized_gated_matmul(x, gate, up, GROUP, BITS)
    yield Call("quantized_gated_matmul", result, {"M": M, "N": N, "K": K})
