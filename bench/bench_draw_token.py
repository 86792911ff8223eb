"""draw_token against its definition in MLX's operations, for each of its two draws.

Run: pytest bench/bench_draw_token.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import draw_token, draw_token_reference

# The call of docs/ops.md
SMALL = {"T": 6, "shared": True}
N = 64  # candidates of a row


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("T", [1, 6])
def test_draw_token(benchmark, T, shared):
    nbytes = T * N * (4 + 4) + 2 * 4 + 4 * T
    state = mx.array(7), mx.array(1, dtype=mx.uint32)
    turns = timing.turns(*timing.candidates(0, T, N), *state, nbytes=nbytes)

    def of(op):
        return lambda *arrays: op(*arrays, shared=shared)

    kernel, plain = of(draw_token), of(draw_token_reference)
    timing.check(kernel(*turns[0]), plain(*turns[0]))
    timing.compare(benchmark, kernel, plain, turns, nbytes=nbytes, T=T, shared=shared)
