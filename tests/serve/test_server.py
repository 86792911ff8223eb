"""The server with the official openai client: over a real socket, on the embedded pair."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
openai = pytest.importorskip("openai", reason="needs the openai client")

import httpx
import numpy as np
import serving
from reading import read_request
from serving import asking, command
from text_fakes import script_pair, write_tokenizers
from typer.testing import CliRunner

from pyengine import cli
from pyengine.checkpoint.pair import Pair, load
from pyengine.generation import generate
from pyengine.sampling.sampler import Logprob
from pyengine.sampling.settings import Sampling
from pyengine.serve.protocols.ask import Limits
from pyengine.serve.protocols.completions import CompletionReply
from pyengine.serve.server import make_app
from pyengine.task import Step
from pyengine.text.tokenizer import load_tokenizer

GAME = [{"role": "user", "content": "Create a single-file HTML5 canvas Snake game."}]
DEEP = json.loads("[" * 80 + "]" * 80)
EMPTY = SimpleNamespace(token_logprobs=[])
LIMITS = Limits(streams=1, waiting=2, body_bytes=20_000, max_tokens=400, any_model=True)


class Server(serving.Server):
    """With the official client."""

    def __init__(self, pair: Any, limits: Limits = LIMITS) -> None:
        super().__init__(pair, limits)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load()


@pytest.fixture(scope="module")
def server(pair: Pair) -> Iterator[Server]:
    made = Server(pair)
    yield made
    made.stop()


def test_chat_completion_is_what_generate_gives(server: Server, pair: Pair) -> None:
    for settings in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}):
        want = generate(
            GAME,
            pair=pair,
            max_tokens=30,
            sampling=Sampling(**settings, verify="coupled"),
            block_size=4,
        )
        said = server.client.chat.completions.create(
            model="any",
            messages=GAME,
            max_tokens=30,
            extra_body={"block_size": 4},
            **settings,
        )
        assert said.choices[0].message.content == want.text
        assert said.choices[0].message.role == "assistant"
        assert said.choices[0].finish_reason == want.finish_reason == "length"
        assert said.usage.prompt_tokens == want.stats.prompt_tokens
        assert said.usage.completion_tokens == 30
        assert said.usage.total_tokens == want.stats.prompt_tokens + 30
        extra = said.usage.model_extra
        assert extra["acceptance"] == want.stats.acceptance > 0
    # The same prompt again is not processed again
    assert said.usage.prompt_tokens_details.cached_tokens >= want.stats.prompt_tokens - 1


def test_streams_are_the_same_text(server: Server, pair: Pair) -> None:
    want = generate(GAME, pair=pair, max_tokens=40, sampling=Sampling(temperature=0.0))
    chunks = list(
        server.client.chat.completions.create(
            model="any",
            messages=GAME,
            max_tokens=40,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(texts) == want.text and len([t for t in texts if t]) > 3
    # Where there are no thoughts nothing is said of them
    assert not any(c.choices[0].delta.model_extra for c in chunks if c.choices)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 40
    assert len({c.id for c in chunks}) == 1


def test_text_completions_stop_echo_and_ids(server: Server, pair: Pair) -> None:
    prompt, ask = "import os\nimport sys\n", {"model": "any", "max_tokens": 40, "temperature": 0}
    want = generate(prompt, pair=pair, raw=True, max_tokens=40, sampling=Sampling(temperature=0.0))
    said = server.client.completions.create(prompt=prompt, **ask)
    assert said.choices[0].text == want.text and said.object == "text_completion"
    assert (
        server.client.completions.create(prompt=prompt, echo=True, **ask).choices[0].text
        == prompt + want.text
    )
    ids = pair.tokenizer.encode(prompt, bos=True)
    assert server.client.completions.create(prompt=ids, **ask).choices[0].text == want.text
    stop = want.text[5:9]
    said = server.client.completions.create(prompt=prompt, stop=[stop], **ask)
    assert said.choices[0].text == want.text[: want.text.index(stop)]
    assert said.choices[0].finish_reason == "stop"
    pieces = list(server.client.completions.create(prompt=prompt, stream=True, **ask))
    assert "".join(piece.choices[0].text for piece in pieces) == want.text


def test_logprobs_penalties_and_bias(server: Server, pair: Pair) -> None:
    ask: dict[str, Any] = {"model": "any", "max_tokens": 12, "temperature": 0}
    settings = Sampling(temperature=0.0, logprobs=2)
    want = generate(GAME, pair=pair, max_tokens=12, sampling=settings)
    assert want.logprobs is not None
    said = server.client.chat.completions.create(
        messages=GAME, logprobs=True, top_logprobs=2, **ask
    )
    rows = said.choices[0].logprobs.content
    assert [row.logprob for row in rows] == [row.logprob for row in want.logprobs]
    assert "".join(row.token for row in rows) == want.text
    assert [len(row.top_logprobs) for row in rows] == [2] * 12
    assert rows[0].top_logprobs[0].logprob == rows[0].logprob  # greedy
    said = server.client.completions.create(prompt="import os", logprobs=1, **ask)
    assert len(said.choices[0].logprobs.token_logprobs) == 12
    # A bias that forbids the first token, and a penalty that changes the text
    first = want.tokens[0]
    biased = server.client.chat.completions.create(
        messages=GAME, logit_bias={str(first): -100}, **ask
    )
    assert not want.text.startswith(biased.choices[0].message.content[:3])
    for name, value in (("presence_penalty", 2.0), ("frequency_penalty", 2.0)):
        settings = Sampling(temperature=0.0, **{name: value})
        other = generate(GAME, pair=pair, max_tokens=60, sampling=settings)
        said = server.client.chat.completions.create(
            messages=GAME, **{**ask, name: value, "max_tokens": 60}
        )
        assert said.choices[0].message.content == other.text


def rows_of(chunks: Any) -> list[Any]:
    """The log-probabilities of a stream, put together."""
    return [r for c in chunks for x in c.choices if x.logprobs for r in x.logprobs.content]


@pytest.mark.parametrize("stop", [None, "<head>", "never said"])
def test_streamed_logprobs_are_those_of_the_whole(server: Server, stop: str | None) -> None:
    """A chunk's rows are of the tokens that made its text, and all together are the whole's."""
    ask: dict[str, Any] = {"model": "any", "messages": GAME, "max_tokens": 60, "temperature": 0}
    ask |= {"logprobs": True, "top_logprobs": 2, "stop": stop}
    whole = server.client.chat.completions.create(**ask)
    chunks = list(server.client.chat.completions.create(stream=True, **ask))
    assert whole.choices[0].finish_reason == ("stop" if stop == "<head>" else "length")
    assert rows_of(chunks) == whole.choices[0].logprobs.content
    assert len(rows_of(chunks)) == whole.usage.completion_tokens
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (
        whole.choices[0].message.content
    )
    if stop is None:
        for chunk in chunks:
            rows = rows_of([chunk])
            assert "".join(row.token for row in rows) == (chunk.choices[0].delta.content or "")
    # As the client puts them together
    with server.client.chat.completions.stream(**ask) as together:
        for _ in together:
            pass
        message = together.current_completion_snapshot.choices[0]
    assert message.message.role == "assistant"
    assert message.message.content == whole.choices[0].message.content
    assert message.logprobs.content == whole.choices[0].logprobs.content


def test_text_logprobs_and_their_offsets(server: Server, pair: Pair) -> None:
    ask: dict[str, Any] = {"model": "any", "prompt": "import os\n", "temperature": 0}
    ask |= {"max_tokens": 20, "logprobs": 2}
    whole = server.client.completions.create(**ask).choices[0]
    chunks = list(server.client.completions.create(stream=True, **ask))
    settings = Sampling(temperature=0.0, logprobs=2)
    want = generate("import os\n", pair=pair, raw=True, max_tokens=20, sampling=settings)
    assert whole.logprobs.token_logprobs == [row.logprob for row in want.logprobs or ()]
    for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        parts = [getattr(c.choices[0].logprobs, field) for c in chunks if c.choices[0].logprobs]
        assert [x for part in parts for x in part] == getattr(whole.logprobs, field), field
    ends = [*whole.logprobs.text_offset[1:], len(whole.text)]
    for token, start, end in zip(
        whole.logprobs.tokens, whole.logprobs.text_offset, ends, strict=True
    ):
        assert whole.text[start:end] == token
    for best in whole.logprobs.top_logprobs:
        assert list(best.values()) == sorted(best.values(), reverse=True) and len(best) == 2


def test_echo_with_logprobs_scores_the_prompt(server: Server, pair: Pair) -> None:
    prompt = "import os\nimport sys\nprint(caf\u00e9 \U0001f642)\n"
    ids = pair.tokenizer.encode(prompt, bos=True)
    rows = np.array(pair.logits(ids)[:-1]).astype(np.float64)
    logprobs = rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
    want = logprobs[np.arange(len(ids) - 1), ids[1:]]
    ask: dict[str, Any] = {"model": "any", "temperature": 0, "echo": True, "logprobs": 1}
    given = server.client.completions.create(prompt=prompt, max_tokens=3, **ask).choices[0]
    alone = server.client.completions.create(
        prompt=prompt, max_tokens=3, temperature=0, model="any", logprobs=1
    ).choices[0]
    assert given.text == prompt + alone.text
    got = given.logprobs
    assert len(got.tokens) == len(ids) - 1 + 3 == len(got.text_offset) == len(got.top_logprobs)
    assert np.allclose(got.token_logprobs[:-3], want, atol=1e-4)
    assert got.token_logprobs[-3:] == alone.logprobs.token_logprobs
    for place, best in enumerate(got.top_logprobs[:-3]):
        assert best[got.tokens[place]] == got.token_logprobs[place] and len(best) <= 2
        assert np.isclose(max(best.values()), logprobs[place].max(), atol=1e-4)
    assert [o + len(prompt) for o in alone.logprobs.text_offset] == got.text_offset[-3:]
    assert got.text_offset[0] == 0 and prompt[: got.text_offset[1]] == got.tokens[0]
    # Token ids are taken as they are, also alone in a list; the first of all has no probability
    for ids_given in (ids, [ids]):
        said = server.client.completions.create(prompt=ids_given, max_tokens=0, **ask)
        scored = said.choices[0]
        assert scored.text == prompt and scored.finish_reason == "length"
        assert scored.logprobs.token_logprobs[0] is scored.logprobs.top_logprobs[0] is None
        assert scored.logprobs.tokens[0] == "<bos>"
        assert np.allclose(scored.logprobs.token_logprobs[1:], want, atol=1e-4)
        assert (said.usage.prompt_tokens, said.usage.completion_tokens) == (len(ids), 0)
    # Streamed: the prompt comes first, as one piece
    chunks = list(server.client.completions.create(prompt=prompt, max_tokens=3, stream=True, **ask))
    assert chunks[0].choices[0].text == prompt
    rows = [x for c in chunks for x in (c.choices[0].logprobs or EMPTY).token_logprobs]
    assert rows == got.token_logprobs
    assert "".join(c.choices[0].text for c in chunks) == given.text
    # Without log-probabilities nothing is computed for an echo alone
    said = server.client.completions.create(
        model="any", prompt=ids, echo=True, max_tokens=0, temperature=0
    )
    assert said.choices[0].text == prompt and said.choices[0].logprobs is None


def test_how_tokens_are_told(tmp_path: Path) -> None:
    """Half a character is told by its bytes; of two tokens spelled alike the best counts."""
    write_tokenizers(tmp_path)
    tok = load_tokenizer(tmp_path)
    text = "caf\u00e9 \U0001f642"
    server = Server(script_pair(tok, text))
    ask: dict[str, Any] = {"model": "any", "temperature": 0}
    try:
        said = server.client.chat.completions.create(
            messages=GAME, logprobs=True, top_logprobs=2, **ask
        ).choices[0]
        *rows, last = said.logprobs.content
        assert bytes(b for row in rows for b in row.bytes).decode() == text == said.message.content
        assert "bytes:\\xf0" in [row.token for row in rows] and last.token == "<turn|>"
        assert bytes(last.bytes) == b"<turn|>"
        rows = server.client.completions.create(prompt="fox", logprobs=1, **ask).choices[0].logprobs
        at = rows.tokens.index("bytes:\\x9f")  # within the character nothing is certain
        assert rows.text_offset[at - 1 : at + 4] == [5, 5, 5, 5, 6]
    finally:
        server.stop()
    a, byte = tok.id_of("a"), tok.id_of("<0x61>")
    assert a is not None and byte is not None and tok.spelling(a) == tok.spelling(byte) == "a"
    ask = {"prompt": "fox", "logprobs": 2}
    reply = CompletionReply(read_request(script_pair(tok, "a"), ask, LIMITS, chat=False))
    step = Step("a", "", [a], [Logprob(a, -1.0, [(a, -1.0), (byte, -2.0)])])
    (chunk,) = reply.chunks(0, step)
    assert chunk["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -1.0}]


def test_seeds(server: Server) -> None:
    """A seed gives its text; without one, another text each time, whose seed the usage tells."""
    ask: dict[str, Any] = {"model": "any", "messages": GAME, "max_tokens": 40, "temperature": 5}

    def text(**kw: Any) -> tuple[str, int]:
        said = server.client.chat.completions.create(**ask, top_p=1, extra_body={"top_k": 0}, **kw)
        return said.choices[0].message.content, said.usage.model_extra["seed"]

    assert text(seed=3) == text(seed=3) == (text(seed=3)[0], 3)
    first, second = text(), text()
    assert first[0] != second[0] and first[1] != second[1]
    assert text(seed=first[1]) == first


def test_models_and_health(server: Server, pair: Pair) -> None:
    (row,) = server.client.models.list()
    told = {"id": pair.name, "object": "model", "created": 0, "owned_by": "pyengine"}
    assert row.to_dict() == told
    health = httpx.get(server.url + "/health").json()
    assert {name: health[name] for name in ("status", "waiting", "running")} == {
        "status": "ok",
        "waiting": 0,
        "running": 0,
    }
    assert server.client.models.retrieve(pair.name) == row
    with pytest.raises(openai.NotFoundError, match=r"the model must be .* but got 'gpt'"):
        server.client.models.retrieve("gpt")
    for path, status in (("/docs", 404), ("/v1/chat/completions", 405)):
        answer = httpx.get(server.url + path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith(f"[serve] {path}: ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"messages": []}, "prompt must not be empty"),
        ({"messages": "hi"}, "messages must be a list of objects"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "must have a role of system"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "hold text only"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": 401}, "max_tokens must be at most 400 here"),
        ({"max_tokens": "9"}, "max_tokens must be a whole number but got a string"),
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"temperature": "hot"}, "temperature must be a number but got 'hot'"),
        ({"seed": -1}, "seed must be 0"),
        ({"seed": 1.5}, "seed must be a whole number but got 1.5"),
        ({"top_k": True}, "top_k must be a whole number but got True"),
        ({"logit_bias": {"x": 1}}, "logit_bias must name token ids but got 'x'"),
        ({"logprobs": 3}, "logprobs must be true or false but got 3"),
        ({"n": 0}, "n times the number of prompts must be 1 to 32 but got 0"),
        ({"n": 33}, "n times the number of prompts must be 1 to 32 but got 33"),
        ({"n": "2"}, "n must be a whole number but got a string"),
        ({"verify": "fast"}, "verify must be one of residual, block, coupled but got fast"),
        ({"stop": 5}, "stop must be a string or a list of strings"),
        ({"stop": [""]}, "stop must hold strings of text"),
        ({"stop": ["a"] * 17}, "stop must hold at most 16 strings"),
        ({"top_logprobs": 2}, "top_logprobs must go with logprobs"),
        (
            {"stream_options": {"include": 1}, "stream": True},
            "stream_options holds 'include', not known here",
        ),
        ({"block_size": 999}, "block_size must be 1 to 128"),
        ({"stream": "yes"}, "stream must be true or false but got a string"),
        ({"functions": []}, "'functions' is not known here"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs must be an object but got a list"),
        ({"chat_template_kwargs": {"messages": []}}, "variables must not be named messages"),
        ({"chat_template_kwargs": {"self": 1}}, "variables must not be named self"),
        ({"temperature": 10**400}, "temperature must be a number but got 1000"),
        ({"logit_bias": {"3": 10**400}}, "logit_bias must map token ids to numbers"),
        ({"logit_bias": {"3": 1e39}}, "logit_bias must be within 1e+09 of 0 but got 1e+39"),
        ({"max_tokens": 3.0}, "max_tokens must be a whole number but got 3.0"),
        ({"messages": [{**GAME[0], "x": DEEP}]}, "message 1 must be nested at most 64 deep"),
    ],
)
def test_what_is_wrong_is_said(server: Server, change: dict, message: str) -> None:
    for stream in (False, True):
        body = {"messages": GAME, "stream": stream, **change}
        answer = server.post(json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert message in error["message"] and error["type"] == "invalid_request_error"
        assert error["message"].startswith("[")


def test_bodies_that_are_no_request(server: Server) -> None:
    head = {"content-type": "application/json"}
    for content, status, message in (
        (b"{", 400, "must be JSON but is not"),
        (b"[" * 9999, 400, "nested too deeply"),
        (b"\xff\xfe", 400, "must be UTF-8 text"),
        (b"[]", 400, "must be a JSON object but got a list"),
        (b'{"messages": "' + b"x" * 30_000 + b'"}', 413, "must be at most 20000 bytes"),
    ):
        answer = server.post(content=content, headers=head)
        assert answer.status_code == status and message in answer.json()["error"]["message"]
    # What a web page could send without asking, and a name that leads here from elsewhere
    answer = server.post(content=b"{}", headers={"content-type": "text/plain"})
    assert answer.status_code == 415
    for host, status in (("evil.example", 400), ("localhost:80", 200), ("[::1]:80", 200)):
        answer = httpx.get(server.url + "/health", headers={"host": host})
        assert answer.status_code == status
        assert status == 200 or "must be this machine's loopback but got 'evil" in answer.text
    with pytest.raises(openai.BadRequestError, match="prompt must not be empty"):
        server.client.completions.create(model="any", prompt="")


# On a scripted pair, whose rounds are held and whose failures are known


@pytest.fixture
def scripted(tmp_path: Path) -> Any:
    write_tokenizers(tmp_path)
    return script_pair(load_tokenizer(tmp_path), "jumps over " * 200)


@pytest.fixture
def held(scripted: Any) -> Iterator[Server]:
    made = Server(scripted)
    yield made
    if isinstance(scripted.target.before_call, serving.Held):
        scripted.target.before_call.open.set()  # also where the test has failed
    made.stop()


LONG_ASK = {"max_tokens": 300, "block_size": 1}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(
    held: Server, scripted: Any, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """After the round under way, of 300, and the next request is served."""
    cut, rounds = serving.cuts(monkeypatch), serving.hold_rounds(scripted, passing=3)
    sock = held.raw(asking(stream=stream, **LONG_ASK))
    rounds.wait()
    if stream:
        serving.until(sock, b"data: ")
    sock.close()
    assert cut.wait(serving.LEFT_S)
    calls_of_the_first = rounds.calls
    rounds.open.set()
    assert held.post(json={"messages": GAME, **LONG_ASK, "max_tokens": 2}).status_code == 200
    assert calls_of_the_first == 4 and rounds.calls <= 4 + 2


def test_requests_wait_for_their_turn_and_too_many_are_refused(held: Server, scripted: Any) -> None:
    """One is served and two may wait; who came first is served first."""
    rounds, answers, asked = serving.hold_rounds(scripted), [], []
    prefill = scripted.target.prefill

    def noted(ids: list[int], *args: Any, **kwargs: Any) -> Any:
        asked.append(scripted.tokenizer.decode(ids).split()[1])
        return prefill(ids, *args, **kwargs)

    scripted.target.prefill = noted
    ask = {"messages": GAME, "max_tokens": 60, "block_size": 1}

    def post(word: str) -> None:
        said = [{"role": "user", "content": word}]
        answers.append(held.post(json={**ask, "messages": said}))

    threads = [threading.Thread(target=post, args=[word]) for word in ("fox", "dog", "lazy")]
    for number, thread in enumerate(threads):
        thread.start()
        held.counts(waiting=number)
    for _ in range(3):
        refused = held.post(json=ask)
        assert refused.status_code == 429
        assert "too many requests are waiting" in refused.json()["error"]["message"]
    assert not answers
    rounds.open.set()
    for thread in threads:
        thread.join(60)
    assert [answer.status_code for answer in answers] == [200] * 3
    assert asked == ["fox", "dog", "lazy"]
    texts = {answer.json()["choices"][0]["message"]["content"] for answer in answers}
    assert len(texts) == 1 and "jumps over" in texts.pop()


def test_failures_and_thoughts(tmp_path: Path) -> None:
    write_tokenizers(tmp_path)
    tok = load_tokenizer(tmp_path)
    script = tok.encode("<|channel>thought\nthe fox<channel|>jumps over")
    pair = script_pair(tok, script)
    server = Server(pair)
    try:
        said = server.client.chat.completions.create(model="any", messages=GAME)
        message = said.choices[0].message
        assert (message.content, message.model_extra["reasoning_content"]) == (
            "jumps over",
            "the fox",
        )
        chunks = server.client.chat.completions.create(model="any", messages=GAME, stream=True)
        deltas = [chunk.choices[0].delta for chunk in chunks]
        thoughts = [(d.model_extra or {}).get("reasoning_content") or "" for d in deltas]
        assert "".join(thoughts) == "the fox"
        assert "".join(d.content or "" for d in deltas) == "jumps over"

        calls = []

        def fail(rows: int) -> None:
            calls.append(rows)
            if len(calls) > len(script) - 2:
                raise KeyError("a secret of the machine")

        pair.target.before_call = fail
        calls += script
        answer = server.post(json={"messages": GAME})
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "[serve] the generation failed."
        # Once text has gone out, the stream itself says so
        calls.clear()
        text = server.post(json={"messages": GAME, "stream": True, "block_size": 1}).text
        last = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
        assert last[-1]["error"]["message"] == "[serve] the generation failed."
        pair.target.before_call = lambda rows: None
        assert server.post(json={"messages": GAME}).status_code == 200
    finally:
        server.stop()


def test_a_client_that_leaves_the_queue_gives_up_its_place(held: Server, scripted: Any) -> None:
    """Two may wait; two that wait and leave make room for two others."""
    rounds = serving.hold_rounds(scripted)
    busy = held.raw(asking(**LONG_ASK))
    held.counts(waiting=0)
    for _ in range(2):
        waiting = []
        for stream in (False, True):
            waiting.append(held.raw(asking(stream=stream, **LONG_ASK)))
            held.counts(waiting=len(waiting))
        assert held.post(json={"messages": GAME}).status_code == 429
        for left, sock in enumerate(waiting, 1):
            sock.close()
            held.counts(waiting=2 - left)
    rounds.open.set()
    assert serving.until(busy, b"usage").startswith(b"HTTP/1.1 200 ")
    busy.close()


def test_thoughts_come_while_the_model_thinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After five rounds of 300; and a client that leaves then ends them."""
    write_tokenizers(tmp_path)
    tok = load_tokenizer(tmp_path)
    pair = script_pair(tok, tok.encode("<|channel>thought\n" + "the fox " * 300))
    cut, rounds = serving.cuts(monkeypatch), serving.hold_rounds(pair, passing=12)
    server = Server(pair)
    ask = {"messages": GAME, **LONG_ASK, "stream": True}
    try:
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=ask, timeout=serving.LEFT_S) as answer:
            lines = (line for line in answer.iter_lines() if line)
            first = json.loads(next(lines)[6:])["choices"][0]["delta"]
            second = json.loads(next(lines)[6:])["choices"][0]["delta"]
            rounds.wait()
        assert first["role"] == "assistant" and "role" not in second
        assert "the fox".startswith(first["reasoning_content"].rstrip())
        assert cut.wait(serving.LEFT_S)
        rounds.open.set()
        assert server.post(json={"messages": GAME, "max_tokens": 1}).status_code == 200
        assert rounds.calls <= 13 + 2
    finally:
        rounds.open.set()
        server.stop()


