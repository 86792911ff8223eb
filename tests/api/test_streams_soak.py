"""Ten thousand requests join an engine and leave it, from several threads: each has the text of
`generate` as far as it comes, and memory is level.

The soak: ``pytest -s tests/api/test_streams_soak.py -m soak`` (``SOAK_REQUESTS`` for more).
"""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from knowing import tiny
from tiny_pairs import greedy_text

from pyengine import Engine, Request, Sampling, generate
from pyengine.model import plan

CLIENTS, LAPS, SEQUENCES, MOST = 8, 20, 4, 24  # MOST: tokens of a text
TEXT = greedy_text("dense31")
# Of a few tokens, of whole pages, past some; those of one length begin alike
PROMPTS = [(TEXT * 2)[:n] for n in (3, 20, 64, 65, 130)] + [[7, *TEXT[:n]] for n in (9, 63, 100)]
KINDS = ("whole", "whole", "cut", "cancelled", "left", "two of one prompt")


def settings(number: int) -> dict[str, Any]:
    """Of few forms, so that few graphs are recorded."""
    rule = ("residual", "coupled")[number % 2]
    sampling = Sampling(1.0 + 0.1 * number, seed=number, top_k=8, verify=rule)
    return {"sampling": sampling, "block_size": 1 + 2 * (number % 3 > 0)}


def client(engine: Engine, known: list[list[int]], seed: int, count: int) -> Counter[str]:
    """So many requests; what became of them, by kind."""
    rng, did = random.Random(seed), Counter[str]()
    while did.total() < count:
        number, kind = rng.randrange(len(PROMPTS)), rng.choice(KINDS)
        most = rng.randrange(1, MOST) if kind == "cut" else MOST
        ask = {**settings(number), "max_tokens": most, "n": 2 if kind.startswith("two") else 1}
        requests = engine.submit(PROMPTS[number], **ask)
        if len(requests) == 2:
            requests[rng.randrange(2)].cancel()
        for request in requests:
            did[end(request, kind, rng)] += 1
        tokens = requests[0].result.tokens
        assert tokens == known[number][: len(tokens)], (seed, number, kind)
        assert kind not in ("whole", "cut") or len(tokens) == most
    return did


def end(request: Request, kind: str, rng: random.Random) -> str:
    """Hear a request to its end, or less; the kind of its end."""
    if kind == "left":
        with request:
            next(request, None)
    elif kind == "cancelled":  # while it waits, amid its prompt, amid its text
        for _ in zip(range(rng.randrange(6)), request.steps(), strict=False):
            continue
        request.cancel()
    else:
        for _ in request:
            continue
    return kind


def resident() -> int:
    """Bytes of memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_joins_and_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK", 32)
    wanted, did, sizes = int(os.environ.get("SOAK_REQUESTS", "10000")), Counter[str](), []
    pair = tiny("dense31", "bfloat16-q8")
    known = [
        generate(prompt, pair=pair, max_tokens=MOST, **settings(number)).tokens
        for number, prompt in enumerate(PROMPTS)
    ]
    memory = 5 * pair.target.prompt_bytes(len(PROMPTS[4]) + MOST, 3, 3)
    with Engine(pair, sequences=SEQUENCES, cache_bytes=memory) as engine:
        arena = engine._arena
        engine.start()
        count = -(-wanted // (CLIENTS * LAPS))
        for lap in range(LAPS):
            with ThreadPoolExecutor(CLIENTS) as clients:
                seeds = range(lap * CLIENTS, (lap + 1) * CLIENTS)
                for each in clients.map(lambda s: client(engine, known, s, count), seeds):
                    did.update(each)
            while engine.step():
                continue
            assert engine.active == engine.waiting == 0
            assert arena.held_bytes == engine._known.nbytes <= arena.nbytes
            assert len(engine._rounds._recorded) <= 16
            gc.collect()
            sizes.append((resident(), mx.get_active_memory(), arena.nbytes))
    assert arena.nbytes == 0 and did.total() >= wanted
    print(f"{dict(did)}; bytes resident, of arrays, of the arena by lap: {sizes}")
    for kind in range(3):
        early = max(row[kind] for row in sizes[LAPS // 4 : LAPS // 2])
        late = max(row[kind] for row in sizes[LAPS // 2 :])
        assert late - early < 8 << 20, (kind, sizes)
    assert max(size for *_, size in sizes) <= memory, sizes
