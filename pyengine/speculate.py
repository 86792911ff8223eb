"""The speculative round, and the loop over rounds. Token ids only: no text, no files.

A round drafts k tokens with the assistant, verifies them in one target call, accepts a prefix,
draws the token that follows it and commits what was kept. It is one lazy graph: the host reads one
small array at its end. Plain decoding is the same loop with rounds of one token.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import numpy as np

from pyengine import sampling as rules
from pyengine.cache import Cache
from pyengine.prefix import Prefix
from pyengine.sampling import Distribution, Purpose, Sampling, filter_logits

MAX_BLOCK = 128


class TargetLike(Protocol):
    """What a round asks of the target (:class:`pyengine.target.Target`)."""

    @property
    def context(self) -> int: ...

    def embed(self, ids: mx.array) -> mx.array: ...

    def new_cache(self, max_block: int) -> Cache: ...

    def prefill(self, ids: list[int], cache: Cache) -> tuple[mx.array, mx.array]: ...

    def verify(self, ids: mx.array, cache: Cache) -> tuple[mx.array, mx.array]: ...


class AssistantLike(Protocol):
    """What a round asks of the assistant (:class:`pyengine.assistant.Assistant`)."""

    def step(
        self, embedding: mx.array, hidden: mx.array, cache: Cache
    ) -> tuple[mx.array, mx.array]: ...


@dataclass
class Stats:
    """Counts and seconds of one generation, filled while it runs.

    ``decode_s`` and ``tok_s`` are decode only: the first token belongs to the prefill.
    """

    block_size: int = 1
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
    """The target gave logits that are NaN or infinite."""


class Round(NamedTuple):
    """Tokens committed by one round; a stop id comes last and ends the generation."""

    tokens: list[int]
    finish_reason: str | None  # "stop", "length", or None while it goes on
    num_drafted: int
    num_accepted: int


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
    max_tokens: int,
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
        max_tokens: At most this many new tokens.
        stop_ids: Ids that end the text.
        stats: Filled as rounds end.
        prefix: What earlier generations left; the caller tells it what this one committed.

    Yields:
        The first token after the prefill, then what each round committed.

    Raises:
        ValueError: A setting is impossible or the prompt does not fit the context.
        RuntimeError: The target's logits are not finite.
    """
    _check(target, assistant, prompt, block_size, max_tokens)
    stats = Stats() if stats is None else stats
    stats.block_size, stats.prompt_tokens = block_size, len(prompt)
    mx.reset_peak_memory()
    room = min(max_tokens, target.context - len(prompt))

    start = time.perf_counter()
    if prefix is None:
        cache = target.new_cache(block_size)
        logits, hidden = target.prefill(prompt, cache)
    else:
        cache, known = prefix.open(target, prompt, block_size)
        logits, hidden = target.prefill(prompt[known:], cache)
        prefix.mark(len(prompt))
        stats.reused_tokens = prefix.reused
    dist = filter_logits(logits[None], sampling)
    primary = rules.draw_plain(dist, sampling, cache.length)
    tokens = _read(mx.concatenate([primary, _broken(logits)]), [hidden])
    stats.prefill_s = time.perf_counter() - start
    state, drafted, accepted = _State(primary, hidden), 0, 0

    while True:
        tokens, reason = _cut(tokens, room - stats.generated_tokens, stop_ids)
        stats.generated_tokens += len(tokens)
        stats.peak_memory_bytes = mx.get_peak_memory()
        yield Round(tokens, reason, drafted, accepted)
        if reason:
            return
        start = time.perf_counter()
        # The last token of all needs no drafts: a round commits at least one.
        drafted = min(block_size - 1, room - stats.generated_tokens - 1)
        if drafted and assistant is not None:
            packed, state = _round(target, assistant, cache, state, sampling, drafted)
        else:
            packed, state = _plain_step(target, cache, state, sampling)
        row = _read(packed, [state.hidden, cache.length])
        accepted = row[drafted]
        tokens = row[:accepted] + row[drafted + 1 :]
        cache.bound = len(prompt) + stats.generated_tokens + accepted
        stats.count_round(drafted, accepted)
        stats.decode_s += time.perf_counter() - start


def _round(
    target: TargetLike,
    assistant: AssistantLike,
    cache: Cache,
    state: _State,
    sampling: Sampling,
    k: int,
) -> tuple[mx.array, _State]:
    """Draft k, verify, accept, commit: (drafts [k], accepted, next token, flag), next state."""
    u = {use: rules.uniforms(sampling.seed, use, cache.length, k + 1) for use in Purpose if use}
    # Draft
    token, hidden, drafts, rows = state.primary, state.hidden, [], []
    for i in range(k):
        logits, hidden = assistant.step(target.embed(token), hidden, cache)
        rows.append(filter_logits(logits, sampling))
        token = rules.draw(rows[i], u[Purpose.DRAFT][i : i + 1])
        drafts.append(token)
    block = mx.concatenate([state.primary, *drafts])  # [k + 1]
    q = Distribution(*(mx.concatenate(list(part)) for part in zip(*rows, strict=True)))
    # Verify
    logits, hidden = target.verify(block, cache)  # [k + 1, V], [k + 1, E]
    p = filter_logits(logits, sampling)
    # Accept
    accepted, token = rules.accept_residual(
        p, q, block[1:], u[Purpose.ACCEPT][:k], u[Purpose.CORRECT], logits.shape[-1]
    )
    # Commit
    cache.commit(accepted + 1, cache.bound + k + 1)
    packed = mx.concatenate([block[1:], accepted[None], token, _broken(logits)])
    return packed, _State(token, hidden[accepted][None])


def _plain_step(
    target: TargetLike, cache: Cache, state: _State, sampling: Sampling
) -> tuple[mx.array, _State]:
    """One token with no draft: (0 accepted, next token, flag), next state."""
    logits, hidden = target.verify(state.primary, cache)
    cache.commit(mx.array(1, mx.int32), cache.bound + 1)
    token = rules.draw_plain(filter_logits(logits, sampling), sampling, cache.length)
    packed = mx.concatenate([mx.zeros(1, mx.int32), token, _broken(logits)])
    return packed, _State(token, hidden)


def _broken(logits: mx.array) -> mx.array:
    """1 when any logit is NaN or infinite, else 0: int32 ``[1]``."""
    return (~mx.isfinite(logits).all()).astype(mx.int32)[None]


def _read(packed: mx.array, state: list[mx.array]) -> list[int]:
    """Evaluate a round and read its one small array; the last entry is the flag."""
    mx.eval(packed, *state)
    row = [int(value) for value in np.array(packed)]
    broken = row.pop()
    if broken:
        raise NonFinite(
            "[decode] logits must be finite but got NaN or infinity; are the weights damaged?"
        )
    return row


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
    max_tokens: int,
) -> None:
    if not 1 <= block_size <= MAX_BLOCK:
        raise ValueError(f"[decode] block_size must be 1 to {MAX_BLOCK} but got {block_size}.")
    if block_size > 1 and assistant is None:
        raise ValueError(
            f"[decode] block_size must be 1 without an assistant but got {block_size}."
        )
    if max_tokens < 1:
        raise ValueError(f"[decode] max_tokens must be at least 1 but got {max_tokens}.")
    if not prompt:
        raise ValueError("[decode] prompt must hold at least one token but got none.")
    if len(prompt) >= target.context:
        raise ValueError(
            f"[decode] prompt must be shorter than the context of {target.context} tokens "
            f"but got {len(prompt)}."
        )
