"""Reusing a cache past the sliding window: regenerate, edit, alternate, leave a prompt midway.

The text is always that of a cold start; the counts say what was not processed again.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Generator
from typing import Any

import mlx.core as mx
import pytest
from models import decode
from tiny_pairs import FLAVOURS, greedy_text, tiny_pair

from pyengine import ops
from pyengine.checkpoint.pair import Pair, load
from pyengine.engine.prefix import WINDOWS, Prefix
from pyengine.engine.sequence import Round
from pyengine.engine.stats import Stats
from pyengine.generation import generate
from pyengine.model import plan
from pyengine.model.cache import window_pages
from pyengine.sampling.settings import Sampling

BLOCK = 4
CHUNK = 16  # instead of 512: the tiny pairs' window is 8


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK", CHUNK)


def answer(
    pair: Pair, prompt: list[int], prefix: Prefix | None, seed: int = 0, count: int = 20
) -> tuple[list[int], int]:
    """New tokens, and how many of the prompt's were reused."""
    stats = Stats()
    rounds = run(pair, prompt, prefix, seed, count, stats)
    return [token for r in rounds for token in r.tokens], stats.reused_tokens


def run(
    pair: Pair,
    prompt: list[int],
    prefix: Prefix | None,
    seed: int = 0,
    count: int = 20,
    stats: Stats | None = None,
) -> Generator[Round, None, None]:
    sampling = Sampling(temperature=0.0) if seed == 0 else Sampling(seed=seed, top_k=8)
    return decode(
        pair.target,
        pair.assistant,
        prompt,
        sampling=sampling,
        block_size=BLOCK,
        max_tokens=count,
        stats=stats,
        prefix=prefix,
    )


def reused(pair: Pair, prefix: Prefix, prompts: list[list[int]]) -> list[int]:
    """Counts of a series of prompts, each with the text of a cold start."""
    found = []
    for seed, prompt in enumerate(prompts):
        warm, known = answer(pair, prompt, prefix, seed)
        assert warm == answer(pair, prompt, None, seed)[0], seed
        found.append(known)
    return found


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_regenerate_reuses_all_but_the_last_token(flavour: str) -> None:
    prompt = greedy_text(flavour)[:41]
    assert reused(tiny_pair(flavour), Prefix(), [prompt] * 4) == [0, 40, 40, 40]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_edited_last_turn_reuses_the_turns_before(flavour: str) -> None:
    """Also after the edit was answered, again and again, and in another order."""
    pair, prefix = tiny_pair(flavour), Prefix()
    first = greedy_text(flavour)[:41]
    said, _ = answer(pair, first, prefix)
    history = [*first, *said]
    turns = [[*history, 7, 100 + i, *range(20, 25 + i)] for i in range(4)]
    # The newest token of an answer is not processed by the time it ends; 7 is common to all turns
    known = len(history) - 1
    assert reused(pair, prefix, [turns[0]]) == [known]
    for prompt in (turns[1], turns[1], turns[2], turns[0]):
        warm, count = answer(pair, prompt, prefix, 3)
        assert warm == answer(pair, prompt, None, 3)[0]
        assert known <= count < len(prompt)


def test_an_edited_end_of_a_first_prompt_reuses_the_chunks_before_the_last() -> None:
    pair, prefix, text = tiny_pair("dense31"), Prefix(), greedy_text("dense31")
    edits = [[200 + i, *range(30, 50)] for i in range(3)]
    prompts = [[*text[:86], *edit] for edit in edits]  # the last chunk begins at 96
    assert reused(pair, prefix, prompts) == [0, 86, 86]
    prompts = [[*text[:98], *edit[:9]] for edit in edits]
    assert reused(pair, Prefix(), prompts) == [0, 98, 98]


def test_alternating_conversations_do_not_make_each_other_forget() -> None:
    """All but the newest token of an answer is there for the next turn of its conversation."""
    pair, prefix, text = tiny_pair("e2b"), Prefix(), greedy_text("e2b")
    a, b = ([*text[:50], start, *range(start, start + 40)] for start in (20, 120))
    counts, known = [], {0: 0, 1: 0}
    for turn in range(4):
        for which, prompt in enumerate((a, b)):
            warm, count = answer(pair, prompt, prefix, turn)
            assert warm == answer(pair, prompt, None, turn)[0]
            counts.append(count == known[which])
            known[which] = len(prompt) + len(warm) - 1
            longer = [*prompt, *warm, 9, 8, 7, 30 + turn]
            a, b = (longer, b) if which == 0 else (a, longer)
    assert counts[0] and all(counts[2:])


def test_going_on_from_a_mark_does_not_narrow_it() -> None:
    """A prompt that parts a little before the mark's end still begins there."""
    pair, prefix, text = tiny_pair("uni12"), Prefix(), greedy_text("uni12")[:40]
    (first, _), _ = answer(pair, text, prefix, count=2)
    other = [(first + 1) % 256, *range(20, 32)]
    prompts = [[*text, *other], [*text[:34], *other]]
    assert reused(pair, prefix, prompts) == [40, 34]


