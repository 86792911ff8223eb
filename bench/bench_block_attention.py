"""block_attention against MLX's attention, on Gemma 4's shapes and the embedded pair's.

Pieces of several sequences are one call of ours, and of MLX's a call per sequence. Then against a
call per sequence of our own.

Run: pytest bench/bench_block_attention.py --benchmark-columns=median,iqr,rounds
"""

import math

import mlx.core as mx
import numpy as np
import pytest
import timing
from sized_calls import Call, bfloat16

from pyengine.ops import block_attention, block_attention_reference
from pyengine.ops.prepare_qkv import PAGE

# Name: H, K, D, cached positions S, window.
SHAPES = {
    "embedded_sliding": (4, 1, 256, 256, 256),
    "embedded_full": (4, 1, 512, 700, None),
    "31b_sliding": (32, 16, 256, 1024, 1024),
    "31b_full": (32, 4, 512, 4096, None),
    "e2b_full": (8, 1, 512, 4096, None),
}
STREAMS = (1, 4, 8)
# The call of docs/ops.md
SMALL = {"shape": "embedded_sliding", "T": 5, "Q": 4}
TABLE = "attention"  # of bench/count.py


def pieces(H, K, D, S, window, T, Q):
    """Arguments of one call, but for the arena; the positions that rows see, and their keys and
    values in a row."""
    C = S if window is None else S - 1 + T  # that any row of a piece sees
    N = -(-C // PAGE)
    q, length = timing.normal(0, Q * T, H, D), mx.array(Q * [C - T])
    tables = mx.arange(Q * N, dtype=mx.int32).reshape(N, Q).T  # pages of all by turns
    mx.eval(q, length, tables)

    def gathered(arena, s):
        own = arena[tables[s]].swapaxes(0, 1).reshape(K, N * PAGE, D)[:, :C]
        return mx.contiguous(own[None])

    # Keys and values of all C places once, queries and results, lengths and tables
    nbytes = Q * ((2 * K * C * D + 2 * T * H * D) * 2 + 4 + 4 * N)
    return (q, length, tables, Q * [T]), C, gathered, nbytes


@pytest.mark.parametrize("Q", STREAMS)
@pytest.mark.parametrize("T", [1, 5, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_block_attention(benchmark, shape, T, Q):
    H, K, D, S, window = SHAPES[shape]
    (q, *where), C, gathered, nbytes = pieces(H, K, D, S, window, T, Q)
    P, scale = where[1].size, 1 / math.sqrt(D)
    arenas = timing.turns(
        timing.normal(1, P, K, PAGE, D), timing.normal(2, P, K, PAGE, D), nbytes=nbytes
    )
    turns = [(*turn, [[gathered(a, s) for a in turn] for s in range(Q)]) for turn in arenas]
    turned = mx.contiguous(q.reshape(Q, T, H, D).swapaxes(1, 2))  # as MLX's attention wants it
    mask = None
    if T > 1:
        rows, columns = mx.arange(C - T, C)[:, None], mx.arange(C)
        mask = (columns <= rows) & (columns > rows - (window or C))
    mx.eval(turns, turned, mask)

    def kernel(keys, values, alone):
        return block_attention(q, keys, values, *where, scale=scale, window=window)

    def mlx(keys, values, alone):
        return mx.concatenate(
            [
                mx.fast.scaled_dot_product_attention(one[None], k, v, scale=scale, mask=mask)
                for one, (k, v) in zip(turned, alone, strict=True)
            ]
        )

    expected = block_attention_reference(q, *arenas[0], *where, scale=scale, window=window)
    timing.check(kernel(*turns[0]), expected, atol=2**-7)
    timing.check(mlx(*turns[0]).swapaxes(1, 2).reshape(q.shape), expected, atol=2**-5)
    timing.compare(benchmark, kernel, mlx, turns, nbytes=nbytes, shape=shape, T=T, Q=Q)


@pytest.mark.parametrize("Q", STREAMS[1:])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_against_calls(benchmark, shape, T, Q):
    """One call for all sequences against one of ours for each; both give the same bits."""
    H, K, D, S, window = SHAPES[shape]
    (q, lengths, tables, counts), _, _, nbytes = pieces(H, K, D, S, window, T, Q)
    P, options = tables.size, {"scale": 1 / math.sqrt(D), "window": window}
    turns = timing.turns(
        timing.normal(1, P, K, PAGE, D), timing.normal(2, P, K, PAGE, D), nbytes=nbytes
    )
    own = [(q[T * s : T * s + T], lengths[s : s + 1], tables[s : s + 1]) for s in range(Q)]
    mx.eval(own)

    def together(keys, values):
        return block_attention(q, keys, values, lengths, tables, counts, **options)

    def apart(keys, values):
        return mx.concatenate(
            [block_attention(rows, keys, values, *where, [T], **options) for rows, *where in own]
        )

    assert mx.array_equal(together(*turns[0]), apart(*turns[0]))
    timing.compare(benchmark, together, apart, turns, nbytes=nbytes, shape=shape, T=T, Q=Q)


def counted(geometries, rows, length):
    """Key heads are independent of each other, so one is counted, with its query heads."""
    for layer, G, D, window in geometries:
        for T in rows:
            seen = T + (length if window is None else min(length, window - 1))
            first, behind = (length + T - seen) // PAGE, (length + T - 1) // PAGE + 1
            N = behind - first
            shapes = ((T, G, D), (N, 1, PAGE, D), (N, 1, PAGE, D))
            draw = np.random.default_rng(T)
            q, keys, values = (bfloat16(draw.normal(size=shape)) for shape in shapes)
            table = np.zeros((1, N), np.int32)
            table[0, np.arange(first, behind) % N] = draw.permutation(N)
            where = mx.array([length]), mx.array(table), [T]
            result = block_attention(q, keys, values, *where, window=window)
            labels = {"layer": layer, "D": D, "M": T, "rows": T * G, "keys": seen}
            yield Call("block_attention", result, labels, seen / (N * PAGE))
