"""Rounds of many sequences: each has the text, the accepted drafts and the bits it has alone."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from models import spoil
from schedules import LARGEST_BLOCK, Case, Watched, alone, random_cases, together
from tiny_pairs import FLAVOURS, FORMS, greedy_text, tiny_pair

from pyengine import ops
from pyengine.checkpoint import memory
from pyengine.engine import round as on_device
from pyengine.engine.report import NonFinite
from pyengine.engine.rounds import Rounds
from pyengine.engine.sequence import Round, TokenSequence
from pyengine.ops import dispatch
from pyengine.ops.accept_block import RULES, Rule
from pyengine.ops.recorded import Recorded
from pyengine.sampling.settings import Sampling
from pyengine.task import embedded_pair

pytestmark = pytest.mark.engine

GREEDY = Sampling(temperature=0.0)


def check_schedule(pair: Any, text: list[int], seed: int, count: int, leave: float = 0.02) -> int:
    """Random texts in random company, with graphs recorded; the drafts that were kept."""
    rng = random.Random(seed)
    cases = random_cases(rng, text, count)
    want = [alone(pair, case) for case in cases]
    got = together(pair, cases, rng, leave=leave)
    for number, (one, other) in enumerate(zip(got, want, strict=True)):
        assert one.begins(other), (seed, number, cases[number])
    return sum(done.num_accepted for story in got for done in story.rounds)


@pytest.mark.parametrize("form", ["float32", "bfloat16-q8"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_text_is_what_it_is_alone(flavour: str, form: str, implementation: str) -> None:
    pair, text = tiny_pair(flavour, form), greedy_text(flavour)
    if implementation == "native":
        assert check_schedule(pair, text, 1, 12) > 1
    else:  # plain MLX is slow
        check_schedule(pair, text, 4, 3)


@pytest.mark.native("plain MLX takes minutes, and has its texts compared")
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_bits_of_committed_rows_are_those_alone(
    flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, hidden vectors, candidates and their probabilities."""
    pair, rng = tiny_pair(flavour, "bfloat16-q8"), random.Random(2)
    cases = random_cases(rng, greedy_text(flavour), 6)
    rounds = Watched()
    with rounds.watching(monkeypatch):
        want = [alone(pair, case, rounds) for case in cases]
        got = together(pair, cases, rng, rounds)
    assert sum(len(story.bits) for story in want) > 30
    for one, other in zip(got, want, strict=True):
        assert one == other


@pytest.mark.native("the embedded pair takes plain MLX minutes")
def test_texts_of_the_embedded_pair_are_those_alone() -> None:
    """Drafts of a real assistant: most are kept."""
    pair = embedded_pair()
    prompts = ("Create a single-file HTML5 canvas Flappy Bird game.", "def fib(n):", "import os\n")
    rules = [replace(GREEDY, logprobs=1), *(Sampling(seed=3, verify=rule) for rule in RULES)]
    cases = [
        Case(pair.tokenizer.encode(prompts[n % 3], bos=True), sampling, block, 20 + n)
        for n, (sampling, block) in enumerate(zip(rules, (4, 6, 1, 4), strict=True))
    ]
    want = [alone(pair, case) for case in cases]
    got = together(pair, cases, random.Random(3))
    assert got == want
    assert sum(done.num_accepted for story in got for done in story.rounds) > 30


@pytest.mark.short
def test_three_texts_are_those_alone() -> None:
    """The tests above, short enough for the workbench."""
    pair, text = tiny_pair("moe26", "bfloat16-q8"), greedy_text("moe26")
    cases = [
        Case(text[:7], Sampling(0.3, top_k=8, seed=1), 3, 5),
        Case(text[:12], GREEDY, 6, 7),
        Case(text[3:9], Sampling(top_k=8, seed=5, verify="coupled"), 2, 5),
    ]
    want = [alone(pair, case) for case in cases]
    assert together(pair, cases, random.Random(1)) == want


