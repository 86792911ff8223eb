"""route_experts against its definition in MLX's operations, with the experts of 26B-A4B.

Run: pytest bench/bench_route_experts.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import route_experts, route_experts_reference

# The call of docs/ops.md
SMALL = {"X": 128, "T": 6}
USED = 8


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("X", [128])
def test_route_experts(benchmark, X, T):
    # Logits and scales; ids and weights of the chosen
    nbytes = 4 * T * X + 4 * X + T * USED * (4 + 4)
    arrays = (timing.normal(0, T, X, dtype=mx.float32), timing.normal(1, X, dtype=mx.float32))
    turns = timing.turns(*arrays, nbytes=nbytes)

    def of(op):
        return lambda logits, scales: op(logits, scales, USED)

    kernel, plain = of(route_experts), of(route_experts_reference)
    timing.check(kernel(*turns[0]), plain(*turns[0]), rtol=1e-5)
    timing.compare(benchmark, kernel, plain, turns, nbytes=nbytes, X=X, T=T)
