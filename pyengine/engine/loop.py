"""The loop over the rounds of a generation, or of several at once. Token ids only.

The prefill gives the first token; each round (:mod:`pyengine.engine.round`) commits one or more,
until a stop id comes up or the room ends. The host reads one small array per round, of however many
sequences.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx

from pyengine import forked
from pyengine.checkpoint import memory
from pyengine.drafters.drafter import MAX_BLOCK, Drafter, TargetLike
from pyengine.engine import round as on_device
from pyengine.engine.prefix import Prefix
from pyengine.engine.report import NonFinite, Report
from pyengine.engine.stats import Stats
from pyengine.model.cache import Arena, Cache
from pyengine.model.plan import chunk_end, last_chunk
from pyengine.model.target import Reader
from pyengine.ops import dispatch
from pyengine.sampling.sampler import Choices, Logprob, Sampler
from pyengine.sampling.settings import Sampling, seeded

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


def decode(
    target: TargetLike,
    drafter: Drafter | None,
    prompt: list[int],
    *,
    sampling: Sampling,
    block_size: int,
    max_tokens: int | None = None,
    stop_ids: frozenset[int] = frozenset(),
    stats: Stats | None = None,
    prefix: Prefix | None = None,
) -> Generator[Round, None, None]:
    """Generate tokens after ``prompt``, a round at a time. Evaluates once per round.

    Args:
        target: The target.
        drafter: Where drafts come from, made for this generation; may be None when ``block_size``
            is 1.
        prompt: Token ids, at least one.
        sampling: How tokens are chosen.
        block_size: Primary token and its drafts, 2 to 128; 1 is plain decoding.
        max_tokens: At most this many new tokens; None: as many as the context holds.
        stop_ids: Ids that end the text.
        stats: Filled as rounds end.
        prefix: What earlier generations left; what this one leaves. After an error forget it.

    Yields:
        How far the prefill is, between its chunks; the first token after it; then what each round
        committed. Closed between two chunks, what is processed is in the prefix.

    Raises:
        ValueError: A setting is impossible or the prompt does not fit the context.
        RuntimeError: The target's logits are not finite, the cache outgrows the memory, or the
            process was forked from one that had used MLX.
    """
    forked.check("generate")
    sequence = TokenSequence(
        target,
        drafter,
        prompt,
        sampling=sampling,
        block_size=block_size,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        stats=stats,
        prefix=prefix,
    )
    mx.reset_peak_memory()
    yield from sequence.prefill()
    rounds = Rounds()
    while sequence.finish_reason is None:
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
        max_tokens: int | None = None,
        stop_ids: frozenset[int] = frozenset(),
        stats: Stats | None = None,
        prefix: Prefix | None = None,
        shared: Shared | None = None,
        arena: Arena | None = None,
    ) -> None:
        _check(target, drafter, prompt, block_size, max_tokens)
        self.stats = Stats() if stats is None else stats
        self.prompt, self.block_size = prompt, block_size
        self.k = 0  # drafts of the newest round
        self.finish_reason: str | None = None
        self._target, self._drafter = target, drafter if block_size > 1 else None
        self._sampling = seeded(sampling)
        self._stop_ids = stop_ids
        # A drafter with taps has no rows of what a prefix holds
        tapped = self._drafter is not None and self._drafter.taps
        self._prefix = None if tapped else prefix
        self._shared, self._arena = shared, arena
        self._own: Cache | None = None  # where no prefix has it
        room = target.context - len(prompt)
        self._room = room if max_tokens is None else min(max_tokens, room)
        self._text = list(prompt)
        self._new: list[int] = []  # tokens of the newest round
        self.stats.block_size, self.stats.prompt_tokens = block_size, len(prompt)
        self.stats.seed = self._sampling.seed

    @property
    def state(self) -> on_device.State:
        """What its next round starts from."""
        return self.parts.state(self._primary)

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
        self._dtype = begun.hidden.dtype
        played = on_device.first(self.parts, self.sampler, begun.logits[None])
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
        self.k = self.block_size - 1
        if self._drafter is not None and not self._drafter.wants_to_draft(self._text, self.k):
            self.k = 0
        # A round past the end of the room keeps its shape; what it commits there is not used
        memory.check_growth(parts.cache.growth(self.block_size))
        parts.cache.reserve(self.block_size)

    def take_results(self, outcome: on_device.Outcome) -> None:
        """Go on with what a round gave, before it is evaluated."""
        self._primary = outcome.primary
        self.parts.take_results(outcome, self.k + 1)

    def count(self, accepted: int, seconds: float) -> None:
        """Note how many drafts a round kept, and what it took, whoever else was in it."""
        self.parts.cache.settle(len(self._text) + accepted)
        self.stats.count_round(self.k, accepted)
        self.stats.decode_s += seconds

    def commit(self, report: Report) -> Round:
        """What a round's report says, as text: up to a stop id or the end of the room.

        Raises:
            NonFinite: The target's logits were NaN or infinite.
        """
        if not report.finite:
            raise NonFinite("decode", self._dtype)
        room = self._room - self.stats.generated_tokens
        tokens, self.finish_reason = _cut(report.tokens, room, self._stop_ids)
        self.stats.generated_tokens += len(tokens)
        self.stats.peak_memory_bytes = mx.get_peak_memory()
        logprobs = None if report.logprobs is None else report.logprobs[: len(tokens)]
        self._text += tokens
        self._new = tokens
        if self._prefix is not None:
            self._prefix.keep(self._text[:-1])  # the newest token is not processed yet
        return Round(tokens, self.finish_reason, self.k, report.accepted, logprobs)


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
        if going:
            choices = self._choices_of([s.sampler for s in going])
            arena = going[0].parts.cache.arena
            placed = arena.place([s.parts.cache for s in going])
            states = on_device.Start(placed, tuple([s.state for s in going]), choices)
            played = self._round(going, self._groups).together(states)
            for sequence, outcome in zip(going, played.outcomes, strict=True):
                sequence.take_results(outcome)
            row = _read(played)
            arena.take_results(played.arena)
            reports = Report.unpack(row, [s.k for s in going], [s.logprobs for s in going])
            seconds = time.perf_counter() - start
            for sequence, report in zip(going, reports, strict=True):
                sequence.count(report.accepted, seconds)
                try:
                    done[sequence] = sequence.commit(report)
                except NonFinite as error:
                    done[sequence] = error.with_traceback(None)
        return [done[sequence] for sequence in sequences]

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
        forms = [form for _, form in groups]
        key = dispatch.chosen(), *forms, *(self._rank(sequence) for sequence in going)
        if key not in self._recorded:
            each = [sequence.parts for sequence in going]
            self._recorded[key] = on_device.RecordedRound(each, [s.k for s in going], groups)
            if len(self._recorded) > MOST_RECORDED:
                self._recorded.popitem(last=False)
        self._recorded.move_to_end(key)
        return self._recorded[key]


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
