"""Reusing a cache between prompts: the same text as without, and fewer tokens processed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from models import decode
from tiny_pairs import FLAVOURS, bits, greedy_text, tiny_pair

from pyengine.checkpoint.pair import Pair, load
from pyengine.engine import round as on_device
from pyengine.engine.prefix import Prefix
from pyengine.engine.stats import Stats
from pyengine.generation import generate, stream
from pyengine.sampling.settings import Sampling

BLOCK = 4


def run(
    pair: Pair, prompt: list[int], prefix: Prefix | None, seed: int | None, count: int
) -> tuple[list[int], Stats]:
    """Tokens after a prompt, and counts."""
    sampling = Sampling(temperature=0.0) if seed is None else Sampling(seed=seed, top_k=8)
    stats, out = Stats(), []
    for r in decode(
        pair.target,
        pair.assistant,
        prompt,
        sampling=sampling,
        block_size=BLOCK,
        max_tokens=count,
        stats=stats,
        prefix=prefix,
    ):
        out += r.tokens
    return out, stats


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_turns_of_a_conversation(flavour: str) -> None:
    """Past many windows of 8: each turn processes what is new to it, and says the same."""
    pair, prefix, text = tiny_pair(flavour), Prefix(), greedy_text(flavour)
    prompt, known = text[:21], 0
    for turn, new in enumerate(([5, 6, 7], list(range(9, 40)), [11], [])):
        seed = None if turn % 2 == 0 else turn
        cold, _ = run(pair, prompt, None, seed, 13)
        warm, stats = run(pair, prompt, prefix, seed, 13)
        assert warm == cold, turn
        assert stats.reused_tokens == known
        # All but the newest token of the answer is there for the next turn
        known = len(prompt) + len(warm) - 1
        prompt = [*prompt, *warm, *new]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_another_answer_to_the_same_prompt(flavour: str) -> None:
    """Its pages behind the window were given back by then; a mark has kept them."""
    pair, prefix, prompt = tiny_pair(flavour), Prefix(), greedy_text(flavour)[:40]
    for seed in range(3):
        said, _ = run(pair, prompt, prefix, seed, 30)
        other = [*prompt, (said[0] + 1) % 256, 7]  # replaced, as where thoughts are cut
        cold, _ = run(pair, other, None, seed, 10)
        warm, stats = run(pair, other, prefix, seed, 10)
        assert warm == cold
        assert stats.reused_tokens in (len(prompt), len(prompt) + 1)  # by chance said before


def test_a_common_beginning_is_marked_when_prompts_part() -> None:
    pair, prefix, text = tiny_pair("dense31"), Prefix(), greedy_text("dense31")
    document = text[:50]
    reused = []
    for question in range(4):
        prompt = [*document, 200 + question, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
        cold, _ = run(pair, prompt, None, None, 20)
        warm, stats = run(pair, prompt, prefix, None, 20)
        assert warm == cold
        reused.append(stats.reused_tokens)
    assert reused == [0, 50, 50, 50]  # what the mark at the first one's end holds serves it too


def test_random_prompts_never_change_the_text() -> None:
    rng, text = random.Random(0), greedy_text("dense31")
    pair, prefix = tiny_pair("dense31"), Prefix()
    history = text[:10]
    total = 0
    for step in range(25):
        cut = rng.randint(1, len(history))
        prompt = [*history[:cut], *(rng.randint(3, 255) for _ in range(rng.randint(0, 12)))]
        seed = rng.choice([None, step])
        count = rng.randint(1, 25)
        cold, _ = run(pair, prompt, None, seed, count)
        warm, stats = run(pair, prompt, prefix, seed, count)
        assert warm == cold, step
        total += stats.reused_tokens
        history = [*prompt, *warm][:120]
    assert total > 200


def test_logits_after_reuse_are_those_of_a_cold_start_bit_for_bit() -> None:
    pair, prefix, text = tiny_pair("e2b", "bfloat16-q8"), Prefix(), greedy_text("e2b")
    run(pair, text[:30], prefix, None, 20)
    out, _ = run(pair, text[:30], None, None, 20)
    prompt = [*text[:30], *out, 5, 6, 7, 8]
    cache, known = prefix.open(pair.target, prompt, BLOCK)
    assert known == 49
    warm, _ = pair.target.prefill(prompt[known:], cache)
    cold, _ = pair.target.prefill(prompt, pair.target.new_cache())
    assert (bits(warm) == bits(cold)).all()


def test_stops_cancellation_and_failure_leave_a_right_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each way a generation can end, through generate, on the embedded pair."""
    pair = load()
    prefix, sampling = Prefix(), Sampling(temperature=0.0)
    ask: dict[str, Any] = {"pair": pair, "sampling": sampling}
    first = "Create a single-file HTML5 canvas Snake game."
    cold = generate(first, max_tokens=60, **ask)
    # A stop string, in the middle of a round's tokens
    stopped = generate(first, max_tokens=60, stop="html", prefix=prefix, **ask)
    assert cold.text.startswith(stopped.text) and stopped.finish_reason == "stop"
    # Left early
    with stream(first, max_tokens=60, prefix=prefix, **ask) as running:
        for _ in range(4):
            next(running)
    again = generate(first, max_tokens=60, prefix=prefix, **ask)
    assert again.text == cold.text and again.stats.reused_tokens > 15
    # A failing machine: nothing half-written is believed
    whole, calls = on_device.read, []

    def fail(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("[verify] the machine failed.")
        return whole(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(on_device, "read", fail)
        with pytest.raises(RuntimeError, match="the machine failed"):
            generate(first, max_tokens=60, prefix=prefix, **ask)
    assert prefix.tokens == []
    again = generate(first, max_tokens=60, prefix=prefix, **ask)
    assert again.text == cold.text


def test_generate_keeps_what_was_processed_and_no_more() -> None:
    """The newest token's keys and values are not there yet, whatever ended the text."""
    pair = load()
    prompt = pair.tokenizer.encode("import os\nimport sys\n", bos=True)
    for count, stop in ((30, None), (31, None), (32, None), (60, "def")):
        prefix, sampling = Prefix(), Sampling(temperature=0.0)
        ask: dict[str, Any] = {"pair": pair, "sampling": sampling, "max_tokens": count}
        said = generate(prompt, stop=stop, prefix=prefix, **ask)
        following = [*prompt, *said.tokens, *pair.tokenizer.encode("\nprint(")]
        warm = generate(following, prefix=prefix, **ask)
        assert warm.tokens == generate(following, **ask).tokens
        # Behind a stop string more may have been committed
        known = len(prompt) + len(said.tokens) - 1
        assert known <= warm.stats.reused_tokens <= known + (stop is not None)


def test_one_generation_at_a_time() -> None:
    pair, prefix = load(), Prefix()
    running = stream("fox", pair=pair, prefix=prefix, max_tokens=30)
    next(running)
    with pytest.raises(ValueError, match=r"\[generate\] prefix must serve one generation at a"):
        generate("fox", pair=pair, prefix=prefix, max_tokens=3)
    running.close()
    assert generate("fox", pair=pair, prefix=prefix, max_tokens=3).tokens


def test_another_pair_starts_afresh() -> None:
    a, b, prefix = tiny_pair("uni12"), tiny_pair("uni12", "bfloat16"), Prefix()
    prompt = greedy_text("uni12")[:21]
    run(a, prompt, prefix, None, 9)
    longer = [*prompt, 5, 6]  # on the first pair all of the prompt would be known
    warm, stats = run(b, longer, prefix, None, 9)
    assert stats.reused_tokens == 0 and warm == run(b, longer, None, None, 9)[0]
