"""What a text leaves to the next one of its pair: the graphs of its rounds, and a small arena.

To record a round takes as long as to play three or four, and a text of a small pair has but some
twenty. A played graph that keeps its memory is bound to where the arena lies, so the arena stays
too, unless it is so large that others may miss its memory. No bit depends on what was left: pages
of others, and what lies in free ones, are nothing to a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from pyengine import forked
from pyengine.drafters.drafter import TargetLike
from pyengine.engine.rounds import Rounds
from pyengine.model.cache import Arena
from pyengine.model.config import LayerConfig

LARGEST = 1 << 26  # bytes of an arena that is kept


class Left(NamedTuple):
    """What plays the rounds, and where keys and values go."""

    rounds: Rounds
    arena: Arena | None


class Idle:
    """What the newest text that has ended left; nothing while the next one works with it. Texts of
    several threads at once begin with nothing, but for one."""

    def __init__(self) -> None:
        self._left: list[Left] = []  # at most one; append and pop are safe between threads

    @contextmanager
    def work(self, target: TargetLike, layers: tuple[LayerConfig, ...]) -> Iterator[Left]:
        """Something to work with, for one text; left to the next one unless it fails.

        Args:
            target: Its target.
            layers: Of its drafter, whose keys and values are kept beside the target's.

        Raises:
            RuntimeError: The process was forked from one that had used MLX.
        """
        forked.check("generate")
        try:
            rounds, arena = self._left.pop()
        except IndexError:
            rounds, arena = Rounds(), None
        if arena is None or arena.beside != layers:
            arena = target.new_arena()
        try:
            yield Left(rounds, arena)
        except GeneratorExit:  # between two rounds
            self._leave(rounds, arena)
            raise
        self._leave(rounds, arena)

    def _leave(self, rounds: Rounds, arena: Arena) -> None:
        try:
            arena.rest()
        except RuntimeError:  # closed by another thread than it ran on: what is lazy is that one's
            return
        self._left[:] = [Left(rounds, arena if arena.nbytes <= LARGEST else None)]


def idle_of(pair: object) -> Idle:
    """That of a pair, which is frozen and keeps it as it keeps a cached property."""
    kept: Idle = vars(pair).setdefault("_idle", Idle())
    return kept
