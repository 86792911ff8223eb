"""The generator, the filter, the draws, the rules and whole rounds in NumPy and float64.

Written from the papers and from what the settings promise, out of nothing of pyengine's, so that
expected tokens are worked out here. Where float32 might rightly decide the other way, `Close` is
raised: such cases are counted and left out.

Sources: Philox, Salmon et al. 2011; arXiv:2211.17192 (residual); arXiv:2403.10444, algorithm 2
(block); the Gumbel-max race (coupled).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

PLAIN, DRAFT, ACCEPT, CORRECT = range(4)  # second word of the key
EPS = 2e-6  # what float32 may be off by, in probability


class Close(Exception):
    """A number lies nearer to its bound than float32 can tell."""


def uniform(position: int, lane: int, seed: int, purpose: int) -> float:
    """Philox 4x32-10 of counter (position, lane, 0, 0) and key (seed, purpose): 24 bits."""
    c, key, mask = [position, lane, 0, 0], [seed, purpose], 2**32 - 1
    for _ in range(10):
        left, right = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(right >> 32) ^ c[1] ^ key[0], right & mask, (left >> 32) ^ c[3] ^ key[1], left & mask]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return (c[0] >> 8) / 2**24


def below(u: float, bound: float, eps: float = EPS) -> bool:
    if 0 < bound < 1 and abs(u - bound) < eps:
        raise Close
    return u < bound


class Row(NamedTuple):
    """Candidates, best first, and their probabilities."""

    ids: np.ndarray
    probs: np.ndarray

    def dense(self, vocab: int) -> np.ndarray:
        out = np.zeros(vocab)
        out[self.ids] = self.probs
        return out


def invert(row: Row, u: float) -> int:
    """The candidate in whose share of the mass u falls, in the order of candidates."""
    total = row.probs.sum()
    if total < EPS:
        raise Close
    ends = np.cumsum(row.probs / total)
    at = int(np.argmax(ends > u))
    # An end between two candidates of mass; what is less than EPS in all is all rounding
    if np.abs(ends[:-1] - u).min(initial=1) < EPS / min(total, 1):
        raise Close
    return int(row.ids[at])


def race(row: Row, position: int, seed: int) -> int:
    """The candidate that comes first, with exponential times of rates `probs`."""
    times = [
        -math.log1p(-uniform(position, int(i), seed, PLAIN)) / p if p > 0 else math.inf
        for i, p in zip(row.ids, row.probs, strict=True)
    ]
    first, second = [*sorted(times), math.inf][:2]
    if second - first <= 1e-5 * first:
        raise Close
    return int(row.ids[times.index(first)])


class Hand(NamedTuple):
    """What a rule is about to do with a block of given drafts."""

    scales: list[float]  # of the row behind i drafts
    chances: list[float]  # [k]
    laws: list[np.ndarray]  # [k + 1], by id, what follows i kept drafts; not normalised


def excess(p: np.ndarray, q: np.ndarray, scale: float) -> np.ndarray:
    return np.maximum(scale * p - q, 0)


def by_hand(rule: str, p: list[np.ndarray], q: list[np.ndarray], drafts: list[int]) -> Hand:
    """`residual` and `block`: rows by id, k + 1 of p and k of q."""
    k = len(drafts)
    ratios = [
        0.0 if p[i][d] == 0 else p[i][d] / q[i][d] if q[i][d] > 0 else math.inf
        for i, d in enumerate(drafts)
    ]
    scales = [1.0]
    for ratio in ratios:
        scales.append(min(1.0, scales[-1] * ratio) if rule == "block" else 1.0)
    laws = [excess(p[i], q[i], scales[i]) for i in range(k)]
    if rule == "residual":
        chances = [min(1.0, ratio) for ratio in ratios]
    else:
        chances = [
            over_rest(laws[i].sum(), 1 - scales[i]) if i < k else scales[i] for i in range(1, k + 1)
        ]
    laws = [law if law.sum() > 0 else p[i] for i, law in enumerate(laws)]
    return Hand(scales, chances, [*laws, p[k]])


def over_rest(mass: float, rest: float) -> float:
    return mass / (mass + rest) if mass + rest > 0 else 1.0


def kept(rule: str, passed: list[bool]) -> int:
    """`residual` stops at the first refusal; `block` keeps up to the last success."""
    if rule == "block":
        return max((i + 1 for i, ok in enumerate(passed) if ok), default=0)
    return next((i for i, ok in enumerate(passed) if not ok), len(passed))


def decide(
    rule: str, p: list[Row], q: list[Row], drafts: list[int], position: int, seed: int, vocab: int
) -> tuple[int, int]:
    """Drafts kept and the token behind them, with the numbers that position and seed give."""
    if rule == "coupled":
        for i, row in enumerate(p):
            token = race(row, position + 1 + i, seed)
            if i == len(drafts) or token != drafts[i]:
                return i, token
    hand = by_hand(rule, [r.dense(vocab) for r in p], [r.dense(vocab) for r in q], drafts)
    return decide_by(rule, hand, p, position, seed)


def decide_by(rule: str, hand: Hand, p: list[Row], position: int, seed: int) -> tuple[int, int]:
    passed = []
    for i, h in enumerate(hand.chances):
        # h = s / (s + 1 - a) of a small denominator is as much less certain
        rest = hand.laws[i + 1].sum() + 1 - hand.scales[i + 1] if rule == "block" else 1.0
        passed.append(below(uniform(position, i, seed, ACCEPT), h, EPS / max(min(rest, 1), EPS)))
    n = kept(rule, passed)
    return n, invert(Row(p[n].ids, hand.laws[n][p[n].ids]), uniform(position, n, seed, CORRECT))


# Laws by enumeration.


def outcomes(rule: str, hand: Hand) -> dict[tuple[int, int], float]:
    """Probability of (drafts kept, token behind them), drafts given, over all the uniforms."""
    k, out = len(hand.chances), {}
    for passed in itertools.product((False, True), repeat=k):
        chance = math.prod(h if ok else 1 - h for h, ok in zip(hand.chances, passed, strict=True))
        n = kept(rule, list(passed))
        law = hand.laws[n] / hand.laws[n].sum()
        for token in np.flatnonzero(law):
            out[n, int(token)] = out.get((n, int(token)), 0.0) + chance * law[token]
    return out


def coupled_outcomes(p: list[np.ndarray], drafts: list[int]) -> dict[tuple[int, int], float]:
    """The same for `coupled`, where drafts were given before the noise: rows win alone."""
    out, reach = {}, 1.0
    for i, row in enumerate(p):
        for token in np.flatnonzero(row):
            if i == len(drafts) or token != drafts[i]:
                out[i, int(token)] = reach * row[token]
        reach *= row[drafts[i]] if i < len(drafts) else 0
    return out


# Whole generations.


class Settings(NamedTuple):
    """As the public settings, with no defaults but "off"."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    bias: tuple[tuple[int, float], ...] = ()
    suppress: tuple[int, ...] = ()


