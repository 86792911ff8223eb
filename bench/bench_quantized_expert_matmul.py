"""quantized_expert_matmul, gated, against MLX's gather_qmm twice and the gate.

Run: pytest bench/bench_quantized_expert_matmul.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import numpy as np
import pytest
import timing
from sized_calls import BITS, EXPERTS, EXPERTS_USED, GROUP, Call, quantized, random

from pyengine.ops import glu, quantized_expert_matmul, quantized_expert_matmul_reference

# The call of docs/ops.md
SMALL = {"N": 64, "K": 512, "T": 6}
TABLE = "experts"  # of bench/count.py
X, U = 32, 8


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


def counted(M, N, K):
    """The gated form; needed are the weights of the experts that some token uses."""
    draw = np.random.default_rng(M)
    ids = np.stack([np.sort(draw.permutation(EXPERTS)[:EXPERTS_USED]) for _ in range(M)])
    stack, up = (quantized(seed, EXPERTS, N, K) for seed in (1, 2))
    at = mx.array(ids.astype(np.int32))
    result = quantized_expert_matmul(random(0, M, K), stack, at, GROUP, BITS, up=up)
    labels = {"M": M, "N": N, "K": K}
    yield Call("quantized_expert_matmul", result, labels, len(np.unique(ids)) / EXPERTS)
