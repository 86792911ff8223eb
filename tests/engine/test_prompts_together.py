"""Prompts that one call of the target processes: each gets the bits that it gets alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from knowing import tiny
from schedules import Case, alone
from tiny_pairs import FLAVOURS, bits, greedy_text, tiny_pair

from pyengine import Engine, Sampling, generate
from pyengine.drafters.assistant import AssistantDrafter
from pyengine.engine import schedule
from pyengine.engine.prompts import process
from pyengine.model import plan
from pyengine.model.cache import Cache
from pyengine.model.target import Part, Target
from pyengine.ops import dispatch

pytestmark = pytest.mark.engine

GREEDY = Sampling(temperature=0.0)
LONG = [5 + i * i * 7 % 250 for i in range(700)]


def keys(cache: Cache, length: int) -> list[np.ndarray]:
    """Of every layer that keeps some, by position; of sliding ones those that are still there."""
    found = []
    for i, a in enumerate(cache.arena.keys):
        if a is not None:
            sliding = cache.arena.layers[i].sliding
            own = cache.sliding if sliding else dict(enumerate(cache.full))
            rows = np.concatenate([bits(a)[own[j]].swapaxes(0, 1) for j in sorted(own)])
            found.append(rows[: length - 64 * min(own)])
    return found


@pytest.mark.parametrize("form", ["float32", "bfloat16-q8"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_parts_of_prompts_have_the_bits_they_have_alone(flavour: str, form: str) -> None:
    """Of unlike lengths, some of them behind positions that are there."""
    pair, text = tiny_pair(flavour, form), greedy_text(flavour)
    target, rng = pair.target, random.Random(flavour)
    arena, lengths, known = target.new_arena(), [1, 17, 40, 5, 31], [0, 64, 3, 0, 20]
    prompts = [
        [rng.choice(text) for _ in range(a + b)] for a, b in zip(known, lengths, strict=True)
    ]
    drafters = [AssistantDrafter(target, pair.assistant) for _ in prompts]
    caches, want = [arena.new_cache() for _ in prompts], []
    for prompt, count, cache in zip(prompts, known, caches, strict=True):
        if count:
            target.prefill(prompt[:count], cache)
        by_itself, drafter = target.new_cache(), AssistantDrafter(target, pair.assistant)
        logits, hidden = target.prefill(prompt, by_itself, reader=drafter)
        want.append((logits, hidden, drafter.hidden, keys(by_itself, len(prompt))))
    parts = zip(prompts, known, caches, drafters, strict=True)
    made = target.prefill_together(
        [Part(prompt[count:], cache, drafter) for prompt, count, cache, drafter in parts]
    )
    for n, (logits, hidden) in enumerate(made):
        assert np.array_equal(bits(logits), bits(want[n][0])), n
        assert np.array_equal(bits(hidden), bits(want[n][1])), n
        assert np.array_equal(bits(drafters[n].hidden), bits(want[n][2])), n
        own = keys(caches[n], len(prompts[n]))
        assert all(np.array_equal(a, b) for a, b in zip(own, want[n][3], strict=True)), n
        assert caches[n].committed == len(prompts[n])


def cases(text: list[int], count: int) -> list[Case]:
    """No two alike; some report log-probabilities of their first token too."""
    return [
        Case(
            text[n : 8 + 5 * n],
            Sampling(1.0, top_k=8 * (n % 2), seed=n, verify="coupled", logprobs=n % 3 or None),
            1 + n % 4,
            6,
            ("assistant", "lookup", "early:2")[n % 3],
        )
        for n in range(count)
    ]


def test_first_tokens_and_what_follows_are_those_alone() -> None:
    pair, text = tiny_pair("e2b"), greedy_text("e2b")
    asked = cases(text, 5)
    want = [alone(pair, case) for case in asked]
    arena = pair.target.new_arena()
    sequences = [case.begin(pair, arena) for case in asked]
    assert process(sequences) == [story.rounds[0] for story in want]
    assert not any(sequence.reads for sequence in sequences)


def test_one_that_finds_no_memory_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, text = tiny_pair("uni12"), greedy_text("uni12")
    asked = cases(text, 3)
    want = [alone(pair, case) for case in asked]
    arena = pair.target.new_arena()
    sequences = [case.begin(pair, arena) for case in asked]
    assert all(sequence.next_rows() for sequence in sequences)
    reading = sequences[1]._reading
    assert reading is not None

    def refuse(count: int) -> None:
        raise RuntimeError("[cache] pages must fit")

    monkeypatch.setattr(reading.cache, "reserve", refuse)
    done = process(sequences)
    assert isinstance(done[1], RuntimeError) and "pages must fit" in str(done[1])
    assert [done[0], done[2]] == [want[0].rounds[0], want[2].rounds[0]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Rows of the prompts in each call of a target that processes some."""
    made: list[list[int]] = []
    whole = Target._process

    def noted(self: Target, parts: Any) -> Any:
        made.append([len(part.ids) for part in parts])
        return whole(self, parts)

    monkeypatch.setattr(Target, "_process", noted)
    monkeypatch.setattr(schedule, "SLOWDOWN", 1e9)  # no round while a prompt is there
    yield made


