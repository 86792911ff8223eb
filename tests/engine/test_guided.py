"""Rounds under a grammar of token ids, on Markov tables: the text, its law, what is counted."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from guides import Allowed, Toy
from scipy import stats as scipy_stats
from test_loop import MarkovAssistant, MarkovTarget, random_table

from pyengine.drafters import new_drafter
from pyengine.drafters.lookup import LookupDrafter
from pyengine.engine.known import known_of
from pyengine.engine.rounds import Rounds
from pyengine.engine.sequence import TokenSequence
from pyengine.ops.accept_block import RULES, Rule
from pyengine.sampling.settings import Sampling

pytestmark = pytest.mark.engine

VOCAB, STOP = 40, 0
GREEDY = Sampling(temperature=0.0)
BLOCKS = (2, 3, 5, 17, 40)


def phrases(text: tuple[int, ...]) -> Collection[int]:
    """Some tokens of each place; behind 3 and 4 runs that are forced; an end from 20 on."""
    forced = {(3,): 11, (11,): 12, (12,): 33, (4,): 39}
    run = 4 if text.count(4) % 2 else 3  # 3: 11 12 33
    if text and text[-1] in (3, 11, 12, 4):
        return {forced[text[-1:]]}
    if len(text) >= 20:
        return {STOP, 5, run}
    some = {t for t in range(1, VOCAB) if (7 * t + 3 * len(text)) % 4}
    return some | {3, 4}


def play(
    target: Any,
    assistant: Any,
    allowed: Allowed | None,
    sampling: Sampling,
    block_size: int,
    *,
    max_tokens: int = 60,
    rounds: Rounds | None = None,
    drafter: Any = None,
) -> TokenSequence:
    """A text to its end; its tokens are behind the prompt in ``_text``."""
    sequence = TokenSequence(
        target,
        new_drafter("assistant", target, assistant) if drafter is None else drafter,
        [5, 9],
        sampling=sampling,
        block_size=block_size,
        max_tokens=max_tokens,
        stop_ids=frozenset({STOP}),
        matcher=None if allowed is None else Toy(allowed),
    )
    list(sequence.prefill())
    rounds = Rounds() if rounds is None else rounds
    while sequence.finish_reason is None:
        [done] = rounds.play([sequence])
        if isinstance(done, Exception):
            raise done
    return sequence


def text(sequence: TokenSequence) -> list[int]:
    return sequence._text[2:]


def follows(tokens: list[int], allowed: Allowed) -> bool:
    return all(token in allowed(tuple(tokens[:n])) for n, token in enumerate(tokens))


@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        Sampling(seed=3, verify="coupled"),
        Sampling(seed=4, verify="coupled", top_k=0, top_p=1.0, logprobs=1, suppress_tokens=(7, 9)),
        Sampling(seed=5, verify="coupled", repetition_penalty=1.4, presence_penalty=0.5),
    ],
    ids=["greedy", "coupled", "dense", "penalties"],
)
def test_text_at_every_block_size_is_plain_text(sampling: Sampling, block_size: int) -> None:
    table, other = random_table(1, VOCAB), random_table(2, VOCAB)
    target, assistant = MarkovTarget(table), MarkovAssistant(table + 0.5 * other)
    plain = play(target, None, phrases, sampling, 1)
    got = play(target, assistant, phrases, sampling, block_size)
    assert text(got) == text(plain)
    assert follows(text(got), phrases)
    assert got.finish_reason == plain.finish_reason
    assert (plain.stats.forced, plain.stats.drafted) == (0, 0)
    assert got.stats.rounds < plain.stats.rounds


def test_lookup_drafts_are_taken_as_far_as_the_grammar_goes() -> None:
    """What was said before is drafted behind forced tokens; what may not come is refused."""

    def twice(so_far: tuple[int, ...]) -> Collection[int]:
        words = [21, 22, 23, 24, 25, 26, 27]
        return {words[len(so_far) % 7]} if len(so_far) % 7 < 4 else {25, 26, 27, STOP}

    table = random_table(3, VOCAB)
    target = MarkovTarget(table)
    sampling = Sampling(seed=8, verify="coupled")
    plain = play(target, None, twice, sampling, 1)
    got = play(target, None, twice, sampling, 6, drafter=LookupDrafter())
    assert text(got) == text(plain)
    assert got.stats.forced > 0


def test_forced_tokens_are_counted_and_need_no_drafter() -> None:
    """After the first token 18 are forced: one round of 15, one of the rest and an end."""
    calls = []

    class Watched(MarkovAssistant):
        def forward(self, embedding: mx.array, hidden: mx.array, caches: object) -> tuple:
            calls.append(1)
            return super().forward(embedding, hidden, caches)

    def forced(so_far: tuple[int, ...]) -> Collection[int]:
        return {7, 8} if not so_far else {10 + len(so_far)} if len(so_far) < 19 else {STOP}

    table = random_table(1, VOCAB)
    got = play(MarkovTarget(table), Watched(table), forced, Sampling(seed=1), 4)
    assert text(got)[1:] == [*range(11, 29), STOP]
    s = got.stats
    # 15 and the round's own token; the last two and the end
    assert (s.rounds, s.forced, s.drafted, s.accepted) == (2, 18, 0, 0)
    assert not calls
    assert s.tokens_per_round == 19 / 2


def test_a_block_is_lengthened_by_what_is_forced_first() -> None:
    """Blocks of 4 behind a forced run of 2 have 5 drafts; drafts of the drafter are its own."""

    def pairs(so_far: tuple[int, ...]) -> Collection[int]:
        return {30 + len(so_far) % 3} if len(so_far) % 5 < 2 else range(1, 30)

    table = random_table(4, VOCAB)
    target = MarkovTarget(table)
    plain = play(target, None, pairs, GREEDY, 1, max_tokens=31)
    got = play(target, MarkovAssistant(table), pairs, GREEDY, 4, max_tokens=31)
    assert text(got) == text(plain)
    s = got.stats
    # The first is forced, from the prefill; rounds: 31 and three drafts, the bonus is forced: 6
    assert (s.drafted, s.accepted, s.forced) == (3 * 6, 3 * 6, 6)
    assert s.rounds == 6


def law(table: np.ndarray, allowed: Allowed, sampling: Sampling, count: int) -> dict[tuple, float]:
    """Probability of each text of so many tokens behind token 9."""
    found: dict[tuple, float] = {(): 1.0}
    for _ in range(count):
        longer: dict[tuple, float] = {}
        for so_far, mass in found.items():
            ids = sorted(allowed(so_far))
            logits = table[so_far[-1] if so_far else 9][ids]
            weights = np.exp(logits - logits.max())
            weights /= weights.sum()
            for token, weight in zip(ids, weights, strict=True):
                longer[(*so_far, token)] = mass * weight
        found = longer
    return found


SMALL = 8


def small(so_far: tuple[int, ...]) -> Collection[int]:
    """Two or three tokens at a place; 3 forces 6."""
    if so_far and so_far[-1] == 3:
        return {6}
    return {1 + (len(so_far) + i) % 4 for i in range(2 + len(so_far) % 2)} | {3}


def p_value(rule: Rule, runs: int, count: int = 4) -> float:
    rng = np.random.default_rng(6)
    table, other = rng.normal(0, 1, (2, 10, 10))
    target, assistant = MarkovTarget(table), MarkovAssistant(other)
    sampling = Sampling(top_k=0, top_p=1.0, verify=rule)
    want, seen, rounds = law(table, small, sampling, count), Counter[tuple](), Rounds()
    kept = forced = 0
    for seed in range(runs):
        own = Sampling(**{**sampling.to_dict(), "seed": seed, "logit_bias": {}})
        done = play(target, assistant, small, own, 4, max_tokens=count, rounds=rounds)
        seen[tuple(text(done))] += 1
        kept, forced = kept + done.stats.accepted, forced + done.stats.forced
    assert set(seen) <= set(want)
    assert kept > runs / 10
    assert forced > runs / 10
    # Texts that are rare stand together
    often = [t for t, mass in want.items() if mass * runs >= 5]
    observed = [seen[t] for t in often]
    expected = [want[t] * runs for t in often]
    rest = runs - sum(expected)
    if rest > 1e-6:
        observed, expected = [*observed, runs - sum(observed)], [*expected, rest]
    return float(scipy_stats.chisquare(observed, expected, sum_check=False).pvalue)


@pytest.mark.native("plain MLX takes minutes")
@pytest.mark.parametrize("rule", RULES)
def test_text_has_the_law_that_the_grammar_leaves(rule: Rule) -> None:
    assert p_value(rule, 800) > 1e-4


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
def test_many_texts_have_the_law_that_the_grammar_leaves(rule: Rule) -> None:
    assert p_value(rule, 8000) > 1e-4


@pytest.mark.parametrize("rule", RULES)
def test_texts_among_others_are_those_alone(rule: Rule) -> None:
    """Guided and free ones in the same rounds, with blocks of their own."""
    table, other = random_table(1, VOCAB), random_table(2, VOCAB)
    target, assistant = MarkovTarget(table), MarkovAssistant(table + other)

    def begin(n: int) -> TokenSequence:
        return TokenSequence(
            target,
            new_drafter("assistant", target, assistant),
            [5, 9 + n],
            sampling=Sampling(seed=n, verify=rule),
            block_size=2 + n,
            max_tokens=25,
            stop_ids=frozenset({STOP}),
            matcher=Toy(phrases) if n % 2 else None,
        )

    def finish(sequences: list[TokenSequence]) -> list[list[int]]:
        rounds = Rounds()
        for sequence in sequences:
            list(sequence.prefill())
        while going := [s for s in sequences if s.finish_reason is None]:
            done = rounds.play(going)
            assert not any(isinstance(d, Exception) for d in done), done
        return [s._text for s in sequences]

    alone = list(itertools.chain(*(finish([begin(n)]) for n in range(6))))
    assert finish([begin(n) for n in range(6)]) == alone


def test_block_sizes_by_load_know_guided_rounds_apart() -> None:
    """Costs go by the drafts that were chosen, acceptance by those that were drawn."""
    target, assistant = (
        MarkovTarget(random_table(1, VOCAB)),
        MarkovAssistant(random_table(1, VOCAB)),
    )
    drafter = new_drafter("assistant", target, assistant)
    plain = play(target, assistant, phrases, GREEDY, 1)
    sequence = TokenSequence(
        target,
        drafter,
        [5, 9],
        sampling=GREEDY,
        block_size=8,
        auto=True,
        max_tokens=60,
        stop_ids=frozenset({STOP}),
        matcher=Toy(phrases),
    )
    list(sequence.prefill())
    rounds, chosen, drawn = Rounds(), [], 0
    while sequence.finish_reason is None:
        rounds.choose([sequence])
        [done] = rounds.play([sequence])
        assert not isinstance(done, Exception), done
        chosen.append(sequence.drafts)
        drawn += sequence.drawn[0]
    assert text(sequence) == text(plain)
    free, guided = (known_of(target, type(drafter), own) for own in (False, True))
    assert not free.costs.shapes and not sum(free.acceptance.made)
    assert {shape.drafts for shape in guided.costs.shapes} <= {*chosen}
    assert guided.costs.shapes
    assert 0 < sum(guided.acceptance.made) <= drawn
    assert sequence.acceptance is not None and sum(sequence.acceptance.made) > 0


def test_a_grammar_that_ends_in_nothing_fails_its_own_text() -> None:
    """A text of others goes on; one whose drafts only would have come there does too."""
    table = random_table(1, VOCAB)
    target, assistant = MarkovTarget(table), MarkovAssistant(random_table(2, VOCAB))

    def dead_end(so_far: tuple[int, ...]) -> Collection[int]:
        return {7, 8, 9} if len(so_far) < 3 else ()

    sequences = [
        TokenSequence(
            target,
            new_drafter("assistant", target, assistant),
            [5, 9],
            sampling=Sampling(seed=2, verify="coupled"),
            block_size=6,
            max_tokens=12,
            matcher=Toy(allowed),
        )
        for allowed in (dead_end, phrases)
    ]
    for sequence in sequences:
        list(sequence.prefill())
    rounds, failed, going = Rounds(), [], list(sequences)
    while going:
        for sequence, done in zip(going, rounds.play(going), strict=True):
            if isinstance(done, Exception):
                failed.append((sequence, str(done)))
        lost = [s for s, _ in failed]
        going = [s for s in going if s.finish_reason is None and s not in lost]
    assert failed == [(sequences[0], "[grammar] nothing may come next.")]
    assert text(sequences[1]) == text(
        play(target, None, phrases, sequences[1]._sampling, 1, max_tokens=12)
    )


def test_a_dead_end_behind_refused_drafts_is_not_met() -> None:
    """The assistant always drafts 7, the target never says it; behind 7 nothing may come."""
    like, unlike = np.zeros((VOCAB, VOCAB)), np.zeros((VOCAB, VOCAB))
    like[:, 8], unlike[:, 7] = 30, 30

    def behind(so_far: tuple[int, ...]) -> Collection[int]:
        return () if 7 in so_far else {7, 8}

    got = play(MarkovTarget(like), MarkovAssistant(unlike), behind, GREEDY, 4, max_tokens=6)
    assert text(got) == [8] * 6


def test_suppressed_tokens_are_no_way_out() -> None:
    table = random_table(1, VOCAB)

    def one(so_far: tuple[int, ...]) -> Collection[int]:
        return {7, 8}

    got = play(
        MarkovTarget(table), None, one, Sampling(seed=1, suppress_tokens=(8,)), 1, max_tokens=4
    )
    assert text(got) == [7] * 4
    with pytest.raises(RuntimeError, match="suppress_tokens must leave a token that the grammar"):
        play(MarkovTarget(table), None, one, Sampling(seed=1, suppress_tokens=(7, 8)), 1)


def test_an_assistant_that_looked_elsewhere_drafts_the_lowest_token() -> None:
    """Its logits are -inf for all that the grammar allows; NaN is an error as without one."""
    table = random_table(1, VOCAB)

    class Elsewhere(MarkovAssistant):
        def forward(self, embedding: mx.array, hidden: mx.array, caches: object) -> tuple:
            logits, hidden = super().forward(embedding, hidden, caches)
            return mx.where(mx.arange(VOCAB) < 30, -mx.inf, logits), hidden

    def low(so_far: tuple[int, ...]) -> Collection[int]:
        return range(4, 20)

    sampling = Sampling(seed=1, verify="coupled")
    target = MarkovTarget(table)
    got = play(target, Elsewhere(table), low, sampling, 4, max_tokens=20)
    assert text(got) == text(play(target, None, low, sampling, 1, max_tokens=20))
    with pytest.raises(RuntimeError, match="logits must be finite"):
        play(target, MarkovAssistant(table * np.nan), low, sampling, 4, max_tokens=20)
