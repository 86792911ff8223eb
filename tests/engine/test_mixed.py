"""Lookup and another drafter by turns: no text depends on it but by the rules' own draws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import decode as plain_decode
from test_lookup import circle, every_three_tokens
from test_loop import (
    GREEDY,
    LENGTH,
    NUCLEUS,
    SMALL,
    MarkovAssistant,
    MarkovTarget,
    Reads,
    cells,
    p_value,
)
from tiny_pairs import FLAVOURS, greedy_text, tiny_pair

import pyengine
from pyengine.drafters import first_of, is_name, new_drafter
from pyengine.drafters.assistant import AssistantDrafter
from pyengine.drafters.lookup import SHORTEST, LookupDrafter
from pyengine.drafters.mixed import LONG_MATCH, MixedDrafter, kind_of, looks_up, source_of
from pyengine.engine.controller import Acceptance, Text
from pyengine.engine.loop import decode
from pyengine.engine.stats import Stats
from pyengine.engine.turns import Turns
from pyengine.ops.accept_block import RULES, Rule
from pyengine.sampling.settings import Sampling
from pyengine.task import new_task

NEW = list(range(100, 130))
BOTH = {"assistant", "lookup"}
# A page that is asked for again: lookup finds it, until the answer goes its own way
PAGE = "Create a single-file HTML5 canvas Snake game."


def mixed(target: Any, assistant: Any, shortest: int | None = LONG_MATCH) -> MixedDrafter:
    drafter = MixedDrafter(AssistantDrafter(target, assistant), "assistant")
    drafter.shortest = shortest
    return drafter


def asked_again() -> list[dict[str, str]]:
    """A conversation that asks the embedded pair for the beginning of its own page once more."""
    page = pyengine.generate(PAGE, sampling={"temperature": 0}, max_tokens=80, block_size=4).text
    said = (("user", PAGE), ("assistant", page), ("user", PAGE))
    return [{"role": role, "content": content} for role, content in said]


def run(target: Any, drafter: Any, prompt: list[int], **kw: Any) -> tuple[list[int], Stats]:
    stats = Stats()
    rounds = decode(target, drafter, prompt, stats=stats, **kw)
    return [token for done in rounds for token in done.tokens], stats


def test_a_long_match_is_lookups_turn() -> None:
    """Of the newest tokens just as many as LONG_MATCH, and one fewer."""
    target = MarkovTarget(circle())
    for count, name in ((LONG_MATCH, "lookup"), (LONG_MATCH - 1, "assistant")):
        drafter = mixed(target, None)
        text = [*NEW, 9, *NEW[5 : 5 + count]]
        assert drafter.wants_to_draft(text, 3) and drafter.turn_name == name
        assert looks_up(drafter) == (name == "lookup")
        assert drafter.turn is (drafter.lookup if name == "lookup" else drafter.other)
        for shortest, other in ((SHORTEST, True), (None, False)):
            again = mixed(target, None, shortest)
            assert again.wants_to_draft(text, 3) and looks_up(again) == other
    # Tokens that come next in any case count, and without drafts nobody looks
    drafter = mixed(target, None)
    assert drafter.wants_to_draft([*NEW, 9, *NEW[5:10]], 3, NEW[10:14]) and looks_up(drafter)
    assert drafter.wants_to_draft([*NEW, 9, *NEW[5:20]], 0) and not looks_up(drafter)


def test_arrays_are_the_others_and_in_its_turn_lookups() -> None:
    target = MarkovTarget(circle())
    drafter = mixed(target, None)
    first, second = mx.array([[1.0]]), mx.array([[2.0]])
    drafter.take_results([first])  # as the first of several texts left it, nothing read yet
    assert drafter.arrays == [first]
    assert drafter.wants_to_draft([*NEW, 9, *NEW[:12]], 3)
    hidden, drafts = drafter.arrays
    assert hidden is first and drafts.tolist() == NEW[12:15]
    copied = drafter.with_arrays([second, drafts])
    assert copied.arrays == [second, drafts] and drafter.arrays[0] is first
    drafter.take_results([second, drafts])
    assert drafter.arrays[0] is second
    text = [*NEW, 9, *NEW[:12], 55]  # where nothing matches
    assert drafter.wants_to_draft(text, 3) and drafter.arrays == [second]


def test_kinds() -> None:
    target, pair = MarkovTarget(circle()), tiny_pair("dense31")
    one, other = mixed(target, None), mixed(target, None)
    early = new_drafter("early:1+lookup", pair.target, None)
    assert isinstance(early, MixedDrafter) and early.turn_name == "early:1"
    assert kind_of(one) == kind_of(other) != kind_of(early)
    assert one.wants_to_draft([*NEW, 9, *NEW], 2)
    assert kind_of(one) != kind_of(other) and source_of(one) is source_of(other) is AssistantDrafter
    assert kind_of(AssistantDrafter(target, None)) is AssistantDrafter  # type: ignore[arg-type]
    assert source_of(None) is type(None) and not looks_up(LookupDrafter())


@pytest.mark.parametrize("name", ["assistant+lookup", "early:6+lookup"])
def test_names(name: str) -> None:
    assert is_name(name) and first_of(name) + "+lookup" == name
    for wrong in ("lookup+lookup", "+lookup", f"{name}+lookup", "lookup+assistant", f"{name} "):
        assert not is_name(wrong), wrong
    assert new_drafter("assistant+lookup", None, None) is None


@pytest.mark.engine
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_greedy_text_is_plain_text(flavour: str, implementation: str) -> None:
    """A prompt that the text may come back to."""
    pair, text = tiny_pair(flavour), greedy_text(flavour)
    prompt = [*text[:40], *text[:12]]
    count = 40 if implementation == "native" else 12
    kw: dict[str, Any] = {"sampling": GREEDY, "max_tokens": count}
    plain = [
        t for r in plain_decode(pair.target, None, prompt, block_size=1, **kw) for t in r.tokens
    ]
    names = set()
    for name in ("assistant+lookup", "early:1+lookup"):
        for block_size, auto in ((2, False), (5, False), (8, True), (33, False)):
            drafter = new_drafter(name, pair.target, pair.assistant)
            got, stats = run(pair.target, drafter, prompt, block_size=block_size, auto=auto, **kw)
            assert got == plain, (name, block_size)
            names |= set(stats.by_drafter)
    assert names - {"lookup"} == {"assistant", "early:1"}


@pytest.mark.engine
@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"top_k": 0, "temperature": 1.3},
        {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logprobs": 2, "min_p": 0.01},
    ],
    ids=["published", "dense", "penalties"],
)
def test_coupled_text_is_plain_text(kw: dict[str, Any]) -> None:
    table = circle()
    target, assistant = MarkovTarget(table), MarkovAssistant(table + np.roll(np.eye(16), 3, 1))
    total = Stats()
    for seed in range(2):
        settings = {"sampling": Sampling(seed=seed, verify="coupled", **kw), "max_tokens": 70}
        rounds = plain_decode(target, None, [5, 3], block_size=1, **settings)
        plain = [t for r in rounds for t in r.tokens]
        for block_size, auto in ((2, False), (5, False), (8, True), (17, False)):
            drafter = mixed(target, assistant, 4)
            got, stats = run(target, drafter, [5, 3], block_size=block_size, auto=auto, **settings)
            assert got == plain, (seed, block_size)
            counts = stats.by_drafter.values()
            assert sum(own["drafted"] for own in counts) == stats.drafted
            assert sum(own["accepted"] for own in counts) == stats.accepted
            for name, own in stats.by_drafter.items():
                total.count_round(own["drafted"], own["accepted"], drafter=name)
    assert all(total.by_drafter[name]["accepted"] > 5 for name in BOTH)


@pytest.mark.native("hundreds of texts, which take plain MLX minutes")
@pytest.mark.parametrize("rule", ["residual", "block"])
def test_sampled_text_has_the_targets_law(rule: Rule) -> None:
    """By counts of all texts of six tokens; rounds of both kinds in them."""
    rng = np.random.default_rng(7)
    table = rng.normal(0, 1.5, (SMALL, SMALL))
    target = MarkovTarget(table)
    assistant = MarkovAssistant(table + rng.normal(0, 1, (SMALL, SMALL)))
    whole = every_three_tokens()
    prompt, seen, total = whole[: len(whole) * 2 // 3], {}, Stats()
    for seed in range(400):
        settings = replace(NUCLEUS, seed=seed, verify=rule)
        text, stats = run(
            target,
            mixed(target, assistant, SHORTEST),
            prompt,
            sampling=settings,
            block_size=4,
            max_tokens=LENGTH,
        )
        seen[tuple(text)] = seen.get(tuple(text), 0) + 1
        for name, own in stats.by_drafter.items():
            total.count_round(own["drafted"], own["accepted"], drafter=name)
    assert all(total.by_drafter[name]["accepted"] > 60 for name in BOTH)
    assert p_value(cells(table, prompt[-1]), seen) > 0.001


@pytest.mark.native("the bits of a carried vector are the native ops'")
def test_what_the_assistant_carries_is_right_behind_rounds_of_lookup() -> None:
    """The very hidden vector that it has at that place where all rounds are its own."""
    pair = pyengine.load()
    assert pair.assistant is not None
    prompt = new_task(asked_again(), pair=pair).ids

    def carried(drafter: Any, other: AssistantDrafter, block: int) -> tuple[dict[int, Any], Stats]:
        stats, at, seen = Stats(), 0, {}
        kw: dict[str, Any] = {"sampling": GREEDY, "max_tokens": 90, "stats": stats}
        for done in decode(pair.target, drafter, prompt, block_size=block, **kw):
            at += len(done.tokens)
            if done.finish_reason is None:  # a last round may have gone further
                seen[at] = np.array(other.hidden.astype(mx.float32))
        return seen, stats

    alone = AssistantDrafter(pair.target, pair.assistant)
    wanted, _ = carried(alone, alone, 2)
    drafter = mixed(pair.target, pair.assistant, SHORTEST)
    assert isinstance(drafter.other, AssistantDrafter)
    found, stats = carried(drafter, drafter.other, 4)
    assert min(own["rounds"] for own in stats.by_drafter.values()) > 1
    assert stats.by_drafter["lookup"]["accepted"] > 10
    shared = wanted.keys() & found.keys()
    assert len(shared) > 5
    for place in shared:
        assert np.array_equal(found[place], wanted[place]), place


@pytest.mark.engine
@pytest.mark.parametrize("rule", RULES)
def test_one_evaluation_and_one_read_per_round(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    target = MarkovTarget(circle())
    drafter = mixed(target, MarkovAssistant(circle()), SHORTEST)
    reads, stats = Reads(monkeypatch), Stats()
    rounds = decode(
        target,  # type: ignore[arg-type]
        drafter,
        [5, 3],
        sampling=Sampling(verify=rule, seed=1),
        block_size=4,
        max_tokens=60,
        stats=stats,
    )
    for number, _ in enumerate(rounds, 1):
        assert (reads.evaluations, reads.reads) == (number, number)
    assert set(stats.by_drafter) == BOTH


def test_a_seed_and_a_block_size_make_the_text_again() -> None:
    """Whatever was known of the pair's rounds: who drafts is told by committed tokens alone."""
    target = MarkovTarget(circle())
    for rule in RULES:
        kw: dict[str, Any] = {"sampling": Sampling(seed=3, verify=rule), "max_tokens": 60}
        texts = []
        for auto in (False, True, False) if rule == "coupled" else (False, False):
            drafter = mixed(target, MarkovAssistant(circle()), SHORTEST)
            texts.append(run(target, drafter, [5, 3], block_size=5, auto=auto, **kw)[0])
        assert all(text == texts[0] for text in texts)


