"""Many clients at once: each answer is what `generate` gives with the seed that the usage tells."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving import CHAT, GAME, LEFT_S, Server, hold

from pyengine.checkpoint import memory
from pyengine.checkpoint.pair import Pair, load
from pyengine.generation import generate
from pyengine.model.target import Target
from pyengine.serve.protocols.ask import Limits

QUESTIONS = ["Create a single-file HTML5 canvas Snake game.", "Write a Python function.", "Pong!"]
TEXTS = ["import os\n", "def fib(n):", "x = ["]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load()


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[Server]:
    with Server(pair, Limits(streams=4, waiting=40, any_model=True)) as made:
        yield made


def client_of(server: Server) -> Any:
    openai = pytest.importorskip("openai", reason="needs the openai client")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


def ask(server: Server, number: int) -> tuple[dict[str, Any], Any, str, list[dict[str, Any]]]:
    """A client: its settings, its prompt, its text, its usage; some leave before the end."""
    rng = random.Random(number)
    settings: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.7, 1.0]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.5]),
    }
    if rng.random() < 0.5:
        settings["seed"] = number
    block, limit = rng.choice([1, 2, 4, 6]), rng.randrange(4, 24)
    asked = {"model": "any", "max_tokens": limit, "extra_body": {"block_size": block}, **settings}
    said: dict[str, Any] = {"max_tokens": limit, "block_size": block, "sampling": settings}
    client, question = client_of(server), rng.choice(QUESTIONS)
    messages = [{"role": "user", "content": question}]
    if number % 4 == 0:  # who leaves
        asked["max_tokens"] = 300
        chunks = client.chat.completions.create(messages=messages, stream=True, **asked)
        text = "".join(next(chunks).choices[0].delta.content or "" for _ in range(3))
        chunks.close()
        return said, messages, text, []
    if number % 4 == 1:
        chunks = list(
            client.chat.completions.create(
                messages=messages, stream=True, stream_options={"include_usage": True}, **asked
            )
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        return said, messages, text, [chunks[-1].usage.to_dict()]
    whole = client.chat.completions.create(messages=messages, **asked)
    return said, messages, whole.choices[0].message.content, [whole.usage.to_dict()]


def test_sixteen_clients_get_what_they_would_alone(server: Server, pair: Pair) -> None:
    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda number: ask(server, number), range(16)))
    for said, messages, text, usages in answers:
        if not usages:
            continue
        [usage] = usages
        sampling = {**said.pop("sampling"), "seed": usage["seed"], "verify": "coupled"}
        alone = generate(messages, pair=pair, sampling=sampling, **said)
        assert text == alone.text
        assert usage["completion_tokens"] == len(alone.tokens)
        assert usage["accepted_tokens"] == alone.stats.accepted
    assert sum(bool(usages) for *_, usages in answers) == 12
    server.counts(waiting=0, running=0)


def test_the_block_size_does_not_change_an_answer(server: Server) -> None:
    client, texts = client_of(server), set()
    for block in (1, 3, 6):
        said = client.chat.completions.create(
            model="any", messages=GAME, max_tokens=30, seed=7, extra_body={"block_size": block}
        )
        texts.add(said.choices[0].message.content)
    assert len(texts) == 1


def test_a_rule_may_be_asked_for(server: Server, pair: Pair) -> None:
    said = server.post(json={"messages": GAME, "max_tokens": 20, "seed": 3, "verify": "block",
                             "block_size": 4}).json()  # fmt: skip
    want = generate(
        GAME, pair=pair, max_tokens=20, block_size=4, sampling={"seed": 3, "verify": "block"}
    )
    assert said["choices"][0]["message"]["content"] == want.text
    assert said["usage"]["accepted_tokens"] == want.stats.accepted


@pytest.mark.parametrize("stream", [False, True])
def test_several_texts_of_several_prompts(server: Server, pair: Pair, stream: bool) -> None:
    """Choices in the order of the prompts, those of one side by side; a seed each."""
    client = client_of(server)
    asked = {"model": "any", "max_tokens": 12, "seed": 5, "n": 2, "temperature": 1.5}
    if stream:
        texts = [""] * 6
        reasons: dict[int, str] = {}
        chunks = client.completions.create(
            prompt=TEXTS, stream=True, stream_options={"include_usage": True}, **asked
        )
        for chunk in chunks:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
                if choice.finish_reason:
                    assert choice.index not in reasons
                    reasons[choice.index] = choice.finish_reason
        usage = chunk.usage
        assert len(reasons) == 6
    else:
        said = client.completions.create(prompt=TEXTS, **asked)
        assert [choice.index for choice in said.choices] == list(range(6))
        texts, usage = [choice.text for choice in said.choices], said.usage
    sampling = {"verify": "coupled", "temperature": 1.5}
    want = [
        generate(text, pair=pair, raw=True, max_tokens=12, sampling={**sampling, "seed": seed})
        for text in TEXTS
        for seed in (5, 6)
    ]
    assert texts == [result.text for result in want]
    assert usage.completion_tokens == sum(len(result.tokens) for result in want)
    assert usage.prompt_tokens == sum(result.stats.prompt_tokens for result in want) // 2
    chat = client.chat.completions.create(messages=GAME, **{**asked, "n": 3})
    assert len({choice.message.content for choice in chat.choices}) == 3


def test_echoes_come_back_before_each_text(server: Server, pair: Pair) -> None:
    asked = {"prompt": TEXTS[:2], "echo": True, "temperature": 0, "max_tokens": 5}
    said = server.post("/v1/completions", json=asked).json()
    for text, choice in zip(TEXTS, said["choices"], strict=False):
        want = generate(text, pair=pair, raw=True, max_tokens=5, sampling={"temperature": 0})
        assert choice["text"] == text + want.text


def test_what_can_never_fit_is_refused_at_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a status of its own, though the answer would be a stream."""
    monkeypatch.setattr(memory, "free_bytes", lambda: pair.target.prompt_bytes(300, 8, 3))
    with Server(pair) as server:
        for stream in (False, True):
            body = {"messages": GAME, "max_tokens": 2000, "block_size": 4, "stream": stream}
            refused = server.post(json=body)
            assert refused.status_code == 400, refused.text
            assert " fit." in refused.json()["error"]["message"]
        assert server.post(json={"messages": GAME, "max_tokens": 2}).status_code == 200