def test_the_command_serves_until_ctrl_c() -> None:
    with command("--port", "0") as process:
        assert process.stderr is not None
        said = process.stderr.readline()
        assert re.match(r"pyengine-nano\S* at http://127\.0\.0\.1:[1-9]\d+/v1", said), said
        url = said.split()[2].rstrip(",;")
        with command("--port", url.split(":")[2].partition("/")[0]) as taken:
            _, err = taken.communicate(timeout=60)
        assert taken.returncode == 2 and err.count("\n") == 1
        assert re.match(r"pyengine: \[serve\] 127\.0\.0\.1 port \d+ must be free to", err)
        # Loopback only, unless told otherwise
        if sys.platform == "linux":
            assert {ip for ip, port in listening(process.pid)} == {"0100007F"}
        # An answer that would go on for a minute
        ask = {"messages": GAME, "max_tokens": 8000, "stream": True, "block_size": 1}
        ask["logit_bias"] = dict.fromkeys(load().generation.stop_ids, -100)
        with httpx.stream("POST", f"{url}/chat/completions", json=ask, timeout=60) as answer:
            lines = answer.iter_lines()  # kept: the client is still there
            next(lines)
            process.send_signal(signal.SIGINT)
            said = [json.loads(line[6:]) for line in lines if line.startswith("data: {")][-1]
            assert said["error"]["message"].startswith("[serve] the server is ending;")
            assert process.wait(timeout=20) == 130
        err = process.stderr.read()
        assert "Traceback" not in err and err.endswith("Interrupted.\n"), err