# ---- Turns by measured acceptance


def test_lookup_is_judged_by_what_came_whoever_drafted() -> None:
    target = MarkovTarget(circle())
    drafter, own = mixed(target, None), Acceptance()
    turns = Turns(target, drafter, own)
    assert turns.ways([1, 2, 3]) == [Text(own)]
    turns.judge([4, 5])  # nothing was looked up
    text = [*NEW, 9, *NEW[:5]]
    first, short = turns.ways(text)
    assert first == Text(own) and short.free and short.acceptance.made == [0.0] * 7
    turns.take(first)
    assert drafter.shortest is None
    turns.judge([NEW[5], NEW[6], 1, 2])  # two of four were right, the next three were not seen
    assert short.acceptance.made[:4] == [1.0, 1.0, 1.0, 0.0]
    assert short.acceptance.kept[:4] == [1.0, 1.0, 0.0, 0.0]
    assert short.acceptance.prior is not None and short.acceptance.prior.made[:3] == [1.0] * 3
    _, long = turns.ways([*text, *NEW[5:10]])
    assert long.acceptance is not short.acceptance and long.acceptance.made[0] == 0.0
    turns.take(long)
    assert drafter.shortest == SHORTEST
    turns.judge(NEW[10:12])  # all that came were right
    assert long.acceptance.made[:3] == long.acceptance.kept[:3] == [1.0, 1.0, 0.0]
    assert own.made[0] == 0.0  # the other's is noted by its own rounds alone


