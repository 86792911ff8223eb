"""Connections: how many there are, how long they may be silent, and what a request's frame is."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import GAME, Server, asking, everything, request, until
from text_fakes import script_pair, write_tokenizers

from pyengine.serve.http import Patience
from pyengine.serve.protocols.ask import Limits
from pyengine.serve.queue import MAX_UNHEARD, Job
from pyengine.text.tokenizer import load_tokenizer

SHORT = Patience(head_s=0.3, body_s=0.3, unread_s=0.5)
HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return script_pair(load_tokenizer(folder), "jumps over " * 300)


@pytest.fixture(scope="module")
def server(pair: Any) -> Iterator[Server]:
    with Server(pair, patience=SHORT) as made:
        yield made


def message(answer: bytes) -> str:
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"])


def test_a_head_that_does_not_come_ends_its_connection(server: Server) -> None:
    assert everything(server.raw()) == b""  # nothing was asked, so nothing is answered
    answer = everything(server.raw(HEALTH[:20]))
    assert answer.startswith(b"HTTP/1.1 408 ") and b"connection: close" in answer
    assert message(answer) == "[serve] the request must come in sooner."


def test_a_head_that_trickles_is_late_too(server: Server) -> None:
    """More bytes of the same part do not put the end off."""
    sock = server.raw(b"GET /health HTTP/1.1\r\n")
    sock.settimeout(0.05)
    answer = b""
    for _ in range(200):
        try:
            sock.sendall(b"a: b\r\n")
            answer += sock.recv(1 << 16)
        except TimeoutError:
            continue
        except ConnectionError:
            break
        if answer:
            break
    assert answer.startswith(b"HTTP/1.1 408 ")
    sock.close()


def test_a_body_that_does_not_come_ends_its_connection(server: Server) -> None:
    whole = asking(max_tokens=1)
    answer = everything(server.raw(whole[:-10]))
    assert answer.startswith(b"HTTP/1.1 408 ") and "sooner" in message(answer)
    # Also where the route has answered without it
    answer = everything(server.raw(request(b"", "content-length: 10", path="/health")))
    assert answer.startswith(b"HTTP/1.1 405 ") and answer.count(b"HTTP/1.1") == 1


def test_the_second_request_of_a_connection_is_waited_for_as_the_first(server: Server) -> None:
    sock = server.raw(HEALTH)
    until(sock, b"}")
    sock.sendall(HEALTH)
    until(sock, b"}")
    sock.sendall(HEALTH[:30])
    assert everything(sock).startswith(b"HTTP/1.1 408 ")


def test_a_long_answer_is_no_silence(pair: Any) -> None:
    """The clocks are the client's: an answer may take longer than any of them."""
    started, go_on = threading.Event(), threading.Event()

    def wait(rows: int) -> None:
        started.set()
        assert go_on.wait(30)

    pair.target.before_call = wait
    try:
        with Server(pair, patience=SHORT) as server:
            sock = server.raw(asking(max_tokens=4))
            assert started.wait(30)
            for _ in range(3):  # other clients come and go, later than this one's clocks
                assert everything(server.raw()) == b""
            go_on.set()
            assert until(sock, b"usage").startswith(b"HTTP/1.1 200 ")
            sock.close()
    finally:
        pair.target.before_call = lambda rows: None


