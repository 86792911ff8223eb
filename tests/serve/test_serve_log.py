"""What operators and proxies see: ids, the log, HEAD and OPTIONS, headers for proxies."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import CHAT, GAME, LEFT_S, Server, asking, cuts, hold_rounds
from text_fakes import script_pair, write_tokenizers

from pyengine.serve.protocols.ask import Limits
from pyengine.text.tokenizer import load_tokenizer

LINE = re.compile(r"(\S+) ([A-Z]+) (\S+) (\d{3}) (\d+)\+(\d+) tokens \d+\.\d{3} s")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return script_pair(load_tokenizer(folder), "jumps over")


@pytest.fixture
def server(pair: Any, caplog: pytest.LogCaptureFixture) -> Iterator[Server]:
    caplog.set_level(logging.INFO, "pyengine.serve.server")
    with Server(pair, Limits(streams=1, waiting=1)) as made:
        yield made


def lines(server: Server, caplog: pytest.LogCaptureFixture) -> list[tuple[Any, ...]]:
    server.stop()  # a line is written when its request is over
    found = [LINE.fullmatch(record.getMessage()) for record in caplog.records]
    return [line.groups() for line in found if line]


def test_one_line_per_request(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    said = server.post(json={"messages": GAME}).json()
    prompt, new = (said["usage"][f"{what}_tokens"] for what in ("prompt", "completion"))
    server.post(json={"messages": GAME, "stream": True})
    server.post(json={"messages": []})
    httpx.get(f"{server.url}/health")
    httpx.get(f"{server.url}/no%0A where")
    found = lines(server, caplog)
    assert [line[1:4] for line in found] == [
        ("POST", CHAT, "200"),
        ("POST", CHAT, "200"),
        ("POST", CHAT, "400"),
        ("GET", "/health", "200"),
    ]
    assert [line[4:] for line in found] == [(str(prompt), str(new))] * 2 + [("0", "0")] * 2
    assert len({line[0] for line in found}) == 4
    # A line is a line, whatever a path holds
    assert "\\n where 404" in caplog.records[-1].getMessage()
    assert all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_has_a_status_of_its_own(
    server: Server,
    pair: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    stream: bool,
) -> None:
    """Whether it had been sent the head of an answer or not."""
    cut, gate = cuts(monkeypatch), hold_rounds(pair)
    try:
        sock = server.raw(asking(stream=stream))
        gate.wait()
        sock.close()
        assert cut.wait(LEFT_S)
    finally:
        gate.open.set()
        pair.target.before_call = lambda rows: None
    assert [line[1:4] for line in lines(server, caplog)] == [("POST", CHAT, "499")]


def test_request_ids_are_taken_or_made(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    for path in ("/health", "/nowhere"):
        answer = httpx.get(server.url + path, headers={"x-request-id": "abc.DEF-1_2"})
        assert answer.headers["x-request-id"] == "abc.DEF-1_2"
    with httpx.stream("POST", server.url + CHAT, json={"messages": GAME, "stream": True}) as answer:
        made = answer.headers["x-request-id"]
    assert re.fullmatch("[0-9a-f]{16}", made)
    for wrong in ("a b", "x" * 129, "<script>"):
        answer = httpx.get(f"{server.url}/health", headers={"x-request-id": wrong})
        assert re.fullmatch("[0-9a-f]{16}", answer.headers["x-request-id"])
    assert [line[0] for line in lines(server, caplog)][:3] == ["abc.DEF-1_2"] * 2 + [made]


def test_a_failure_is_logged_with_its_id_and_told_without_its_reason(
    server: Server, pair: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(rows: int) -> None:
        raise KeyError("a secret of the machine")

    pair.target.before_call = fail
    try:
        for stream in (False, True):
            answer = server.post(
                json={"messages": GAME, "stream": stream}, headers={"x-request-id": f"r{stream}"}
            )
            assert "secret" not in answer.text and "the generation failed" in answer.text
    finally:
        pair.target.before_call = lambda rows: None
    traced = [record for record in caplog.records if record.exc_info]
    assert [record.getMessage() for record in traced] == [
        "rFalse the generation failed",
        "rTrue the generation failed",
    ]


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ValueError("[generate] it must be so but is not."), 400, None),
        (RuntimeError("[decode] logits must be finite."), 500, None),
        (ValueError("a secret of the machine"), 500, "[serve] the generation failed."),
    ],
)
def test_only_an_impossible_request_is_the_clients_fault(
    server: Server, pair: Any, error: Exception, status: int, message: str | None
) -> None:
    def fail(rows: int) -> None:
        raise error

    pair.target.before_call = fail
    try:
        answer = server.post(json={"messages": GAME})
    finally:
        pair.target.before_call = lambda rows: None
    told = answer.json()["error"]
    assert (answer.status_code, told["message"]) == (status, message or str(error))
    assert told["type"] == ("server_error" if status == 500 else "invalid_request_error")


def test_a_failure_of_our_own_code_is_an_answer_too(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("a secret of the machine")

    monkeypatch.setattr("pyengine.serve.protocols.chat.Chat.read", fail)
    answer = server.post(json={"messages": GAME})
    assert answer.status_code == 500 and "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error" and answer.headers["x-request-id"]
    assert [r.getMessage().split(" ", 1)[1] for r in caplog.records if r.exc_info] == [
        "the request failed"
    ]


def test_head_options_and_allow(server: Server) -> None:
    for path in ("/health", "/v1/models", "/v1/models/scripted"):
        got, head = httpx.get(server.url + path), httpx.head(server.url + path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == got.headers["content-length"]
        answer = httpx.options(server.url + path)
        assert (answer.status_code, answer.headers["allow"]) == (204, "GET, HEAD, OPTIONS")
        answer = httpx.delete(server.url + path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")
        assert answer.json()["error"]["message"].startswith("[serve] ")
    for path in (CHAT, "/v1/completions"):
        assert httpx.options(server.url + path).headers["allow"] == "OPTIONS, POST"
        answer = httpx.get(server.url + path)
        assert (answer.status_code, answer.headers["allow"]) == (405, "OPTIONS, POST")
    assert httpx.options(f"{server.url}/nowhere").status_code == 404


def test_streams_are_not_to_be_collected_on_their_way(server: Server) -> None:
    answer = server.post(json={"messages": GAME, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"
    assert "content-length" not in answer.headers
    chunks = [json.loads(line[6:]) for line in answer.text.splitlines() if "data: {" in line]
    texts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == "jumps over"
