"""Sampling settings, checked."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pyengine.arguments import number, token_ids
from pyengine.arguments import whole as whole_number
from pyengine.ops.accept_block import RULES, Rule
from pyengine.ops.filter_logits import MAX_TOP_K
from pyengine.untrusted import shown

MAX_SEED = 2**32 - 1
# With these, edited logits divided by the temperature are still float32's
MAX_EDIT = 1e9
MIN_TEMPERATURE = 1e-20
MOST_NODES = 15  # drafts of a tree: with the primary token, what one launch of an op takes


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


def seeded(sampling: Sampling) -> Sampling:
    """The same settings; with a seed drawn now where none was given."""
    if sampling.seed is not None:
        return sampling
    return replace(sampling, seed=secrets.randbelow(MAX_SEED + 1))