def test_a_client_that_leaves_while_it_asks(pair: Pair) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    asyncio.run(make_app(pair)({**scope, "query_string": b""}, receive, send))
    assert not sent  # nobody is there to be answered


def test_impatience_ends_the_command_too() -> None:
    """Ctrl-C twice and more: no trace, and what scripts read comes on standard output."""
    with command("--port", "0", "--json") as process:
        assert process.stdout is not None and process.stderr is not None
        said = json.loads(process.stdout.readline())
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/v1", said["url"])
        row = httpx.get(f"{said['url']}/models/{said['model']}", timeout=60).json()
        assert row["id"] == said["model"] == load().name
        for _ in range(3):
            process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
        err = process.stderr.read()
        assert "Traceback" not in err and process.returncode in (130, -signal.SIGINT), err


def listening(pid: int) -> set[tuple[str, str]]:
    """Addresses a process listens at, as the kernel writes them."""
    own = {os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir() if f.is_symlink()}
    tables = [Path(f"/proc/net/{name}").read_text() for name in ("tcp", "tcp6")]
    rows = [line.split() for table in tables for line in table.splitlines()]
    return {
        (row[1].split(":")[0], row[1].split(":")[1])
        for row in rows
        if row[3] == "0A" and f"socket:[{row[9]}]" in own
    }


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    whole = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else whole(name)
    )
    done = CliRunner().invoke(cli.app, ["serve"])
    assert done.exit_code == 1 and 'pip install "pyengine-mlx[serve]"' in done.stderr
    monkeypatch.undo()
    done = CliRunner().invoke(cli.app, ["serve", "--max-tokens", "0"])
    assert done.exit_code == 2 and "max_tokens must be at least 1" in done.stderr
