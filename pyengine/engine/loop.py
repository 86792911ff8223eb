"""The loop over the rounds of a generation, or of several at once. Token ids only.

The prefill gives the first token; each round (:mod:`pyengine.engine.round`) commits one or more,
until a stop id comes up or the room ends. The host reads one small array per round, of however many
sequences.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import mlx.core as mx

from pyengine import forked
from pyengine.checkpoint import memory
from pyengine.drafters.drafter import MAX_BLOCK, Drafter, TargetLike
from pyengine.engine import round as on_device
from pyengine.engine.controller import Acceptance, Controller, Text
from pyengine.engine.known import known_of
from pyengine.engine.prefix import Prefix
from pyengine.engine.report import NonFinite, Report
from pyengine.engine.stats import Source, Stats, last_source
from pyengine.model.cache import Arena, Cache
from pyengine.model.plan import chunk_end, last_chunk
from pyengine.model.target import Reader
from pyengine.ops import dispatch
from pyengine.sampling.sampler import Choices, Logprob, Sampler
from pyengine.sampling.settings import Sampling, seeded

if TYPE_CHECKING:  # what brings NumPy is imported where it is needed
    from pyengine.engine.guided import Drafting, Guide, Matcher, Step

T = TypeVar("T")

MOST_FORCED = 15  # drafts in a row: with the primary token, what one launch of an op takes
MOST_RECORDED = 16  # rounds of other makes than these are recorded anew


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


def decode(
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
    matcher: Matcher | None = None,
) -> Generator[Round, None, None]:
    """Generate tokens after ``prompt``, a round at a time. Evaluates once per round; with a matcher
    once more per draft that is drawn.

    Args:
        target: The target.
        drafter: Where drafts come from, made for this generation; may be None when ``block_size``
            is 1.
        prompt: Token ids, at least one.
        sampling: How tokens are chosen.
        block_size: Primary token and its drafts, 2 to 128; 1 is plain decoding.
        auto: Each round takes as many drafts as pay, up to ``block_size``. For greedy decoding and
            the rule ``coupled``, where no text can tell.
        max_tokens: At most this many new tokens; None: as many as the context holds.
        stop_ids: Ids that end the text.
        stats: Filled as rounds end.
        prefix: What earlier generations left; what this one leaves. After an error forget it.
        matcher: Says which tokens may come next; it has seen none.

    Yields:
        How far the prefill is, between its chunks; the first token after it; then what each round
        committed. Closed between two chunks, what is processed is in the prefix.

    Raises:
        ValueError: A setting is impossible or the prompt does not fit the context.
        RuntimeError: The target's logits are not finite, the cache outgrows the memory, the grammar
            cannot be followed, or the process was forked from one that had used MLX.
    """
    forked.check("generate")
    sequence = TokenSequence(
        target,
        drafter,
        prompt,
        sampling=sampling,
        block_size=block_size,
        auto=auto,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        stats=stats,
        prefix=prefix,
        matcher=matcher,
    )
    mx.reset_peak_memory()
    yield from sequence.prefill()
    rounds = Rounds()
    while sequence.finish_reason is None:
        rounds.choose([sequence])
        [done] = rounds.play([sequence])
        if isinstance(done, Exception):
            try:
                raise done
            finally:
                del done  # its trace holds this frame: a cycle would keep the cache
        yield done


class Begun(NamedTuple):
    """A prompt that was processed: what several texts may start from."""

    cache: Cache
    logits: mx.array
    hidden: mx.array
    drafter: list[mx.array]


class Shared:
    """A prompt that several texts begin with; the first that comes to it processes it.

    ``texts`` is how many they are. They share the pages of its keys and values but the last one,
    of which each gets a copy; the last text gets what was left for all.
    """

    def __init__(self, texts: int) -> None:
        self._left, self._running = texts - 1, texts
        self._begun: Begun | None = None

    def take(self) -> Begun | None:
        """What the first one left; None where nobody has been there. Evaluates."""
        begun = self._begun
        if begun is None:
            return None
        self._left -= 1
        if not self._left:
            self._begun = None
            return begun
        return _copied(begun)

    def leave(self, begun: Begun) -> None:
        """Leave a copy for the others. Evaluates."""
        if self._begun is None and self._left:
            self._begun = _copied(begun)

    def end(self) -> None:
        """One of the texts has ended, or never began."""
        self._running -= 1
        if not self._running and self._begun is not None:
            self._begun.cache.release()
            self._begun = None


def _copied(begun: Begun) -> Begun:
    """What a text may write to, apart."""
    carried = [a * 1 for a in begun.drafter]
    return begun._replace(cache=begun.cache.fork(begun.cache.committed), drafter=carried)


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
    ) -> None:
        _check(target, drafter, prompt, block_size, max_tokens)
        self.stats = Stats() if stats is None else stats
        self.prompt, self.block_size = prompt, block_size
        self.drafts = block_size - 1  # of the next round, if its drafter has any
        self.k = 0  # drafts of the newest round
        self.acceptance: Acceptance | None = None  # where each round's block size is chosen
        self.finish_reason: str | None = None
        self._target, self._drafter = target, drafter if block_size > 1 else None
        self._sampling = seeded(sampling)
        self._stop_ids = stop_ids
        # A drafter with taps has no rows of what a prefix holds
        tapped = self._drafter is not None and self._drafter.taps
        self._prefix = None if tapped else prefix
        self._shared, self._arena = shared, arena
        self._own: Cache | None = None  # where no prefix has it
        self._matcher = matcher
        self.guide: Guide | None = None  # once the prompt is processed, where there is a matcher
        self._most_rows = most_rows(block_size, matcher is not None)
        room = target.context - len(prompt)
        self._room = room if max_tokens is None else min(max_tokens, room)
        self._text = list(prompt)
        self._new: list[int] = []  # tokens of the newest round
        self._counts = (0, 0, 0)  # of it: drafted, accepted, forced
        self._sources: list[Source] = ["first"]
        if auto and self._drafter is not None:
            known = known_of(target, type(self._drafter), self.is_guided)
            self.acceptance = Acceptance(known.acceptance)
        self.stats.block_size = "auto" if self.acceptance else block_size
        self.stats.prompt_tokens = len(prompt)
        self.stats.seed = self._sampling.seed

    @property
    def state(self) -> on_device.State:
        """What its next round starts from."""
        return self.parts.state(self._primary)

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
    def is_dense(self) -> bool:
        """Whether all V are candidates."""
        return self.sampler.top_k == 0

    def release(self) -> None:
        """Give back its pages where no prefix holds them."""
        if self._own is not None:
            self._own.release()

    def prefill(self) -> Iterator[Round]:
        """Process the prompt; the last round that is yielded has the first token. Evaluates."""
        stats, prompt = self.stats, self.prompt
        start = time.perf_counter()
        begun = None if self._shared is None else self._shared.take()
        if begun is not None:
            self._prefix = None  # which holds another cache
            self._own = begun.cache
            stats.reused_tokens = len(prompt)
            if self._drafter is not None:
                self._drafter.take_results(begun.drafter)
            yield self._begin(begun, start)
            return
        if self._prefix is None:
            arena = self._arena
            cache = self._target.new_cache() if arena is None else arena.new_cache()
            self._own, known = cache, 0
        else:
            cache, known = self._prefix.open(self._target, prompt)
            stats.reused_tokens = known
        for chunk in prefill(self._target, prompt, cache, known, self._prefix, self._drafter):
            if chunk.done < len(prompt):
                stats.prefill_s += time.perf_counter() - start
                yield Round([], None, 0, 0, None, chunk.done)
                start = time.perf_counter()
        carried = [] if self._drafter is None else self._drafter.arrays
        begun = Begun(cache, chunk.logits, chunk.hidden, carried)
        if self._shared is not None:
            self._shared.leave(begun)
        yield self._begin(begun, start)

    def _begin(self, begun: Begun, start: float) -> Round:
        """The first token, behind a prompt that was processed. Evaluates."""
        vocab = begun.logits.shape[-1]
        self.sampler = Sampler(self._sampling, self.prompt, vocab)
        self.parts = on_device.Parts(self._target, self._drafter, begun.cache, vocab, self.logprobs)
        self.kind = self.block_size, type(self._drafter), self.logprobs
        masks = None
        if self._matcher is not None:
            from pyengine.engine.guided import Guide

            own = self._sampling.suppress_tokens
            self.guide = Guide(self._matcher, own, self._stop_ids, vocab)
            masks = self.guide.masks()
        self._dtype = begun.hidden.dtype
        played = on_device.first(self.parts, self.sampler, begun.logits[None], masks)
        [report] = Report.unpack(_read(played), [0], [self.logprobs])
        self._primary = played.outcomes[0].primary
        self.stats.prefill_s += time.perf_counter() - start
        return self.commit(report)

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

    def count(self, accepted: int, seconds: float) -> None:
        """Note how many drafts a round kept, and what it took, whoever else was in it."""
        self.parts.cache.settle(len(self._text) + accepted)
        guide = self.guide
        self._counts = (self.k, accepted, 0) if guide is None else guide.counts(accepted)
        self._sources = ["draft"] * accepted if guide is None else guide.sources(accepted)
        self._sources.append(last_source(*self._counts[:2]))
        self.stats.count_round(*self._counts)
        if self.acceptance is not None:
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
        self.stats.peak_memory_bytes = mx.get_peak_memory()
        logprobs = None if report.logprobs is None else report.logprobs[: len(tokens)]
        if self.guide is not None:
            self.guide.commit(report.accepted, None if self.finish_reason else tokens[-1])
        self._text += tokens
        self._new = tokens
        if self._prefix is not None:
            self._prefix.keep(self._text[:-1])  # the newest token is not processed yet
        drafted, accepted, forced = self._counts
        sources = tuple(self._sources[: len(tokens)])
        return Round(tokens, self.finish_reason, drafted, accepted, logprobs, None, forced, sources)


class Rounds:
    """Plays rounds of any sequences of one pair; keeps the graphs that were recorded.

    A graph serves all sequences that draft as many tokens and have candidates, lists of edits and
    log-probabilities of the same number: settings, seeds, edits, lengths and caches are arguments.
    """

    def __init__(self) -> None:
        self._kinds: dict[Any, int] = {}
        self._known: tuple[Any, ...] = ()  # who was in the newest round, and what they were told
        self._groups: tuple[on_device.Group, ...] = ()
        self._choices: tuple[Choices, ...] = ()
        self._recorded: OrderedDict[Any, on_device.RecordedRound] = OrderedDict()
        self._recorded_now = False  # whether the newest round's graph was new
        self._controllers: dict[bool, Controller] = {}  # of free texts; and of guided ones
        self._steps: OrderedDict[Any, on_device.RecordedDraft] = OrderedDict()

    def choose(self, sequences: Sequence[TokenSequence]) -> None:
        """Set the drafts of those whose block size is automatic, for a round of them all."""
        for guided in (False, True):
            self._choose([s for s in sequences if s.is_guided == guided], guided)

    def _choose(self, sequences: Sequence[TokenSequence], guided: bool) -> None:
        chosen = [s for s in sequences if s.acceptance is not None]
        if not chosen:
            return
        if guided not in self._controllers:
            parts = chosen[0].parts
            known = known_of(parts.target, type(parts.drafter), guided)
            self._controllers[guided] = Controller(known)
        controller = self._controllers[guided]
        all_texts = controller.known.acceptance
        texts = [
            Text(all_texts, s.drafts) if s.acceptance is None else Text(s.acceptance)
            for s in sequences
        ]
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
        for group in (
            [s for s in going if s.guide is None],
            [s for s in going if s.guide is not None],
        ):
            done |= self._play(group, start)
        return [done[sequence] for sequence in sequences]

    def _play(
        self, going: Sequence[TokenSequence], start: float
    ) -> dict[TokenSequence, Round | Exception]:
        """A round of sequences that are all free, or all guided by grammars."""
        if not going:
            return {}
        done: dict[TokenSequence, Round | Exception] = {}
        played = self._played(going)
        for sequence, outcome in zip(going, played.outcomes, strict=True):
            sequence.take_results(outcome)
        row = _read(played)
        going[0].parts.cache.arena.take_results(played.arena)
        reports = Report.unpack(row, [s.k for s in going], [s.logprobs for s in going])
        seconds = time.perf_counter() - start
        for sequence, report in zip(going, reports, strict=True):
            sequence.count(report.accepted, seconds)
            try:
                done[sequence] = sequence.commit(report)
            except RuntimeError as error:
                done[sequence] = error.with_traceback(None)
        guided = going[0].is_guided
        if guided in self._controllers:
            drawn, kept = zip(*(s.drawn for s in going), strict=True)
            ks = [s.drafts for s in going] if guided else drawn
            self._controllers[guided].note(ks, kept, seconds, self._recorded_now, drawn)
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
        key = *(form for _, form in groups), *(self._rank(sequence) for sequence in going)
        self._recorded_now = (dispatch.chosen(), key) not in self._recorded
        return _kept(self._recorded, key, lambda: on_device.RecordedRound(each, ks, groups))

    def _step(self, going: Sequence[TokenSequence], i: int) -> Step:
        from pyengine.engine.guided import masked

        each, samplers = [s.parts for s in going], [s.sampler for s in going]
        groups = on_device.groups_of(samplers)
        key = i, *(form for _, form in groups), *(self._rank(s)[::2] for s in going)
        placed = each[0].cache.arena.place([parts.cache for parts in each])
        step = _kept(self._steps, key, lambda: on_device.RecordedDraft(each, i, groups))

        def draw(
            states: tuple[on_device.State, ...], masks: Sequence[mx.array], before: mx.array
        ) -> on_device.Drawn:
            choices = masked(samplers, groups, masks)
            return step.draw(on_device.Start(placed, states, choices), before)

        return draw


def _kept(recorded: OrderedDict[Any, T], key: Any, record: Callable[[], T]) -> T:
    """What was recorded under that key and the ops in use; recorded now where nothing was."""
    key = dispatch.chosen(), key
    if key not in recorded:
        recorded[key] = record()
        if len(recorded) > MOST_RECORDED:
            recorded.popitem(last=False)
    recorded.move_to_end(key)
    return recorded[key]


class Prefilled(NamedTuple):
    """What a chunk of the prefill gave, and how much of the prompt is done."""

    done: int
    logits: mx.array  # [V]
    hidden: mx.array  # [1, E]


def prefill(
    target: TargetLike,
    prompt: list[int],
    cache: Cache,
    known: int,
    prefix: Prefix | None = None,
    reader: Reader | None = None,
) -> Iterator[Prefilled]:
    """Process a prompt from place ``known`` on, a chunk at a time. Evaluates once per chunk.

    A prefix gets its marks: where prompts part, where no more than a chunk is left, at the end.
    """
    parting, done = 0 if prefix is None else prefix.parting, known
    last = last_chunk(known, len(prompt))
    while done < len(prompt):
        forked.check("generate")
        end = chunk_end(done, len(prompt))
        if done < parting < end:
            end = parting
        if prefix is not None and done in (parting, last):
            prefix.mark(done)
        logits, hidden = target.prefill(prompt[done:end], cache, reader=reader)
        done = end
        if prefix is not None and done == len(prompt):
            prefix.mark(done)
        yield Prefilled(done, logits, hidden)


def _read(played: on_device.Played) -> list[int]:
    """Evaluate a round and read its one small array; nothing else of it is read."""
    mx.eval(played)
    return cast("list[int]", played.report.tolist())


def _cut(tokens: list[int], room: int, stop_ids: frozenset[int]) -> tuple[list[int], str | None]:
    """Cut a round's tokens after the first stop id or where the room ends."""
    for i, token in enumerate(tokens[:room]):
        if token in stop_ids:
            return tokens[: i + 1], "stop"
    return tokens[:room], "length" if len(tokens) >= room else None


def most_rows(block_size: int, guided: bool) -> int:
    """Rows of a round's block at most; a grammar may lengthen a block, but not plain decoding."""
    return max(block_size, 1 + MOST_FORCED) if guided and block_size > 1 else block_size


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
