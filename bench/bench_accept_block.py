"""accept_block against its definition in MLX's operations, for blocks of 2 and 6.

Run: pytest bench/bench_accept_block.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import accept_block, accept_block_reference
from pyengine.ops.accept_block import RULES

# The call of docs/ops.md
SMALL = {"k": 5, "rule": "residual"}
N = 64  # candidates of a row


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 5])
def test_accept_block(benchmark, k, rule):
    p, q = timing.candidates(0, k + 1, N), timing.candidates(1, k, N)
    drafts = mx.arange(k, dtype=mx.int32)
    state = mx.array([7]), mx.array([1], dtype=mx.uint32), mx.array([RULES.index(rule)], mx.int32)
    nbytes = (2 * k + 1) * N * (4 + 4) + 4 * k + 3 * 4 + 2 * 4
    turns = timing.turns(*p, *q, drafts, *state, nbytes=nbytes)

    def of(op):
        return lambda *arrays: op(*arrays, counts=(k + 1,), vocab=N)

    kernel, plain = of(accept_block), of(accept_block_reference)
    timing.check(kernel(*turns[0]), plain(*turns[0]))
    timing.compare(benchmark, kernel, plain, turns, nbytes=nbytes, k=k, rule=rule)
