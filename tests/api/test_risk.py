"""Bounds of a mean loss: p-values against scipy's, the order of tests, and that it holds."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

import pytest
from scipy import stats

from pyengine.risk import (
    binomial_tail,
    check_bounds,
    fixed_sequence,
    least_n,
    longest_common,
    loss,
    p_value,
    too_few,
)


@pytest.mark.parametrize("n", [1, 2, 29, 200, 5000])
@pytest.mark.parametrize("share", [1e-4, 0.05, 0.1, 0.5, 0.97])
def test_binomial_tail_is_scipys(n: int, share: float) -> None:
    for most in {0, 1, n // 20, n // 10, n // 2, n - 1, n, n + 3}:
        want = stats.binom.cdf(most, n, share)
        assert binomial_tail(most, n, share) == pytest.approx(want, rel=1e-8, abs=1e-280)


def test_a_loss_of_0_or_1_has_the_exact_tail() -> None:
    for n, count, delta in ((40, 0, 0.1), (40, 3, 0.1), (200, 9, 0.05), (10, 10, 0.3)):
        want = stats.binom.cdf(count, n, delta)
        assert p_value(float(count), n, delta, True) == pytest.approx(want, rel=1e-10)


def test_other_losses_have_the_smaller_of_two_bounds() -> None:
    """Hoeffding's wins where the loss is nearly none, Bentkus's in between."""
    winners = []
    for n, total, delta in ((80, 0.0, 0.1), (80, 2.3, 0.1), (500, 30.5, 0.1), (80, 7.9, 0.1)):
        mean = total / n
        entropy = stats.entropy([mean, 1 - mean], [delta, 1 - delta])
        bounds = (
            math.exp(-n * entropy),
            math.e * stats.binom.cdf(math.ceil(total), n, delta),
            1.0,
        )
        assert p_value(total, n, delta, False) == pytest.approx(min(bounds), rel=1e-9)
        winners.append(bounds.index(min(bounds)))
    assert winners == [0, 0, 1, 0]
    # Of a mean above delta nothing can be said
    assert p_value(8.0, 80, 0.1, False) == p_value(40.0, 80, 0.1, False) == 1.0


def test_the_sequence_ends_with_the_first_that_fails() -> None:
    ps = {"a": 0.01, "b": 0.05, "c": 0.0500001, "d": 0.0}
    asked: list[str] = []

    def test(name: str) -> float:
        asked.append(name)
        return ps[name]

    assert fixed_sequence("abcd", test, 0.05) == [("a", 0.01), ("b", 0.05), ("c", 0.0500001)]
    assert asked == ["a", "b", "c"]
    assert fixed_sequence("ab", test, 0.05) == [("a", 0.01), ("b", 0.05)]
    assert fixed_sequence("cab", test, 0.05) == [("c", 0.0500001)]
    assert fixed_sequence("", test, 0.05) == []
    assert fixed_sequence("x", lambda _: math.nan, 0.05)[0][0] == "x"  # no number passes nothing


@pytest.mark.parametrize(
    ("delta", "n"), [(0.2, 14), (0.1, 29), (0.05, 59), (0.02, 149), (0.01, 299)]
)
def test_the_least_number_of_prompts(delta: float, n: int) -> None:
    assert least_n(delta, 0.05) == n
    for binary in (True, False):
        assert p_value(0, n, delta, binary) <= 0.05 < p_value(0, n - 1, delta, binary)
    assert too_few(n, delta, 0.05) is None
    said = too_few(n - 1, delta, 0.05)
    assert said is not None and said.endswith(f"delta {delta:g} and epsilon 0.05 need {n}.")


def test_longest_common_by_enumeration() -> None:
    def parts(text: list[int]) -> Iterator[tuple[int, ...]]:
        for count in range(len(text) + 1):
            yield from itertools.combinations(text, count)

    rng = random.Random(3)
    for _ in range(60):
        one, other = ([rng.randrange(3) for _ in range(rng.randrange(7))] for _ in range(2))
        best = max(len(part) for part in set(parts(one)) & set(parts(other)))
        assert longest_common(one, other) == best == longest_common(other, one)


def test_losses() -> None:
    assert loss("differs", [1, 2], [1, 2]) == loss("lcs", [1, 2], [1, 2]) == 0
    assert loss("differs", [1, 2], [1, 3]) == 1 == loss("differs", [1], [1, 2])
    assert loss("lcs", [1, 2, 3, 4], [1, 9, 3, 4]) == 0.25
    assert loss("lcs", [1, 2], [1, 2, 3, 4]) == pytest.approx(1 - 4 / 6)
    assert loss("lcs", [5], [6]) == 1 == loss("lcs", [], [1])
    assert loss("lcs", [], []) == 0


def test_what_passes_is_seldom_false() -> None:
    """Losses whose mean is just above delta: of 2000 samples no more than epsilon pass, and of ones
    well below most do."""
    rng, delta, epsilon, n, runs = random.Random(5), 0.1, 0.05, 120, 2000

    def passes(mean: float, binary: bool) -> int:
        def one() -> float:
            if binary:
                return float(rng.random() < mean)
            return rng.betavariate(0.2, 0.2 * (1 - mean) / mean)

        return sum(
            p_value(math.fsum(one() for _ in range(n)), n, delta, binary) <= epsilon
            for _ in range(runs)
        )

    for binary in (True, False):
        assert passes(0.1001, binary) <= runs * epsilon + 3 * (runs * epsilon) ** 0.5
        assert passes(0.02, binary) > runs * 0.8


def test_bounds_are_between_0_and_1() -> None:
    assert check_bounds("x", 0.1, 0.05) == (0.1, 0.05)
    for delta, epsilon in ((0.0, 0.1), (1.0, 0.1), (0.1, -1), (0.1, 2), (math.nan, 0.1)):
        with pytest.raises(ValueError, match=r"^\[x\] \w+ must be above 0 and below 1 but got "):
            check_bounds("x", delta, epsilon)
    with pytest.raises(ValueError, match=r"^\[x\] epsilon must be a number but got '0.1'\.$"):
        check_bounds("x", 0.1, "0.1")  # type: ignore[arg-type]
