"""Drafts of lookup where the text repeats itself, of another drafter where it is new.

Each round is one's of the two. The other reads every row either way, so that what it carries is
right when its turn comes again.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from pyengine.drafters.drafter import Asked, Drafter
from pyengine.drafters.lookup import LookupDrafter
from pyengine.model.config import LayerConfig
from pyengine.model.target import Processed
from pyengine.ops.filter_logits import Filtered

if TYPE_CHECKING:
    from typing import Self

LONG_MATCH = 8  # tokens that lookup must have found again, to be preferred untried


class MixedDrafter:
    """``other`` and lookup. A round is lookup's where at least ``shortest`` of the newest tokens
    stand in the text before: that depends on committed tokens alone, so no rule's law is touched.

    Where no text can tell who drafts, ``shortest`` may be set before a round, None for never.
    """

    def __init__(self, other: Drafter, name: str) -> None:
        self.other, self.lookup = other, LookupDrafter()
        self.shortest: int | None = LONG_MATCH
        self._name = name  # of the other
        self._looks_up = False  # in the newest round that was asked for

    @property
    def turn(self) -> Drafter:
        """Who drafts in the round that was asked for."""
        return self.lookup if self._looks_up else self.other

    @property
    def turn_name(self) -> str:
        return "lookup" if self._looks_up else self._name

    @property
    def taps(self) -> tuple[int, ...]:
        return self.other.taps

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return self.other.layers

    @property
    def arrays(self) -> list[mx.array]:
        return [*self.other.arrays, *self._drafts]

    @property
    def _drafts(self) -> list[mx.array]:
        """What lookup carries into this round."""
        return self.lookup.arrays if self._looks_up else []

    def with_arrays(self, arrays: list[mx.array]) -> MixedDrafter:
        mixed = copy.copy(self)
        count = len(arrays) - len(self._drafts)
        mixed.other = self.other.with_arrays(arrays[:count])
        mixed.lookup = self.lookup.with_arrays(arrays[count:])
        return mixed

    def take_results(self, arrays: list[mx.array]) -> None:
        self.other.take_results(arrays[: len(arrays) - len(self._drafts)])

    def wants_to_draft(self, text: Sequence[int], k: int, forced: Sequence[int] = ()) -> bool:
        shortest = self.shortest
        self._looks_up = shortest is not None and self.lookup.wants_to_draft(
            text, k, forced, shortest
        )
        return self._looks_up or self.other.wants_to_draft(text, k, forced)

    @classmethod
    def propose(cls, i: int, drafters: Sequence[Self], asked: Asked) -> Sequence[Filtered]:
        turns = [drafter.turn for drafter in drafters]
        return turns[0].propose(i, turns, asked)

    @classmethod
    def read(cls, readers: Sequence[Self], rows: Sequence[Processed]) -> None:
        others = [reader.other for reader in readers]
        for kind in dict.fromkeys(type(other) for other in others):
            own = [n for n, other in enumerate(others) if type(other) is kind]
            kind.read([others[n] for n in own], [rows[n] for n in own])


def kind_of(drafter: Drafter | None) -> Any:
    """What drafters have in common that propose together, and rounds that one graph serves."""
    if isinstance(drafter, MixedDrafter):
        return MixedDrafter, type(drafter.other), type(drafter.turn)
    return type(drafter)


def looks_up(drafter: Drafter | None) -> bool:
    """Whether the round that was asked for is lookup's of a mix."""
    return isinstance(drafter, MixedDrafter) and drafter.turn is drafter.lookup


def source_of(drafter: Drafter | None) -> type[Drafter | None]:
    """The drafters whose rounds tell what those of this one cost: of a mix the other than lookup,
    whose rounds are the same without the steps."""
    return type(drafter.other if isinstance(drafter, MixedDrafter) else drafter)
