from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, Results, copied, normal
from .prepare_qkv import PAGE
from .sizes import Shape, Sizes


def move_rows(
    keys: mx.array,
    values: mx.array,
    lengths: mx.array,
    tables: mx.array,
    rows: mx.array,
    kept: mx.array,
) -> tuple[mx.array, mx.array]:
    """Move the kept rows of trees to the places that plain steps would have given them, in place.

    Of sequence s, for j from 0 to below ``kept[s]``, one after the other: what lies in the place of
    position ``lengths[s] + rows[s, j]`` goes to that of position ``lengths[s] + j``. Position p
    lies in page ``tables[s, p // 64 % N]``, place ``p % 64``. A row that is negative, or one of
    whose two pages is none of the P, is left out, and so is all beyond ``rows``. A path from a
    tree's root rises, so no row is overwritten before it was moved; of a chain nothing moves.

    The results *are* the arenas' memory, with the rules for handles of :func:`prepare_qkv`. No two
    sequences may have a page of these places in common.

    Args:
        keys: The arena's, ``[P, K, 64, D]``, float32, float16 or bfloat16, evaluated to a
            contiguous array; D is even.
        values: The same.
        lengths: int32 ``[Q]``, the position of each sequence's row 0, on the device.
        tables: int32 ``[Q, N]``, pages of each sequence.
        rows: int32 ``[Q, A]``, on the device.
        kept: int32 ``[Q]``, how many of them count, on the device.

    Returns:
        Keys and values ``[P, K, 64, D]`` with up to Q * A places replaced.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
        RuntimeError: keys or values turn out not to be contiguous when evaluated.
    """
    args = (keys, values, lengths, tables, rows, kept)
    keys, values = run(_ext.move_rows(*args), move_rows_reference, *args)
    return keys, values


ELEMENTWISE = True  # the reference has no reduction


def move_rows_reference(
    keys: mx.array,
    values: mx.array,
    lengths: mx.array,
    tables: mx.array,
    rows: mx.array,
    kept: mx.array,
) -> tuple[mx.array, mx.array]:
    """The same in plain MLX, as copies: older handles keep their content."""
    if not (keys.size and tables.size and rows.size):
        return keys * 1, values * 1
    P, N = keys.shape[0], tables.shape[1]
    # What goes nowhere goes to a page of its own, which is cut off
    arenas = [mx.concatenate([a, mx.zeros_like(a[:1])]).swapaxes(1, 2) for a in (keys, values)]
    for j in range(rows.shape[1]):
        ends = []
        for row in (rows[:, j], mx.full(kept.shape, j, mx.int32)):
            known = (lengths >= 0) & (lengths < 1 << 30) & (row >= 0) & (row < (1 << 30) - lengths)
            position = mx.where(known & (j < kept), lengths + row, -1)
            at = mx.maximum(position, 0) // PAGE % N
            page = mx.take_along_axis(tables, at[:, None], axis=1)[:, 0]
            ends.append((mx.where((position >= 0) & (page >= 0) & (page < P), page, P), position))
        (source, old), (target, new) = ends
        target = mx.where(source == P, P, target)
        for arena in arenas:
            arena[target, new % PAGE] = arena[source, old % PAGE]
    found = [mx.contiguous(arena[:-1].swapaxes(1, 2)) for arena in arenas]
    return found[0], found[1]


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for heads in sizes.heads:
        if heads.has_trees:
            yield {"K": heads.K, "D": heads.D, "dtype": sizes.dtype}, {}


def example(K: int, D: int, dtype: str) -> Call:
    """Two rows of each of several sequences that have a page each; a row is a sequence."""
    keys, values = (normal(i, MOST, K, PAGE, D, dtype=dtype) for i in (1, 2))
    lengths, tables = 3 * mx.arange(MOST), mx.arange(MOST)[:, None]
    rows = mx.broadcast_to(mx.array([0, 2, 5]), (MOST, 3))
    kept = mx.full(MOST, 3)

    def move(arenas: Results, b: int, e: int) -> Results:
        where = (a[b:e] for a in (lengths, tables, rows, kept))
        return list(move_rows(arenas[0], arenas[1], *where))

    own = [copied(keys), copied(values)]
    return Call(
        lambda b, e: move([copied(keys), copied(values)], b, e),
        lambda results, i, t: [a[t] for a in results],
        exact_definition=True,
        timed=lambda b, e: move(own, b, e),
    )
