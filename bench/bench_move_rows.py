"""move_rows against MLX's gather and scatter, which copy the arenas.

Run: pytest bench/bench_move_rows.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import move_rows, move_rows_reference

# The call of docs/ops.md
SMALL = {"K": 2, "D": 256, "Q": 2}
P = 16  # pages of an arena
PATH = [0, 2, 3, 7]  # which three rows of a path are moved of


@pytest.mark.parametrize("Q", [1, 8])
@pytest.mark.parametrize("K, D", [(1, 256), (16, 256)])
def test_move_rows(benchmark, K, D, Q):
    """Of the first sequence three rows move, of the others one."""
    kept = mx.array([4] + [2] * (Q - 1))
    moved = 3 + Q - 1
    if Q == 2:  # as docs/ops.md counts it: of the second none
        kept, moved = mx.array([4, 1]), 3
    # Rows of keys and values in and out; lengths, counts, rows and one entry of each table
    nbytes = 2 * 2 * moved * K * D * 2 + 4 * (2 * Q + 4 * Q + Q)
    arenas = timing.normal(0, P, K, 64, D), timing.normal(1, P, K, 64, D)
    where = mx.arange(Q) * 5, P - 1 - mx.arange(Q)[:, None], mx.array([PATH] * Q), kept
    turns = timing.turns(*arenas, *where, nbytes=nbytes)
    expected = move_rows_reference(*turns[0])
    mx.eval(expected)  # before the arenas are written
    timing.check(move_rows(*turns[0]), expected)
    timing.compare(
        benchmark,
        move_rows,
        move_rows_reference,
        turns,
        nbytes=nbytes,
        baseline_calls=10,
        K=K,
        D=D,
        Q=Q,
    )
