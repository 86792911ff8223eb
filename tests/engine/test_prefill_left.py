"""A long prompt can be watched, and left between its chunks, without a change to any bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import decode
from tiny_pairs import FLAVOURS, bits, greedy_text, tiny_pair

from pyengine.chat import Chat
from pyengine.checkpoint.pair import Pair, load
from pyengine.engine import rounds, sequence
from pyengine.engine.prefill import prefill
from pyengine.engine.prefix import Prefix
from pyengine.engine.score import prompt_logprobs, score
from pyengine.engine.stats import Stats
from pyengine.generation import generate, stream
from pyengine.model import plan
from pyengine.sampling.settings import Sampling
from pyengine.task import Step

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load()


@pytest.fixture(scope="module")
def long(pair: Pair) -> list[int]:
    """Four whole chunks and a fifth."""
    code = "\n".join(f"value_{i} = {i * i % 97}" for i in range(400))
    return pair.tokenizer.encode(code, bos=True)[:2119]


def test_steps_tell_how_far_the_prompt_is(pair: Pair, long: list[int]) -> None:
    running = stream(long, pair=pair, max_tokens=5, sampling=GREEDY)
    steps = list(running.steps())
    reading = [step for step in steps if step.prompt_done is not None]
    assert reading == [Step("", "", [], [], 512 * i) for i in range(1, 5)] == steps[:4]
    assert [token for step in steps for token in step.tokens] == running.result.tokens
    # Who asks for text alone, or has a prompt of one chunk, sees none of it
    assert all(stream(long, pair=pair, max_tokens=5, sampling=GREEDY))
    short = stream(long[:512], pair=pair, max_tokens=5).steps()
    assert all(step.prompt_done is None for step in short)


def test_what_is_left_can_be_gone_on_with(pair: Pair, long: list[int]) -> None:
    cold = generate(long, pair=pair, max_tokens=20, sampling=GREEDY)
    prefix = Prefix()
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 20, "sampling": GREEDY, "prefix": prefix}
    for chunks in (2, 1):
        with stream(long, **ask) as running:
            for _ in range(chunks):
                next(running.steps())
        result = running.result
        assert (result.tokens, result.finish_reason) == ([], None)
        assert result.stats.prompt_tokens == len(long) and result.stats.prefill_s > 0
    warm = generate(long, **ask)
    assert warm.tokens == cold.tokens and warm.stats.reused_tokens == 3 * 512
    # A prefix in use midway in a prompt is not free for another
    running = stream([*long[:600], 5, *long[601:]], **ask)
    next(running.steps())
    with pytest.raises(ValueError, match="prefix must serve one generation at a time"):
        generate(long, **ask)
    with pytest.raises(ValueError, match="prefix must serve one generation at a time"):
        score(pair, long[:5], long[5:9], prefix=prefix)
    running.close()
    assert generate(long, **ask).tokens == cold.tokens


def test_ctrl_c_between_chunks_keeps_them(pair: Pair, long: list[int]) -> None:
    cold, prefix = generate(long, pair=pair, max_tokens=8, sampling=GREEDY), Prefix()
    steps = stream(long, pair=pair, max_tokens=8, sampling=GREEDY, prefix=prefix).steps()
    with pytest.raises(KeyboardInterrupt):
        for step in steps:
            if step.prompt_done == 1024:
                steps.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    warm = generate(long, pair=pair, max_tokens=8, sampling=GREEDY, prefix=prefix)
    assert warm.tokens == cold.tokens and warm.stats.reused_tokens == 1024


def test_a_turn_of_a_chat_left_midway_does_not_count(pair: Pair) -> None:
    question = "x = 1; " * 400
    chat, other = (Chat(pair, max_tokens=8, sampling={"temperature": 0}) for _ in range(2))
    turn = chat.steps(question)
    assert next(turn).prompt_done == 512
    turn.close()
    assert chat.turns == [] and len(chat.prefix.tokens) == 512
    assert "".join(chat.ask(question)) == "".join(other.ask(question))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_chunks_and_their_borders_are_those_of_one_call(
    flavour: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CHUNK", 16)
    target, prompt = tiny_pair(flavour, "bfloat16-q8").target, greedy_text(flavour)[:75]
    whole = target.new_cache()
    want, _ = target.prefill(prompt, whole, chunk=16)
    cache = target.new_cache()
    parts = list(prefill(target, prompt, cache, 0, None))
    assert [part.done for part in parts] == [16, 32, 48, 64, 75]
    assert np.array_equal(bits(parts[-1].logits), bits(want))
    for a, b in zip(cache.arena.arrays, whole.arena.arrays, strict=True):
        assert mx.array_equal(a[: len(cache.full)], b[: len(cache.full)])


def test_the_prefill_clock_stops_between_chunks(
    pair: Pair, long: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that is a second later each time it is read; the caller takes a thousand."""
    now, stats, chunks = iter(range(10**9)), Stats(), 0
    clock = SimpleNamespace(perf_counter=lambda: next(now))
    for module in (rounds, sequence):
        monkeypatch.setattr(module, "time", clock)
    for _ in decode(
        pair.target,
        None,
        long,
        sampling=Sampling(temperature=0.0),
        block_size=1,
        max_tokens=1,
        stats=stats,
    ):
        chunks += 1
        for _ in range(1000):
            next(now)
    assert chunks == -(-len(long) // 512) > 2
    assert stats.prefill_s == chunks and stats.decode_s == 0


def test_the_logprobs_of_a_prompt_can_be_left(pair: Pair, long: list[int]) -> None:
    ids, said = long[:100], []
    rows = prompt_logprobs(pair, ids, 2, lambda done, total: said.append((done, total)))
    assert rows == prompt_logprobs(pair, ids, 2) and len(rows) == 99
    assert said == [(min(1 + 16 * i, 100), 100) for i in range(1, 8)]

    def leave(done: int, total: int) -> None:
        if done > 40:
            raise InterruptedError(f"left at {done} of {total}")

    with pytest.raises(InterruptedError, match="left at 49 of 100"):
        prompt_logprobs(pair, ids, 2, leave)
