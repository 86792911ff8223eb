"""weigh_experts against a product and a sum of MLX, with the experts of 26B-A4B.

Run: pytest bench/bench_weigh_experts.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import weigh_experts, weigh_experts_reference

# The call of docs/ops.md
SMALL = {"E": 1536, "T": 6}
U, DTYPE = 8, mx.bfloat16


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("E", [2816])
def test_weigh_experts(benchmark, E, T):
    nbytes = 4 * T * U * E + 4 * T * U + T * E * DTYPE.size
    arrays = (timing.normal(0, T, U, E, dtype=mx.float32), timing.normal(1, T, U, dtype=mx.float32))
    turns = timing.turns(*arrays, nbytes=nbytes)

    def kernel(parts, weights):
        return weigh_experts(parts, weights, DTYPE)

    def mlx(parts, weights):
        return (parts * weights[..., None]).sum(axis=1).astype(DTYPE)

    timing.check(kernel(*turns[0]), weigh_experts_reference(*turns[0], DTYPE))
    timing.check(mlx(*turns[0]), kernel(*turns[0]), rtol=2**-7, atol=2**-7)
    timing.compare(benchmark, kernel, mlx, turns, nbytes=nbytes, E=E, T=T)
