"""residual_norm against MLX's norms and an addition: at these sizes the cost is that of a call.

Run: pytest bench/bench_residual_norm.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing
from sized_calls import EPS, WIDTH, Call, random

from pyengine.ops import residual_norm, residual_norm_reference

# The call of docs/ops.md
SMALL = {"E": 1536, "T": 6}
TABLE = "layers"  # of bench/count.py


@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("E", [128, 5376])
def test_residual_norm(benchmark, E, T):
    # Stream and branch, their sum and its norm; two weights
    nbytes = 4 * T * E * 2 + 2 * E * 2
    weights = timing.normal(2, E), timing.normal(3, E)
    turns = timing.turns(timing.normal(0, T, E), timing.normal(1, T, E), *weights, nbytes=nbytes)

    def kernel(h, y, weight, next_weight):
        return residual_norm(h, y, weight, next_weight=next_weight)

    def mlx(h, y, weight, next_weight):
        total = h + mx.fast.rms_norm(y, weight, 1e-6)
        return total, mx.fast.rms_norm(total, next_weight, 1e-6)

    *arrays, following = turns[0]
    expected = residual_norm_reference(*arrays, next_weight=following)
    timing.check(kernel(*turns[0]), expected, rtol=2**-7, atol=2**-7)
    timing.check(mlx(*turns[0]), expected, rtol=2**-5, atol=2**-3)
    timing.compare(benchmark, kernel, mlx, turns, nbytes=nbytes, E=E, T=T)


def counted(T):
    h, y, weight, following = (random(i, *n, WIDTH) for i, n in enumerate([(T,), (T,), (), ()]))
    settings = {"scalar": random(5, 1), "next_weight": following, "eps": EPS}
    result = residual_norm(h, y, weight, **settings)[0]
    yield Call("residual_norm", result, {"M": T, "shape": f"{WIDTH}"})
