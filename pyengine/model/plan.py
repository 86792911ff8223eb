"""Which calls of the forward pass a prompt causes: by absolute positions, never by history.

A processor's kernels are row-stable at any number of rows, so there calls are as long as a chunk.
On a GPU a whole chunk runs MLX's kernels, which are faster and whose bits go with the shape of the
call; what is shorter runs ours, whose bits do not. So a position's keys and values have the same
bits in every prompt that has the same calls up to there, and a prefix is reused only so far.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pyengine import _ext

CHUNK = 512  # positions of a whole chunk, which lies at a multiple of it; more than ROWS
ROWS: int = _ext.max_launch_rows  # the longest call that our kernels take on a GPU

Kernel = Literal["own", "mlx"]


class Call(NamedTuple):
    """One forward pass over ``rows`` positions from ``start`` on."""

    start: int
    rows: int
    kernel: Kernel


def plan(start: int, stop: int, borrows: bool, chunk: int | None = None) -> list[Call]:
    """The calls that process positions ``start`` to ``stop - 1``.

    Args:
        start: Positions that are there already.
        stop: Where the prompt ends.
        borrows: Whether whole chunks run MLX's kernels (:func:`pyengine.ops.dispatch.borrows`).
        chunk: In place of ``CHUNK``.
    """
    chunk = chunk or CHUNK
    calls = []
    while start < stop:
        end = min(start - start % chunk + chunk, stop)
        whole = borrows and end - start == chunk
        if borrows and not whole:  # MLX's kernels never see a call of another length
            end = min(start - start % ROWS + ROWS, end)
        calls.append(Call(start, end - start, "mlx" if whole else "own"))
        start = end
    return calls


def chunk_end(start: int, stop: int) -> int:
    """Where the chunk that ``start`` lies in ends, or the prompt."""
    return min(start - start % CHUNK + CHUNK, stop)


def most_together(borrows: bool) -> int:
    """How many positions one call may process of several prompts: all by kernels of ours."""
    return ROWS if borrows else CHUNK


def last_chunk(start: int, stop: int) -> int:
    """Where, from ``start`` on, no more than a chunk of a prompt is left."""
    return start if stop - start <= CHUNK else (stop - 1) // CHUNK * CHUNK


def whole(stop: int, borrows: bool) -> int:
    """How many positions of a prompt lie in calls of MLX's kernels: its whole chunks."""
    return stop - stop % CHUNK if borrows else 0


def reusable(shared: int, made: int, stop: int, borrows: bool) -> int:
    """How many of ``shared`` known positions the calls of another prompt would have made alike.

    Args:
        shared: Positions with the same tokens.
        made: How many positions MLX's kernels had made there (:func:`whole`); ours made the rest.
        stop: Where the prompt that would reuse them ends.
        borrows: As :func:`plan`.
    """
    wanted = whole(stop, borrows)
    if made == wanted <= shared:
        return shared  # all beyond the whole chunks is ours in both
    alike = min(shared, made, wanted)
    return alike - alike % CHUNK


def border(position: int, stop: int, borrows: bool) -> int:
    """The last position up to ``position`` where the calls of a prompt may be parted."""
    return reusable(position, whole(stop, borrows), stop, borrows)
