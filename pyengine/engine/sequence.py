"""A text on its way: what its rounds work with, and what the host knows of it. Token ids only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from pyengine import mapped
from pyengine.checkpoint import memory
from pyengine.drafters.dflash import DFlashDrafter
from pyengine.drafters.drafter import MAX_BLOCK, Drafter, TargetLike
from pyengine.drafters.mixed import MixedDrafter, kind_of, looks_up, source_of
from pyengine.engine import round as on_device
from pyengine.engine.controller import Acceptance, Text
from pyengine.engine.known import known_of
from pyengine.engine.prefill import Begun, Reading, Shared
from pyengine.engine.prefix import Prefix
from pyengine.engine.report import NonFinite, Report
from pyengine.engine.stats import Nodes, Source, Stats, last_source
from pyengine.engine.turns import Turns
from pyengine.model import plan
from pyengine.model.cache import Arena, Cache
from pyengine.model.target import Part
from pyengine.ops.dispatch import borrows
from pyengine.ops.prepare_qkv import PAGE
from pyengine.sampling.sampler import Logprob, Sampler
from pyengine.sampling.settings import MOST_NODES, Sampling, seeded

if TYPE_CHECKING:  # what brings NumPy is imported where it is needed
    from pyengine.engine.guided import Drafting, Guide, Matcher

MOST_FORCED = 15  # drafts in a row: with the primary token, what one launch of an op takes


class Round(NamedTuple):
    """Tokens committed by one round; a stop id comes last and ends the generation.

    Between two chunks of the prefill there is one with no tokens, whose ``prompt_done`` counts the
    prompt's tokens processed so far.
    """

    tokens: list[int]
    finish_reason: str | None  # "stop", "length", or None while it goes on
    num_drafted: int
    num_accepted: int
    logprobs: list[Logprob] | None = None  # one per token, where the settings ask for them
    prompt_done: int | None = None
    num_forced: int = 0  # tokens that a grammar forced and nobody drafted
    sources: tuple[Source, ...] = ()  # one per token
    drafter: str | None = None  # of a mix, whose drafts they are


class TokenSequence:
    """A text on its way: what its rounds work with, and what the host knows of it.

    First its :meth:`prefill`, then rounds (:meth:`Rounds.play`) until ``finish_reason`` says
    "stop" or "length"; then :meth:`release`. Arguments and errors are those of :func:`decode`;
    ``arena`` is where its keys and values go if no prefix has them, None for one of its own.
    """

    def __init__(
        self,
        target: TargetLike,
        drafter: Drafter | None,
        prompt: list[int],
        *,
        sampling: Sampling,
        block_size: int,
        auto: bool = False,
        max_tokens: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
        stats: Stats | None = None,
        prefix: Prefix | None = None,
        shared: Shared | None = None,
        arena: Arena | None = None,
        matcher: Matcher | None = None,
        tree: int | None = None,
    ) -> None:
        _check(target, drafter, prompt, block_size, max_tokens)
        if tree is not None:
            _check_tree(tree, drafter, sampling, block_size, auto, matcher)
            block_size = min(block_size, tree + 1)
        self.stats = Stats() if stats is None else stats
        self.prompt, self.block_size = prompt, block_size
        self.drafts = block_size - 1  # of the next round, if its drafter has any
        self.k = 0  # drafts of the newest round
        self.acceptance: Acceptance | None = None  # where each round's block size is chosen
        self._turns: Turns | None = None  # and who drafts
        self.finish_reason: str | None = None
        self.target, self._drafter = target, drafter if block_size > 1 else None
        self._sampling = seeded(sampling)
        self._stop_ids = stop_ids
        self._layers = () if self._drafter is None else self._drafter.layers
        # A drafter with taps and no layers has nothing of the rows that a prefix holds
        tapped = self._drafter is not None and self._drafter.taps and not self._layers
        self._prefix = None if tapped else prefix
        self._shared, self._arena = shared, arena
        self._own: Cache | None = None  # where no prefix has it
        self._reads = True  # until its prompt is processed
        self._reading: Reading | None = None  # once it is begun
        self._begun: Begun | None = None  # a prompt that another text has processed
        self._matcher = matcher
        self.guide: Guide | None = None  # once the prompt is processed, where there is a matcher
        self._most_rows = most_rows(block_size, matcher is not None, tree)
        self.tree = tree  # drafts of each round's
        room = target.context - len(prompt)
        self._room = room if max_tokens is None else min(max_tokens, room)
        self._text = list(prompt)
        self._new: list[int] = []  # tokens of the newest round
        self._counts = (0, 0, 0)  # of it: drafted, accepted, forced
        self._sources: list[Source] = ["first"]
        if auto and self._drafter is not None:
            known = known_of(target, source_of(self._drafter), self.is_guided)
            self.acceptance = Acceptance(known.acceptance)
            if isinstance(self._drafter, MixedDrafter) and not self.is_guided:
                self._turns = Turns(target, self._drafter, self.acceptance)
        self.stats.block_size = "auto" if self.acceptance else block_size
        self.stats.tree = tree
        self.stats.prompt_tokens = len(prompt)
        self.stats.seed = self._sampling.seed

    @property
    def state(self) -> on_device.State:
        """What its next round starts from."""
        return self.parts.state(self._primary)

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a recorded round goes by, beside numbers of the settings."""
        tree = self.tree and (self.tree, self.is_greedy)
        return self.block_size, kind_of(self._drafter), self.logprobs, tree

    @property
    def make(self) -> tuple[bool, int, int, bool, bool]:
        """What sequences of one round must have in common: whether grammars guide it; of trees the
        drafts, their depth, and how candidates are ranked."""
        if self.tree is None:
            return self.is_guided, 0, 0, False, False
        return False, self.tree, self.block_size, self.is_greedy, self.is_dense

    @property
    def source(self) -> type[Drafter | None]:
        """The drafters whose rounds tell what those of this one cost."""
        return source_of(self._drafter)

    @property
    def looks_up(self) -> bool:
        """Whether the newest round was lookup's of a mix."""
        return looks_up(self._drafter)

    @property
    def turn(self) -> str | None:
        """Of a mix who drafted in the newest round, if anybody did."""
        drafter = self._drafter
        return drafter.turn_name if isinstance(drafter, MixedDrafter) and self.drawn[0] else None

    @property
    def is_guided(self) -> bool:
        """Whether a grammar says which tokens may come next."""
        return self._matcher is not None

    @property
    def drawn(self) -> tuple[int, int]:
        """Of the newest round, the drafts that the drafter drew, and how many of them were kept."""
        return self._counts[:2]

    @property
    def logprobs(self) -> int | None:
        return self._sampling.logprobs

    @property
    def is_greedy(self) -> bool:
        return self._sampling.greedy

    @property
    def is_dense(self) -> bool:
        """Whether all V are candidates."""
        return self.sampler.top_k == 0

    def release(self) -> None:
        """Give back its pages where no prefix holds them."""
        if self._own is not None:
            self._own.release()

    def prefill(self) -> Iterator[Round]:
        """Process the prompt; the last round that is yielded has the first token. Evaluates."""
        while self.reads:
            start, part, made = time.perf_counter(), self.next_part(), None
            if part is not None:
                made = self.target.prefill(part.ids, part.cache, reader=part.reader)
            yield self.take_part(made, start)

    @property
    def reads(self) -> bool:
        """Whether its prompt is not wholly processed."""
        return self._reads

    def waits_for(self, other: TokenSequence) -> bool:
        """Whether its prompt saves a page or more if the other's, which is under way, is processed
        first."""
        if self._shared is not None and self._shared is other._shared:
            return True
        if self._prefix is None or self._layers != other._layers:
            return False
        alike = sum(1 for _ in takewhile(bool, map(eq, self.prompt, other.prompt)))
        alike = plan.border(alike, len(self.prompt), borrows())
        if alike < PAGE:
            return False
        read = self._reading
        known = self._prefix.shared(self.prompt, self._layers) if read is None else read.done
        return alike - known >= PAGE

    def next_rows(self) -> int:
        """Rows of the prompt's next part; 0 where another text has processed it. Evaluates."""
        if self._begun is None and self._reading is None:
            self._open()
        return 0 if self._reading is None else self._reading.next_end - self._reading.done

    def next_part(self) -> Part | None:
        """The next part of its prompt; None where another text has processed it. Evaluates."""
        self.next_rows()
        return None if self._reading is None else self._reading.part()

    def take_part(self, made: tuple[mx.array, mx.array] | None, start: float) -> Round:
        """Go on with what the target made of the next part, None where there was none; the last one
        gives the first token. Evaluates then.

        Args:
            made: Logits [V] and hidden vector [1, E] of its last row.
            start: When its call began, in seconds.
        """
        if self._reading is not None and made is not None:
            if not self._reading.note():
                self.stats.prefill_s += time.perf_counter() - start
                return Round([], None, 0, 0, None, self._reading.done)
            carried = [] if self._drafter is None else self._drafter.arrays
            self._begun = Begun(self._reading.cache, *made, carried)
            if self._shared is not None:
                self._shared.leave(self._begun)
        assert self._begun is not None
        begun, self._begun, self._reading, self._reads = self._begun, None, None, False
        return self._begin(begun, start)

    def _open(self) -> None:
        """Find what is known of the prompt. Evaluates."""
        begun = None if self._shared is None else self._shared.take()
        if begun is not None:
            self._prefix = None  # which holds another cache
            self._begun, self._own = begun, begun.cache
            self.stats.reused_tokens = len(self.prompt)
            if self._drafter is not None:
                self._drafter.take_results(begun.drafter)
            return
        if self._prefix is None:
            arena = self._arena
            cache = self.target.new_cache() if arena is None else arena.new_cache()
            self._own, known = cache, 0
            if self._layers:
                cache.arena.extend(self._layers)
        else:
            cache, known = self._prefix.open(self.target, self.prompt, layers=self._layers)
            self.stats.reused_tokens = known
        self._reading = Reading(self.prompt, cache, known, self._prefix, self._drafter)

    def _begin(self, begun: Begun, start: float) -> Round:
        """The first token, behind a prompt that was processed. Evaluates."""
        vocab = begun.logits.shape[-1]
        self.sampler = Sampler(self._sampling, self.prompt, vocab)
        self.parts = on_device.Parts(self.target, self._drafter, begun.cache, vocab, self.logprobs)
        masks = None
        if self._matcher is not None:
            from pyengine.engine.guided import Guide

            own = self._sampling.suppress_tokens
            self.guide = Guide(self._matcher, own, self._stop_ids, vocab)
            masks = self.guide.masks()
        self._dtype = begun.hidden.dtype
        played = on_device.first(self.parts, self.sampler, begun.logits[None], masks)
        [report] = Report.unpack(on_device.read(self.parts.target, played), [0], [self.logprobs])
        self._primary = played.outcomes[0].primary
        self.stats.prefill_s += time.perf_counter() - start
        return self.commit(report)

    def ways(self) -> list[Text]:
        """How its next round may draft; for one whose block size is automatic."""
        assert self.acceptance is not None
        return [Text(self.acceptance)] if self._turns is None else self._turns.ways(self._text)

    def take(self, way: Text) -> None:
        """Draft one of these ways."""
        if self._turns is not None:
            self._turns.take(way)

    def prepare(self) -> None:
        """Make ready for a round: the tokens so far, how many drafts, room in the cache.

        Raises:
            RuntimeError: The memory has no room for it.
        """
        parts = self.parts
        self.sampler.add(self._new)
        self._new = []
        self.k = self._drafts()
        # A round past the end of the room keeps its shape; what it commits there is not used
        memory.check_growth(parts.cache.growth(self._most_rows))
        parts.cache.reserve(self._most_rows)

    def _drafts(self) -> int:
        """How many drafts the next round has: a function of committed tokens alone."""
        k, drafter, guide = self.drafts, self._drafter, self.guide
        if drafter is None or guide is None:
            return k if drafter is not None and drafter.wants_to_draft(self._text, k) else 0
        forced = guide.run(MOST_FORCED)
        if not guide.is_open or not drafter.wants_to_draft(self._text, k, forced):
            return len(forced)
        return min(len(forced) + k, self._most_rows - 1)

    def drafting(self) -> Drafting:
        """What draws its drafts where the host stands behind each."""
        from pyengine.engine.guided import Drafting

        assert self.guide is not None
        return Drafting(self.state, self.guide, self._text[-1], self.k)

    def take_results(self, outcome: on_device.Outcome) -> None:
        """Go on with what a round gave, before it is evaluated."""
        self._primary = outcome.primary
        self.parts.take_results(outcome, self.k + 1)

    def count(self, accepted: int, seconds: float, nodes: Nodes | None = None) -> None:
        """Note how many drafts a round kept, and what it took, whoever else was in it; of a tree
        what there is to know of it."""
        self.parts.cache.settle(len(self._text) + accepted)
        guide = self.guide
        drafted = self.k if nodes is None else sum(nodes.by_depth)
        self._counts = (drafted, accepted, 0) if guide is None else guide.counts(accepted)
        self._sources = ["draft"] * accepted if guide is None else guide.sources(accepted)
        self._sources.append(last_source(*self._counts[:2], nodes))
        self.stats.count_round(*self._counts, self.turn, nodes)
        if self.acceptance is not None and not self.looks_up:
            self.acceptance.note(*self.drawn)
        self.stats.decode_s += seconds

    def commit(self, report: Report) -> Round:
        """What a round's report says, as text: up to a stop id or the end of the room.

        Raises:
            NonFinite: The target's logits were NaN or infinite.
            RuntimeError: The grammar cannot be followed.
        """
        if not report.finite:
            raise NonFinite("decode", self._dtype)
        room = self._room - self.stats.generated_tokens
        tokens, self.finish_reason = _cut(report.tokens, room, self._stop_ids)
        self.stats.generated_tokens += len(tokens)
        self.stats.peak_memory_bytes = mx.get_peak_memory() + mapped.nbytes()
        logprobs = None if report.logprobs is None else report.logprobs[: len(tokens)]
        if self.guide is not None:
            self.guide.commit(report.accepted, None if self.finish_reason else tokens[-1])
        if self._turns is not None:
            self._turns.judge(tokens)
        self._text += tokens
        self._new = tokens
        if self._prefix is not None:
            self._prefix.keep(self._text[:-1])  # the newest token is not processed yet
        drafted, accepted, forced = self._counts
        sources = tuple(self._sources[: len(tokens)])
        reason = self.finish_reason
        return Round(tokens, reason, drafted, accepted, logprobs, None, forced, sources, self.turn)


