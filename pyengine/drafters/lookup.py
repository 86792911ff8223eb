"""Drafts from the text itself: what followed the newest tokens the last time they stood there.

Costs no model. Pays where an answer repeats its prompt: edited code, quoted text, tables.

Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding; the search
is that of LZ77 with chains of earlier places.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from pyengine.drafters.drafter import Asked
from pyengine.model.config import LayerConfig
from pyengine.model.target import Processed
from pyengine.ops.filter_logits import Filtered

if TYPE_CHECKING:
    from typing import Self

SHORTEST = 3  # tokens that must match
LONGEST = 16  # tokens that are compared
MOST_PLACES = 64  # that are compared, newest first


class LookupDrafter:
    """Drafts the continuation of the longest match of the newest tokens in the text before them.

    Each draft's distribution has that one candidate, of probability 1, so that every rule stays
    exact. Where nothing matches there is no draft, and the round is a plain step: that depends on
    committed tokens alone, so no rule's law is touched, and it spares the target k useless rows.
    Carries the drafts of a round, int32 ``[k]``.
    """

    def __init__(self) -> None:
        self._drafts: list[mx.array] = []
        self._newest: dict[tuple[int, ...], int] = {}  # by tokens, the newest place behind them
        self._before: dict[int, int] = {}  # by place, the place before it with the same tokens
        self._indexed = SHORTEST  # places before it are in the two

    @property
    def taps(self) -> tuple[int, ...]:
        return ()

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return ()

    @property
    def arrays(self) -> list[mx.array]:
        return self._drafts

    def with_arrays(self, arrays: list[mx.array]) -> LookupDrafter:
        other = copy.copy(self)
        other.take_results(arrays)
        return other

    def take_results(self, arrays: list[mx.array]) -> None:
        self._drafts = arrays

    def wants_to_draft(
        self,
        text: Sequence[int],
        k: int,
        forced: Sequence[int] = (),
        shortest: int = SHORTEST,
    ) -> bool:
        drafts = self.find([*text, *forced] if forced else text, k, shortest)
        self._drafts = [mx.array([*forced, *drafts], dtype=mx.int32)] if drafts else []
        return bool(drafts)

    def find(self, text: Sequence[int], k: int, shortest: int = SHORTEST) -> list[int]:
        """The k tokens that followed the longest match; none where so many tokens do not match.

        A match that reaches into what it predicts goes on with its own drafts, so that there are
        always k.
        """
        place, length = self.match(text)
        drafts: list[int] = []
        while length >= shortest and len(drafts) < k:
            at = place + len(drafts)
            drafts.append(text[at] if at < len(text) else drafts[at - len(text)])
        return drafts

    def match(self, text: Sequence[int]) -> tuple[int, int]:
        """The place behind the longest match of the newest tokens, and its length; 0 for none.

        Of equally long matches the newest counts. Each text must begin with the one before.
        """
        for end in range(self._indexed, len(text)):  # what ends the text matches nothing yet
            tokens = tuple(text[end - SHORTEST : end])
            if tokens in self._newest:
                self._before[end] = self._newest[tokens]
            self._newest[tokens] = end
        self._indexed = max(self._indexed, len(text))
        place, best, length = self._newest.get(tuple(text[-SHORTEST:])), 0, 0
        for _ in range(MOST_PLACES):
            if place is None:
                break
            if (found := _match(text, place)) > length:
                best, length = place, found
            place = self._before.get(place)
        return best, length

    @classmethod
    def propose(cls, i: int, drafters: Sequence[Self], asked: Asked) -> list[Filtered]:
        one = mx.ones((1, 1))
        each = [drafts for drafter in drafters for drafts in drafter._drafts]
        return [Filtered(drafts[i : i + 1, None], one, mx.zeros(1, mx.int32)) for drafts in each]

    @classmethod
    def read(cls, readers: Sequence[Self], rows: Sequence[Processed]) -> None:
        pass


def _match(text: Sequence[int], place: int) -> int:
    """How many of the newest tokens stand before a place too, at most LONGEST."""
    limit = min(place, LONGEST)
    return next((n for n in range(limit) if text[place - 1 - n] != text[-1 - n]), limit)
