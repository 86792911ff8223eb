"""Rounds of one text or of several at once, and the graphs that were recorded of them.

The host reads one small array per round, of however many sequences.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from pyengine import forked
from pyengine.engine import round as on_device
from pyengine.engine.controller import Controller, Known, Text
from pyengine.engine.known import known_of
from pyengine.engine.report import Report
from pyengine.engine.sequence import Round, TokenSequence
from pyengine.engine.stats import Nodes, nodes_of
from pyengine.ops import dispatch
from pyengine.sampling.sampler import Choices, Sampler

if TYPE_CHECKING:  # what brings NumPy is imported where it is needed
    from pyengine.engine.guided import Step
    from pyengine.engine.tree_round import RecordedTree

T = TypeVar("T")

MOST_RECORDED = 16  # rounds of other makes than these are recorded anew


class Rounds:
    """Plays rounds of any sequences of one pair; keeps the graphs that were recorded.

    A graph serves all sequences that draft as many tokens and have candidates, lists of edits and
    log-probabilities of the same number: settings, seeds, edits, lengths and caches are arguments.
    ``recorded_now`` says whether the newest round's graph was a new one.
    """

    def __init__(self) -> None:
        self._kinds: dict[Any, int] = {}
        self._known: tuple[Any, ...] = ()  # who was in the newest round, and what they were told
        self._groups: tuple[on_device.Group, ...] = ()
        self._choices: tuple[Choices, ...] = ()
        self._recorded: OrderedDict[Any, on_device.RecordedRound] = OrderedDict()
        self.recorded_now = False
        self._controllers: dict[Known, Controller] = {}
        self._choosing: dict[bool, Controller] = {}  # those that chose for the newest round
        self._steps: OrderedDict[Any, on_device.RecordedDraft] = OrderedDict()
        self._trees: OrderedDict[Any, RecordedTree] = OrderedDict()

    def choose(self, sequences: Sequence[TokenSequence]) -> None:
        """Set the drafts of those whose block size is automatic, for a round of them all."""
        self._choosing = {}
        for guided in (False, True):
            own = [s for s in sequences if s.is_guided == guided and s.tree is None]
            self._choose(own, guided)

    def _choose(self, sequences: Sequence[TokenSequence], guided: bool) -> None:
        chosen = [s for s in sequences if s.acceptance is not None]
        if not chosen:
            return
        known = known_of(chosen[0].parts.target, chosen[0].source, guided)
        if known not in self._controllers:
            self._controllers[known] = Controller(known)
        controller = self._choosing[guided] = self._controllers[known]
        all_texts = controller.known.acceptance
        texts = []
        for sequence in sequences:
            if sequence.acceptance is None:
                texts.append(Text(all_texts, sequence.drafts))
                continue
            ways = sequence.ways()
            texts.append(ways[controller.pick(ways) if len(ways) > 1 else 0])
            sequence.take(texts[-1])
        for sequence, k in zip(sequences, controller.choose(texts), strict=True):
            sequence.drafts = k

    def play(self, sequences: Sequence[TokenSequence]) -> list[Round | Exception]:
        """One round of sequences that go on, all of one arena; by sequence what it committed, or
        why it failed: a sequence that fails takes no other with it. Evaluates once.

        Raises:
            RuntimeError: The process was forked from one that had used MLX.
        """
        forked.check("generate")
        start = time.perf_counter()
        done: dict[TokenSequence, Round | Exception] = {}
        for sequence in sequences:
            try:
                sequence.prepare()
            except RuntimeError as error:
                done[sequence] = error.with_traceback(None)  # which would hold the caches
        # In one order whoever came first, so that fewer graphs are recorded
        going = sorted((s for s in sequences if s not in done), key=self._rank)
        makes: dict[Any, list[TokenSequence]] = {}
        for sequence in going:
            makes.setdefault(sequence.make, []).append(sequence)
        for make in sorted(makes):
            done |= self._play(makes[make], start)
        return [done[sequence] for sequence in sequences]

    def _play(
        self, going: Sequence[TokenSequence], start: float
    ) -> dict[TokenSequence, Round | Exception]:
        """A round of sequences of one make (:attr:`TokenSequence.make`)."""
        done: dict[TokenSequence, Round | Exception] = {}
        played = self._played(going)
        for sequence, outcome in zip(going, played.outcomes, strict=True):
            sequence.take_results(outcome)
        row = on_device.read(going[0].parts.target, played)
        going[0].parts.cache.arena.take_results(played.arena)
        reports = Report.unpack(row, [s.k for s in going], [s.logprobs for s in going])
        seconds = time.perf_counter() - start
        nodes: Sequence[Nodes | None] = [None] * len(going)
        if is_tree := going[0].tree is not None:
            nodes = nodes_of(row, len(going), going[0].k)
        for sequence, report, own in zip(going, reports, nodes, strict=True):
            sequence.count(report.accepted, seconds, own)
            try:
                done[sequence] = sequence.commit(report)
            except RuntimeError as error:
                done[sequence] = error.with_traceback(None)
        guided = going[0].is_guided
        if guided in self._choosing and not is_tree:
            drawn, kept = zip(*(s.drawn for s in going), strict=True)
            ks = [s.drafts for s in going] if guided else drawn
            free = [s.looks_up for s in going]
            self._choosing[guided].note(ks, kept, seconds, self.recorded_now, drawn, free)
        return done

    def _played(self, going: Sequence[TokenSequence]) -> on_device.Played:
        """The round, built; of guided sequences the drafts are drawn before."""
        guided = [s.drafting() for s in going if s.guide is not None]
        placed = going[0].parts.cache.arena.place([s.parts.cache for s in going])
        if not guided:
            choices = self._choices_of([s.sampler for s in going])
            begin = on_device.Start(placed, tuple([s.state for s in going]), choices)
            return self._free(going, begin)
        from pyengine.engine.guided import draft, masked, of_group

        draft(guided, lambda places, i: self._step([going[n] for n in places], i))
        samplers = [s.sampler for s in going]
        groups = on_device.groups_of(samplers)
        masks = [own.guide.masks() for own in guided]
        states = tuple([own.state for own in guided])
        begin = on_device.Start(placed, states, masked(samplers, groups, masks))
        ids = mx.array([token for own in guided for token in own.ids], dtype=mx.int32)
        qs = [own.guide.q() for own in guided]
        of_groups = tuple([of_group([qs[n] for n in group.places]) for group in groups])
        return self._round(going, groups).verify(begin, on_device.Block(ids, of_groups))

    def _free(self, going: Sequence[TokenSequence], begin: on_device.Start) -> on_device.Played:
        """A round of sequences that no grammar guides, built."""
        if going[0].tree is not None:
            return self._tree(going).play(begin)
        return self._round(going, self._groups).together(begin)

    def _rank(self, sequence: TokenSequence) -> tuple[bool, int, int]:
        kind = self._kinds.setdefault(sequence.kind, len(self._kinds))
        return sequence.is_dense, -sequence.k, kind

    def _choices_of(self, samplers: list[Sampler]) -> tuple[Choices, ...]:
        """What the round is told of its texts; the same as the newest one was where they are the
        same and nothing of them is listed."""
        known = (*samplers, *[sampler.most_listed for sampler in samplers])
        if known != self._known:
            self._known, self._groups = known, on_device.groups_of(samplers)
            self._choices = tuple(
                [Choices.of([samplers[n] for n in own], form) for own, form in self._groups]
            )
        return tuple(
            [
                choices.with_lists([samplers[n] for n in own], form) if form.room else choices
                for choices, (own, form) in zip(self._choices, self._groups, strict=True)
            ]
        )

    def _round(
        self, going: Sequence[TokenSequence], groups: Sequence[on_device.Group]
    ) -> on_device.RecordedRound:
        each, ks = [s.parts for s in going], [s.k for s in going]
        key = self._key(going, groups)
        self.recorded_now = (dispatch.chosen(), key) not in self._recorded
        return kept(self._recorded, key, lambda: on_device.RecordedRound(each, ks, groups))

    def _tree(self, going: Sequence[TokenSequence]) -> RecordedTree:
        from pyengine.engine.tree_round import RecordedTree

        [group], first = self._groups, going[0]
        assert first.tree is not None
        shape = first.k, first.tree, group, first.is_greedy
        key = self._key(going, self._groups)
        self.recorded_now = (dispatch.chosen(), key) not in self._trees
        return kept(self._trees, key, lambda: RecordedTree([s.parts for s in going], *shape))

    def _key(
        self, going: Sequence[TokenSequence], groups: Sequence[on_device.Group]
    ) -> tuple[Any, ...]:
        """What a recorded round goes by."""
        layers = len(going[0].parts.cache.arena.arrays)  # a drafter may bring some
        return layers, *(form for _, form in groups), *(self._rank(one) for one in going)

    def _step(self, going: Sequence[TokenSequence], i: int) -> Step:
        from pyengine.engine.guided import masked

        each, samplers = [s.parts for s in going], [s.sampler for s in going]
        groups = on_device.groups_of(samplers)
        arena = each[0].cache.arena
        key = (i, len(arena.arrays), *(form for _, form in groups))
        key = *key, *(self._rank(s)[::2] for s in going)
        placed = arena.place([parts.cache for parts in each])
        step = kept(self._steps, key, lambda: on_device.RecordedDraft(each, i, groups))

        def draw(
            states: tuple[on_device.State, ...], masks: Sequence[mx.array], before: mx.array
        ) -> on_device.Drawn:
            choices = masked(samplers, groups, masks)
            return step.draw(on_device.Start(placed, states, choices), before)

        return draw


def kept(recorded: OrderedDict[Any, T], key: Any, record: Callable[[], T]) -> T:
    """What was recorded under that key and the ops in use; recorded now where nothing was."""
    key = dispatch.chosen(), key
    if key not in recorded:
        recorded[key] = record()
        if len(recorded) > MOST_RECORDED:
            recorded.popitem(last=False)
    recorded.move_to_end(key)
    return recorded[key]
