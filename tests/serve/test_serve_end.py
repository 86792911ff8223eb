"""The end of `pyengine serve`, also amid a prompt: every client is told, and nothing aborts."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import CHAT, GAME, Server, command, everything, request, until
from text_fakes import script_pair, write_tokenizers

from pyengine.serve.protocols.chat import Chat
from pyengine.serve.server import Generations
from pyengine.text.tokenizer import load_tokenizer

LONG = list(range(300, 900)) * 10  # token ids: twelve chunks

# A prompt's first chunk goes on until the server ends
HELD = """
import threading
from pyengine.serve import queue
from pyengine.model import target
ended, end, prefill = threading.Event(), queue.Worker.end, target.Target.prefill
def held(self, *args, **kwargs):
    print("chunk", flush=True)
    assert ended.wait(60)
    return prefill(self, *args, **kwargs)
def noted(self):
    end(self)
    ended.set()
target.Target.prefill, queue.Worker.end = held, noted
"""
# A chunk that MLX works at for much longer than is waited for
ENDLESS = """
import mlx.core as mx
from pyengine.model import target
from pyengine.cli import serve
serve.CHUNK_S = 0.2
def endless(self, *args, **kwargs):
    print("chunk", flush=True)
    a = mx.random.normal((100, 100))
    while True:  # each evaluation comes back to Python, which may have ended meanwhile
        mx.eval(mx.tanh(a @ a))
target.Target.prefill = endless
"""


@pytest.fixture
def pair(tmp_path: Path) -> Any:
    write_tokenizers(tmp_path)
    return script_pair(load_tokenizer(tmp_path), "jumps over")


def ready(process: subprocess.Popen[str]) -> int:
    assert process.stderr is not None
    found = re.search(r":(\d+)/v1", process.stderr.readline())
    assert found
    return int(found[1])


def ask(port: int, **body: Any) -> socket.socket:
    sock = socket.create_connection(("127.0.0.1", port), timeout=60)
    text = json.dumps({"prompt": LONG, "max_tokens": 5, **body})
    sock.sendall(request(text.encode(), path="/v1/completions"))
    return sock


def waiting(port: int) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        return int(json.loads(everything(sock).partition(b"\r\n\r\n")[2])["waiting"])


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("before", [HELD, ENDLESS])
def test_everybody_is_told_and_the_process_ends_as_it_should(sig: int, before: str) -> None:
    """The one that is served, streamed or whole, and those that wait."""
    streamed = sig == signal.SIGINT
    with command("--port", "0", "--quiet", before=before) as process:
        assert process.stdout is not None and process.stderr is not None
        port = ready(process)
        served = ask(port, stream=streamed)
        assert process.stdout.readline() == "chunk\n"
        head = until(served, b"\r\n\r\n") if streamed else b""
        queued = [ask(port) for _ in range(2)]
        while waiting(port) < 2:
            pass
        process.send_signal(sig)
        for sock in queued if streamed else [served, *queued]:
            answer = everything(sock)
            assert answer.startswith(b"HTTP/1.1 503 "), answer
            assert b"retry-after: " in answer and b"content-type: application/json" in answer
            error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
            assert error["message"] == "[serve] the server is ending; try again later."
            assert error["type"] == "server_error"
        if streamed:
            assert head.startswith(b"HTTP/1.1 200 ")
            told = everything(served)
            assert b'"message": "[serve] the server is ending' in told and b"[DONE]" in told
        assert process.wait(timeout=30) == (130 if sig == signal.SIGINT else -signal.SIGTERM)
        assert process.stderr.read() == ("Interrupted.\n" if sig == signal.SIGINT else "")


def check_ending(answer: httpx.Response) -> None:
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["error"]["message"].startswith("[serve] the server is ending;")


def test_a_request_that_comes_after_the_end_is_told_so(pair: Any) -> None:
    """On a connection that was open before."""
    with Server(pair) as server, httpx.Client(base_url=server.url) as client:
        assert client.post(CHAT, json={"messages": GAME}).status_code == 200
        server.app.state.worker.end()
        check_ending(client.post(CHAT, json={"messages": GAME}))


def test_a_request_that_is_being_read_at_the_end_is_told_so(
    pair: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also one that waits to be read. Nobody waits for the reading, and there is no trace."""
    come, go_on, body_of = threading.Semaphore(0), threading.Event(), Generations._body

    async def noted(self: Generations, request: Any) -> bytes:
        data = await body_of(self, request)
        come.release()
        return data

    def held(*_: Any) -> None:
        assert go_on.wait(60)

    monkeypatch.setattr(Generations, "_body", noted)
    monkeypatch.setattr(Chat, "read", held)
    answers: list[httpx.Response] = []
    with Server(pair) as server:
        threads = [
            threading.Thread(target=lambda: answers.append(server.post(json={"messages": GAME})))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for _ in threads:
            assert come.acquire(timeout=30)
        server.http.should_exit = True
        for thread in threads:
            thread.join(30)
        go_on.set()
    assert len(answers) == 4
    for answer in answers:
        check_ending(answer)
    assert capfd.readouterr().err == ""


def test_a_request_that_has_been_read_at_the_end_is_told_so(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has its place, but nobody serves it any more."""
    with Server(pair) as server:

        def read(*given: Any) -> Any:
            server.app.state.worker.end()
            return whole(*given)

        whole = Chat.read
        monkeypatch.setattr(Chat, "read", read)
        check_ending(httpx.post(server.url + CHAT, json={"messages": GAME}, timeout=20))