def run(engine: Engine, prompts: list[list[int]], **settings: Any) -> list[Any]:
    requests = [engine.submit(prompt, max_tokens=6, **settings) for prompt in prompts]
    while engine.step():
        pass
    return [request.result for request in requests]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Any:
    own = tiny("uni12")
    monkeypatch.setattr(own.target, "context", 4096)
    return own


def texts(pair: Any, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    return [generate(p, pair=pair, max_tokens=6, **settings).tokens for p in prompts]


def test_prompts_that_wait_together_are_one_call(pair: Any, calls: list[list[int]]) -> None:
    """As many as have 512 rows, in the order of arrival."""
    settings: dict[str, Any] = {"sampling": GREEDY, "block_size": 1}
    prompts = [
        [n, *LONG[n : n + count]] for n, count in enumerate((30, 200, 7, 270, 20, 600, 9), 5)
    ]
    want = texts(pair, prompts, **settings)
    calls.clear()
    with Engine(pair) as engine:
        found = run(engine, prompts, **settings)
        assert [result.tokens for result in found] == want
        # The sixth has two parts; the seventh finds no room beside the first
        assert calls == [[31, 201, 8, 271], [21], [512], [89, 10]]
        assert engine.totals.prompt_tokens == sum(map(len, prompts))
        assert all(result.stats.prefill_s > 0 for result in found)


def test_who_begins_alike_waits_for_what_the_first_leaves(
    pair: Any, calls: list[list[int]]
) -> None:
    """If that saves a page or more; and not where it is known already."""
    settings: dict[str, Any] = {"sampling": GREEDY, "block_size": 1}
    common = LONG[:100]
    prompts = [[*common, 9, 8], [*common, 7], [11, *LONG[:30]], [11, *LONG[:30], 6]]
    want = texts(pair, prompts, **settings)
    calls.clear()
    with Engine(pair) as engine:
        found = run(engine, prompts, **settings)
        assert [result.tokens for result in found] == want
        assert calls == [[102, 31, 32], [1]]
        assert [result.stats.reused_tokens for result in found] == [0, 100, 0, 0]
        calls.clear()
        run(engine, [[*common, 5, 4], [*common, 3, 2, 1]], **settings)
        assert calls == [[2, 3]]


def test_texts_of_one_prompt_wait_however_short_it_is(pair: Any, calls: list[list[int]]) -> None:
    with Engine(pair) as engine:
        requests = engine.submit(LONG[:9], n=3, max_tokens=4, block_size=1)
        other = engine.submit(LONG[20:40], max_tokens=4, block_size=1)
        while engine.step():
            pass
        assert calls == [[9, 20]]
        assert [request.result.stats.reused_tokens for request in requests] == [0, 9, 9]
        assert len(other.result.tokens) == 4


@pytest.mark.native("the limits of our kernels hold where these are chosen")
def test_a_gpu_takes_fewer_and_whole_chunks_alone(
    pair: Any, calls: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own kernels take 128 rows, and MLX's kernels never see two prompts."""
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    settings: dict[str, Any] = {"sampling": GREEDY, "block_size": 1}
    prompts = [LONG[:100], LONG[1:29], [3], LONG[2:602], LONG[3:43]]
    want = texts(pair, prompts, **settings)
    calls.clear()
    with Engine(pair) as engine:
        found = run(engine, prompts, **settings)
    assert [result.tokens for result in found] == want
    assert calls == [[100, 28], [1], [512], [88, 40]]


@pytest.mark.parametrize("kind", ["one", "all"])
def test_what_fails_fails_its_own(
    kind: str, pair: Any, calls: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that cannot begin fails alone; a call that raises fails those in it, and no other."""
    settings: dict[str, Any] = {"sampling": GREEDY, "block_size": 1}
    prompts = [LONG[:300], LONG[5:205], LONG[9:309]]
    want = texts(pair, prompts, **settings)
    with Engine(pair) as engine:
        requests = [engine.submit(prompt, max_tokens=6, **settings) for prompt in prompts]
        whole = Target._process if kind == "all" else Engine._join

        def fail(self: Any, given: Any) -> Any:
            monkeypatch.setattr(*place, whole)
            if kind == "all":
                raise RuntimeError("[metal] no memory")
            whole(self, given)
            monkeypatch.setattr(given.sequence, "next_rows", refuse)

        def refuse() -> int:
            raise RuntimeError("[metal] no memory")

        place: Any = (Target, "_process") if kind == "all" else (Engine, "_join")
        monkeypatch.setattr(*place, fail)
        while engine.step():
            pass
        failed = (0, 1) if kind == "all" else (0,)
        for n, request in enumerate(requests):
            if n in failed:
                with pytest.raises(RuntimeError, match=r"\[metal\] no memory"):
                    list(request)
            else:
                assert request.result.tokens == want[n]
        assert engine.active == 0


def test_what_fits_one_call_goes_by_the_kernels() -> None:
    assert plan.most_together(False) == plan.CHUNK and plan.most_together(True) == plan.ROWS == 128