def test_running_and_waiting_are_told(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at once, the others in line; who leaves the line is counted no more."""
    gate = hold(monkeypatch, Target, "prefill")
    with Server(pair, Limits(streams=2, waiting=5)) as server:
        body = json.dumps({"messages": GAME, "max_tokens": 2, "stream": True}).encode()
        socks = []
        for _ in range(4):
            socks.append(server.raw(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nhost: localhost\r\n"
                                    b"content-type: application/json\r\ncontent-length: "
                                    + str(len(body)).encode() + b"\r\n\r\n" + body))  # fmt: skip
            if len(socks) == 1:
                gate.wait()
        server.counts(waiting=3, running=1)  # the engine's thread is in the first one's prompt
        socks.pop().close()
        server.counts(waiting=2, running=1)
        gate.open.set()
        for sock in socks:
            sock.close()
        server.counts(waiting=0, running=0)


def test_a_client_that_does_not_read_holds_nobody_up(server: Server) -> None:
    """Its own text waits; the others' go on to their ends."""
    done = threading.Event()
    with httpx.stream(
        "POST",
        server.url + CHAT,
        json={"messages": GAME, "max_tokens": 2000, "stream": True, "logit_bias": {"1": -100}},
        timeout=60,
    ) as slow:
        lines = slow.iter_lines()
        next(lines)

        def others() -> None:
            for _ in range(4):
                assert server.post(json={"messages": GAME, "max_tokens": 20}).status_code == 200
            done.set()

        thread = threading.Thread(target=others)
        thread.start()
        assert done.wait(LEFT_S)
        thread.join()
