"""What many sequences do next: who joins, and whether a prompt's chunk or a round runs.

Pure: no arrays, no clocks, no locks. What it decides changes when a text comes, never the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

SLOWDOWN = 2.0  # by so much prompts slow running texts at most, beyond the one chunk under way
MOST_ROWS = 128  # of one round: a GPU's own kernels take no more


class Load(NamedTuple):
    """What there is to do.

    Attributes:
        waiting: Bytes that each waiting sequence needs at worst, in the order of arrival.
        places: How many may join at most.
        free: Bytes that nobody was promised; None where nobody counts.
        active: Sequences that have joined, of whatever state.
        prompts: Those whose prompts are under way.
        texts: Those that can have a round now.
        chunk_s: What the newest chunk of a prompt took.
        rounds_s: What rounds took since.
    """

    waiting: Sequence[int]
    places: int
    free: int | None
    active: int
    prompts: int
    texts: int
    chunk_s: float
    rounds_s: float


class Plan(NamedTuple):
    """How many of the waiting join, from the first on, and the work that is next: a chunk of the
    prompt that came first, a round of all texts, or None."""

    joining: int
    work: Literal["chunk", "round"] | None


def plan(load: Load) -> Plan:
    """The next step.

    Nobody overtakes: one that does not fit holds up all behind it until others have ended. One that
    is alone joins whatever it needs. Nobody starves: a round is of all texts, and rounds and chunks
    take turns; after a chunk, rounds have the time that it took, times 1 / (SLOWDOWN - 1).
    """
    joining, free = 0, load.free
    for need in load.waiting[: load.places]:
        alone = not load.active and not joining
        if free is not None and need > free and not alone:
            break
        free = None if free is None else max(0, free - need)
        joining += 1
    owed = load.chunk_s / (SLOWDOWN - 1)
    if load.prompts + joining and (not load.texts or load.rounds_s >= owed):
        return Plan(joining, "chunk")
    return Plan(joining, "round" if load.texts else None)


def groups(rows: Sequence[int]) -> list[range]:
    """Places of sequences with so many rows each that go into one round, in order."""
    found, begin, total = [], 0, 0
    for place, count in enumerate(rows):
        if place > begin and total + count > MOST_ROWS:
            found.append(range(begin, place))
            begin, total = place, 0
        total += count
    return [*found, range(begin, len(rows))] if rows else []