def test_a_client_that_does_not_read_is_dropped_and_blocks_nobody(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its generation waits for it, with a bounded number of steps, until it is dropped."""
    unheard, say = [], Job.say

    def counted(job: Job, said: Any) -> None:
        say(job, said)
        unheard.append(len(job._said))

    monkeypatch.setattr(Job, "say", counted)
    with Server(pair, Limits(streams=1, any_model=True), SHORT) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(30)
        sock.connect(("127.0.0.1", server.port))
        body = {"max_tokens": 4000, "logprobs": True, "top_logprobs": 20, "block_size": 1}
        body["logit_bias"] = {str(i): -100 for i in pair.generation.stop_ids}
        sock.sendall(asking(stream=True, **body))
        until(sock, b"data: ")
        # The next in the queue is served, so the worker was not held for ever
        assert server.post(json={"messages": GAME, "max_tokens": 1}).status_code == 200
        assert max(unheard) == MAX_UNHEARD
        assert not everything(sock).endswith(b"[DONE]\n\n")


def test_both_content_length_and_transfer_encoding_close_the_connection(server: Server) -> None:
    inner = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\n\r\n"
    body = b"0\r\n\r\n" + inner  # one reader's next request is the other's body
    for headers in (
        (f"content-length: {len(body)}", "transfer-encoding: chunked"),
        ("Transfer-Encoding: chunked", f"Content-Length: {len(body)}"),
    ):
        answer = everything(server.raw(request(body, *headers)))
        assert answer.startswith(b"HTTP/1.1 400 ") and answer.count(b"HTTP/1.1") == 1
        assert b"connection: close" in answer and "both Content-Length and" in message(answer)


def test_what_is_no_http_is_told_so(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    for data in (
        b"\x16\x03\x01 TLS\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        request(b"", "content-length: -5"),
        b"GET / HTTP/1.1\r\nx: " + b"y" * 100_000,
    ):
        answer = everything(server.raw(data))
        assert answer.startswith(b"HTTP/1.1 400 ") and "must be HTTP/1.1" in message(answer)
    assert capfd.readouterr() == ("", "")


def test_connections_past_the_limit_are_turned_away(pair: Any) -> None:
    with Server(pair, max_connections=2) as server:
        kept = [server.raw(HEALTH) for _ in range(2)]
        for sock in kept:
            until(sock, b"}")
        answer = everything(server.raw(HEALTH))
        assert answer.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in answer
        assert message(answer) == "[serve] too many connections are open; try again later."
        for sock in kept:  # who is there stays
            sock.sendall(HEALTH)
            assert until(sock, b"}").startswith(b"HTTP/1.1 200 ")
            sock.close()


FEW_FILES = """
import resource, sys
soft, hard = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from pathlib import Path
import tempfile
from serving import Server
from text_fakes import script_pair, write_tokenizers
from pyengine.serve.http import MAX_CONNECTIONS, SPARE_FILES, Patience, open_files
from pyengine.text.tokenizer import load_tokenizer
assert open_files() == min(hard, MAX_CONNECTIONS + SPARE_FILES)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (open_files(), hard)
with tempfile.TemporaryDirectory() as folder:
    write_tokenizers(Path(folder))
    pair = script_pair(load_tokenizer(Path(folder)), "jumps over")
with Server(pair, patience=Patience(head_s=3)) as server:
    print(server.port, flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize(("soft", "hard"), [(256, 256), (100, 256)])
def test_more_connections_than_descriptors_wedge_nothing(soft: int, hard: int) -> None:
    """300 half-open ones of 256: the rest is turned away, all end, and nothing is logged."""
    process = subprocess.Popen(
        [sys.executable, "-c", FEW_FILES, str(soft), str(hard)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1] / "helpers",
    )
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        socks = []
        for _ in range(300):
            socks.append(socket.create_connection(("127.0.0.1", port), timeout=30))
            with contextlib.suppress(ConnectionError):  # already turned away
                socks[-1].sendall(HEALTH[:20])
        answers = [everything(sock) for sock in socks]  # every one of them ends
        late = sum(answer.startswith(b"HTTP/1.1 408 ") for answer in answers)
        assert 256 - 64 - 20 <= late <= 256 - 64
        assert sum(answer.startswith(b"HTTP/1.1 503 ") for answer in answers) > 20
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            sock.sendall(HEALTH)
            assert until(sock, b"}").startswith(b"HTTP/1.1 200 ")
        out, err = process.communicate("\n", timeout=60)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