def _cut(tokens: list[int], room: int, stop_ids: frozenset[int]) -> tuple[list[int], str | None]:
    """Cut a round's tokens after the first stop id or where the room ends."""
    for i, token in enumerate(tokens[:room]):
        if token in stop_ids:
            return tokens[: i + 1], "stop"
    return tokens[:room], "length" if len(tokens) >= room else None


def most_rows(block_size: int, guided: bool, tree: int | None = None) -> int:
    """Rows of a round's block at most, or of a tree of so many drafts; a grammar may lengthen a
    block, but not plain decoding."""
    if tree is not None:
        return tree + 1
    return max(block_size, 1 + MOST_FORCED) if guided and block_size > 1 else block_size


def _check_tree(
    tree: int,
    drafter: Drafter | None,
    sampling: Sampling,
    block_size: int,
    auto: bool,
    matcher: Matcher | None,
) -> None:
    if not 1 <= tree <= MOST_NODES:
        raise ValueError(f"[decode] a tree must be of 1 to {MOST_NODES} drafts but got {tree}.")
    if not isinstance(drafter, DFlashDrafter):
        raise ValueError(
            "[decode] a tree's drafter must judge all places of a block at once but got "
            f"{type(drafter).__name__}."
        )
    if block_size < 2 or auto or matcher is not None:
        raise ValueError(
            "[decode] a tree must have blocks of one size, 2 or more, and no grammar but has not."
        )
    check_tree_sampling("decode", sampling)


