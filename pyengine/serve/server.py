"""A server of several protocols: requests in, generation.py's work out. Needs the extra ``serve``.

The routes and what they answer. What a request may ask and how an answer is told is a protocol's
(protocols/), who is served when is queue.py's, connections and their limits are http.py's.
"""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pyengine.serve.access import KeyGuard, check_key, check_origins
from pyengine.serve.front import LEFT, Front, allowed_names, error_response, note
from pyengine.serve.protocols.ask import Ask, Limits, Refused, no_such_model
from pyengine.serve.protocols.chat import Chat
from pyengine.serve.protocols.completions import Completions
from pyengine.serve.protocols.faces import Protocol
from pyengine.serve.protocols.fields import without_nulls
from pyengine.serve.protocols.messages import Messages
from pyengine.serve.protocols.responses import Responses
from pyengine.serve.queue import Hear, Job, Worker
from pyengine.serve.web import page_routes
from pyengine.task import Result, Step
from pyengine.untrusted import kind, parse

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair
    from pyengine.serve.metrics import Metrics

PROTOCOLS = (Chat, Completions, Responses, Messages)
# Reading a long prompt is work too; more threads would only hold more of them in memory
READERS = 2
STREAM_HEADERS = {
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect the stream
}

log = logging.getLogger("pyengine.serve.server")


def make_app(
    pair: Pair,
    *,
    limits: Limits | None = None,
    any_host: bool = False,
    hosts: Sequence[str] = (),
    key: str | None = None,
    origins: Sequence[str] = (),
    page: bool = True,
) -> FastAPI:
    """The server for a loaded pair, to be run by http.py: connections are watched there.

    Args:
        pair: From :func:`pyengine.load`.
        limits: What it takes on.
        any_host: Answer requests that name another host than this machine's loopback. Off, a web
            page cannot reach the server by a name of its own that leads here.
        hosts: Names of other hosts that may be named nevertheless.
        key: What requests must carry, all but those for ``/health`` and the page's files; None asks
            for none.
        origins: Web pages that browsers let ask, by origin; ``*`` for all.
        page: Serve the page at ``/``.

    Returns:
        The app; ``app.state.worker.end()`` refuses what waits and all that comes, and ends its
        thread.

    Raises:
        ValueError: One of ``hosts`` or ``origins`` is none, ``key`` cannot be one, or trees are
            asked of a target that other processes share.
    """
    check_key(key)
    check_origins(origins)
    limits, names = limits or Limits(), allowed_names(hosts)
    if limits.tree is not None:
        pair.target.check_alone("tree")
    mode = {} if limits.early_exit is None else {"early_exit": limits.early_exit.told()}
    worker = Worker(
        pair,
        limits.streams,
        limits.waiting,
        cache_bytes=limits.cache_bytes,
        cache_dir=limits.cache_dir,
        cache_dir_bytes=limits.cache_dir_bytes,
    )
    metrics = _metrics(worker)
    row = {"id": pair.name, "object": "model", "created": 0, "owned_by": "pyengine"}

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [row]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        if name != pair.name:
            return error_response(no_such_model(pair, name))
        return JSONResponse(row)

    async def health(_: Request) -> Response:
        counts = {"waiting": worker.waiting, "running": worker.running, "texts": worker.texts}
        counts["streams"] = worker.streams
        memory = {"cache_bytes": worker.cache_bytes, "pages": worker.pages}
        speeds = {"tok_s": worker.speed.tok_s, "acceptance": worker.totals.acceptance}
        return JSONResponse({"status": "ok", **counts, **memory, **speeds, **mode})

    async def figures(request: Request) -> Response:
        if metrics is None:
            return error_response(
                Refused(
                    404,
                    "[serve] prometheus-client must be installed for /metrics but is not; run: "
                    'pip install "pyengine-mlx[serve]"',
                )
            )
        page, media_type = metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"content-type": media_type})

    async def nowhere(request: Request, error: Any) -> Response:
        headers = dict(error.headers or {})
        if "Allow" in headers:
            headers["Allow"] = ", ".join(sorted({*headers["Allow"].split(", "), "OPTIONS"}))
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        path = request.url.path
        refused = Refused(error.status_code, f"[serve] {path}: {error.detail}.")
        return error_response(refused, headers, path=path)

    readers = ThreadPoolExecutor(READERS, thread_name_prefix="pyengine-read")
    shared = (limits, worker, readers, metrics)
    protocols: list[Protocol] = [kind(pair, limits) for kind in PROTOCOLS]
    routes = [
        Route(protocol.path, Generations(protocol, *shared), methods=["POST"])
        for protocol in protocols
    ]
    counts = TokenCounts(Messages(pair, limits), *shared)
    [responses] = [protocol for protocol in protocols if isinstance(protocol, Responses)]

    async def response(request: Request) -> Response:
        name = request.path_params["name"]
        try:
            if request.method != "DELETE":
                return JSONResponse(responses.store.response(name))
            responses.store.forget(name)
        except Refused as error:
            return error_response(error)
        return JSONResponse({"id": name, "object": "response", "deleted": True})

    app = FastAPI(
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        routes=[
            *routes,
            Route(f"{Messages.path}/count_tokens", counts, methods=["POST"]),
            Route(f"{Responses.path}/{{name}}", response, methods=["GET", "DELETE"]),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/health", health),
            Route("/metrics", figures),
            *(page_routes() if page else ()),
        ],
        exception_handlers={404: nowhere, 405: nowhere},
    )
    if key is not None:
        app.add_middleware(KeyGuard, key=key)
    if origins:  # outside of the guard: a browser asks without a key whether it may ask
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(Front, any_host=any_host, hosts=names)
    app.state.worker = worker
    return app


