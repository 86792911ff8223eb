"""Two threads on one loaded pair, and many rounds in one process.

The soak: ``pytest tests/engine/test_threads.py -m soak`` (some minutes; ``SOAK_ROUNDS`` for more).
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from models import decode
from tiny_pairs import FLAVOURS, greedy_text, tiny_pair

from pyengine.checkpoint.pair import load
from pyengine.engine.prefix import Prefix
from pyengine.generation import generate, stream
from pyengine.sampling.settings import Sampling

PROMPTS = (
    "Create a single-file HTML5 canvas Flappy Bird game.",
    "Write a Python function that adds two numbers.",
)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Results of calls that start at the same moment, each in a thread of its own."""
    results: list[Any] = [None] * len(calls)
    start = threading.Barrier(len(calls))

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = calls[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def test_two_threads_give_the_text_each_gives_alone() -> None:
    pair = load()

    def answer(prompt: str, seed: int) -> tuple[str, list[int]]:
        result = generate(
            prompt, pair=pair, max_tokens=50, sampling=Sampling(seed=seed), block_size=4
        )
        return result.text, result.tokens

    alone = [answer(prompt, seed) for seed, prompt in enumerate(PROMPTS)]
    assert alone[0] != alone[1]
    for _ in range(3):
        calls = [lambda p=p, s=s: answer(p, s) for s, p in enumerate(PROMPTS)]
        assert together(*calls) == alone


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_pair_loaded_in_one_thread_runs_in_another(flavour: str) -> None:
    """Also the parts a model makes of its weights: nothing lazy may stay behind."""
    pair = tiny_pair.__wrapped__(flavour, "bfloat16-q8")  # a new one, that has run in no thread
    prompt = greedy_text(flavour)[:21]

    def text() -> list[int]:
        rounds = decode(
            pair.target,
            pair.assistant,
            prompt,
            sampling=Sampling(temperature=0.0),
            block_size=4,
            max_tokens=12,
        )
        return [token for r in rounds for token in r.tokens]

    assert together(text, text) == [text(), text()]


def test_a_prefix_may_move_between_threads() -> None:
    pair, prefix = load(), Prefix()
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 20, "sampling": Sampling(seed=3)}
    cold = generate(PROMPTS[0], **ask)
    warm = together(lambda: generate(PROMPTS[0], prefix=prefix, **ask))[0]
    again = together(lambda: generate(PROMPTS[0], prefix=prefix, **ask))[0]
    assert warm.tokens == again.tokens == cold.tokens and again.stats.reused_tokens > 10


def resident() -> int:
    """Bytes of memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_does_not_grow_over_thousands_of_rounds() -> None:
    """Generations of every kind over and over: ended, stopped, left, with and without a prefix."""
    pair, prefix = tiny_pair("dense31", "bfloat16-q8"), Prefix()
    embedded = load()
    wanted, rounds, seed, sizes = int(os.environ.get("SOAK_ROUNDS", "6000")), 0, 0, []

    def once() -> int:
        count = 0
        prompt = greedy_text("dense31")[: 5 + seed % 40]
        for _ in decode(
            pair.target,
            pair.assistant,
            prompt,
            sampling=Sampling(seed=seed),
            block_size=2 + seed % 6,
            max_tokens=60,
            prefix=prefix if seed % 2 else None,
        ):
            count += 1
            if seed % 5 == 0 and count == 7:
                break
        with stream(PROMPTS[seed % 2], pair=embedded, max_tokens=24, stop="html") as running:
            for _ in running:
                count += 1
        return count

    while rounds < wanted:
        rounds += once()
        seed += 1
        if seed % 10 == 0:
            gc.collect()
            sizes.append((rounds, resident(), mx.get_active_memory()))
    half = len(sizes) // 2
    early = max(size for _, size, _ in sizes[half // 2 : half])
    late = max(size for _, size, _ in sizes[half:])
    active = {memory for _, _, memory in sizes[half:]}
    print(f"{rounds} rounds, resident {early / 1e6:.1f} MB, then {late / 1e6:.1f} MB")
    assert late - early < 8 << 20, sizes
    assert max(active) - min(active) < 8 << 20, sizes
