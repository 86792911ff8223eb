"""accept_block against its definition in MLX's operations, for blocks of 2 and 6.

Run: pytest bench/bench_accept_block.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import numpy as np
import pytest
import timing
from sized_calls import DRAFTS, Call

from pyengine.ops import accept_block, accept_block_reference
from pyengine.ops.accept_block import RULES

# The call of docs/ops.md
SMALL = {"k": 5, "rule": "residual"}
TABLE = "rules"  # of bench/count.py
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


def counted(rows, vocab):
    """By the rule block, of distributions that overlap."""
    k = DRAFTS
    draw = np.random.default_rng(0)
    ids = np.stack([draw.permutation(vocab)[:N] for _ in range(k + 1)])
    ids = mx.array(ids.astype(np.int32))
    probs = mx.array(draw.dirichlet(np.full(N, 0.5), k + 1).astype(np.float32))
    drafts = mx.contiguous(ids[:k, 0])
    state = mx.array([7]), mx.array([3], mx.uint32), mx.array([RULES.index("block")], mx.int32)
    lists = ids, probs, ids[:k], probs[:k], drafts
    result = accept_block(*lists, *state, counts=(k + 1,), vocab=vocab)
    yield Call("accept_block", result, {"M": k + 1, "N": N})
