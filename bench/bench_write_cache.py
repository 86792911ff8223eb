"""write_cache against MLX's put_along_axis, which copies the cache.

Run: pytest bench/bench_write_cache.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import write_cache, write_cache_reference

# The call of docs/ops.md
SMALL = {"K": 2, "D": 256, "T": 6}
C = 1024  # places of the cache


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("K, D", [(1, 256), (16, 256)])
def test_write_cache(benchmark, K, D, T):
    nbytes = 2 * T * K * D * 2 + 4  # rows in and into the cache, and the offset
    arrays = (timing.normal(0, 1, K, C, D), timing.normal(1, 1, T, K, D), mx.array(C + 9))
    turns = timing.turns(*arrays, nbytes=nbytes)
    expected = write_cache_reference(*turns[0])
    mx.eval(expected)
    timing.check(write_cache(*turns[0]), expected)
    timing.compare(
        benchmark,
        write_cache,
        write_cache_reference,
        turns,
        nbytes=nbytes,
        baseline_calls=10,
        K=K,
        D=D,
        T=T,
    )
