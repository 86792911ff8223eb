"""Where an answer of the server ends: text, reason, usage and log-probabilities, whole and
streamed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Server
from speaker import LETTERS, by_rule, letter, logprob, speaking
from text_fakes import write_tokenizers

from pyengine.sampling.sampler import Logprob
from pyengine.serve.protocols.ask import Limits
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

PROMPT = [5, 6, 7]
LINE = re.compile(r"\S+ POST (\S+) 200 (\d+)\+(\d+) tokens .*")


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def server(tok: Tokenizer) -> Iterator[Server]:
    pair = speaking(tok, letter(tok, LETTERS))
    with Server(pair, Limits(max_tokens=100)) as made:
        made.pair = pair  # type: ignore[attr-defined]
        yield made


def post(server: Server, chat: bool, streamed: bool, **body: Any) -> list[dict[str, Any]]:
    """The answer, or all chunks of a stream."""
    body = {
        **({"messages": [{"role": "user", "content": "fox"}]} if chat else {"prompt": PROMPT}),
        **body,
    }
    if streamed:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    answer = server.post("/v1/chat/completions" if chat else "/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    if not streamed:
        return [answer.json()]
    *events, done, last = answer.text.split("\n\n")
    assert (done, last) == ("data: [DONE]", "")
    return [json.loads(event[6:]) for event in events if not event.startswith(":")]


def told(chunks: list[dict[str, Any]], chat: bool) -> tuple[str, list[Any], list[Any]]:
    """Text, log-probabilities and reasons of an answer or of a stream."""
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    parts = [c.get("delta") or c.get("message") or c for c in choices]
    text = "".join(part.get("content" if chat else "text") or "" for part in parts)
    rows: list[Any] = []
    for each in filter(None, (c["logprobs"] for c in choices)):
        if chat:
            rows += [(r["token"], r["logprob"], None) for r in each["content"]]
        else:
            names = ("tokens", "token_logprobs", "text_offset")
            rows += zip(*(each[name] for name in names), strict=True)
            assert len(each["top_logprobs"]) == len(each["tokens"])
    return text, rows, [c["finish_reason"] for c in choices]


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("block_size", [1, 4, 9])
def test_the_end_of_an_answer_of_the_server(
    server: Server, tok: Tokenizer, chat: bool, streamed: bool, block_size: int
) -> None:
    """Before, at and behind the limit: text, reason, usage, log-probabilities and offsets."""
    script = letter(tok, LETTERS)
    pieces = dict(zip(script, LETTERS, strict=True))
    generation = server.pair.generation  # type: ignore[attr-defined]
    for place in (0, 3, 4, 5, 6, 9):
        for kind in ("id", "string", "two tokens"):
            ids = {script[place]} if kind == "id" else set()
            stop = LETTERS[max(0, place - (kind == "two tokens")) : place + 1]
            stops = () if kind == "id" else (stop,)
            generation.stop_ids = tuple(ids)
            for limit in (1, 5):
                want = by_rule(script, pieces, limit, ids, stops)
                ask = {"max_tokens": limit, "block_size": block_size, "stop": list(stops)}
                ask |= {"logprobs": True, "top_logprobs": 1} if chat else {"logprobs": 1}
                chunks = post(server, chat, streamed, temperature=0, **ask)
                text, rows, reasons = told(chunks, chat)
                assert text == want.text
                assert reasons[-1] == want.reason and set(reasons[:-1]) <= {None}
                assert [row[0] for row in rows] == [pieces[t] for t in want.tokens]
                for at, (_, value, offset) in enumerate(rows):
                    assert abs(value - logprob(at)) < 1e-5
                    assert chat or offset == at
                usage = chunks[-1]["usage"]
                prompt = usage["prompt_tokens"]
                assert chat or prompt == len(PROMPT)
                assert usage["completion_tokens"] == len(want.tokens)
                assert usage["total_tokens"] == prompt + len(want.tokens)
                assert all(chunk["usage"] is None for chunk in chunks[:-1])


@pytest.mark.parametrize("chat", [True, False], ids=["chat", "text"])
def test_a_context_that_is_used_up_ends_the_servers_answer(tok: Tokenizer, chat: bool) -> None:
    pair = speaking(tok, letter(tok, LETTERS))
    with Server(pair) as server:
        free = post(server, chat, False, max_tokens=1)[0]["usage"]["prompt_tokens"]
        for room in (1, 2, 6):
            pair.target.context = free + room
            for streamed in (False, True):
                chunks = post(server, chat, streamed, temperature=0, max_tokens=50, block_size=4)
                text, _, reasons = told(chunks, chat)
                assert (text, reasons[-1]) == (LETTERS[:room], "length")
                assert chunks[-1]["usage"]["completion_tokens"] == room


def test_thoughts_and_what_ends_them_are_told_by_the_server(tok: Tokenizer) -> None:
    open_, close = tok.channel_ids()
    thought = [tok.id_of(c) for c in "t\nxy"]
    script: Any = [open_, *thought, close, *letter(tok, "abcdef")]
    pair = speaking(tok, script)
    with Server(pair) as server:
        for limit in (1, 3, 5, 6, 7, 8, 11):
            for stop in (None, "b", "x"):
                want = by_rule(
                    script,
                    {tok.id_of(c) or 0: c for c in "t\nxyabcdef"},
                    limit,
                    set(),
                    (stop,) if stop else (),
                    (open_, close),
                )
                for streamed in (False, True):
                    ask = {"max_tokens": limit, "stop": stop, "logprobs": True, "block_size": 4}
                    chunks = post(server, True, streamed, temperature=0, **ask)
                    text, rows, reasons = told(chunks, True)
                    assert (text, reasons[-1]) == (want.text, want.reason)
                    assert len(rows) == len(want.tokens)
                    assert chunks[-1]["usage"]["completion_tokens"] == len(want.tokens)
                    parts = [
                        c.get("delta") or c.get("message") for x in chunks for c in x["choices"]
                    ]
                    said = "".join(p.get("reasoning_content") or "" for p in parts if p)
                    assert said == want.thinking


def test_the_log_counts_no_token_behind_a_stop_string(
    tok: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "pyengine.serve.server")
    with Server(speaking(tok, letter(tok, LETTERS))) as server:
        for streamed in (False, True):
            post(server, False, streamed, temperature=0, max_tokens=12, stop="c", block_size=9)
    found = [LINE.fullmatch(record.getMessage()) for record in caplog.records]
    counts = [line.groups()[1:] for line in found if line]
    assert counts == [("3", "3")] * 2


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_an_echo_alone_processes_nothing(tok: Tokenizer, streamed: bool) -> None:
    """``max_tokens`` 0: the prompt comes back, no token is made and none is counted."""
    pair = speaking(tok, letter(tok, LETTERS))
    calls: list[Any] = []
    pair.target.prefill = lambda *args, **_: calls.append(args)
    with Server(pair) as server:
        chunks = post(server, False, streamed, echo=True, max_tokens=0)
    text, rows, reasons = told(chunks, False)
    assert text == tok.decode(PROMPT) and rows == [] and reasons[-1] == "length"
    usage = chunks[-1]["usage"]
    counts = ("prompt_tokens", "completion_tokens", "total_tokens", "drafted_tokens")
    assert [usage[name] for name in counts] == [3, 0, 3, 0]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0} and calls == []


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("count", [0, 4])
def test_an_echo_with_logprobs_and_an_end(
    tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, streamed: bool, count: int
) -> None:
    """The prompt's rows, one fewer than its tokens, come before the answer's, cut where it ends."""
    prompt = letter(tok, "xyz")
    theirs = [Logprob(token, -7.0 - at, []) for at, token in enumerate(prompt[1:])]
    monkeypatch.setattr(
        "pyengine.serve.protocols.ask.prompt_logprobs", lambda *args, **kw: list(theirs)
    )
    with Server(speaking(tok, letter(tok, LETTERS))) as server:
        ask = {"echo": True, "logprobs": 0, "temperature": 0, "stop": "c", "block_size": 9}
        chunks = post(server, False, streamed, prompt=prompt, max_tokens=count, **ask)
    text, rows, reasons = told(chunks, False)
    assert text == ("xyzab" if count else "xyz")
    assert reasons[-1] == ("stop" if count else "length")
    assert [row[0] for row in rows] == [*"xyz", *("abc" if count else "")]
    assert [row[1] for row in rows[:3]] == [None, -7.0, -8.0]
    assert [row[2] for row in rows] == list(range(len(rows)))
    assert all(abs(row[1] - logprob(at)) < 1e-5 for at, row in enumerate(rows[3:]))
    made = 3 if count else 0
    usage = chunks[-1]["usage"]
    assert (usage["completion_tokens"], usage["total_tokens"]) == (made, 3 + made)
