"""random_uniform against the same in MLX's own operations.

Run: pytest bench/bench_random_uniform.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import random_uniform, random_uniform_reference

# The call of docs/ops.md
SMALL = {"n": 1024}
KEY = (3, 5)


@pytest.mark.parametrize("n", [6, 4096])
def test_random_uniform(benchmark, n):
    nbytes = n * 4 * 4 + n * 4
    counters = mx.random.randint(0, 2**31, (n, 4), key=mx.random.key(0)).astype(mx.uint32)
    turns = timing.turns(counters, nbytes=nbytes)

    def of(op):
        return lambda counters: op(counters, KEY)

    kernel, plain = of(random_uniform), of(random_uniform_reference)
    timing.check(kernel(*turns[0]), plain(*turns[0]))
    timing.compare(benchmark, kernel, plain, turns, nbytes=nbytes, n=n)
