"""How many drafts the next round makes: by what rounds cost, and how many drafts are kept.

Pure: no arrays, no clocks, no locks. Seconds are handed in. They steer speed only: it is asked
where no text can tell the block size, which is greedy decoding and the rule ``coupled``.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import accumulate, groupby
from operator import mul
from typing import NamedTuple

AUTO_BLOCK = 8  # the largest block of "auto"
MOST_DRAFTS = AUTO_BLOCK - 1

FORGET = 0.98  # of a text's counts, per draft at that depth; of those of all texts:
FORGET_ALL = 0.995
WEIGHT = 6.0  # drafts that a prior counts for
HARD = 0.5  # refusals that a text is taken to be like all others for
OF_LATE = 0.9  # of what tells how hard a text is, per round
LIKELY = 0.75  # of a draft to be kept, before any was seen

NEWEST = 25  # rounds of a shape whose median counts
AS_FIT = 10  # rounds of a shape that say as much as the fit over all
ENOUGH = 3  # rounds of a shape that tell the machine's pace
TO_PACE = 0.1  # part of a round's surprise that is taken to be the machine's pace
MOST_SHAPES = 64
REFIT = 8  # rounds
TO_USUAL = 0.1  # how much a fit is drawn to what is usual
# Relative seconds of a round, and for each sequence, reading of the weights and drafter's step
USUAL = {1: (0.5, 0.1, 0.2, 0.12), 16: (0.1, 0.1, 0.7, 0.1)}

PLAYED = 16  # shapes whose graphs are taken to be still there
HELD = 8  # rounds that a choice holds
OPENING = (3, 0, MOST_DRAFTS)  # drafts of a text in the rounds that are timed before any choice
SURPLUS = 1.03  # plain decoding stays unless drafts promise so much
PROBES = 0.01  # part of the time that trials of other shapes may lose
CREDIT = 2.0  # rounds' time that they may lose in the beginning
NEAR = 0.6  # of the best rate: what promises less is not tried
LEAST = 0.25  # of its time a trial is taken to lose, so that those that lose nothing stay few


class Shape(NamedTuple):
    """What the cost of a round goes by."""

    sequences: int
    drafts: int
    depth: int  # the most drafts of a sequence: steps of the drafter

    @classmethod
    def of(cls, ks: Sequence[int], free: Sequence[bool] = ()) -> Shape:
        """``free``: whose drafts take no steps; none where nothing is said."""
        steps = [0 if own else k for k, own in zip(ks, free, strict=True)] if free else ks
        return cls(len(ks), sum(ks), max(steps))


class Acceptance:
    """How likely a draft is kept, by depth, where all before it in its block are.

    Beta counts with forgetting. Where little was seen the ``prior`` counts, made as hard as this
    text is: its drafts are refused so many times as often as the prior's, at all depths alike, so
    that few rounds tell a hard text among easy ones. Without a prior, a depth of which nothing is
    known is like the one before it.
    """

    def __init__(self, prior: Acceptance | None = None, forget: float = FORGET) -> None:
        self.kept = [0.0] * MOST_DRAFTS
        self.made = [0.0] * MOST_DRAFTS
        self.prior, self._forget = prior, forget
        self._refused = self._expected = HARD  # drafts of late, and by the prior

    def note(self, drafted: int, accepted: int) -> None:
        """A round of the text. What lies behind a refused draft tells nothing, and what was known
        of it is forgotten bit by bit; a round without drafts changes nothing."""
        seen = min(drafted, accepted + 1, MOST_DRAFTS)
        if self.prior is not None and seen:
            likely = self.prior.rates()[:seen]
            self._refused = OF_LATE * (self._refused - HARD) + HARD + (accepted < seen)
            self._expected = OF_LATE * (self._expected - HARD) + HARD + seen - sum(likely)
        for depth in range(MOST_DRAFTS if seen else 0):
            forget = self._forget if depth < seen else FORGET
            self.kept[depth] = self.kept[depth] * forget + (depth < min(accepted, seen))
            self.made[depth] = self.made[depth] * forget + (depth < seen)

    def rates(self) -> list[float]:
        """By depth, 0 to 1."""
        priors = self._priors()
        rates, last = [], LIKELY
        for depth, (kept, made) in enumerate(zip(self.kept, self.made, strict=True)):
            prior = last if priors is None else priors[depth]
            last = (kept + WEIGHT * prior) / (made + WEIGHT)
            rates.append(last)
        return rates

    def _priors(self) -> list[float] | None:
        """The prior's rates, were it as hard as this text."""
        if self.prior is None:
            return None
        hardness = self._refused / self._expected
        return [prior**hardness for prior in self.prior.rates()]

    def reach(self) -> list[float]:
        """How likely each draft is committed: all up to it are kept."""
        return list(accumulate(self.rates(), mul))


