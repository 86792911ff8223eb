"""A server behind a socket of its own, in a thread or as the command in a process."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for module in ("fastapi", "uvicorn", "httpx"):
    pytest.importorskip(module, reason="needs the extra serve, and httpx")

import httpx  # noqa: E402

from pyengine.serve.http import Patience  # noqa: E402
from pyengine.serve.http import Server as Http  # noqa: E402
from pyengine.serve.protocols.ask import Limits  # noqa: E402
from pyengine.serve.queue import Job  # noqa: E402
from pyengine.serve.server import make_app  # noqa: E402

GAME = [{"role": "user", "content": "Create a single-file HTML5 canvas Snake game."}]
CHAT = "/v1/chat/completions"
LEFT_S = 60  # within which an event must come, on any machine


class Server:
    """The app of a pair, served in a thread; ready when made."""

    def __init__(
        self,
        pair: Any,
        limits: Limits | None = None,
        patience: Patience | None = None,
        max_connections: int | None = None,
        **settings: Any,
    ) -> None:
        self.app = make_app(pair, limits=limits, **settings)
        sock = socket.create_server(("127.0.0.1", 0))  # connections wait in it from here on
        self.port = sock.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = Http(
            self.app,
            sock,
            on_end=self.app.state.worker.end,
            patience=patience,
            max_connections=max_connections,
        )
        self.thread = threading.Thread(target=self.http.run, daemon=True)
        self.thread.start()

    def post(self, path: str = CHAT, **kw: Any) -> httpx.Response:
        return httpx.post(self.url + path, timeout=60, **kw)

    def stop(self) -> None:
        self.http.should_exit = True
        self.thread.join(30)
        assert self.app.state.worker.join(30)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def raw(self, data: bytes = b"") -> socket.socket:
        """A connection that has sent these bytes."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        sock.sendall(data)
        return sock

    def health(self) -> dict[str, Any]:
        return dict(httpx.get(self.url + "/health", timeout=60).json())

    def counts(self, waiting: int, running: int = 1) -> None:
        """Ask until so many requests wait and run; each answer is waited for, so this does not
        spin."""
        end = threading.Event()
        timer = threading.Timer(LEFT_S, end.set)
        timer.start()
        want = {"status": "ok", "waiting": waiting, "running": running}.items()
        while not want <= (said := self.health()).items():
            assert not end.is_set(), (said, want)
        timer.cancel()


class Held:
    """Holds the calls of a function until it is opened, or lets some of them pass before that."""

    def __init__(self, function: Callable[..., Any], passing: int = 0) -> None:
        self.function, self.passing = function, passing
        self.calls, self.begun, self.open = 0, threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls > self.passing:
            self.begun.set()
            assert self.open.wait(LEFT_S)
        return self.function(*args, **kwargs)

    def wait(self) -> None:
        """Until a call is held."""
        assert self.begun.wait(LEFT_S)


def hold_rounds(pair: Any, passing: int = 0) -> Held:
    """Of a scripted pair."""
    pair.target.before_call = held = Held(lambda rows: None, passing)
    return held


def hold(patch: pytest.MonkeyPatch, owner: type, name: str) -> Held:
    held = Held(getattr(owner, name))
    patch.setattr(owner, name, lambda *args, **kwargs: held(*args, **kwargs))
    return held


def cuts(patch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a request has been cut, as it is when its client has left."""
    event, cut = threading.Event(), Job.cut

    def noted(job: Job, reason: Exception) -> None:
        cut(job, reason)
        event.set()

    patch.setattr(Job, "cut", noted)
    return event


def request(body: bytes, *headers: str, path: str = CHAT, host: str = "localhost") -> bytes:
    """A whole POST request as bytes."""
    lines = [f"POST {path} HTTP/1.1", f"host: {host}", "content-type: application/json", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in lines):
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def asking(**body: Any) -> bytes:
    return request(json.dumps({"messages": GAME, **body}).encode())


def everything(sock: socket.socket) -> bytes:
    """What comes until the server closes; a reset is an end too."""
    parts = []
    with contextlib.suppress(ConnectionError), sock:
        while part := sock.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def until(sock: socket.socket, mark: bytes) -> bytes:
    """What comes until a mark has come."""
    data = b""
    while mark not in data:
        part = sock.recv(1 << 12)
        assert part, data
        data += part
    return data


@contextlib.contextmanager
def command(*arguments: str, before: str = "") -> Iterator[subprocess.Popen[str]]:
    """`pyengine serve` in a process of its own; ``before`` is run in it first."""
    source = f"{before}\nfrom pyengine.__main__ import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", source, "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        # A shell that starts tests in the background may have it ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