def check_tree_sampling(what: str, sampling: Sampling) -> None:
    """Refuse settings under which no tree can be verified.

    Raises:
        ValueError: The rule compares probabilities, which a draft chosen by rank does not have; or
            logits depend on the tokens before, which are others on every path.
    """
    if not (sampling.greedy or sampling.verify == "coupled"):
        raise ValueError(
            f"[{what}] verify must be coupled, or temperature 0, with a tree, whose drafts are "
            f"ranked and not drawn, but got {sampling.verify}."
        )
    if sampling.penalises:
        raise ValueError(
            f"[{what}] penalties must be off with a tree, whose paths differ in the tokens that "
            "they count, but are on."
        )


def _check(
    target: TargetLike,
    drafter: Drafter | None,
    prompt: list[int],
    block_size: int,
    max_tokens: int | None,
) -> None:
    if not 1 <= block_size <= MAX_BLOCK:
        raise ValueError(f"[decode] block_size must be 1 to {MAX_BLOCK} but got {block_size}.")
    if block_size > 1 and drafter is None:
        raise ValueError(
            f"[decode] block_size must be 1 without an assistant but got {block_size}."
        )
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"[decode] max_tokens must be at least 1 but got {max_tokens}.")
    if not prompt:
        raise ValueError("[decode] prompt must hold at least one token but got none.")
    if len(prompt) >= target.context:
        raise ValueError(
            f"[decode] prompt must be shorter than the context of {target.context} tokens "
            f"but got {len(prompt)}."
        )
