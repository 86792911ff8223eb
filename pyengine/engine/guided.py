"""Rounds of texts that a grammar guides: the host stands behind each draft.

Which tokens may come next depends on the drafts before, and the grammar is followed on the host. So
drafts are drawn one at a time, each from what the mask of its own row leaves of the drafter's
distribution, and then verified in one call against the target's, which the same masks have cut.
That is the round of any other text, for another p and another q: what the rules promise holds for
the p of the grammar.

A draft whose mask leaves one token needs nobody to draw it. Those that follow the primary token at
once lengthen the block, as they depend on committed tokens alone; later ones take a draft's place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from pyengine.engine.round import Drawn, Group, State, widened
from pyengine.engine.stats import Source
from pyengine.model.rows import packed
from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.sampler import Choices, Sampler

Mask = NDArray[np.uint32]


class Matcher(Protocol):
    """Follows a grammar through one text."""

    def fill(self, row: Mask) -> None:
        """Set the bits of the tokens that may come next; token t is bit t % 32 of number t // 32.

        Raises:
            RuntimeError: It cannot go on here.
        """
        ...

    def add(self, token: int) -> bool:
        """Go on behind a token; False, and nothing happens, where it may not come next."""
        ...

    def take_back(self, count: int) -> None:
        """Forget so many of the newest tokens."""
        ...


class Guide:
    """A grammar in the rounds of one text: masks of a block's rows, and drafts nobody draws.

    Args:
        matcher: Behind the text so far.
        suppressed: Ids that are never chosen.
        stop_ids: Behind one nothing comes.
        vocab: V.
    """

    def __init__(
        self, matcher: Matcher, suppressed: Sequence[int], stop_ids: frozenset[int], vocab: int
    ) -> None:
        self._matcher, self._stop_ids = matcher, stop_ids
        self._all: Mask = np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)
        self._kept = self._all.copy()
        for token in suppressed:
            self._kept[token // 32] &= ~np.uint32(1 << token % 32)
        self.begin()

    def begin(self) -> None:
        """Begin a block behind the committed tokens."""
        self.tokens: list[int] = []  # the drafts so far
        self.drawn: list[bool] = []  # of them, those that the drafter drew
        self.forced: list[bool] = []  # and those that nothing else could stand in place of
        self._failure: RuntimeError | None = None
        self._failed_at = 0  # the row that the matcher had no mask for
        self._qs: list[Filtered | None] = []
        self._rows: list[Mask] = []
        self._known = 0  # drafts that the matcher has seen
        self._open = True  # not behind a stop id, nor a draft that is not allowed

    @property
    def is_open(self) -> bool:
        """Whether drafts from here on may be kept."""
        return self._open

    def run(self, most: int) -> list[int]:
        """The drafts that nobody has to draw, from here on, at most so many; they are taken."""
        while len(self.tokens) < most and self._open and self.take_forced():
            pass
        return self.tokens

    def take_forced(self) -> bool:
        """Take the next draft if nobody has to draw it: it is the only one that may come, or none
        from here on can be kept."""
        row = self.row()
        if not self._open:
            self._take(0, None, drawn=False, forced=False)
            return True
        token = _single(row)
        if token is None:
            return False
        self._take(token, None, drawn=False, forced=True)
        return True

    def take(self, token: int, q: Filtered | None) -> None:
        """Take what the drafter drew, from its row of q; None where that was nothing."""
        self._take(token, q, drawn=q is not None, forced=False)

    def row(self) -> Mask:
        """The mask of the row behind the drafts so far."""
        if len(self._rows) == len(self.tokens):
            self._rows.append(self._next_row())
        return self._rows[-1]

    def least(self) -> int:
        """The lowest token that may come next."""
        row = self.row()
        word = int(np.flatnonzero(row)[0])
        bits = int(row[word])
        return 32 * word + (bits & -bits).bit_length() - 1

    def masks(self) -> mx.array:
        """Those of all rows, uint32 ``[k + 1, ceil(V / 32)]``."""
        self.row()
        return mx.array(np.stack(self._rows))

    def mask(self) -> mx.array:
        """The mask of the newest row, a row of :meth:`masks`."""
        return mx.array(self.row()[None])

    def everything(self) -> mx.array:
        """A mask of all tokens."""
        return mx.array(self._all[None])

    def q(self) -> Filtered | None:
        """What each draft was drawn from, a row each; None where there are no drafts."""
        if not self.tokens:
            return None
        width = max((q.ids.shape[1] for q in self._qs if q is not None), default=1)
        rows = [
            _certain(token, width) if q is None else widened(q, width)
            for token, q in zip(self.tokens, self._qs, strict=True)
        ]
        return Filtered(*(packed(list(part)) for part in zip(*rows, strict=True)))

    def counts(self, accepted: int) -> tuple[int, int, int]:
        """Of a round that kept so many drafts: those that were drawn, those of them that were kept,
        and the forced ones that were kept."""
        return sum(self.drawn), sum(self.drawn[:accepted]), sum(self.forced[:accepted])

    def sources(self, accepted: int) -> list[Source]:
        """Where the drafts of a round that kept so many come from. One that is neither drawn nor
        forced was put in place of nothing: that it was kept is the target's doing alone."""
        each = zip(self.drawn[:accepted], self.forced[:accepted], strict=True)
        return ["draft" if drawn else "forced" if forced else "plain" for drawn, forced in each]

    def commit(self, accepted: int, token: int | None) -> None:
        """Keep so many drafts and the token that follows them; None where the text ends.

        Raises:
            RuntimeError: The grammar cannot be followed to there.
        """
        if self._failure is not None and accepted >= self._failed_at:
            raise self._failure
        if token is None:
            return
        self._matcher.take_back(self._known - accepted)
        if not self._matcher.add(token):
            raise RuntimeError(f"[grammar] a token must be one that may come next but is {token}.")
        self.begin()

    def _take(self, token: int, q: Filtered | None, *, drawn: bool, forced: bool) -> None:
        self.tokens.append(token)
        self.drawn.append(drawn)
        self.forced.append(forced)
        self._qs.append(q)
        if self._open:
            self._open = self._matcher.add(token)
            self._known += self._open
            self._open = self._open and token not in self._stop_ids

    def _next_row(self) -> Mask:
        if not self._open:
            return self._all
        row = np.zeros_like(self._all)
        try:
            self._matcher.fill(row)
            row &= self._kept
            if not row.any():
                raise RuntimeError(
                    "[grammar] suppress_tokens must leave a token that the grammar allows but "
                    "leaves none."
                )
        except RuntimeError as error:
            self._failure, self._failed_at, self._open = error, len(self._rows), False
            return self._all
        return row