def filtered(logits: np.ndarray, s: Settings, prompt: list[int], text: list[int]) -> Row:
    """What is drawn from after ``prompt`` and then ``text``."""
    x = logits.astype(np.float64).copy()
    for token in {*prompt, *text} if s.repetition != 1 else ():
        x[token] = x[token] / s.repetition if x[token] > 0 else x[token] * s.repetition
    for token in set(text):
        x[token] -= s.presence + s.frequency * text.count(token)
    for token, bias in s.bias:
        x[token] += bias
    x[list(s.suppress)] = -math.inf
    order = np.lexsort((np.arange(x.size), -x))
    if s.temperature == 0:
        if x[order[0]] - x[order[1]] < 1e-5:
            raise Close
        return Row(order[:1], np.ones(1))
    order = order[: s.top_k or x.size]
    probs = np.exp((x[order] - x[order[0]]) / s.temperature)
    probs /= probs.sum()
    before = np.cumsum(probs) - probs
    if s.top_p < 1:
        if np.abs(before - s.top_p).min() < EPS:
            raise Close
        probs[before >= s.top_p] = 0
    if s.min_p > 0:
        if np.abs(probs - s.min_p * probs[0]).min() < EPS:
            raise Close
        probs[probs < s.min_p * probs[0]] = 0
    return Row(order, probs / probs.sum())


class Played(NamedTuple):
    """One round: its drafts, how many were kept, and all it committed."""

    drafts: list[int]
    accepted: int
    tokens: list[int]


Logits = Callable[[list[int]], np.ndarray]
Guess = Callable[[list[int], list[int]], np.ndarray]


def rounds(
    target: Logits,
    assistant: Guess | None,
    prompt: list[int],
    s: Settings,
    *,
    rule: str,
    k: int,
    seed: int,
) -> Iterator[Played]:
    """A generation, without end: its first token, then round by round.

    Args:
        target: Logits [V] of the token behind a whole text, prompt included.
        assistant: Logits [V] of the next draft, from the whole text and the drafts before it.
        prompt: At least one token.
        s: How both are filtered.
        rule: How drafts are accepted.
        k: Drafts a round.
        seed: The seed.
    """
    text: list[int] = []

    def drawn(row: Row, position: int) -> int:
        return int(row.ids[0]) if s.temperature == 0 else race(row, position, seed)

    token = drawn(filtered(target(prompt), s, prompt, text), len(prompt))
    text.append(token)
    yield Played([], 0, [token])
    while True:
        here = [*prompt, *text]
        n = len(here) - 1  # position of the newest token, which no cache holds yet
        if k == 0:
            token = drawn(filtered(target(here), s, prompt, text), n + 1)
            text.append(token)
            yield Played([], 0, [token])
            continue
        assert assistant is not None
        drafts: list[int] = []
        q: list[Row] = []
        for i in range(k):
            row = filtered(assistant(here, drafts), s, prompt, text + drafts)
            q.append(row)
            if rule == "coupled" or s.temperature == 0:
                drafts.append(drawn(row, n + 1 + i))
            else:
                drafts.append(invert(row, uniform(n, i, seed, DRAFT)))
        p = [
            filtered(target(here + drafts[:i]), s, prompt, text + drafts[:i]) for i in range(k + 1)
        ]
        vocab = target(prompt).size
        accepted, token = decide(rule, p, q, drafts, n, seed, vocab)
        text += [*drafts[:accepted], token]
        yield Played(drafts, accepted, [*drafts[:accepted], token])
