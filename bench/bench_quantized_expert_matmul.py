"""quantized_expert_matmul, gated, against MLX's gather_qmm twice and the gate.

Run: pytest bench/bench_quantized_expert_matmul.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import glu, quantized_expert_matmul, quantized_expert_matmul_reference

# The call of docs/ops.md
SMALL = {"N": 64, "K": 512, "T": 6}
X, U, GROUP, BITS = 32, 8, 64, 8


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("N, K", [(704, 2816)])
def test_quantized_expert_matmul(benchmark, N, K, T):
    ids = (mx.arange(T)[:, None] + mx.arange(U)) % X  # token t uses experts t to t + U - 1
    used = min(X, T + U - 1)
    # Gate and up of the experts that some token uses; x, ids and results
    nbytes = used * 2 * (N * K * BITS // 8 + 2 * N * K // GROUP * 2)
    nbytes += T * K * 2 + 4 * T * U + T * U * N * 2
    x, stacks = timing.normal(0, T, K), [timing.quantized(i, X, N, K) for i in (1, 2)]
    turns = timing.turns(*stacks, nbytes=nbytes)

    def kernel(gate, up):
        return quantized_expert_matmul(x, gate, ids, GROUP, BITS, up=up)

    def mlx(gate, up):
        rows = x[:, None, None]
        options = {"rhs_indices": ids, "transpose": True, "group_size": GROUP, "bits": BITS}
        parts = (mx.gather_qmm(rows, *stack, **options)[:, :, 0] for stack in (gate, up))
        return glu(*parts)

    gate, up = turns[0]
    expected = quantized_expert_matmul_reference(x, gate, ids, GROUP, BITS, up=up)
    timing.check(kernel(gate, up), expected, rtol=2**-5, atol=8)
    timing.compare(benchmark, kernel, mlx, turns, nbytes=nbytes, baseline_calls=1, N=N, K=K, T=T)
