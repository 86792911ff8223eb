"""A long prompt: its client hears at once, and one that leaves ends it between two chunks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import CHAT, GAME, LEFT_S, Server, cuts, hold, request, until

from pyengine.checkpoint.pair import Pair, load
from pyengine.generation import generate
from pyengine.model.target import Target
from pyengine.sampling.settings import Sampling
from pyengine.serve.protocols.ask import Limits
from pyengine.serve.queue import Job

LONG = list(range(300, 900)) * 3  # token ids: four chunks


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load()


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[Server]:
    with Server(pair, Limits(keep_alive_s=0.05)) as made:
        yield made


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("echo", [False, True])
def test_a_client_that_leaves_ends_its_prompt(
    server: Server, monkeypatch: pytest.MonkeyPatch, stream: bool, echo: bool
) -> None:
    """After the chunk under way: the next request waits for no more of it."""
    cut = cuts(monkeypatch)
    body: dict[str, Any] = {"prompt": LONG, "stream": stream, "max_tokens": 5}
    if echo:  # scored in blocks of 16 rows, all of them by forward
        body |= {"echo": True, "logprobs": 1, "max_tokens": 0}
    gate = hold(monkeypatch, Target, "forward" if echo else "prefill")
    sock = server.raw(request(json.dumps(body).encode(), path="/v1/completions"))
    gate.wait()
    sock.close()
    assert cut.wait(LEFT_S)
    gate.open.set()
    answer = server.post(json={"messages": GAME, "max_tokens": 1})
    assert answer.status_code == 200
    calls_of_the_next = 0 if echo else 1
    assert gate.calls == 1 + calls_of_the_next


def test_a_stream_begins_before_its_prompt_is_read(
    server: Server, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers at once and comments while nothing comes; then the text as ever."""
    settings = {"max_tokens": 8, "temperature": 0}
    want = generate(LONG, pair=pair, max_tokens=8, sampling=Sampling(temperature=0.0)).text
    gate = hold(monkeypatch, Target, "prefill")
    url = f"{server.url}/v1/completions"
    body = {"prompt": LONG, "stream": True, **settings}
    with httpx.stream("POST", url, json=body, timeout=60) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        first = [next(lines) for _ in range(6)]
        assert first == [": keep-alive", ""] * 3 and gate.calls == 1
        gate.open.set()
        texts = [
            json.loads(line[6:])["choices"][0]["text"]
            for line in lines
            if line.startswith("data: {")
        ]
    assert "".join(texts) == want and gate.calls >= 2  # of an earlier test two chunks are known


def test_the_official_client_passes_over_comments(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    gate, silences, hear = hold(monkeypatch, Target, "prefill"), 0, Job.hear

    async def heard(job: Job, seconds: float | None) -> Any:
        nonlocal silences
        said = await hear(job, seconds)
        silences += said is None
        if silences == 3:  # which are three comments
            gate.open.set()
        return said

    monkeypatch.setattr(Job, "hear", heard)
    chunks = client.chat.completions.create(
        model=load().name, messages=GAME, max_tokens=5, stream=True
    )
    assert sum(bool(chunk.choices[0].delta.content) for chunk in chunks) > 0
    assert silences >= 3


def test_errors_before_the_queue_have_their_status_in_streams_too(server: Server) -> None:
    for body, status in (
        ({"messages": []}, 400),
        ({"messages": GAME, "model": "gpt"}, 404),
        ({"messages": GAME, "temperature": -1}, 400),
    ):
        assert server.post(json={**body, "stream": True}).status_code == status


def test_health_is_quick_while_a_prompt_is_read(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = hold(monkeypatch, Target, "prefill")
    sock = server.raw(request(json.dumps({"messages": GAME, "max_tokens": 1}).encode(), path=CHAT))
    gate.wait()
    said = server.health()
    assert (said["status"], said["waiting"], said["running"], said["texts"]) == ("ok", 0, 1, 1)
    gate.open.set()
    assert until(sock, b"usage").startswith(b"HTTP/1.1 200 ")
    sock.close()
