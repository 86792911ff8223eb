"""The speculative round, and the loop over rounds. Token ids only: no text, no files.

A round drafts k tokens with the assistant, verifies them in one target call, accepts a prefix,
draws the token that follows it and commits what was kept. It is one lazy graph of fixed shapes,
built once and played again, and the host reads one small array at its end. Plain decoding is the
same loop with rounds of one token.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, cast

import mlx.core as mx

from pyengine import forked
from pyengine.checkpoint import memory
from pyengine.engine.prefix import Prefix
from pyengine.engine.recorded import ArrayFunction, recorded
from pyengine.model.cache import CHUNK, Cache
from pyengine.model.head import Logits
from pyengine.ops import dispatch
from pyengine.ops.filter_logits import Filtered
from pyengine.sampling import settings as rules
from pyengine.sampling.settings import History, Listed, Logprob, Sampling, filter_logits

MAX_BLOCK = 128


class TargetLike(Protocol):
    """What a round asks of the target (:class:`pyengine.model.target.Target`)."""

    @property
    def context(self) -> int: ...

    def embed(self, ids: mx.array) -> mx.array: ...

    def new_cache(self, max_block: int) -> Cache: ...

    def prefill(self, ids: list[int], cache: Cache) -> tuple[mx.array, mx.array]: ...

    def forward(self, ids: mx.array, cache: Cache) -> tuple[mx.array | Logits, mx.array]: ...


class AssistantLike(Protocol):
    """What a round asks of the assistant (:class:`pyengine.model.assistant.Assistant`)."""

    def forward(
        self, embedding: mx.array, hidden: mx.array, cache: Cache
    ) -> tuple[mx.array | Logits, mx.array]: ...


@dataclass
class Stats:
    """Counts and seconds of one generation, filled while it runs.

    ``decode_s`` and ``tok_s`` are decode only: the first token belongs to the prefill. ``seed`` is
    the one that was used, given or drawn. What a round committed behind a stop string counts too.
    """

    block_size: int = 1
    seed: int | None = None
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    bonus_tokens: int = 0
    correction_tokens: int = 0
    peak_memory_bytes: int = 0

    @property
    def tok_s(self) -> float:
        """Decode tokens per second; 0 when nothing was decoded after the first token."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def prefill_tok_s(self) -> float:
        processed = self.prompt_tokens - self.reused_tokens
        return processed / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def acceptance(self) -> float:
        """Accepted / drafted; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_by_depth(self) -> list[float]:
        """Of the drafts at each depth, the share that was accepted."""
        return [a / d for a, d in zip(self.accepted_by_depth, self.drafted_by_depth, strict=True)]

    @property
    def tokens_per_round(self) -> float:
        return (self.generated_tokens - 1) / self.rounds if self.rounds else 0.0

    def count_round(self, drafted: int, accepted: int) -> None:
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        grow = drafted - len(self.drafted_by_depth)
        self.drafted_by_depth += [0] * grow
        self.accepted_by_depth += [0] * grow
        for depth in range(drafted):
            self.drafted_by_depth[depth] += 1
            self.accepted_by_depth[depth] += depth < accepted
        if drafted and accepted == drafted:
            self.bonus_tokens += 1
        elif drafted:
            self.correction_tokens += 1

    def to_dict(self) -> dict[str, Any]:
        """Counts, seconds and the ratios made of them, ready for JSON."""
        ratios = ("tok_s", "prefill_tok_s", "acceptance", "acceptance_by_depth", "tokens_per_round")
        return {**self.__dict__, **{name: getattr(self, name) for name in ratios}}


class NonFinite(RuntimeError):
    """The target gave logits that are NaN or infinite; ``dtype`` is that of its activations."""

    def __init__(self, what: str, dtype: mx.Dtype) -> None:
        why = "are the weights damaged?"
        if dtype == mx.float16:
            why = "float16 ends at 65504: load the pair with dtype bfloat16 or float32."
        super().__init__(f"[{what}] logits must be finite but got NaN or infinity; {why}")


class Round(NamedTuple):
    """Tokens committed by one round; a stop id comes last and ends the generation.

    Between two chunks of the prefill there is one with no tokens, whose ``prompt_done`` counts the
    prompt's tokens processed so far.
    """

    tokens: list[int]
    finish_reason: str | None  # "stop", "length", or None while it goes on
    num_drafted: int
    num_accepted: int
    logprobs: list[Logprob] | None = None  # one a token, where the settings ask for it
    prompt_done: int | None = None


class _State(NamedTuple):
    """What a round starts from: the primary token ``[1]`` and the hidden row that made it."""

    primary: mx.array
    hidden: mx.array  # [1, E]


def decode(
    target: TargetLike,
    assistant: AssistantLike | None,
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
        assistant: The assistant; may be None when ``block_size`` is 1.
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
    _check(target, assistant, prompt, block_size, max_tokens)
    stats = Stats() if stats is None else stats
    sampling = rules.seeded(sampling)
    stats.block_size, stats.prompt_tokens = block_size, len(prompt)
    stats.seed = sampling.seed
    mx.reset_peak_memory()
    room = target.context - len(prompt)
    room = room if max_tokens is None else min(max_tokens, room)

    start = time.perf_counter()
    if prefix is None:
        cache, known = target.new_cache(block_size), 0
    else:
        cache, known = prefix.open(target, prompt, block_size)
        stats.reused_tokens = known
    for chunk in prefill(target, prompt, cache, known, prefix):
        if chunk.done < len(prompt):
            stats.prefill_s += time.perf_counter() - start
            yield Round([], None, 0, 0, None, chunk.done)
            start = time.perf_counter()
    _, logits, hidden = chunk
    history = History(sampling, prompt, logits.shape[-1])
    seed = rules.seed_of(sampling)
    packed, state = _first(logits[None], hidden, history.listed(), cache, sampling, seed)
    row = _read(packed, [hidden])
    stats.prefill_s += time.perf_counter() - start
    drafted, play = 0, _rounds(target, assistant, cache, sampling, block_size - 1)
    text = list(prompt)

    while True:
        kept = _unpack(row, drafted, sampling, state.hidden.dtype)
        tokens, reason = _cut(kept.tokens, room - stats.generated_tokens, stop_ids)
        stats.generated_tokens += len(tokens)
        stats.peak_memory_bytes = mx.get_peak_memory()
        logprobs = None if kept.logprobs is None else kept.logprobs[: len(tokens)]
        text += tokens
        if prefix is not None:
            prefix.keep(text[:-1])  # the newest token is not processed yet
        yield Round(tokens, reason, drafted, kept.accepted, logprobs)
        if reason:
            return
        forked.check("generate")
        start = time.perf_counter()
        history.add(tokens)
        # A round past the end of the room keeps its shape; what it commits there is not used
        drafted = block_size - 1
        memory.check_growth(cache.growth(block_size))
        cache.reserve(block_size)
        packed, primary, hidden, *arrays = play(
            [*state, seed, *(history.listed() or ()), *cache.arrays]
        )
        state = _State(primary, hidden)
        cache.take_results(arrays, cache.length_limit + block_size)
        row = _read(packed, [state.hidden, *cache.arrays])
        accepted = row[drafted]
        cache.length_limit = len(prompt) + stats.generated_tokens + accepted
        stats.count_round(drafted, accepted)
        stats.decode_s += time.perf_counter() - start


class Prefilled(NamedTuple):
    """What a chunk of the prefill gave, and how much of the prompt is done."""

    done: int
    logits: mx.array  # [V]
    hidden: mx.array  # [1, E]


def prefill(
    target: TargetLike, prompt: list[int], cache: Cache, known: int, prefix: Prefix | None
) -> Iterator[Prefilled]:
    """Process a prompt from place ``known`` on, a chunk at a time. Evaluates once per chunk.

    A prefix gets its marks: where prompts part, and at both ends of the last chunk.
    """
    parting, done = 0 if prefix is None else prefix.parting, known
    while done < len(prompt):
        forked.check("generate")
        end = min(done + CHUNK, len(prompt))
        if done < parting < end:
            end = parting
        if prefix is not None and (done == parting or end == len(prompt)):
            prefix.mark(done)
        logits, hidden = target.prefill(prompt[done:end], cache)
        done = end
        if prefix is not None and done == len(prompt):
            prefix.mark(done)
        yield Prefilled(done, logits, hidden)


def _rounds(
    target: TargetLike,
    assistant: AssistantLike | None,
    cache: Cache,
    sampling: Sampling,
    k: int,
) -> ArrayFunction:
    """Rounds of one generation, as a function of arrays alone: the state's two, the seed, what
    :class:`Listed` holds if anything, the cache's. It gives what the host reads, the next state's
    two and the cache's."""
    size = len(cache.arrays)

    def build(arrays: Sequence[mx.array]) -> list[mx.array]:
        primary, hidden, seed, *rest = arrays[:-size]
        state, listed = _State(primary, hidden), Listed(*rest) if rest else None
        own = cache.with_arrays(arrays[-size:])
        if k and assistant is not None:
            packed, state = _round(target, assistant, own, state, listed, sampling, seed, k)
        else:
            packed, state = _plain_step(target, own, state, listed, sampling, seed)
        # What was written in place the caller has; MLX's work grows with the square of the results
        return [packed, *state, *([own.length] if dispatch.in_place() else own.arrays)]

    return recorded(build)


