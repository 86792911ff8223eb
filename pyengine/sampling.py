"""Sampling settings and the rules in plain MLX: filter, draw, accept.

A distribution over the vocabulary is held as its candidates, best first: at most ``top_k`` ids a
row when top-k is on, all V otherwise. Greedy decoding is the distribution with one candidate of
probability 1, so no rule needs a second form for it. Nothing here evaluates an array.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import mlx.core as mx

from pyengine import ops
from pyengine.ops.filter_logits import MAX_TOP_K

MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits; the same settings filter target and assistant.

    The order is fixed: suppressed tokens, temperature, top-k, softmax, top-p, min-p, renormalise.
    Higher logits come first and equal logits by lower id.

    Args:
        temperature: Divides the logits; 0 is greedy.
        top_p: Keeps the smallest prefix whose preceding mass is below it; 1.0 is off.
        top_k: Keeps that many candidates, at most 256; 0 is off.
        min_p: Drops candidates below this share of the best one's probability; 0.0 is off.
        seed: Key of the random numbers, 0 to 2**32 - 1. One seed always gives one text.
        suppress_tokens: Ids that are never chosen.

    Raises:
        ValueError: A value is outside its range.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 64
    min_p: float = 0.0
    seed: int = 0
    suppress_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        def rule(ok: bool, name: str, text: str, value: object) -> None:
            if not ok:
                raise ValueError(f"[sampling] {name} must {text} but got {value}.")

        rule(
            math.isfinite(self.temperature) and self.temperature >= 0,
            "temperature",
            "be 0 or more",
            self.temperature,
        )
        rule(0 < self.top_p <= 1, "top_p", "be above 0 and at most 1", self.top_p)
        rule(
            0 <= self.top_k <= MAX_TOP_K,
            "top_k",
            f"be 0 (off) to {MAX_TOP_K}",
            self.top_k,
        )
        rule(0 <= self.min_p < 1, "min_p", "be 0 or more and below 1", self.min_p)
        rule(0 <= self.seed <= MAX_SEED, "seed", f"be 0 to {MAX_SEED}", self.seed)
        bad = [t for t in self.suppress_tokens if t < 0]
        rule(not bad, "suppress_tokens", "be token ids", bad)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


class Purpose(IntEnum):
    """Second word of the random key: draws made for different ends never share a number."""

    PLAIN = 0
    DRAFT = 1
    ACCEPT = 2
    CORRECT = 3


class Distribution(NamedTuple):
    """Rows of candidates, best first. ``ids`` int32 ``[T, n]``, ``probs`` ``[T, n]``."""

    ids: mx.array
    probs: mx.array


def filter_logits(logits: mx.array, sampling: Sampling) -> Distribution:
    """Turn logits into the distribution that is sampled.

    Args:
        logits: ``[T, V]`` float32, after the softcap.
        sampling: The settings.

    Returns:
        Candidates with probabilities that sum to 1; those that were cut have probability 0.
    """
    if sampling.suppress_tokens:
        logits = logits.at[:, mx.array(sampling.suppress_tokens)].add(-mx.inf)
    if sampling.greedy:
        best = mx.argmax(logits, axis=-1, keepdims=True).astype(mx.int32)
        return Distribution(best, mx.ones(best.shape, mx.float32))
    return Distribution(
        *ops.filter_logits(
            logits,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
    )


def uniforms(seed: int, purpose: Purpose, position: mx.array, count: int) -> mx.array:
    """Random numbers of one round: ``[count]`` float32 in [0, 1).

    Counter: (absolute position of the block's primary token, index in the block, lane 0).
    """
    index = mx.arange(count, dtype=mx.uint32)
    zero = mx.zeros_like(index)
    counters = mx.stack([zero + position.astype(mx.uint32), index, zero, zero], axis=-1)
    return ops.random_uniform(counters, (seed, int(purpose)))


def draw_plain(dist: Distribution, sampling: Sampling, position: mx.array) -> mx.array:
    """Draw the token for an absolute position, as plain decoding does: int32 ``[1]``.

    Adds Gumbel noise keyed by (position, token id), so the token depends on the seed, the position
    and the distribution alone. ``dist`` has one row.
    """
    if sampling.greedy:
        return dist.ids[:, 0]
    ids = dist.ids[0].astype(mx.uint32)
    zero = mx.zeros_like(ids)
    counters = mx.stack([zero + position.astype(mx.uint32), ids, zero, zero], axis=-1)
    u = ops.random_uniform(counters, (sampling.seed, int(Purpose.PLAIN)))
    score = mx.log(dist.probs[0]) - mx.log(-mx.log(u))
    return dist.ids[0, mx.argmax(score)].reshape(1)


def draw(dist: Distribution, u: mx.array) -> mx.array:
    """Invert the distribution function: int32 ``[T]`` from one uniform a row ``[T]``.

    Rows need not be normalised. A candidate of probability 0 is never drawn.
    """
    mass = mx.cumsum(dist.probs, axis=-1)
    index = mx.argmax(mass > u[:, None] * mass[:, -1:], axis=-1, keepdims=True)
    return mx.take_along_axis(dist.ids, index, axis=-1)[:, 0]


def probability_of(dist: Distribution, tokens: mx.array) -> mx.array:
    """Probability of one token a row: ``[T]``; 0 for a token that is no candidate."""
    return mx.where(dist.ids == tokens[:, None], dist.probs, 0).sum(axis=-1)


def accept_probability(p: Distribution, q: Distribution, drafts: mx.array) -> mx.array:
    """min(1, p(d) / q(d)) for each draft: ``[k]``. Source: arXiv:2211.17192, algorithm 1."""
    k = drafts.shape[0]
    target = probability_of(Distribution(p.ids[:k], p.probs[:k]), drafts)
    return mx.minimum(target / probability_of(q, drafts), 1)


def residual(p: Distribution, q: Distribution, vocab: int) -> Distribution:
    """What to draw after the first i drafts were accepted: rows ``[k + 1, n]``, normalised.

    Row i < k is the correction (p - q)+; row k is the bonus, p itself. Where p = q nothing is ever
    refused; the row is p then, so that it stays a distribution.
    """
    k, count = q.ids.shape[0], p.ids.shape[0]
    by_id = mx.zeros((count, vocab), dtype=q.probs.dtype)
    if k:
        rows = mx.put_along_axis(by_id[:k], q.ids, q.probs, axis=-1)
        by_id = mx.concatenate([rows, by_id[k:]])
    excess = mx.maximum(p.probs - mx.take_along_axis(by_id, p.ids, axis=-1), 0)
    mass = mx.cumsum(excess, axis=-1)[:, -1:]
    return Distribution(p.ids, mx.where(mass > 0, excess / mx.where(mass > 0, mass, 1), p.probs))


def accept_residual(
    p: Distribution,
    q: Distribution,
    drafts: mx.array,
    u_accept: mx.array,
    u_correct: mx.array,
    vocab: int,
) -> tuple[mx.array, mx.array]:
    """Accept drafts token by token and draw the token that follows them.

    Draft i is accepted iff ``u_accept[i] < min(1, p/q)`` and all before it were; the next token
    is drawn from :func:`residual`'s row of that count.

    Args:
        p: The target's rows, ``[k + 1, n]``.
        q: The assistant's rows, ``[k, m]``; draft i was drawn from row i.
        drafts: ``[k]`` int32.
        u_accept: ``[k]`` uniforms.
        u_correct: ``[k + 1]`` uniforms.
        vocab: V.

    Returns:
        Accepted count int32 ``[]`` and the next token int32 ``[1]``.

    Source: speculative sampling, arXiv:2211.17192 and arXiv:2302.01318.
    """
    passed = (u_accept < accept_probability(p, q, drafts)).astype(mx.int32)
    accepted = mx.cumprod(passed).sum().astype(mx.int32)
    rows = residual(p, q, vocab)
    row = Distribution(rows.ids[accepted][None], rows.probs[accepted][None])
    return accepted, draw(row, u_correct[accepted][None])
