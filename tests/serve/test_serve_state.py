"""State between requests: what one leaves in the server's prefix is never seen in another's."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import CHAT, Server

from pyengine.checkpoint.pair import Pair, load
from pyengine.engine.score import prompt_logprobs
from pyengine.generation import generate

QUESTIONS = ["Create a single-file HTML5 canvas Snake game.", "Write a Python function.", "Pong!"]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9},
    {"temperature": 0, "presence_penalty": 2.0},
    {"temperature": 2.0, "seed": 6, "logit_bias": {"300": 3.0}},
]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load()


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[Server]:
    with Server(pair) as made:
        yield made


def leave(server: Server, body: dict[str, Any], events: int) -> None:
    """Ask for a stream and go after so many of its events."""
    with httpx.stream("POST", server.url + CHAT, json={**body, "stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line)
        for _, _ in zip(range(events), lines, strict=False):
            pass


@pytest.mark.parametrize("seed", [0, 1])
def test_requests_in_any_order_are_answered_as_if_alone(
    server: Server, pair: Pair, seed: int
) -> None:
    """Conversations that go on or begin anew, answers that end early in any way, clients that
    leave, echoes; settings and blocks that change."""
    rng = random.Random(seed)
    talks: list[list[dict[str, str]]] = [[{"role": "user", "content": q}] for q in QUESTIONS]
    cached = 0
    for step in range(14):
        talk = rng.choice(talks)
        settings = rng.choice(SETTINGS)
        limit, block = rng.randint(1, 30), rng.choice([1, 2, 4, 9])
        body: dict[str, Any] = {"messages": talk, "max_tokens": limit, "block_size": block}
        body |= settings
        kind = rng.choice(["whole", "stop", "leave", "echo"])
        if kind == "echo":
            ids = pair.tokenizer.encode_chat(talk)[: rng.randint(2, 40)]
            ask = {"prompt": ids, "echo": True, "logprobs": 0, "max_tokens": 0}
            said = server.post("/v1/completions", json=ask).json()["choices"][0]
            want = [None, *(row.logprob for row in prompt_logprobs(pair, ids, 0))]
            assert said["logprobs"]["token_logprobs"] == want
            continue
        if kind == "leave":
            leave(server, {**body, "max_tokens": 200}, rng.randint(1, 6))
        stop = rng.choice([["e"], ["<"], [" a", "\n"]]) if kind == "stop" else []
        given = {**settings, "logit_bias": {300: 3.0}} if "logit_bias" in settings else settings
        settings_given = {"verify": "coupled", **given}
        cold = generate(
            talk, pair=pair, max_tokens=limit, block_size=block, stop=stop, sampling=settings_given
        )
        answer = server.post(json={**body, "stop": stop}).json()
        choice, usage = answer["choices"][0], answer["usage"]
        assert choice["message"]["content"] == cold.text, (step, kind)
        assert choice["finish_reason"] == cold.finish_reason
        assert usage["completion_tokens"] == len(cold.tokens)
        assert usage["drafted_tokens"] == cold.stats.drafted
        assert usage["accepted_tokens"] == cold.stats.accepted
        cached += usage["prompt_tokens_details"]["cached_tokens"]
        if rng.random() < 0.5 and cold.text:
            talk += [
                {"role": "assistant", "content": cold.text},
                {"role": "user", "content": rng.choice(QUESTIONS)},
            ]
    assert cached > 50
    assert json.loads(httpx.get(f"{server.url}/health").text)["running"] == 0


def test_what_a_request_left_is_known_to_the_next(server: Server, pair: Pair) -> None:
    """The prompt, and the answer but its newest token, however it ended."""
    for stop, limit in ((None, 12), ("<", 40)):
        talk = [{"role": "user", "content": f"A game of {limit} parts."}]
        body = {"temperature": 0, "max_tokens": limit, "stop": stop, "block_size": 4}
        first = server.post(json={"messages": talk, **body}).json()
        again = server.post(json={"messages": talk, **body}).json()
        prompt = first["usage"]["prompt_tokens"]
        assert again["choices"] == first["choices"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == prompt - 1
