"""glu against the same in MLX's own operations.

Run: pytest bench/bench_glu.py --benchmark-columns=median,iqr,rounds
"""

import pytest
import timing
from sized_calls import WIDTH, Call, random

from pyengine.ops import glu, glu_reference

# The call of docs/ops.md
SMALL = {"F": 6144, "T": 6}
TABLE = "layers"  # of bench/count.py


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("F", [512, 21504])
def test_glu(benchmark, F, T):
    nbytes = 3 * T * F * 2
    turns = timing.turns(timing.normal(0, T, F), timing.normal(1, T, F), nbytes=nbytes)
    timing.check(glu(*turns[0]), glu_reference(*turns[0]), rtol=2**-7, atol=2**-20)
    timing.compare(benchmark, glu, glu_reference, turns, nbytes=nbytes, F=F, T=T)


def counted(T):
    gate, up = random(6, T * WIDTH), random(7, T * WIDTH)
    yield Call("glu", glu(gate, up), {"M": T, "shape": f"{WIDTH}"})
