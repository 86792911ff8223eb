"""Tests that bound a mean loss in [0, 1] from a sample, whatever its distribution: Learn then Test.

``P(mean <= delta) >= 1 - epsilon``, over the draw of the sample, for whatever passes: the losses of
cases exchangeable with those to come. What is tested, and in which order, must be fixed before the
losses are seen.

Source: Learn then Test, https://arxiv.org/abs/2110.01052: the Hoeffding-Bentkus inequality,
fixed-sequence testing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

from pyengine.arguments import number
from pyengine.untrusted import shown

Metric = Literal["differs", "lcs"]
METRICS: tuple[Metric, ...] = ("lcs", "differs")
T = TypeVar("T")


def p_value(total: float, n: int, delta: float, binary: bool) -> float:
    """How likely so small a loss is at most, were its mean above delta.

    Args:
        total: Sum of the n losses.
        n: How many.
        delta: Mean that is tested, above 0 and below 1.
        binary: Whether each loss is 0 or 1: the binomial tail is then exact. Else the smaller of
            Hoeffding's bound and Bentkus's.
    """
    if binary:
        return binomial_tail(round(total), n, delta)
    mean = min(total / n, delta)
    hoeffding = math.exp(-n * _divergence(mean, delta))
    return min(1.0, hoeffding, math.e * binomial_tail(math.ceil(total), n, delta))


def binomial_tail(most: int, n: int, share: float) -> float:
    """P(X <= most) for X of n draws that each succeed with that probability."""
    if most >= n:
        return 1.0
    log_of, log_not, whole = math.log(share), math.log1p(-share), math.lgamma(n + 1)
    terms = (
        math.exp(whole - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * log_of + rest * log_not)
        for k in range(most + 1)
        for rest in [n - k]
    )
    return min(1.0, math.fsum(terms))


def _divergence(p: float, q: float) -> float:
    """Of two coins, the Kullback-Leibler divergence of the first from the second, in nats."""
    parts = ((p, q), (1 - p, 1 - q))
    return math.fsum(a * math.log(a / b) for a, b in parts if a > 0)


def fixed_sequence(
    candidates: Iterable[T], test: Callable[[T], float], epsilon: float
) -> list[tuple[T, float]]:
    """Candidates with their p-values, in order, up to the first above epsilon, which is the last;
    those behind it are not tested. The chance that one of those before it is false is at most
    epsilon.
    """
    tested = []
    for candidate in candidates:
        tested.append((candidate, p := test(candidate)))
        if not p <= epsilon:
            break
    return tested


def least_n(delta: float, epsilon: float) -> int:
    """The smallest sample that can pass, without any loss: ``(1 - delta)^n <= epsilon``."""
    n = max(1, math.ceil(math.log(epsilon) / math.log1p(-delta)))
    return n if p_value(0, n, delta, True) <= epsilon else n + 1


def too_few(n: int, delta: float, epsilon: float) -> str | None:
    """A sentence where so few prompts cannot pass, whatever they show."""
    least = least_n(delta, epsilon)
    if n >= least:
        return None
    return (
        f"{n} prompts are too few: even without any loss, delta {delta:g} and epsilon {epsilon:g} "
        f"need {least}."
    )


def loss(metric: Metric, one: Sequence[int], other: Sequence[int]) -> float:
    """How much two texts differ, from 0 to 1: ``differs`` is 1 unless they are equal; ``lcs`` is 1
    - ROUGE-L, twice their longest common subsequence over the lengths of both."""
    if metric == "differs" or not one or not other:
        return float(list(one) != list(other))
    return 1 - 2 * longest_common(one, other) / (len(one) + len(other))


def longest_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for a in one:
        diagonal = 0
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], diagonal + 1 if a == b else max(row[j], row[j - 1])
    return row[-1]


def check_bounds(what: str, delta: float, epsilon: float) -> tuple[float, float]:
    """Both as Python's numbers.

    Raises:
        ValueError: One is not between 0 and 1.
    """
    found = []
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        found.append(own := number(what, name, value))
        if not 0 < own < 1:
            raise ValueError(f"[{what}] {name} must be above 0 and below 1 but got {shown(value)}.")
    return found[0], found[1]