def _metrics(worker: Worker) -> Metrics | None:
    """None where prometheus-client is missing, without which the server does all else."""
    if importlib.util.find_spec("prometheus_client") is None:
        return None
    from pyengine.serve.metrics import Metrics

    return Metrics(worker)


class Generations:
    """The route of a protocol that generates."""

    def __init__(
        self,
        protocol: Protocol,
        limits: Limits,
        worker: Worker,
        readers: ThreadPoolExecutor,
        metrics: Metrics | None,
    ) -> None:
        self._protocol, self._limits, self._worker = protocol, limits, worker
        self._readers, self._metrics = readers, metrics
        self._held = 0  # bytes of the bodies that are coming in

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500
        try:
            body = await self._body(Request(scope, receive))
            came = time.perf_counter()
            with self._worker.place():
                loop = asyncio.get_running_loop()
                ask = await loop.run_in_executor(self._readers, self._read, body)
                status = await self._answer(ask, came, scope, receive, send)
        except ClientDisconnect:
            status = LEFT
            note(scope, left=True)
        except Refused as error:
            status = error.status
            await self._error(error)(scope, receive, send)
        except ValueError as error:
            status = 400
            await self._error(Refused(400, str(error)))(scope, receive, send)
        finally:
            if self._metrics is not None:
                self._metrics.count(status)

    def _error(self, error: Refused) -> Response:
        return error_response(error, path=self._protocol.path)

    async def _body(self, request: Request) -> bytes:
        # A web page can send plain text to any address without asking; JSON it cannot
        media = request.headers.get("content-type", "").split(";")[0].strip()
        if media.lower() != "application/json":
            raise Refused(415, "[serve] the content type must be application/json.")
        most, data = self._limits.body_bytes, bytearray()
        try:
            async for chunk in request.stream():
                data += chunk
                self._held += len(chunk)
                if len(data) > most:
                    raise Refused(413, f"[serve] a request must be at most {most} bytes.")
                if self._held > most * (self._limits.waiting + 1):
                    raise Refused(
                        503, "[serve] too many requests are coming in; try again.", retry=True
                    )
        finally:
            self._held -= len(data)
        return bytes(data)

    def _read(self, data: bytes) -> Any:
        ask = self._protocol.read(_given(data))
        self._worker.check([one.task() for one in ask.all if one.max_tokens])
        return ask

    async def _answer(
        self, ask: Any, came: float, scope: Scope, receive: Receive, send: Send
    ) -> int:
        """Its status; that of a stream that fails is the error's, though its head said 200."""
        log.debug(
            "%s asks for %d texts of up to %d tokens: %s",
            *(note(scope)["id"], len(ask.all), ask.max_tokens, ask.sampling),
        )
        self._worker.add(job := Job(ask, self._worker.wake))
        hear = job.hear if self._metrics is None else self._metrics.timed(job, came)
        watch = asyncio.create_task(self._watch(job, receive))
        try:
            if ask.streamed:
                return await self._streamed(ask, hear, scope, send)
            response = await self._whole(ask, hear, scope)
            await response(scope, receive, send)
            return response.status_code
        finally:
            watch.cancel()
            self._worker.cut(job, ClientDisconnect())

    async def _watch(self, job: Job, receive: Receive) -> None:
        """Cut the job when its client leaves."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self._worker.cut(job, ClientDisconnect())

    async def _whole(self, ask: Ask, hear: Hear, scope: Scope) -> Response:
        echoed: dict[int, Step] = {}
        results: dict[int, Result] = {}
        while len(results) < len(ask.all):
            said = await hear(None)
            if isinstance(said, Exception):
                return self._error(_failure(said, scope))
            assert said is not None
            if isinstance(said.what, Result):
                results[said.choice] = said.what
            elif ask.echo is not None:
                echoed.setdefault(said.choice, said.what)  # before all others
        each = [results[index] for index in range(len(results))]
        note(scope, tokens=(ask.prompt_tokens, sum(len(result.tokens) for result in each)))
        return JSONResponse(self._protocol.reply(ask).whole(echoed, each))

    async def _streamed(self, ask: Ask, hear: Hear, scope: Scope, send: Send) -> int:
        """Server-sent events. The headers go out at once, so an error from here on is an event."""

        async def write(text: str, more: bool = True) -> None:
            body = {"type": "http.response.body", "body": text.encode(), "more_body": more}
            await send(body)

        # Nothing but the headers of a response without a body of its own
        head = Response(headers=STREAM_HEADERS, media_type="text/event-stream")
        headers = [(name, value) for name, value in head.raw_headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        reply, counts = self._protocol.reply(ask), [0] * len(ask.all)
        results: dict[int, Result] = {}
        events = [*reply.start()]
        if events:
            await write("".join(map(reply.spell, events)))
        while len(results) < len(ask.all):
            said = await hear(self._limits.keep_alive_s)
            if said is None:
                await write(": keep-alive\n\n")
                continue
            if isinstance(said, Exception):
                failure = _failure(said, scope)
                last = "".join(map(reply.spell, reply.failed(failure)))
                await write(last + reply.done, more=False)
                return failure.status
            index, what = said
            if isinstance(what, Result):
                results[index], counts[index] = what, len(what.tokens)
                events = [*reply.end(index, what)]
            else:
                counts[index] += len(what.tokens)
                events = [*reply.chunks(index, what)]
            note(scope, tokens=(ask.prompt_tokens, sum(counts)))
            ends = len(results) == len(ask.all)
            if ends:
                events += reply.close([results[n] for n in range(len(results))])
            await write("".join(map(reply.spell, events)) + reply.done * ends, more=not ends)
        return 200


class TokenCounts(Generations):
    """The route that counts the tokens of a prompt."""

    def _read(self, data: bytes) -> Any:
        return len(self._protocol.read({**_given(data), "max_tokens": 1}).ids)

    async def _answer(
        self, count: Any, came: float, scope: Scope, receive: Receive, send: Send
    ) -> int:
        await JSONResponse({"input_tokens": count})(scope, receive, send)
        return 200


def _given(data: bytes) -> dict[str, Any]:
    """The fields of a body."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise Refused(400, "[serve] the request must be UTF-8 text but is not.") from None
    body = parse(text, "[serve] the request")
    if not isinstance(body, dict):
        raise Refused(400, f"[serve] the request must be a JSON object but got {kind(body)}.")
    return without_nulls(body)


def _failure(error: Exception, scope: Scope) -> Refused:
    """Our own sentences go to the client; of anything else it learns nothing, the log all.

    Raises:
        ClientDisconnect: There is nobody to tell.
    """
    if isinstance(error, (Refused, ClientDisconnect)):
        if isinstance(error, ClientDisconnect):
            raise error
        return error
    ours = str(error).startswith("[")
    if not ours:
        log.error("%s the generation failed", note(scope)["id"], exc_info=error)
    status = 400 if isinstance(error, ValueError) and ours else 500
    return Refused(status, str(error) if ours else "[serve] the generation failed.")
