"""An OpenAI-compatible server: requests in, generate.py's work out. Needs the extra ``serve``.

One generation at a time, in one thread, in the order of arrival; a client that leaves ends its
own. What a request may ask is openai_protocol.py's.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.types import ASGIApp, Receive, Scope, Send

from pyengine.files import kind, parse, shown
from pyengine.generate import Result, Step
from pyengine.openai_protocol import Ask, Limits, Refused, Reply, read_request
from pyengine.prefix import Prefix
from pyengine.speculate import Stats

if TYPE_CHECKING:
    from pyengine.pair import Pair

LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
POLL_S = 0.1

Said = Step | Result | Exception  # rounds, then one of the others


@dataclass(eq=False)
class Job:
    """A generation in the queue; what it says comes out of ``said``."""

    ask: Ask
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    said: asyncio.Queue[Said] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    seen: float = 0.0  # when the client was last looked for

    def say(self, what: Said) -> None:
        try:
            self.loop.call_soon_threadsafe(self.said.put_nowait, what)
        except RuntimeError:  # the server has stopped meanwhile
            self.cancelled = True


class Worker:
    """The thread that generates, one job after the other."""

    def __init__(self, limits: Limits) -> None:
        self._limit = limits.waiting
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._prefix = Prefix()
        self._ended = False
        threading.Thread(target=self._work, daemon=True, name="pyengine-serve").start()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def add(self, job: Job) -> None:
        with self._changed:
            if len(self._jobs) >= self._limit:
                raise Refused(429, "[serve] too many requests are waiting; try again later.")
            self._jobs.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """End it after its round; give up its place if it still waits."""
        job.cancelled = True
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def end(self) -> None:
        """End the job under way after its round, and those that wait."""
        self._ended = True

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    self._changed.wait()
                job = self._jobs.popleft()
            try:
                self._run(job)
            except Exception as error:  # the thread serves the next, whatever this one did
                job.say(error)

    def _check_open(self) -> None:
        if self._ended:
            raise RuntimeError("[serve] the server was ended.")

    def _run(self, job: Job) -> None:
        self._check_open()
        ask = job.ask
        if ask.echo is not None:
            job.say(ask.echoed(ask.echo))
        if not ask.max_tokens:
            job.say(Result("", [], "length", Stats()))
            return
        with ask.start(self._prefix) as running:
            for step in running.steps():
                self._check_open()
                if job.cancelled:
                    break
                job.say(step)
            job.say(running.result)


class LoopbackOnly:
    """Refuses requests that name another host than this machine's loopback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            host = HTTPConnection(scope).headers.get("host", "")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in LOOPBACK:
                message = f"[serve] the host must be this machine's loopback but got {shown(host)}."
                await _error(400, message)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def make_app(pair: Pair, *, limits: Limits | None = None, any_host: bool = False) -> FastAPI:
    """The server for a loaded pair.

    Args:
        pair: From :func:`pyengine.load`.
        limits: What it takes on.
        any_host: Answer requests that name another host than this machine's loopback. Off, a web
            page cannot reach the server by a name of its own that leads here.
    """
    limits = limits or Limits()
    app = FastAPI(title="pyengine", docs_url=None, redoc_url=None, openapi_url=None)
    if not any_host:
        app.add_middleware(LoopbackOnly)
    worker = app.state.worker = Worker(limits)

    async def complete(request: Request, chat: bool) -> Response:
        try:
            body = await _body(request, limits)
            # In a thread: a long prompt takes its time, and others' answers must not wait for it
            ask = await asyncio.to_thread(read_request, pair, body, limits, chat)
            worker.add(job := Job(ask))
        except ClientDisconnect:
            return Response(status_code=499)
        except Refused as error:
            return _error(error.status, str(error))
        except ValueError as error:
            return _error(400, str(error))
        answer = _streamed if ask.streamed else _whole
        return await answer(request, worker, job)

    async def chat_completions(request: Request) -> Response:
        return await complete(request, chat=True)

    async def completions(request: Request) -> Response:
        return await complete(request, chat=False)

    row = {"id": pair.name, "object": "model", "created": 0, "owned_by": "pyengine"}

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [row]}

    async def model(name: str) -> Response:
        if name != pair.name:
            return _error(404, f"[serve] the model must be {pair.name} but got {shown(name)}.")
        return JSONResponse(row)

    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": worker.waiting}

    async def nowhere(request: Request, error: Any) -> Response:
        return _error(error.status_code, f"[serve] {request.url.path}: {error.detail}.")

    async def broken(request: Request, error: Any) -> Response:
        return _error(500, "[serve] the request failed; the server's log has the reason.")

    for status in (404, 405):
        app.add_exception_handler(status, nowhere)
    app.add_exception_handler(Exception, broken)
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/models/{name:path}", model)
    app.add_api_route("/health", health)
    return app


async def _body(request: Request, limits: Limits) -> dict[str, Any]:
    # A web page can send plain text to any address without asking; JSON it cannot
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise Refused(415, "[serve] the content type must be application/json.")
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > limits.body_bytes:
            raise Refused(413, f"[serve] a request must be at most {limits.body_bytes} bytes.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(400, "[serve] the request must be UTF-8 text but is not.") from None
    body = parse(text, "[serve] the request")
    if not isinstance(body, dict):
        raise Refused(400, f"[serve] the request must be a JSON object but got {kind(body)}.")
    return {key: value for key, value in body.items() if value is not None}


async def _next(request: Request, worker: Worker, job: Job) -> Said | None:
    """What the job says next; None when the client has left, which ends the job."""
    while True:
        if time.monotonic() - job.seen > POLL_S:
            job.seen = time.monotonic()
            if await request.is_disconnected():
                worker.cancel(job)
                return None
        try:
            return await asyncio.wait_for(job.said.get(), POLL_S)
        except asyncio.TimeoutError:
            continue


async def _whole(request: Request, worker: Worker, job: Job) -> Response:
    reply, echoed = Reply(job.ask), None
    while (said := await _next(request, worker, job)) is not None:
        if isinstance(said, Exception):
            return _failure(said)
        if isinstance(said, Result):
            return JSONResponse(reply.whole(echoed, said))
        if echoed is None and job.ask.echo is not None:
            echoed = said
    return Response(status_code=499)


async def _streamed(request: Request, worker: Worker, job: Job) -> Response:
    first = await _next(request, worker, job)  # so that an error still has a status
    if first is None:
        return Response(status_code=499)
    if isinstance(first, Exception):
        return _failure(first)
    reply = Reply(job.ask)

    async def events() -> AsyncIterator[str]:
        said: Said = first
        try:
            while isinstance(said, Step):
                for chunk in reply.chunks(said):
                    yield _event(chunk)
                said = await job.said.get()
            if isinstance(said, Exception):
                yield _event(_error_body(500, _failure_text(said)))
            else:
                for chunk in reply.end(said):
                    yield _event(chunk)
            yield "data: [DONE]\n\n"
        finally:  # also when the client has left
            worker.cancel(job)

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _failure(error: Exception) -> Response:
    return _error(400 if isinstance(error, ValueError) else 500, _failure_text(error))


def _failure_text(error: Exception) -> str:
    """Our own sentences go to the client; of anything else it learns nothing."""
    return str(error) if str(error).startswith("[") else "[serve] the generation failed."


def _error(status: int, message: str) -> Response:
    return JSONResponse(_error_body(status, message), status_code=status)


def _error_body(status: int, message: str) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
