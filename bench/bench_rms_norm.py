"""rms_norm against MLX's own.

Run: pytest bench/bench_rms_norm.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing
from sized_calls import WIDTH, Call, random

from pyengine.ops import rms_norm, rms_norm_reference

# The call of docs/ops.md
SMALL = {"E": 1536, "T": 6}
TABLE = "layers"  # of bench/count.py


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("E", [128, 5376])
def test_rms_norm(benchmark, E, T):
    nbytes = 2 * T * E * 2 + E * 2
    turns = timing.turns(timing.normal(0, T, E), timing.normal(1, E), nbytes=nbytes)

    def mlx(x, weight):
        return mx.fast.rms_norm(x, weight, 1e-6)

    timing.check(rms_norm(*turns[0]), rms_norm_reference(*turns[0]), rtol=2**-7)
    timing.check(mlx(*turns[0]), rms_norm_reference(*turns[0]), rtol=2**-6)
    timing.compare(benchmark, rms_norm, mlx, turns, nbytes=nbytes, E=E, T=T)


def counted(T):
    labels = {"M": T, "shape": f"{WIDTH}"}
    yield Call("rms_norm", rms_norm(random(0, T, WIDTH), random(0, WIDTH)), labels)