def test_what_is_looked_up_takes_over_where_it_is_better() -> None:
    """An assistant that is always wrong beside a text that always repeats, and the other way."""
    table = 40.0 * np.eye(16)[(np.arange(16) + 1) % 16]
    target, wrong = MarkovTarget(table), MarkovAssistant(np.roll(table, 2, axis=1))
    kw: dict[str, Any] = {"sampling": GREEDY, "max_tokens": 400, "block_size": 8, "auto": True}
    _, stats = run(target, mixed(target, wrong), [5, 3], **kw)
    own = stats.by_drafter["lookup"]
    assert own["accepted"] == own["drafted"] > 200
    assert stats.by_drafter.get("assistant", {"rounds": 0})["rounds"] < 20


# ---- Texts of the embedded pair


def test_streams_are_those_alone() -> None:
    """Unlike drafters in one round, where a text tells which it had, and where none does."""
    prompt = asked_again()
    names = ("assistant+lookup", "early:6+lookup", "lookup", "assistant", "assistant+lookup")
    counted: dict[str, int] = {}
    for verify, block in (("residual", 4), ("block", 6), ("coupled", 5), ("coupled", "auto")):
        ask: dict[str, Any] = {"max_tokens": 60, "block_size": block}
        alone, streamed = [], []
        with pyengine.Engine(sequences=8) as engine:
            requests = []
            for seed, name in enumerate(names):
                sampling = {"seed": seed, "verify": verify}
                requests.append(engine.submit(prompt, drafter=name, sampling=sampling, **ask))
                alone.append(pyengine.generate(prompt, drafter=name, sampling=sampling, **ask))
            for request in requests:
                for _ in request.steps():
                    pass
                streamed.append(request.result)
            totals = engine.totals
        assert [r.tokens for r in streamed] == [r.tokens for r in alone], verify
        if block != "auto":
            assert [r.stats.by_drafter for r in streamed] == [r.stats.by_drafter for r in alone]
        drafted = sum(own["drafted"] for own in totals.by_drafter.values())
        kept = sum(own["accepted"] for own in totals.by_drafter.values())
        assert (drafted, kept) == (totals.drafted, totals.accepted)
        for name, own in totals.by_drafter.items():
            counted[name] = counted.get(name, 0) + own["accepted"]
    assert counted.keys() == {"assistant", "early:6", "lookup"} and min(counted.values()) > 20


def test_under_a_grammar() -> None:
    pytest.importorskip("llguidance", reason="the extra grammar is not installed")
    for sampling in ({"temperature": 0}, {"seed": 3, "verify": "coupled"}):
        ask: dict[str, Any] = {
            "sampling": sampling,
            "regex": r"player = [a-z]{1,12};( // yes){2,9}",
        }
        plain = pyengine.generate("x", block_size=1, **ask)
        for block in (3, 6, "auto"):
            got = pyengine.generate("x", block_size=block, drafter="assistant+lookup", **ask)
            assert got.tokens == plain.tokens and got.stats.forced > 0
            if block != "auto":
                again = pyengine.generate("x", block_size=block, drafter="assistant+lookup", **ask)
                assert again.stats.by_drafter == got.stats.by_drafter


def test_without_an_assistant_it_is_refused() -> None:
    pair = replace(pyengine.load(), assistant=None)
    with pytest.raises(ValueError, match=r"without an assistant but got assistant\+lookup"):
        pyengine.generate("x", pair=pair, drafter="assistant+lookup")
    got = pyengine.generate("x", pair=pair, drafter="early:6+lookup", max_tokens=8)
    assert got.stats.block_size == 4