def _single(row: Mask) -> int | None:
    """The only token of a mask; None where it has several."""
    words = np.flatnonzero(row)
    bits = int(row[words[0]])
    if len(words) > 1 or bits & (bits - 1):
        return None
    return 32 * int(words[0]) + bits.bit_length() - 1


def _certain(token: int, width: int) -> Filtered:
    """A row of so many candidates, of which the first is certain and the others are none."""
    one = Filtered(mx.array([[token]]), mx.ones((1, 1)), mx.zeros(1, mx.int32))
    return widened(one, width)


class Drafting(NamedTuple):
    """A guided sequence in a round of k drafts; its state is that before the round."""

    state: State
    guide: Guide
    primary: int
    k: int

    @property
    def ids(self) -> list[int]:
        """The block so far."""
        return [self.primary, *self.guide.tokens]


class Step(Protocol):
    """Draws a draft of each of some sequences."""

    def __call__(
        self, states: tuple[State, ...], masks: Sequence[mx.array], before: mx.array
    ) -> Drawn:
        """Behind the blocks so far, ``[Q, i + 1]``, under a mask of one row each."""
        ...


def draft(each: Sequence[Drafting], step: Callable[[list[int], int], Step]) -> None:
    """Take k drafts behind each primary token. Evaluates once per draft that a drafter draws.

    Args:
        each: The sequences; their guides have taken what is forced from the primary token on.
        step: What draws draft i for the sequences at these places.
    """
    carried = [own.state.drafter for own in each]
    for i in range(max(own.k for own in each)):
        waiting = [n for n, own in enumerate(each) if len(own.guide.tokens) == i < own.k]
        asking = [n for n in waiting if not each[n].guide.take_forced()]
        if not asking:
            continue
        guides = [each[n].guide for n in asking]
        draw, before = step(asking, i), mx.array([each[n].ids for n in asking], dtype=mx.int32)
        states = tuple([each[n].state._replace(drafter=carried[n]) for n in asking])
        drawn = draw(states, [guide.mask() for guide in guides], before)
        mx.eval(drawn.report, list(drawn.drafters), list(drawn.qs))
        report = cast("list[int]", drawn.report.tolist())
        nothing = [flag > 1 for flag in report[len(asking) :]]
        if any(nothing):
            # Of what the grammar allows the drafter has nothing; or its logits are not finite
            free = draw(states, [guide.everything() for guide in guides], before)
            broken = cast("list[int]", free.report.tolist())[len(asking) :]
        rows = [_row(part, r) for part in drawn.qs for r in range(part.ids.shape[0])]
        for place, n in enumerate(asking):
            carried[n] = drawn.drafters[place]
            if nothing[place] and broken[place] < 2:
                guides[place].take(guides[place].least(), None)
            else:
                guides[place].take(report[place], rows[place])


def _row(rows: Filtered, r: int) -> Filtered:
    return Filtered(*(part[r : r + 1] for part in rows))


def masked(
    samplers: Sequence[Sampler], groups: Sequence[Group], masks: Sequence[mx.array]
) -> tuple[Choices, ...]:
    """What a round of guided texts is told of each group, with the masks of each text's rows."""
    return tuple(
        [
            Choices.of([samplers[n] for n in own], form)._replace(
                masks=packed([masks[n] for n in own])
            )
            for own, form in groups
        ]
    )


def of_group(qs: Sequence[Filtered | None]) -> Filtered | None:
    """What the drafts of a group were drawn from, of one width; None where there are none."""
    rows = [q for q in qs if q is not None]
    if not rows:
        return None
    width = max(q.ids.shape[1] for q in rows)
    each = zip(*(widened(q, width) for q in rows), strict=True)
    return Filtered(*(packed(list(part)) for part in each))
