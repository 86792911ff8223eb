"""block_size="auto": the same text as at any block size, and what it is where a text can tell."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from pyengine.checkpoint.pair import load
from pyengine.doctor import profile
from pyengine.engine import round as on_device
from pyengine.engine.controller import AUTO_BLOCK, MOST_DRAFTS, Controller
from pyengine.engine.rounds import Rounds
from pyengine.engine.sequence import Round, TokenSequence
from pyengine.generation import generate
from pyengine.ops import dispatch
from pyengine.sampling import Sampling
from pyengine.streams import Engine
from pyengine.task import default_block_size, embedded_pair, new_task

GREEDY = Sampling(temperature=0.0)
COUPLED = Sampling(seed=4, verify="coupled")
PROMPTS = ("Create a single-file HTML5 canvas Snake game.", "def fib(n):", "import os\n")


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED, replace(COUPLED, temperature=1.5)])
def test_it_changes_no_text(sampling: Sampling) -> None:
    for prompt in PROMPTS[:2]:
        pair = load()  # nothing is known of its rounds, so it tries some with drafts first
        ask: dict[str, Any] = {"max_tokens": 60, "sampling": sampling, "pair": pair}
        plain = generate(prompt, block_size=1, **ask)
        first, second = generate(prompt, **ask), generate(prompt, **ask)
        assert first.stats.accepted > 10
        for auto in (first, second):  # the second knows what the first one learned
            assert auto.tokens == plain.tokens
            assert auto.stats.block_size == "auto"
            assert len(auto.stats.drafted_by_depth) <= MOST_DRAFTS


@pytest.mark.parametrize("sampling", [GREEDY, COUPLED])
def test_whatever_is_chosen_a_text_among_others_is_the_one_alone(
    sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Load and clock may choose anything: here sizes at random, each round, of texts that come one
    by one, beside one whose block size is fixed by its rule."""
    rng, seen = random.Random(2), set()

    def choose(self: Controller, texts: Any) -> list[int]:
        ks = [rng.randrange(8) if t.fixed is None else t.fixed for t in texts]
        seen.update(ks)
        return ks

    pair = embedded_pair()
    prompts = [PROMPTS[n % 3] for n in range(5)]
    rules = [*[replace(sampling, seed=n) for n in range(4)], Sampling(seed=3, top_k=9)]
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 30}
    sizes = [4, 4, 4, 4, 3]
    want = [
        generate(p, sampling=s, block_size=b, **ask).tokens
        for p, s, b in zip(prompts, rules, sizes, strict=True)
    ]
    monkeypatch.setattr(Controller, "choose", choose)
    with Engine(pair, sequences=4) as engine:
        blocks = ["auto"] * 4 + [3]
        requests = [
            engine.submit(p, sampling=s, block_size=b, max_tokens=30)
            for p, s, b in zip(prompts, rules, blocks, strict=True)
        ]
        for request in requests:
            for _ in request.steps():
                pass
        assert [request.result.tokens for request in requests] == want
    assert seen == {*range(8)}


def test_where_a_text_can_tell_it_is_one_number_that_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The profile's, else the pair's; given explicitly it gives the same text. Never a clock's."""
    pair = embedded_pair()
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 40}
    known = profile.Profile(
        "x", tuple(1 + 0.3 * k for k in range(8)), 0.1, (40,) * 7, (20,) + (10,) * 6
    )
    for rule in ("residual", "block"):
        sampling = Sampling(seed=7, temperature=3.0, verify=rule)  # of many texts
        auto = generate(PROMPTS[0], sampling=sampling, **ask)
        assert auto.stats.block_size == default_block_size(pair) == 4
        assert auto.tokens == generate(PROMPTS[0], sampling=sampling, block_size=4, **ask).tokens
        with monkeypatch.context() as patch:
            patch.setattr(profile, "ready", lambda pair, drafter: known)
            other = generate(PROMPTS[0], sampling=sampling, **ask)
        size = known.best_block
        assert other.stats.block_size == size != 4
        same = generate(PROMPTS[0], sampling=sampling, block_size=size, **ask)
        assert other.tokens == same.tokens != auto.tokens


def test_where_ops_are_not_exact_nothing_follows_the_load() -> None:
    """There the bits of a row may go with the rows beside it, so a greedy text with the block."""
    assert new_task("x", sampling=GREEDY).auto
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "exact", lambda: False)
        task = new_task("x", sampling=GREEDY)
    assert not task.auto and task.block_size == 4


def test_it_has_room_for_the_largest_block() -> None:
    task = new_task("x", sampling=GREEDY)
    assert task.auto and task.block_size == AUTO_BLOCK
    numbers = {new_task("x", block_size=n, sampling=GREEDY).block_size for n in (1, 3, 40)}
    assert numbers == {1, 3, 40} and not new_task("x", block_size=3, sampling=GREEDY).auto
    assert new_task("x", block_size=None, sampling=GREEDY).auto  # the same as saying nothing


def test_few_graphs_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it knows the machine, a text takes few sizes, and an engine records few rounds."""
    made: list[Any] = []
    recorded = on_device.RecordedRound

    def record(each: Any, ks: Any, groups: Any) -> Any:
        made.append(tuple(ks))
        return recorded(each, ks, groups)

    ask: dict[str, Any] = {"max_tokens": 120, "sampling": GREEDY}
    for _ in range(3):
        generate(PROMPTS[0], **ask)
    monkeypatch.setattr(on_device, "RecordedRound", record)
    generate(PROMPTS[0], **ask)
    assert len(made) <= 4
    made.clear()
    with Engine(sequences=4) as engine:
        for request in [engine.submit(PROMPTS[0], **ask) for _ in range(4)]:
            for _ in request.steps():
                pass
        assert engine.totals.rounds >= 120 // AUTO_BLOCK  # four texts whose rounds are shared
        assert len(made) == len({*made}) <= 16


def test_a_sequence_takes_what_was_chosen() -> None:
    """And what became of it is noted where the next choice is made."""
    task = new_task(PROMPTS[0], max_tokens=40, sampling=GREEDY)
    pair = task.pair
    sequence = TokenSequence(pair.target, task.new_drafter(), task.ids, **task.arguments)
    list(sequence.prefill())
    rounds = Rounds()
    rounds.choose([sequence])
    known = next(iter(rounds._controllers))
    before = sum(known.acceptance.made)
    for k in (2, 0, 5):
        sequence.drafts = k
        [done] = rounds.play([sequence])
        assert isinstance(done, Round) and done.num_drafted == k
    assert sequence.acceptance is not None and sum(sequence.acceptance.made) > 0
    assert sum(known.acceptance.made) != before


@pytest.mark.parametrize("wrong", ["Auto", "4", "", 1.5, True, ["auto"]])
def test_another_word_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"\[generate\] block_size must be a whole number but got"):
        generate("x", block_size=wrong)
