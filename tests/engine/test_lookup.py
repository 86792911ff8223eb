"""Prompt lookup: what it drafts, and that no text depends on it but by the rules' own draws."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from models import decode as plain_decode
from test_loop import GREEDY, LENGTH, NUCLEUS, SMALL, MarkovTarget, Reads, cells, p_value
from tiny_pairs import FLAVOURS, greedy_text, tiny_pair

from pyengine.drafters.lookup import LONGEST, MOST_PLACES, LookupDrafter
from pyengine.engine.loop import decode
from pyengine.engine.stats import Stats
from pyengine.ops.accept_block import RULES, Rule
from pyengine.sampling.settings import Sampling


@pytest.mark.parametrize(
    ("text", "k", "drafts"),
    [
        ([], 3, []),
        ([1, 2], 3, []),
        ([1, 2, 3], 3, []),  # the newest tokens are no match of themselves
        ([1, 2, 3, 9, 2, 3], 3, []),  # two tokens are too few
        ([1, 2, 3, 9, 8, 7, 1, 2, 3], 2, [9, 8]),
        ([1, 2, 3, 9, 8, 7, 1, 2, 3], 8, [9, 8, 7, 1, 2, 3, 9, 8]),  # on into its own drafts
        ([5, 5, 5, 5], 4, [5, 5, 5, 5]),
        ([1, 2, 1, 2, 1, 2], 3, [1, 2, 1]),
        # Of equally long matches the newest: 4 followed the first, 6 the second
        ([1, 2, 3, 4, 0, 1, 2, 3, 6, 7, 1, 2, 3], 1, [6]),
        # A longer one before a newer one
        ([8, 1, 2, 3, 4, 0, 1, 2, 3, 6, 8, 1, 2, 3], 1, [4]),
    ],
)
def test_drafts_are_what_followed_the_longest_match(
    text: list[int], k: int, drafts: list[int]
) -> None:
    assert LookupDrafter().find(text, k) == drafts
    grown = LookupDrafter()  # asked after every token, as by rounds of one
    for end in range(len(text)):
        grown.find(text[:end], k)
    assert grown.find(text, k) == drafts


def test_a_search_is_bounded() -> None:
    """Matches count up to a length, and so many places are looked at."""
    same = list(range(100, 100 + LONGEST))
    text = [50, *same, 7, 60, *same, 8, 50, *same]
    assert LookupDrafter().find(text, 1) == [
        8
    ]  # the other match is longer, beyond what is compared
    for others, draft in ((MOST_PLACES, 5), (MOST_PLACES - 1, 6)):
        text = [9, 1, 2, 3, 6, *[0, 1, 2, 3, 5] * others, 9, 1, 2, 3]
        assert LookupDrafter().find(text, 1) == [draft]


def looked_up(target: Any, prompt: list[int], **settings: Any) -> tuple[list[int], Stats, set[int]]:
    """A text, its counts, and the numbers of drafts that its rounds had."""
    stats = Stats()
    rounds = list(decode(target, LookupDrafter(), prompt, stats=stats, **settings))
    return [t for r in rounds for t in r.tokens], stats, {r.num_drafted for r in rounds[1:]}


@pytest.mark.engine
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_greedy_text_is_plain_text_at_every_block_size(flavour: str, implementation: str) -> None:
    """A prompt that the text comes back to: drafts of every depth are kept, and some are not."""
    target, text = tiny_pair(flavour).target, greedy_text(flavour)
    prompt = [*text[:40], *text[:9]]
    count = 40 if implementation == "native" else 12
    kw: dict[str, Any] = {"sampling": GREEDY, "max_tokens": count}
    plain = [t for r in plain_decode(target, None, prompt, block_size=1, **kw) for t in r.tokens]
    for block_size in (2, 4, 7, 16, 40):
        got, _, _ = looked_up(target, prompt, block_size=block_size, **kw)
        assert got == plain, block_size


def circle() -> np.ndarray:
    """A table that mostly counts up, round and round."""
    table = np.random.default_rng(3).normal(0, 1, (16, 16))
    return table + 5 * np.eye(16)[(np.arange(16) + 1) % 16]


@pytest.mark.engine
@pytest.mark.parametrize("block_size", [2, 3, 5, 17])
@pytest.mark.parametrize(
    "kw",
    [
        {"temperature": 0.0},
        {},
        {"top_k": 0, "temperature": 1.3},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": 2, "min_p": 0.01},
    ],
    ids=["greedy", "published", "dense", "penalties"],
)
def test_coupled_text_is_plain_text(block_size: int, kw: dict[str, Any]) -> None:
    target = MarkovTarget(circle())
    kept = 0
    for seed in range(2):
        settings = {"sampling": Sampling(seed=seed, verify="coupled", **kw), "max_tokens": 70}
        rounds = plain_decode(target, None, [5, 3], block_size=1, **settings)
        plain = [t for r in rounds for t in r.tokens]
        got, stats, drafted = looked_up(target, [5, 3], block_size=block_size, **settings)
        assert got == plain
        assert drafted == {0, block_size - 1}  # both kinds of round
        kept += stats.accepted
    assert kept > 5


def every_three_tokens() -> list[int]:
    """Each succession of three of SMALL tokens, once: whatever comes, it has a match."""
    seen, text = set(), [0, 0]
    while True:
        new = [t for t in reversed(range(SMALL)) if (text[-2], text[-1], t) not in seen]
        if not new:
            return text
        seen.add((text[-2], text[-1], new[0]))
        text.append(new[0])


@pytest.mark.native("hundreds of texts, which take plain MLX minutes")
@pytest.mark.parametrize("rule", ["residual", "block"])
@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all rounds draft", "some rounds draft"])
def test_sampled_text_has_the_targets_law(rule: Rule, share: float) -> None:
    """Plain steps between the blocks too: whether there is one depends on committed tokens."""
    table = np.random.default_rng(7).normal(0, 1.5, (SMALL, SMALL))
    whole = every_three_tokens()
    assert len(whole) == SMALL**3 + 2
    prompt = whole[: round(share * len(whole))]
    target, seen, kinds, kept = MarkovTarget(table), {}, set(), 0
    for seed in range(400):
        settings = replace(NUCLEUS, seed=seed, verify=rule)
        text, stats, drafted = looked_up(
            target, prompt, sampling=settings, block_size=4, max_tokens=LENGTH
        )
        seen[tuple(text)] = seen.get(tuple(text), 0) + 1
        kinds, kept = kinds | drafted, kept + stats.accepted
    assert kinds == ({3} if share == 1 else {0, 3}) and kept > 200
    assert p_value(cells(table, prompt[-1]), seen) > 0.001


@pytest.mark.native("hundreds of texts, which take plain MLX minutes")
def test_a_wrong_probability_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that claims to have been one of many is kept too often."""
    propose = LookupDrafter.propose

    def modest(*args: Any) -> Any:
        return [row._replace(probs=row.probs * 0.2) for row in propose(*args)]

    monkeypatch.setattr(LookupDrafter, "propose", staticmethod(modest))
    table = np.random.default_rng(7).normal(0, 1.5, (SMALL, SMALL))
    prompt, seen = every_three_tokens(), {}
    for seed in range(400):
        settings = {"sampling": replace(NUCLEUS, seed=seed), "block_size": 4}
        text, _, _ = looked_up(MarkovTarget(table), prompt, max_tokens=LENGTH, **settings)
        seen[tuple(text)] = seen.get(tuple(text), 0) + 1
    assert p_value(cells(table, prompt[-1]), seen) < 1e-4


@pytest.mark.engine
@pytest.mark.parametrize("rule", RULES)
def test_one_evaluation_and_one_read_per_round(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = Reads(monkeypatch)
    rounds = decode(
        MarkovTarget(circle()),  # type: ignore[arg-type]
        LookupDrafter(),
        [5, 3],
        sampling=Sampling(verify=rule, seed=1),
        block_size=4,
        max_tokens=60,
    )
    for number, _ in enumerate(rounds, 1):
        assert (reads.evaluations, reads.reads) == (number, number)
    assert number > 5


def test_a_block_is_not_drafted_twice_from_one_text() -> None:
    """The same seed gives the same text again, whatever the text before it was."""
    target = MarkovTarget(circle())
    for rule, seed in itertools.product(RULES, range(3)):
        settings = {"sampling": Sampling(seed=seed, verify=rule), "block_size": 5}
        first, again = (looked_up(target, [5, 3], max_tokens=50, **settings)[0] for _ in range(2))
        assert first == again