@pytest.mark.long
@pytest.mark.parametrize("part", range(20))
def test_texts_of_hundreds_of_schedules_are_those_alone(part: int) -> None:
    """500 schedules over all architectures and forms, some with caches that grow."""
    for seed in range(25 * part, 25 * part + 25):
        flavour, form = FLAVOURS[seed % 4], list(FORMS)[seed // 4 % 4]
        text = greedy_text(flavour)
        check_schedule(tiny_pair(flavour, form), text, 1000 + seed, 8)


@pytest.mark.parametrize("kind", ["reference", "copies alone"])
def test_what_a_round_copied_is_what_the_next_begins_with(kind: str) -> None:
    """Where writes are not in place: the texts are still what greedily follows."""
    pair, text = tiny_pair("dense31"), greedy_text("dense31")
    cases = [Case(text[:n], GREEDY, 1 + n % 4, 9) for n in (21, 40, 62)]
    try:
        if kind == "reference":
            ops.use("reference")
        else:
            dispatch.set_aside({"prepare_qkv"})
        assert not dispatch.in_place()
        stories = together(pair, cases, random.Random(2))
    finally:
        ops.use("native")
        dispatch.set_aside(())
    for case, story in zip(cases, stories, strict=True):
        n = len(case.prompt)
        assert story.tokens == text[n : n + 9]


@pytest.mark.native("plain MLX takes minutes")
def test_caches_may_grow_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full layers grow at 512; graphs from before are not played after."""
    pair, text = tiny_pair("e2b"), greedy_text("e2b")
    monkeypatch.setattr(pair.target, "context", 4096)
    long = [5 + i * i * 7 % 250 for i in range(480)]
    cases = [
        Case([*long, *text[:n]], replace(GREEDY, presence_penalty=0.1 * n), 4, 24)
        for n in (1, 9, 17, 25)
    ]
    want = [alone(pair, case) for case in cases]
    assert together(pair, cases, random.Random(4)) == want


@pytest.mark.native("plain MLX takes minutes")
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=4, verify="coupled")])
@pytest.mark.parametrize("flavour", ["dense31", "moe26"])
def test_a_block_size_may_vary_where_no_text_can_tell(flavour: str, sampling: Sampling) -> None:
    pair, text = tiny_pair(flavour), greedy_text(flavour)
    cases = [Case(text[:n], replace(sampling, seed=n), LARGEST_BLOCK, 24) for n in (9, 14, 21, 30)]
    want = [alone(pair, replace(case, block_size=4)).tokens for case in cases]
    got = together(pair, cases, random.Random(5), vary=True)
    assert [story.tokens for story in got] == want
    assert len({done.num_drafted for story in got for done in story.rounds}) > 5


@pytest.mark.native("plain MLX takes minutes")
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "coupled"])
def test_a_block_size_must_not_vary_where_rounds_key_the_draws(rule: Rule) -> None:
    """Why the load may not choose it for these: the text is another."""
    pair, text = tiny_pair("dense31"), greedy_text("dense31")
    sampling = Sampling(verify=rule)
    cases = [Case(text[:n], replace(sampling, seed=n), LARGEST_BLOCK, 24) for n in (9, 14, 21, 30)]
    want = [alone(pair, replace(case, block_size=4)).tokens for case in cases]
    got = [story.tokens for story in together(pair, cases, random.Random(6), vary=True)]
    assert sum(one != other for one, other in zip(got, want, strict=True)) >= 3


def begun(pair: Any, cases: list[Case]) -> list[TokenSequence]:
    arena = pair.target.new_arena()
    sequences = [case.begin(pair, arena) for case in cases]
    for sequence in sequences:
        list(sequence.prefill())
    return sequences


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_one_that_turns_nan_takes_no_other_with_it(flavour: str) -> None:
    pair, text = tiny_pair(flavour), greedy_text(flavour)
    cases = random_cases(random.Random(7), text, 4)
    cases = [replace(case, max_tokens=12) for case in cases]
    want = [alone(pair, case) for case in cases]
    sequences, rounds = begun(pair, cases), Rounds()
    spoil(sequences[1].parts.cache)
    done = rounds.play(sequences)
    assert isinstance(done[1], NonFinite)
    sequences.pop(1), done.pop(1), want.pop(1)
    for number, sequence in enumerate(sequences):
        tokens = [want[number].tokens[0], *done[number].tokens]
        while sequence.finish_reason is None:
            [more] = rounds.play([sequence])
            assert isinstance(more, Round)
            tokens += more.tokens
        assert tokens == want[number].tokens


def test_one_that_finds_no_memory_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, text = tiny_pair("uni12"), greedy_text("uni12")
    cases = [Case(text[:n], GREEDY, 4, 12) for n in (5, 9, 14)]
    want = [alone(pair, case) for case in cases]
    sequences = begun(pair, cases)

    def refuse(more: int) -> None:
        if more:
            raise RuntimeError("[generate] the answer must fit")

    monkeypatch.setattr(memory, "check_growth", refuse)
    monkeypatch.setattr(sequences[0].parts.cache, "growth", lambda count: 1)
    done = Rounds().play(sequences)
    assert isinstance(done[0], RuntimeError)
    for n in (1, 2):
        assert done[n] == want[n].rounds[1]


def test_graphs_serve_whoever_asks_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other prompts, seeds and settings, and in another order, record nothing."""
    made: list[Recorded[..., Any]] = []

    def record(function: Any) -> Recorded[..., Any]:
        made.append(Recorded(function))
        return made[-1]

    monkeypatch.setattr(on_device, "recorded", record)
    pair, text = tiny_pair("uni12"), greedy_text("uni12")
    rounds, counts = Rounds(), []
    for turn, rule in enumerate(RULES):
        plain = Sampling(
            temperature=0.5 * turn,  # greedy at first
            top_k=5 - turn,
            top_p=1 - 0.2 * turn,
            logit_bias={turn: 2.0},
            seed=turn,
        )
        drafting = Sampling(top_k=8, min_p=0.05 * turn, verify=rule, seed=turn)
        cases = [Case(text[turn:9], plain, 1, 9), Case(text[turn:14], drafting, 4, 9)]
        sequences = begun(pair, cases[:: 1 if turn % 2 else -1])
        rounds.play(sequences)
        counts.append(sum(graph.tapes for graph in made))
    assert counts == [1, 1, 1]


@pytest.mark.native("counts nodes of the native ops")
def test_row_wise_ops_run_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many sequences: models and rules have the same nodes, so a matrix is read once per
    round."""
    made: list[Recorded[..., Any]] = []

    def record(function: Any) -> Recorded[..., Any]:
        made.append(Recorded(function))
        return made[-1]

    monkeypatch.setattr(on_device, "recorded", record)
    pair, text = tiny_pair("dense31", "bfloat16-q8"), greedy_text("dense31")
    counts = []
    for count in (1, 2, 4, 8):
        made.clear()
        cases = [
            Case(text[: 5 + n], Sampling(temperature=1.0 + n, verify=RULES[n % 3], seed=n), 3, 9)
            for n in range(count)
        ]
        Rounds().play(begun(pair, cases))
        names = [node.split()[0] for node in made[0].nodes]
        counts.append({name: names.count(name) for name in names})
    once = {"quantized_matmul", "quantized_matmuls", "quantized_gated_matmul", "residual_norm"}
    once |= {"rms_norm", "embed", "quantized_filter_logits", "draw_token", "accept_block"}
    once |= {"block_attention", "prepare_qkv", "norm_rope", "Depends", "Reshape"}
    for more in counts[1:]:
        assert {name: counts[0][name] for name in once} == {name: more[name] for name in once}


@pytest.mark.native("counts nodes of the native ops")
@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(logit_bias={3: 1.0}), Sampling(presence_penalty=0.5), Sampling(top_k=0)],
    ids=["plain", "bias", "penalties", "dense"],
)
def test_rules_take_as_many_nodes_for_more_sequences(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past three, two of which draft: only what commits a sequence, and its drafter's own rows,
    multiplies."""
    made: list[Recorded[..., Any]] = []

    def record(function: Any) -> Recorded[..., Any]:
        made.append(Recorded(function))
        return made[-1]

    monkeypatch.setattr(on_device, "recorded", record)
    pair, text = tiny_pair("dense31", "bfloat16-q8"), greedy_text("dense31")
    totals = []
    for count in (4, 5, 6):
        made.clear()
        cases = [
            Case(text[: 5 + n], replace(sampling, seed=n), 1 + 2 * (n < 2), 9) for n in range(count)
        ]
        Rounds().play(begun(pair, cases))
        names = Counter(node.split()[0] for node in made[0].nodes)
        totals.append(names)
    per_cache = totals[1] - totals[0]
    assert totals[2] - totals[1] == per_cache
    # Of a cache: its length committed; no sort, no sum, no draw
    assert not set(per_cache) & {"draw_token", "accept_block", "filter_logits", "Equal", "Gather"}
