"""64 clients at once: some leave, some are slow, some send rubbish. Every answer is `generate`'s,
every refusal a documented one, and memory is level.

The soak: ``pytest -s tests/serve/test_serve_soak.py -m soak`` (``SOAK_LAPS`` for more).
"""

from __future__ import annotations

import gc
import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from serving import CHAT, Server, request

from pyengine.checkpoint.pair import Pair, load
from pyengine.generation import generate
from pyengine.serve.protocols.ask import Limits

CLIENTS, ASKS = 64, 2  # of each client in a lap
QUESTIONS = ["Create a single-file HTML5 canvas Snake game.", "Write a Python function.", "Pong!"]
RUBBISH: list[tuple[bytes, int]] = [
    (request(b"{"), 400),
    (request(b"\xff\xfe"), 400),
    (request(b"[]"), 400),
    (request(b'{"messages": 7}'), 400),
    (request(b'{"messages": [], "max_tokens": -1}'), 400),
    (request(b"{}", path="/v1/nowhere"), 404),
    (request(b"{}", host="evil.example"), 400),
    (b"\x16\x03\x01\x02\x00\r\n\r\n", 400),
]


def asks(pair: Pair) -> list[tuple[dict[str, Any], str]]:
    """Requests, and what each is alone."""
    rng, made = random.Random(0), []
    for seed in range(24):
        settings = {"temperature": rng.choice([0.0, 0.7, 1.0]), "seed": seed}
        messages = [{"role": "user", "content": QUESTIONS[seed % 3] + " Please." * (seed % 4)}]
        limits = {"max_tokens": rng.randrange(4, 24), "block_size": rng.choice([1, 2, 4, 6])}
        alone = generate(messages, pair=pair, sampling={**settings, "verify": "coupled"}, **limits)
        made.append(({"messages": messages, **settings, **limits}, alone.text))
    return made


def client(server: Server, known: list[tuple[dict[str, Any], str]], seed: int) -> list[str]:
    """The kinds of what it did; it fails where an answer is not as it must be."""
    rng, did = random.Random(seed), []
    for _ in range(ASKS):
        body, text = rng.choice(known)
        kind = rng.choice(["whole", "whole", "streamed", "slow", "leaves", "rubbish", "half"])
        did.append(kind)
        if kind == "whole":
            said = server.post(json=body)
            assert said.status_code == 200, said.text
            assert said.json()["choices"][0]["message"]["content"] == text
        elif kind in ("streamed", "slow"):
            assert streamed(server, body, kind == "slow") == text
        elif kind == "leaves":
            ask = {**body, "max_tokens": 300, "stream": True}
            with httpx.stream("POST", server.url + CHAT, json=ask, timeout=300) as answer:
                for _, line in zip(range(rng.randrange(1, 6)), answer.iter_lines(), strict=False):
                    assert line == "" or line.startswith(("data: ", ":"))
        elif kind == "rubbish":
            data, status = rng.choice(RUBBISH)
            with server.raw(data) as sock:
                assert sock.recv(12) == f"HTTP/1.1 {status}".encode()
        else:  # goes amid its request
            server.raw(request(json.dumps(body).encode())[: rng.randrange(1, 200)]).close()
    return did


def streamed(server: Server, body: dict[str, Any], slow: bool) -> str:
    """The text; one who is slow asks for another's figures between any two lines."""
    text = ""
    ask = {**body, "stream": True}
    with httpx.stream("POST", server.url + CHAT, json=ask, timeout=300) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if slow:
                server.health()
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    return text


def resident() -> int:
    """Bytes of memory this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_64_clients_at_once() -> None:
    pair, laps = load(), int(os.environ.get("SOAK_LAPS", "10"))
    known, did, sizes = asks(pair), Counter[str](), []
    with Server(pair, Limits(streams=8, waiting=CLIENTS)) as server:
        for lap in range(laps):
            with ThreadPoolExecutor(CLIENTS) as clients:
                seeds = range(lap * CLIENTS, (lap + 1) * CLIENTS)
                for each in clients.map(lambda seed: client(server, known, seed), seeds):
                    did.update(each)
            server.counts(waiting=0, running=0)
            told = httpx.get(server.url + "/metrics").text
            assert 'pyengine_requests_total{outcome="failed"} 0.0' in told, told
            gc.collect()
            sizes.append((resident(), mx.get_active_memory()))
    half = laps // 2
    early = max(size for size, _ in sizes[half // 2 : half])
    late = max(size for size, _ in sizes[half:])
    active = {memory for _, memory in sizes[half:]}
    print(f"{did}, resident {early / 1e6:.1f} MB, then {late / 1e6:.1f} MB; {sizes}")
    assert late - early < 8 << 20, sizes
    assert max(active) - min(active) < 8 << 20, sizes