class Costs:
    """What rounds take, by shape, in seconds at the machine's present pace.

    A shape that was seen takes the median of its newest rounds, drawn to a fit over all shapes
    where these are few: so much for a round, a sequence, a reading of the weights and a step of the
    drafter. What slows the machine, or a context that grows, slows all shapes: that is the pace,
    and shapes that were seen at different times compare.

    Args:
        width: Rows per reading of the weights: 16 on a GPU; 1 on a processor, where a row costs
            what it costs.
    """

    def __init__(self, width: int = 1) -> None:
        self._width = width
        self._seen: OrderedDict[Shape, deque[float]] = OrderedDict()
        self._median: dict[Shape, float] = {}
        self._fit: tuple[float, ...] | None = None
        self._pace = 1.0
        self._notes = 0
        self.recording_s = 0.0  # what a shape takes once more, when its graph is recorded

    @property
    def shapes(self) -> list[Shape]:
        """Those that were timed."""
        return list(self._seen)

    def note(self, shape: Shape, seconds: float, recorded: bool = False) -> None:
        """A round of that shape; ``recorded`` where its graph was recorded, which takes longer."""
        if recorded:
            surplus = max(0.0, seconds - self.estimate(shape)) if self._seen else 0.0
            self.recording_s += 0.5 * (surplus - self.recording_s)
            return
        newest = self._seen.setdefault(shape, deque(maxlen=NEWEST))
        if len(newest) >= ENOUGH:
            surprise = seconds / (self._pace * self._median[shape])
            self._pace *= 1 + TO_PACE * (min(max(surprise, 0.5), 2.0) - 1)
        newest.append(seconds / self._pace)
        self._median[shape] = sorted(newest)[len(newest) // 2]
        self._seen.move_to_end(shape)
        if len(self._seen) > MOST_SHAPES:
            del self._median[self._seen.popitem(last=False)[0]]
        self._notes += 1
        if self._notes % REFIT == 0 or len(newest) <= ENOUGH:
            self._fit = None

    def rounds(self, shape: Shape) -> int:
        """Of that shape, as far as they are kept."""
        return len(self._seen.get(shape, ()))

    def estimate(self, shape: Shape) -> float:
        """Seconds of a round of that shape."""
        if self._fit is None:
            self._fit = self._fitted()
        took: float = sum(map(mul, self._fit, self._parts(shape)))
        newest = self._seen.get(shape)
        if newest is not None:
            count = len(newest)
            took = (count * self._median[shape] + AS_FIT * took) / (count + AS_FIT)
        return self._pace * took

    def _parts(self, shape: Shape) -> tuple[int, int, int, int]:
        """How often each part of a round's cost is in it."""
        readings = -(-(shape.sequences + shape.drafts) // self._width)
        return 1, shape.sequences, readings, shape.depth

    def _fitted(self) -> tuple[float, ...]:
        """Least squares of relative errors, drawn a little to what is usual: while all shapes are
        alike, only that tells the parts apart."""
        import numpy as np  # not needed before

        usual = np.array(USUAL[self._width])
        shapes = self.shapes
        if not shapes:
            return tuple(usual.tolist())
        took = np.array([self._median[shape] for shape in shapes])
        parts = np.array([self._parts(shape) for shape in shapes])
        weights = np.sqrt([len(self._seen[shape]) / NEWEST for shape in shapes])
        usual *= np.average(took / (parts @ usual), weights=weights)
        rows = np.vstack([weights[:, None] * parts * usual / took[:, None], TO_USUAL * np.eye(4)])
        times = np.linalg.lstsq(rows, np.append(weights, [TO_USUAL] * 4), rcond=None)[0]
        return tuple((np.maximum(times, TO_USUAL**2) * usual).tolist())


class Known:
    """What is known of the rounds of a pair, whoever's texts they are."""

    def __init__(self, width: int = 1) -> None:
        self.costs = Costs(width)
        self.acceptance = Acceptance(forget=FORGET_ALL)
        self.spare_s: float | None = None  # what trials may lose; None before any round


class Text(NamedTuple):
    """A text that is to have a round; ``fixed`` is how many drafts it makes in any case, ``free``
    says that they take no steps of a drafter."""

    acceptance: Acceptance
    fixed: int | None = None
    free: bool = False


class Choice(NamedTuple):
    """The drafts of each text, and what the round should commit and take with them."""

    ks: list[int]
    shape: Shape
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class Controller:
    """Chooses the drafts of each round of some texts.

    A round begins with no drafts and gets them one by one, the likeliest first, those of texts that
    are alike together; of all these rounds the one of most expected tokens per second is taken. A
    shape that was not played is not recorded before what it would have saved is worth that. A small
    part of the time goes to trials, so that it is noticed when a text has become easy, or the
    machine another; a trial that pays is followed by the next.

    Args:
        known: What was seen so far; gets what is seen here.
    """

    def __init__(self, known: Known) -> None:
        self.known = known
        self._played: OrderedDict[Shape, int] = OrderedDict()  # by shape, its newest round
        self._rounds = 0
        self._texts: list[Text] = []  # that the newest choice was made for
        self._ks: list[int] = []
        self._held = 0  # rounds that it has still to hold
        self._missed_s = 0.0  # what a better shape, not recorded, would have saved
        self._instead_of = 0.0  # tokens per second of what a trial stands in for, else 0

    def pick(self, ways: Sequence[Text]) -> int:
        """Which of several ways to draft promises a text, were it alone, the most tokens per
        second; the first of equal ones."""
        rates = [max(choice.rate for choice in self._choices([way])) for way in ways]
        return rates.index(max(rates))

    def choose(self, texts: Sequence[Text]) -> list[int]:
        """Drafts of each in the next round."""
        if self._held and self._texts == list(texts):
            self._held -= 1
            return self._ks
        self._texts, self._held, self._instead_of = list(texts), 0, 0.0
        opening = self._opening(texts)
        if opening is not None:
            return opening
        choices = self._choices(texts)
        best = self._best(choices)
        trial = self._trial(choices, best)
        if trial is not None:
            self._instead_of = best.rate
            return trial.ks
        self._ks, self._held = best.ks, HELD - 1
        return best.ks

    def note(
        self,
        ks: Sequence[int],
        accepted: Sequence[int],
        seconds: float,
        recorded: bool = False,
        drawn: Sequence[int] | None = None,
        free: Sequence[bool] = (),
    ) -> None:
        """What became of a round: the drafts of each sequence as they were chosen, those that were
        kept, and those that were drawn where they are not as many. Those that were ``free`` say
        nothing of a drafter's."""
        shape = Shape.of(ks, free)
        self._rounds += 1
        self._played[shape] = self._rounds
        self._played.move_to_end(shape)
        if len(self._played) > PLAYED:
            self._played.popitem(last=False)
        for n, (k, kept) in enumerate(zip(ks if drawn is None else drawn, accepted, strict=True)):
            if not (free and free[n]):
                self.known.acceptance.note(k, kept)
        self.known.costs.note(shape, seconds, recorded)
        most = CREDIT * seconds + self.known.costs.recording_s
        spare = CREDIT * seconds if self.known.spare_s is None else self.known.spare_s
        spare = min(most, max(spare, -most) + PROBES * seconds)
        if self._instead_of:
            spare -= seconds - (len(ks) + sum(accepted)) / self._instead_of
        self.known.spare_s = spare

    def _opening(self, texts: Sequence[Text]) -> list[int] | None:
        """Shapes far apart that tell, to begin with, what rounds cost."""
        costs = self.known.costs
        if len(costs.shapes) > len(OPENING):
            return None
        for k in OPENING:
            ks = [k if text.fixed is None else text.fixed for text in texts]
            if costs.rounds(Shape.of(ks, _free(texts))) < ENOUGH:
                return ks
        return None

    def _choices(self, texts: Sequence[Text]) -> list[Choice]:
        """From no drafts on, each with one more for all texts of a kind."""
        reaches = [text.acceptance.reach() for text in texts]
        ks = [text.fixed or 0 for text in texts]
        tokens = sum(1 + sum(reach[:k]) for reach, k in zip(reaches, ks, strict=True))
        # Alike are those of whose drafts about as many are kept: few shapes, and few graphs
        open_ = sorted((round(sum(reaches[n])), n) for n, t in enumerate(texts) if t.fixed is None)
        kinds = [[n for _, n in kind] for _, kind in groupby(open_, key=lambda pair: pair[0])]
        gains = [
            (sum(reaches[n][depth] for n in kind), depth, kind)
            for kind in kinds
            for depth in range(MOST_DRAFTS)
        ]
        gains.sort(key=lambda gain: (-gain[0] / len(gain[2]), gain[1]))
        free = _free(texts)
        choices = [self._choice(ks, tokens, free)]
        for gain, _, kind in gains:
            for n in kind:
                ks[n] += 1
            tokens += gain
            choices.append(self._choice(ks, tokens, free))
        return choices

    def _choice(self, ks: Sequence[int], tokens: float, free: Sequence[bool]) -> Choice:
        shape = Shape.of(ks, free)
        return Choice(list(ks), shape, tokens, self.known.costs.estimate(shape))

    def _best(self, choices: Sequence[Choice]) -> Choice:
        """The most tokens per second; while that is not recorded and was not missed for long, the
        most of what is."""
        plain, best = choices[0], max(choices, key=lambda choice: choice.rate)
        if best.rate < SURPLUS * plain.rate:
            best = plain
        there = [choice for choice in choices if choice.shape in self._played]
        if not there or best.shape in self._played:
            return best
        stay = max(there, key=lambda choice: choice.rate)
        self._missed_s += HELD * stay.seconds * (1 - min(1.0, stay.rate / best.rate))
        if self._missed_s < self.known.costs.recording_s:
            return stay
        self._missed_s = 0.0
        return best

    def _trial(self, choices: Sequence[Choice], best: Choice) -> Choice | None:
        """Of plain decoding and those beside the best, what was not tried for longest, if its loss
        can be afforded."""
        place = choices.index(best)
        beside = {0, max(0, place - 1), min(place + 1, len(choices) - 1)} - {place}
        near = [choices[n] for n in sorted(beside) if choices[n].rate > NEAR * best.rate]
        if not near or self.known.spare_s is None:
            return None
        trial = min(near, key=lambda choice: self._played.get(choice.shape, 0))
        loss = max(trial.seconds - trial.tokens / best.rate, LEAST * trial.seconds)
        if trial.shape not in self._played:
            loss += self.known.costs.recording_s
        return trial if loss < self.known.spare_s else None


def _free(texts: Sequence[Text]) -> list[bool]:
    return [text.free for text in texts]