def _round(
    target: TargetLike,
    assistant: AssistantLike,
    cache: Cache,
    state: _State,
    listed: Listed | None,
    sampling: Sampling,
    seed: mx.array,
    k: int,
) -> tuple[mx.array, _State]:
    """Draft k, verify, accept, commit: what the host reads, and the next state."""
    position = cache.length  # of the block's first token
    # Draft
    token, hidden, block, rows = state.primary, state.hidden, [state.primary], []
    for i in range(k):
        logits, hidden = assistant.forward(target.embed(token), hidden, cache)
        before = mx.concatenate(block)[1:]
        rows.append(filter_logits(logits, sampling, rules.edits(listed, sampling, before, i)))
        token = rules.draw_draft(rows[i], sampling, position, seed, i)
        block.append(token)
    q = Filtered(*(mx.concatenate(list(part)) for part in zip(*rows, strict=True)))
    # Verify
    ids = mx.concatenate(block)
    logits, hidden = target.forward(ids, cache)  # [k + 1, ...]
    drafts = ids[1:]
    p = filter_logits(logits, sampling, rules.edits(listed, sampling, drafts, 0))
    # Accept
    accepted, token = rules.accept(p, q, drafts, sampling, position, seed, logits.shape[-1])
    # Commit
    cache.commit(accepted + 1, cache.length_limit + k + 1)
    row = accepted[None]
    packed = [drafts, row, token, p.flags, q.flags]
    if sampling.logprobs is not None:
        chosen = mx.where(mx.arange(k + 1) == accepted, token, mx.concatenate([drafts, token]))
        packed.append(rules.logprobs(logits, chosen, sampling.logprobs).flatten())
    return mx.concatenate(packed), _State(token, mx.take(hidden, row, axis=0))


