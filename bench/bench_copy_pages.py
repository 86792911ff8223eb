"""copy_pages against MLX's gather and scatter, which copy the arena.

Run: pytest bench/bench_copy_pages.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing
from sized_calls import HEADS, Call, random

from pyengine.ops import copy_pages, copy_pages_reference

# The call of docs/ops.md
SMALL = {"K": 2, "D": 256, "n": 2}
TABLE = "layers"  # of bench/count.py
P = 24  # pages of the arena


@pytest.mark.parametrize("n", [1, 6])
@pytest.mark.parametrize("K, D", [(1, 256), (16, 256)])
def test_copy_pages(benchmark, K, D, n):
    nbytes = 2 * n * K * 64 * D * 2 + 2 * n * 4  # pages read and written, and their numbers
    sources = mx.arange(n) + 7
    turns = timing.turns(timing.normal(0, P, K, 64, D), sources, sources + n, nbytes=nbytes)
    expected = copy_pages_reference(*turns[0])
    mx.eval(expected)
    timing.check(copy_pages(*turns[0]), expected)
    timing.compare(
        benchmark,
        copy_pages,
        copy_pages_reference,
        turns,
        nbytes=nbytes,
        baseline_calls=10,
        K=K,
        D=D,
        n=n,
    )


def counted(T):
    """One page of two."""
    for _, K, D in HEADS if T == 1 else ():
        result = copy_pages(random(7, 2, K, 64, D), mx.array([1]), mx.array([0]))
        yield Call("copy_pages", result, {"M": 1, "shape": f"{K} of {D}"})
