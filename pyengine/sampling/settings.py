"""Sampling settings, and how they turn logits into tokens: edit, filter, draw, accept.

A distribution over the vocabulary is held as its candidates, best first: at most ``top_k`` ids a
row when top-k is on, all V otherwise. Greedy decoding is the distribution with one candidate of
probability 1, so no rule needs a second form for it. Nothing here evaluates an array.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import mlx.core as mx

from pyengine import ops
from pyengine.arguments import number, token_ids
from pyengine.arguments import whole as whole_number
from pyengine.model.head import Logits, whole
from pyengine.ops.accept_block import RULES, Rule
from pyengine.ops.filter_logits import MAX_TOP_K, Edits, Filtered
from pyengine.untrusted import shown

MAX_SEED = 2**32 - 1
# With these, edited logits divided by the temperature are still float32's
MAX_EDIT = 1e9
MIN_TEMPERATURE = 1e-20
# Lists of edited logits grow in steps, so that few rounds differ in their shapes
LIST_STEP = 64


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits; the same settings filter target and assistant.

    The order is fixed: penalties and bias, suppressed tokens, temperature, top-k, softmax, top-p,
    min-p, renormalise. Higher logits come first and equal logits by lower id.

    Args:
        temperature: Divides the logits; 0 is greedy.
        top_p: Keeps the smallest prefix whose preceding mass is below it; 1.0 is off.
        top_k: Keeps that many candidates, at most 256; 0 is off.
        min_p: Drops candidates below this share of the best one's probability; 0.0 is off.
        seed: Key of the random numbers, 0 to 2**32 - 1. The same seed gives the same text. None
            draws a seed for each generation and reports it as ``stats.seed``.
        suppress_tokens: Ids that are never chosen.
        repetition_penalty: Divides positive logits, and multiplies others, of tokens in the prompt
            or the text; 1.0 is off.
        presence_penalty: Subtracted from the logits of tokens in the text; 0.0 is off.
        frequency_penalty: Like the presence penalty, scaled by the token's count.
        logit_bias: Added to the logits of single tokens, by id.
        verify: The rule that accepts drafts. All keep the target's distribution. ``block`` accepts
            no fewer drafts on average than ``residual``; ``coupled`` gives the same text as plain
            decoding with the same seed.
        logprobs: Report the log-probability of each token and of that many most likely ones, from
            the logits before penalties, bias and filter; None reports nothing.

    Raises:
        ValueError: A value is outside its range.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    top_k: int = 64
    min_p: float = 0.0
    seed: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    verify: Rule = "residual"
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def rule(ok: bool, name: str, text: str) -> None:
            if not ok:
                raise ValueError(f"[sampling] {name} must {text} but got {getattr(self, name)}.")

        for name, value in self._checked().items():
            object.__setattr__(self, name, value)
        temperature, repetition, n = self.temperature, self.repetition_penalty, self.logprobs
        rule(math.isfinite(temperature) and temperature >= 0, "temperature", "be 0 or more")
        least = f"be 0, which is greedy, or at least {MIN_TEMPERATURE:g}"
        rule(temperature == 0 or temperature >= MIN_TEMPERATURE, "temperature", least)
        rule(0 < self.top_p <= 1, "top_p", "be above 0 and at most 1")
        rule(0 <= self.top_k <= MAX_TOP_K, "top_k", f"be 0 (off) to {MAX_TOP_K}")
        rule(0 <= self.min_p < 1, "min_p", "be 0 or more and below 1")
        rule(self.seed is None or 0 <= self.seed <= MAX_SEED, "seed", f"be 0 to {MAX_SEED}")
        rule(math.isfinite(repetition) and repetition > 0, "repetition_penalty", "be positive")
        bounds = f"be {1 / MAX_EDIT:g} to {MAX_EDIT:g}"
        rule(1 / MAX_EDIT <= repetition <= MAX_EDIT, "repetition_penalty", bounds)
        verify = isinstance(self.verify, str) and self.verify in RULES
        rule(verify, "verify", f"be one of {', '.join(RULES)}")
        rule(n is None or 0 <= n <= MAX_TOP_K, "logprobs", f"be 0 to {MAX_TOP_K}, or None")

    def _checked(self) -> dict[str, Any]:
        """The fields as Python's own types, whatever numbers were given."""
        found: dict[str, Any] = {
            name: number("sampling", name, getattr(self, name))
            for name in ("temperature", "top_p", "min_p", "repetition_penalty")
        }
        for name in ("presence_penalty", "frequency_penalty"):
            found[name] = _edit(name, getattr(self, name))
        for name in ("top_k", "seed", "logprobs"):
            value = getattr(self, name)
            if name == "top_k" or value is not None:
                found[name] = whole_number("sampling", name, value)
        suppressed = _ids("suppress_tokens", self.suppress_tokens, "be token ids")
        found["suppress_tokens"] = tuple(suppressed)
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(
                "[sampling] logit_bias must be a dict of token ids and numbers but got "
                f"{shown(self.logit_bias)}."
            )
        ids = _ids("logit_bias", self.logit_bias, "name token ids")
        biases = (_edit("logit_bias", bias) for bias in self.logit_bias.values())
        return {**found, "logit_bias": dict(zip(ids, biases, strict=True))}

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether logits depend on the tokens before."""
        off = (1.0, 0.0, 0.0)
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != off

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {
            **self.__dict__,
            "suppress_tokens": list(self.suppress_tokens),
            "logit_bias": {str(token): bias for token, bias in self.logit_bias.items()},
        }


def _ids(name: str, value: Any, rule: str) -> list[int]:
    """Token ids of a vocabulary that is not known yet."""
    ids = token_ids("sampling", name, value, rule)
    if ids and min(ids) < 0:
        raise ValueError(f"[sampling] {name} must {rule} but got {min(ids)}.")
    return ids


def _edit(name: str, value: Any) -> float:
    """What is added to a logit."""
    edit = number("sampling", name, value)
    for ok, text in (
        (math.isfinite(edit), "finite"),
        (abs(edit) <= MAX_EDIT, f"within {MAX_EDIT:g} of 0"),
    ):
        if not ok:
            raise ValueError(f"[sampling] {name} must be {text} but got {edit}.")
    return edit


class Listed(NamedTuple):
    """The tokens whose logits are edited, ``[L]`` each, ids rising; the last may repeat."""

    ids: mx.array  # int32
    counts: mx.array  # in the text, float32
    seen: mx.array  # in the prompt or the text, bool
    bias: mx.array  # float32; -inf for suppressed tokens


class History:
    """What the host knows of the tokens so far, as far as the settings ask for it."""

    def __init__(self, sampling: Sampling, prompt: list[int], vocab: int) -> None:
        named = {*sampling.suppress_tokens, *sampling.logit_bias}
        wrong = sorted(token for token in named if token >= vocab)
        if wrong:
            raise ValueError(
                "[sampling] suppress_tokens and logit_bias must name ids below "
                f"{vocab} but got {wrong[0]}."
            )
        if len(set(sampling.suppress_tokens)) == vocab:
            raise ValueError("[sampling] suppress_tokens must leave a token but got all.")
        self._penalises = sampling.penalises
        self._bias = dict(sampling.logit_bias) | dict.fromkeys(sampling.suppress_tokens, -math.inf)
        self._counts: Counter[int] = Counter()
        self._ids = {*self._bias, *(prompt if self._penalises else ())}
        self._seen = set(prompt)

    def add(self, tokens: Iterable[int]) -> None:
        """Count tokens of the text."""
        if self._penalises:
            self._counts.update(tokens)
            self._ids.update(self._counts)

    def listed(self) -> Listed | None:
        """The tokens to edit in the next round; None where there are none."""
        if not self._ids:
            return None
        ids = sorted(self._ids)
        ids += ids[-1:] * (-len(ids) % LIST_STEP)
        return Listed(
            mx.array(ids, dtype=mx.int32),
            mx.array([float(self._counts[i]) for i in ids]),
            mx.array([i in self._seen or self._counts[i] > 0 for i in ids]),
            mx.array([self._bias.get(i, 0.0) for i in ids]),
        )


def edits(listed: Listed | None, sampling: Sampling, drafts: mx.array, first: int) -> Edits | None:
    """Penalties, bias and suppressed tokens of rows ``first`` to k.

    Row t follows drafts 1 to t of its own block, so they count in it.

    Args:
        listed: From :meth:`History.listed`.
        sampling: The settings.
        drafts: The block's drafts, int32 ``[k]``; k may be 0.
        first: First row wanted, at most k.
    """
    if listed is None:
        return None
    k = drafts.shape[0]
    rows = k + 1 - first
    if not sampling.penalises:
        shape = (rows, listed.ids.shape[0])
        return Edits(listed.ids, mx.ones(shape), mx.broadcast_to(listed.bias, shape))
    ids, counts, seen, bias = listed
    if k:
        # A draft that is not listed yet has no count, no bias
        match = drafts[:, None] == ids
        known, at = match.any(axis=-1), mx.argmax(match, axis=-1)
        ids = mx.concatenate([ids, drafts])
        counts = mx.concatenate([counts, mx.where(known, counts[at], 0)])
        seen = mx.concatenate([seen, known & seen[at]])
        bias = mx.concatenate([bias, mx.where(known, bias[at], 0)])
        own = (drafts[:, None] == ids).astype(mx.float32)  # [k, L + k]
        before = mx.arange(k) < mx.arange(first, k + 1)[:, None]  # [rows, k]
        own = mx.where(before[:, :, None], own, 0).sum(axis=1)
        counts, seen = counts + own, seen | (own > 0)
    else:
        counts, seen = counts[None], seen[None]
    deltas = mx.where(counts > 0, bias - sampling.presence_penalty, bias)
    deltas = deltas - sampling.frequency_penalty * counts
    return Edits(ids, mx.where(seen, sampling.repetition_penalty, 1.0), deltas)


def filter_logits(
    logits: mx.array | Logits, sampling: Sampling, edits: Edits | None = None
) -> Filtered:
    """Turn logits ``[T, V]`` float32, after the softcap, into the distribution that is sampled.

    Logits that are not made yet stay so, unless logprobs want them too.
    """
    settings: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "edits": edits,
    }
    if isinstance(logits, Logits) and sampling.logprobs is None:
        return logits.filter(**settings)
    return ops.filter_logits(whole(logits), **settings)


def seeded(sampling: Sampling) -> Sampling:
    """The same settings; with a seed drawn now where none was given."""
    if sampling.seed is not None:
        return sampling
    return replace(sampling, seed=secrets.randbelow(MAX_SEED + 1))


def seed_of(sampling: Sampling) -> mx.array:
    """The seed as the ops take it."""
    assert sampling.seed is not None
    return mx.array(sampling.seed, dtype=mx.uint32)


def draw_plain(row: Filtered, sampling: Sampling, position: mx.array, seed: mx.array) -> mx.array:
    """Draw the token for an absolute position, as plain decoding does: int32 ``[1]``."""
    if sampling.greedy:
        return row.ids[:, 0]
    return ops.draw_token(row.ids, row.probs, position, seed, shared=True)


def draw_draft(
    row: Filtered, sampling: Sampling, position: mx.array, seed: mx.array, i: int
) -> mx.array:
    """Draw draft i, from 0, of the block whose first token is at ``position``: int32 ``[1]``."""
    if sampling.greedy:
        return row.ids[:, 0]
    shared = sampling.verify == "coupled"
    # The block's first token is drawn already: draft i is the token at position + 1 + i
    index = i + 1 if shared else i
    return ops.draw_token(row.ids, row.probs, position, seed, index=index, shared=shared)


def accept(
    p: Filtered,
    q: Filtered,
    drafts: mx.array,
    sampling: Sampling,
    position: mx.array,
    seed: mx.array,
    vocab: int,
) -> tuple[mx.array, mx.array]:
    """Drafts kept, int32 ``[]``, and the token that follows them, int32 ``[1]``."""
    return ops.accept_block(
        p.ids,
        p.probs,
        q.ids,
        q.probs,
        drafts,
        position,
        seed,
        rule=sampling.verify,
        vocab=vocab,
    )


class Logprob(NamedTuple):
    """Log-probability of a token, and the best tokens with theirs, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def logprobs(logits: mx.array | Logits, tokens: mx.array, count: int) -> mx.array:
    """Log-probabilities of one token a row and of the ``count`` best: ``[T, 1 + 2 * count]``.

    As int32, to be read with the tokens: the token's, then ids, then theirs; floats by their bits.
    """
    logits = whole(logits)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    parts = [tokens[:, None]]
    if count:
        parts.append(ops.filter_logits(logits, top_k=count).ids)
    ids = mx.concatenate(parts, axis=-1)
    values = (mx.take_along_axis(logits, ids, axis=-1) - total).view(mx.int32)
    return mx.concatenate([values[:, :1], ids[:, 1:], values[:, 1:]], axis=-1)