def _plain_step(
    target: TargetLike,
    cache: Cache,
    state: _State,
    listed: Listed | None,
    sampling: Sampling,
    seed: mx.array,
) -> tuple[mx.array, _State]:
    """One token with no draft: what the host reads, and the next state."""
    logits, hidden = target.forward(state.primary, cache)
    cache.commit(mx.array(1, mx.int32), cache.length_limit + 1)
    return _first(logits, hidden, listed, cache, sampling, seed)


def _first(
    logits: mx.array | Logits,
    hidden: mx.array,
    listed: Listed | None,
    cache: Cache,
    sampling: Sampling,
    seed: mx.array,
) -> tuple[mx.array, _State]:
    """The token after the committed ones, from logits ``[1, V]``."""
    row = filter_logits(logits, sampling, rules.edits(listed, sampling, mx.zeros(0, mx.int32), 0))
    token = rules.draw_plain(row, sampling, cache.length, seed)
    packed = [mx.zeros(1, mx.int32), token, row.flags]
    if sampling.logprobs is not None:
        packed.append(rules.logprobs(logits, token, sampling.logprobs).flatten())
    return mx.concatenate(packed), _State(token, hidden)


class _Kept(NamedTuple):
    """What a round kept."""

    tokens: list[int]
    accepted: int
    logprobs: list[Logprob] | None


def _read(packed: mx.array, state: list[mx.array]) -> list[int]:
    """Evaluate a round and read its one small array; nothing else of it is read."""
    mx.eval(packed, *state)
    return cast(list[int], packed.tolist())


def _unpack(row: list[int], k: int, sampling: Sampling, dtype: mx.Dtype) -> _Kept:
    """Take apart what was read: k drafts, how many were kept, the next token, flags of the target's
    k + 1 rows and of the assistant's k, logprobs."""
    ours, guesses = row[k + 2 : 2 * k + 3], row[2 * k + 3 : 3 * k + 3]
    # An assistant may leave tokens out (-inf, flag 1); a target may not
    if any(ours) or any(flags >> 1 for flags in guesses):
        raise NonFinite("decode", dtype)
    accepted = row[k]
    tokens = [*row[:accepted], row[k + 1]]
    if sampling.logprobs is None:
        return _Kept(tokens, accepted, None)
    n, rest = sampling.logprobs, row[3 * k + 3 :]
    width = 1 + 2 * n
    found = []
    for i, token in enumerate(tokens):
        own, *best = rest[i * width : (i + 1) * width]
        values = struct.unpack(f"{1 + n}f", struct.pack(f"{1 + n}i", own, *best[n:]))
        found.append(Logprob(token, values[0], list(zip(best[:n], values[1:], strict=True))))
    return _Kept(tokens, accepted, found)


def _cut(tokens: list[int], room: int, stop_ids: frozenset[int]) -> tuple[list[int], str | None]:
    """Cut a round's tokens after the first stop id or where the room ends."""
    for i, token in enumerate(tokens[:room]):
        if token in stop_ids:
            return tokens[: i + 1], "stop"
    return tokens[:room], "length" if len(tokens) >= room else None


def _check(
    target: TargetLike,
    assistant: AssistantLike | None,
    prompt: list[int],
    block_size: int,
    max_tokens: int | None,
) -> None:
    if not 1 <= block_size <= MAX_BLOCK:
        raise ValueError(f"[decode] block_size must be 1 to {MAX_BLOCK} but got {block_size}.")
    if block_size > 1 and assistant is None:
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
