"""An engine's texts with an early exit: each is the one it is alone, and takes its turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from exits import passed, trial

from pyengine import Engine, Sampling, generate
from pyengine.engine import schedule
from pyengine.streams import Request
from pyengine.task import Result

pytestmark = pytest.mark.native("the embedded pair takes plain MLX minutes")

PROMPTS = ("Write a Snake game.", "import os\n", "def fib(n):", "Pong!", "x = [")
SAMPLED = Sampling(temperature=1.3, repetition_penalty=1.1)
ASKED: dict[str, Any] = {
    "max_tokens": 24,
    "early_exit": passed(sampling=SAMPLED, tested=(trial(0.9, 0), trial(0.1, 0))),
}
EXACT: dict[str, Any] = {"max_tokens": 24, "sampling": Sampling(temperature=0.0)}


def settings(n: int) -> dict[str, Any]:
    return {**ASKED, "max_tokens": 24 - 3 * n, "sampling": replace(SAMPLED, seed=n)}


def told(result: Result) -> tuple[Any, ...]:
    return result.tokens, result.text, result.finish_reason, result.stats.exits, result.early_exit


@pytest.fixture(scope="module")
def alone() -> list[tuple[Any, ...]]:
    results = [generate(prompt, **settings(n)) for n, prompt in enumerate(PROMPTS)]
    exits = [set(result.stats.exits) for result in results]
    assert {6, 24} in exits and all(6 in layers for layers in exits)
    plain = [
        generate(prompt, block_size=1, **{**settings(n), "early_exit": None}).tokens
        for n, prompt in enumerate(PROMPTS)
    ]
    assert any(result.tokens != own for result, own in zip(results, plain, strict=True))
    return [told(result) for result in results]


@pytest.fixture
def prompts_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """No round runs while a prompt is there, however slow the machine."""
    monkeypatch.setattr(schedule, "SLOWDOWN", 1e9)


def submitted(engine: Engine) -> list[Request]:
    return [engine.submit(prompt, **settings(n)) for n, prompt in enumerate(PROMPTS)]


def steps(engine: Engine) -> Iterator[None]:
    while engine.step():
        yield


@pytest.mark.parametrize("sequences", [1, 3, 8])
def test_texts_are_those_of_generate(sequences: int, alone: Any) -> None:
    with Engine(sequences=sequences) as engine:
        requests, most = submitted(engine), 0
        for _ in steps(engine):
            most = max(most, engine.active)
        assert most == min(sequences, len(PROMPTS))
        assert [told(request.result) for request in requests] == alone
        assert engine.totals.drafted == 0 and engine.cache_bytes == 0


def test_none_waits_for_another_text_to_end(prompts_first: None) -> None:
    with Engine() as engine:
        requests = submitted(engine)
        while any(r.sequence is None or r.reads for r in requests):
            engine.step()
        before = [len(request.result.tokens) for request in requests]
        for _ in range(5):
            engine.step()
        after = [len(request.result.tokens) for request in requests]
        assert after == [count + 5 for count in before]


def test_exact_texts_beside_them_stay_exact(alone: Any) -> None:
    """They draft as ever, and nobody begins with what an early token left."""
    want = generate(PROMPTS[0], **EXACT)
    with Engine() as engine:
        requests = submitted(engine)
        exact = engine.submit(PROMPTS[0], **EXACT)
        for _ in steps(engine):
            pass
        assert [told(request.result) for request in requests] == alone
        assert exact.result.tokens == want.tokens and exact.result.early_exit is None
        assert exact.result.stats.accepted > 0 and exact.result.stats.exits == {}
        ids = [*requests[1].task.ids, *requests[1].result.tokens]
        want = generate(ids, **EXACT)
        # No more than the exact prompt has in common with it
        after = engine.submit(ids, **EXACT)
        assert "".join(after) == want.text and after.result.tokens == want.tokens
        assert after.result.stats.reused_tokens < len(requests[1].task.ids)
        again = engine.submit(PROMPTS[0], **settings(0))
        assert "".join(again) == alone[0][1] and again.result.stats.reused_tokens == 0


def test_several_prompts_and_n(alone: Any) -> None:
    seeds = [replace(SAMPLED, seed=n) for n in range(2)]
    got = generate(list(PROMPTS[:2]), **{**ASKED, "max_tokens": 21}, sampling=seeds)
    assert told(got[1]) == alone[1] and got[0].tokens == alone[0][0][:21]
    ask = {**ASKED, "raw": True}
    several = generate("x = [", **ask, sampling=seeds[1], n=3)
    each = [generate("x = [", **ask, sampling=replace(SAMPLED, seed=1 + n)) for n in range(3)]
    assert [told(one) for one in several] == [told(one) for one in each]
    assert [one.stats.reused_tokens for one in several] == [0] + 2 * [
        several[0].stats.prompt_tokens
    ]
    assert len({one.text for one in several}) == 3


@pytest.mark.parametrize("started", [False, True])
def test_threads_may_each_read_one(started: bool, alone: Any) -> None:
    with Engine(sequences=3) as engine:
        if started:
            engine.start()
        requests, texts = submitted(engine), {}

        def read(number: int) -> None:
            texts[number] = "".join(requests[number])

        readers = [threading.Thread(target=read, args=[n]) for n in range(len(requests))]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
        assert [texts[number] for number in range(len(requests))] == [text for _, text, *_ in alone]


def test_nothing_is_under_way_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may take the next one."""
    begun: list[Any] = []
    own = mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: begun.append(arrays) or own(*arrays))
    with Engine() as engine:
        request = engine.submit(PROMPTS[0], **settings(0))
        assert "".join(request) and request.result.stats.exits[6] > 3 and not begun
    assert generate(PROMPTS[0], **settings(0)).text == request.result.text and begun


def test_one_that_is_cancelled_or_fails_leaves_the_others(
    alone: Any, prompts_first: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine() as engine:
        requests = submitted(engine)
        while any(r.sequence is None or r.reads for r in requests):
            engine.step()
        requests[0].cancel()
        broken = requests[2].sequence
        assert broken is not None

        def fails() -> None:
            raise RuntimeError("[test] no room.")

        monkeypatch.setattr(broken, "prepare", fails)
        for _ in steps(engine):
            pass
        with pytest.raises(RuntimeError, match="no room"):
            list(requests[2])
        part = requests[0].result
        assert part.finish_reason is None and part.tokens == alone[0][0][: len(part.tokens)]
        assert part.early_exit == ASKED["early_exit"].told()
        for n in (1, 3, 4):
            assert told(requests[n].result) == alone[n]
        assert engine.cache_bytes == 0


def test_what_was_not_calibrated_is_refused() -> None:
    with Engine() as engine:
        for changed, message in (
            ({"max_tokens": 25}, "max_tokens must be at most 24 as calibrated but got 25."),
            ({"sampling": EXACT["sampling"]}, "temperature must be 1.3 as calibrated but got 0.0."),
            ({"drafter": "lookup"}, "an early exit must go without drafts but some are asked for."),
            ({"regex": "a"}, "the answer's form must be free but one is asked for."),
        ):
            with pytest.raises(ValueError, match=message):
                engine.submit("x", **{**settings(0), **changed})
        assert not engine.waiting
