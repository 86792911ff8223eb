"""draw_token against its definition in MLX's operations, for each of its two draws.

Run: pytest bench/bench_draw_token.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing
from sized_calls import Call

from pyengine.ops import draw_token, draw_token_reference

# The call of docs/ops.md
SMALL = {"T": 6, "shared": True}
TABLE = "rules"  # of bench/count.py
N = 64  # candidates of a row


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("T", [1, 6])
def test_draw_token(benchmark, T, shared):
    # Candidates; position, index, seed and which draw of each row; a token
    nbytes = T * N * (4 + 4) + T * (3 * 4 + 1) + 4 * T
    at = mx.full((T,), 7, mx.int32), mx.arange(T, dtype=mx.int32)
    key = mx.full((T,), 1, mx.uint32), mx.full((T,), shared)
    turns = timing.turns(*timing.candidates(0, T, N), *at, *key, nbytes=nbytes)
    timing.check(draw_token(*turns[0]), draw_token_reference(*turns[0]))
    labels = {"T": T, "shared": shared}
    timing.compare(benchmark, draw_token, draw_token_reference, turns, nbytes=nbytes, **labels)


def counted(rows, vocab):
    at = mx.array([7], mx.int32), mx.array([1], mx.int32), mx.array([3], mx.uint32)
    result = draw_token(*timing.candidates(0, 1, N), *at, mx.array([False]))
    yield Call("draw_token", result, {"M": 1, "N": N})