def test_the_embedded_pair_past_its_window() -> None:
    """As a user meets it: a long prompt, the same again, another question at its end."""
    pair, prefix = load(), Prefix()
    window = pair.target.config.window
    code = "\n".join(f"value_{i} = {i * i % 97}" for i in range(90))
    ids = pair.tokenizer.encode(code, bos=True)
    assert len(ids) > 2 * window
    for sampling, least in (({"temperature": 0}, 0), ({"seed": 5}, len(ids) - 1)):
        for _ in range(2):
            ask: dict[str, Any] = {"pair": pair, "max_tokens": 40, "sampling": sampling}
            warm = generate(ids, prefix=prefix, **ask)
            assert warm.tokens == generate(ids, **ask).tokens
            assert warm.stats.reused_tokens in (least, len(ids) - 1)
            least = len(ids) - 1


def left_between_chunks(pair: Pair, prompt: list[int], prefix: Prefix, chunks: int) -> int:
    """Begin on a prompt and leave it after so many chunks; returns what was said to be done."""
    rounds, done = run(pair, prompt, prefix), 0
    for _ in range(chunks):
        r = next(rounds)
        assert r.prompt_done is not None and not r.tokens
        done = r.prompt_done
    rounds.close()
    return done


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_prompt_left_between_chunks_goes_on_there(flavour: str) -> None:
    pair, prefix, text = tiny_pair(flavour), Prefix(), greedy_text(flavour)
    prompt = text[:75]
    assert left_between_chunks(pair, prompt, prefix, 3) == 3 * CHUNK
    assert prefix.tokens == prompt[: 3 * CHUNK]
    assert left_between_chunks(pair, prompt, prefix, 1) == 4 * CHUNK
    assert reused(pair, prefix, [prompt]) == [4 * CHUNK]


class Interrupts:
    """Ctrl-C at the n-th call of one of the model's functions, after it or in its place."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, n: int, after: bool):
        self.real, self.left, self.after = getattr(owner, name), n, after
        patch.setattr(owner, name, self)

    def __call__(self, *args: Any, **kw: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = self.real(*args, **kw)
        if self.left == 0:
            raise KeyboardInterrupt
        return result


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", [1, 2, 9, 25, 40])
def test_ctrl_c_inside_a_chunk_leaves_a_right_prefix(
    call: int, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a chunk some rings may have been written to, and others not."""
    pair, text = tiny_pair("dense31"), greedy_text("dense31")
    prefix, prompt = Prefix(), text[:75]
    with monkeypatch.context() as patch:
        Interrupts(patch, ops, "block_attention", call, after)
        with pytest.raises(KeyboardInterrupt):
            answer(pair, prompt, prefix)
    assert prompt[: len(prefix.tokens)] == prefix.tokens
    reused(pair, prefix, [prompt, prompt])


def test_ctrl_c_at_a_chunks_end_keeps_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Python hears of it: the chunk has been evaluated, nobody has counted it."""
    pair, text = tiny_pair("e2b"), greedy_text("e2b")
    prefix, prompt, evals = Prefix(), text[:75], []
    with monkeypatch.context() as patch:
        whole = mx.eval
        patch.setattr(mx, "eval", lambda *args: evals.append(1) or whole(*args))
        left_between_chunks(pair, prompt, Prefix(), 2)
    with monkeypatch.context() as patch:
        Interrupts(patch, mx, "eval", len(evals) + 1, after=True)
        with pytest.raises(KeyboardInterrupt):
            answer(pair, prompt, prefix)
    assert reused(pair, prefix, [prompt]) == [3 * CHUNK]


def test_random_histories_never_change_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns, edits, repeats, other conversations; left between chunks, cut off inside them."""
    rng = random.Random(1)
    for flavour in FLAVOURS:
        pair, prefix, text = tiny_pair(flavour), Prefix(), greedy_text(flavour)
        prompts, total = [text[:30], text[:90]], 0
        for step in range(18):
            old = rng.choice(prompts[-3:])
            kinds: list[Callable[[], list[int]]] = [
                lambda old=old: old,
                lambda old=old: [*old, *rng.choices(range(3, 255), k=rng.randint(1, 40))],
                lambda old=old: [*old[: rng.randint(1, len(old))], rng.randint(3, 255)],
            ]
            prompt = rng.choice(kinds)()[-150:]
            prompts.append(prompt)
            end = rng.randint(0, 3)
            if end == 0:
                rounds = run(pair, prompt, prefix, step)
                for _ in zip(range(rng.randint(1, 4)), rounds, strict=False):
                    pass
                rounds.close()
            elif end == 1:
                name, owner = rng.choice([("block_attention", ops), ("eval", mx)])
                with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                    Interrupts(patch, owner, name, rng.randint(1, 12), rng.random() < 0.5)
                    answer(pair, prompt, prefix, step)
            warm, known = answer(pair, prompt, prefix, step, rng.randint(1, 25))
            assert warm == answer(pair, prompt, None, step, len(warm))[0], (flavour, step)
            total += known
            prompts.append([*prompt, *warm])
        assert total > 300


def test_memory_is_twice_the_newest_texts_pages_and_four_windows() -> None:
    pair, prefix = tiny_pair("dense31"), Prefix()
    arena = pair.target.new_arena()
    full, sliding = (arena.page_bytes(kind) for kind in (False, True))
    for i in range(12):
        prompt = [i, *range(10, 150)]
        with prefix.in_use():
            said, _ = answer(pair, prompt, prefix)
        pages = -(-(len(prompt) + len(said)) // 64)
        windows = WINDOWS * window_pages(8, 1)
        assert 0 < prefix.nbytes <= 2 * pages * full + windows * sliding
    assert prefix.nbytes > pages * full
    prefix.forget()
    assert prefix.nbytes == 0
