"""Rows of several sequences behind one another, as one call processes them.

Most ops see rows alone and take them packed, so that a weight is read once for all sequences. What
reads or writes a cache takes each sequence's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


def packed(parts: Sequence[mx.array]) -> mx.array:
    """Rows of each sequence, one behind the other; of one sequence as they are."""
    return parts[0] if len(parts) == 1 else mx.concatenate(list(parts))


def apart(rows: mx.array, counts: Sequence[int]) -> list[mx.array]:
    """What :func:`packed` packed, ``counts`` rows of each sequence."""
    if len(counts) == 1:
        return [rows]
    ends = [sum(counts[: n + 1]) for n in range(len(counts) - 1)]
    return list(mx.split(rows, ends))


def picked(rows: mx.array, places: Sequence[int]) -> mx.array:
    """Rows at places that the host knows; all of them in their order are what is there."""
    count, places = rows.shape[0], list(places)
    if places == list(range(count)):
        return rows
    first = places[0] if places else 0
    if places == list(range(first, first + len(places))):
        return rows[first : first + len(places)]
    return mx.take(rows, mx.array(places, dtype=mx.int32), axis=0)
