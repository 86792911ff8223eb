"""Whose turn the rounds of a mix are, where each round has a block size of its own.

There no text can tell who drafts, so measured cost and acceptance may: the way that promises more
tokens per second is taken.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.drafters.drafter import TargetLike
from pyengine.drafters.lookup import SHORTEST
from pyengine.drafters.mixed import LONG_MATCH, MixedDrafter
from pyengine.engine.controller import MOST_DRAFTS, Acceptance, Text
from pyengine.engine.known import looked_up


class Turns:
    """The rounds of one text that are lookup's or another drafter's.

    What lookup would draft is compared with the tokens of every round, whoever drafted it: a text
    is the same either way, so it is known which of them would have been kept, at no cost. So
    neither way is ever forgotten for being passed over. Short matches and long ones have an
    acceptance each.
    """

    def __init__(self, target: TargetLike, drafter: MixedDrafter, acceptance: Acceptance) -> None:
        self._drafter, self._other = drafter, acceptance
        self._kinds = [Acceptance(looked_up(target, long)) for long in (False, True)]
        self._guess: list[int] = []
        self._kind = self._kinds[0]  # of the guess

    def ways(self, text: Sequence[int]) -> list[Text]:
        """How the next round behind these tokens may draft: the other way, and by lookup where it
        finds any."""
        lookup, own = self._drafter.lookup, Text(self._other)
        _, length = lookup.match(text)
        self._kind = self._kinds[length >= LONG_MATCH]
        self._guess = lookup.find(text, MOST_DRAFTS)
        return [own, Text(self._kind, free=True)] if length >= SHORTEST else [own]

    def take(self, way: Text) -> None:
        """Draft that way."""
        self._drafter.shortest = SHORTEST if way.free else None

    def judge(self, tokens: Sequence[int]) -> None:
        """Tokens that came behind those that :meth:`ways` was asked about."""
        pairs = list(zip(self._guess, tokens, strict=False))
        kept = next((n for n, (guess, token) in enumerate(pairs) if guess != token), len(pairs))
        for own in (self._kind, self._kind.prior):
            if own is not None:
                own.note(len(pairs), kept)
        self._guess = []
