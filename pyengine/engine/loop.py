"""The loop over the rounds of one generation. Token ids only: no text, no files.

The prefill gives the first token; each round (:mod:`pyengine.engine.round`) commits one or more,
until a stop id comes up or the room ends. The host reads one small array per round.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import NamedTuple, cast

import mlx.core as mx

from pyengine import forked
from pyengine.checkpoint import memory
from pyengine.drafters.drafter import MAX_BLOCK, Drafter, TargetLike
from pyengine.engine import round as on_device
from pyengine.engine.prefix import Prefix
from pyengine.engine.report import NonFinite, Report
from pyengine.engine.stats import Stats
from pyengine.model.cache import Cache
from pyengine.model.plan import chunk_end, last_chunk
from pyengine.model.target import Reader
from pyengine.sampling.sampler import Logprob, Sampler
from pyengine.sampling.settings import Sampling, seeded


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
    _check(target, drafter, prompt, block_size, max_tokens)
    stats = Stats() if stats is None else stats
    sampling = seeded(sampling)
    stats.block_size, stats.prompt_tokens = block_size, len(prompt)
    stats.seed = sampling.seed
    mx.reset_peak_memory()
    room = target.context - len(prompt)
    room = room if max_tokens is None else min(max_tokens, room)
    drafter = drafter if block_size > 1 else None
    if drafter is not None and drafter.taps:
        prefix = None  # it has no rows of what the prefix holds

    start = time.perf_counter()
    if prefix is None:
        cache, known = target.new_cache(block_size), 0
    else:
        cache, known = prefix.open(target, prompt, block_size)
        stats.reused_tokens = known
    for chunk in prefill(target, prompt, cache, known, prefix, drafter):
        if chunk.done < len(prompt):
            stats.prefill_s += time.perf_counter() - start
            yield Round([], None, 0, 0, None, chunk.done)
            start = time.perf_counter()
    sampler = Sampler(sampling, prompt, chunk.logits.shape[-1])
    parts = on_device.Parts(target, drafter, cache, sampler)
    outcome = on_device.first(parts, chunk.logits[None])
    row = _read(parts, outcome)
    stats.prefill_s += time.perf_counter() - start
    rounds: dict[int, on_device.RecordedRound] = {}  # by number of drafts
    text, k = list(prompt), 0

    while True:
        report = Report.unpack(row, k, sampling.logprobs)
        if not report.finite:
            raise NonFinite("decode", chunk.hidden.dtype)
        tokens, reason = _cut(report.tokens, room - stats.generated_tokens, stop_ids)
        stats.generated_tokens += len(tokens)
        stats.peak_memory_bytes = mx.get_peak_memory()
        logprobs = None if report.logprobs is None else report.logprobs[: len(tokens)]
        text += tokens
        if prefix is not None:
            prefix.keep(text[:-1])  # the newest token is not processed yet
        yield Round(tokens, reason, k, report.accepted, logprobs)
        if reason:
            return
        forked.check("generate")
        start = time.perf_counter()
        sampler.add(tokens)
        k = block_size - 1
        if drafter is not None and not drafter.wants_to_draft(text, k):
            k = 0
        # A round past the end of the room keeps its shape; what it commits there is not used
        memory.check_growth(cache.growth(block_size))
        cache.reserve(block_size)
        if k not in rounds:
            rounds[k] = on_device.RecordedRound(parts, k)
        outcome = rounds[k].together(parts.state(outcome.primary))
        parts.take_results(outcome, k + 1)
        row = _read(parts, outcome)
        accepted = row[0]
        cache.length_limit = len(prompt) + stats.generated_tokens + accepted
        stats.count_round(k, accepted)
        stats.decode_s += time.perf_counter() - start


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


def _read(parts: on_device.Parts, outcome: on_device.Outcome) -> list[int]:
    """Evaluate a round and read its one small array; nothing else of it is read."""
    mx.eval(outcome.report, outcome.drafter, parts.cache.arrays)
    return cast("list[int]", outcome.report.tolist())


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
