"""softcap against the same in MLX's own operations, at Gemma 4's vocabulary.

Run: pytest bench/bench_softcap.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import softcap, softcap_reference

# The call of docs/ops.md
SMALL = {"V": 8192, "T": 6}
CAP = 30.0


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("V", [262144])
def test_softcap(benchmark, V, T):
    nbytes = 2 * T * V * 4
    turns = timing.turns(timing.normal(0, T, V, dtype=mx.float32) * 20, nbytes=nbytes)

    def of(op):
        return lambda x: op(x, CAP)

    kernel, plain = of(softcap), of(softcap_reference)
    timing.check(kernel(*turns[0]), plain(*turns[0]), rtol=1e-5)
    timing.compare(benchmark, kernel, plain, turns, nbytes=nbytes, V=V, T=T)
