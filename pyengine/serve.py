"""An OpenAI-compatible server: requests in, generate.py's work out. Needs the extra ``serve``.

One generation at a time, in one thread, in the order of arrival; a client that leaves ends its
own. Nothing a request asks for is silently ignored: what this engine has not is refused.
"""

from __future__ import annotations

import asyncio
import json
import queue
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from pyengine.files import kind, parse, shown
from pyengine.generate import Result, Stream, resolve_sampling, stream
from pyengine.messages import Prompt
from pyengine.prefix import Prefix
from pyengine.sampling import Logprob

if TYPE_CHECKING:
    from pyengine.pair import Pair

LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
POLL_S = 0.1

# What the protocol knows and this engine has not, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
}
# Of no consequence to the text.
IGNORED = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
NUMBERS = {
    "temperature": float,
    "top_p": float,
    "min_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "top_k": int,
    "seed": int,
}
OTHERS = {"model", "stream", "stream_options", "stop", "max_tokens", "block_size", "logit_bias"}
OTHERS |= {"logprobs"}
CHAT = {"messages", "tools", "max_completion_tokens", "chat_template_kwargs", "top_logprobs"}
TEXT = {"prompt", "echo"}


@dataclass(frozen=True)
class Limits:
    """What a server takes on: waiting requests, bytes and new tokens of one."""

    waiting: int = 16
    body_bytes: int = 4 << 20
    max_tokens: int = 8192
    default_tokens: int = 512


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Job:
    """A generation in the queue; pieces of text come out of ``pieces``, at the end a Result."""

    start: Callable[[], Stream]
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[tuple[str, str] | Result | Exception]
    cancelled: threading.Event

    def say(self, what: tuple[str, str] | Result | Exception) -> None:
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, what)
        except RuntimeError:  # the server has stopped meanwhile
            self.cancelled.set()


class Worker:
    """The thread that generates, one job after the other."""

    def __init__(self, limits: Limits) -> None:
        self.jobs: queue.Queue[Job] = queue.Queue(limits.waiting)
        threading.Thread(target=self._work, daemon=True, name="pyengine-serve").start()

    def add(self, start: Callable[[], Stream]) -> Job:
        job = Job(start, asyncio.get_running_loop(), asyncio.Queue(), threading.Event())
        try:
            self.jobs.put_nowait(job)
        except queue.Full:
            raise Refused(429, "[serve] too many requests are waiting; try again later.") from None
        return job

    def _work(self) -> None:
        while True:
            job = self.jobs.get()
            if not job.cancelled.is_set():
                self._run(job)

    def _run(self, job: Job) -> None:
        try:
            with job.start() as running:
                for step in running.steps():
                    if job.cancelled.is_set():
                        break
                    if step.thinking:
                        job.say(("thinking", step.thinking))
                    if step.text:
                        job.say(("text", step.text))
                job.say(running.result)
        except Exception as error:  # the thread serves the next request, whatever this one did
            job.say(error)


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
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    worker, prefix = Worker(limits), Prefix()

    async def complete(request: Request, chat: bool) -> Response:
        try:
            body = await _body(request, limits)
            _check_fields(body, chat)
            start, echo = _starter(pair, prefix, body, limits, chat)
            job = worker.add(start)
        except Refused as error:
            return _error(error.status, str(error))
        except ValueError as error:
            return _error(400, str(error))
        reply = _Reply(pair, chat, echo)
        if body.get("stream"):
            usage = bool((body.get("stream_options") or {}).get("include_usage"))
            return await _streamed(job, reply, usage)
        return await _whole(request, job, reply)

    async def chat_completions(request: Request) -> Response:
        return await complete(request, chat=True)

    async def completions(request: Request) -> Response:
        return await complete(request, chat=False)

    async def models() -> dict[str, Any]:
        row = {"id": pair.name, "object": "model", "created": 0, "owned_by": "pyengine"}
        return {"object": "list", "data": [row]}

    async def health() -> dict[str, Any]:
        return {"status": "ok", "waiting": worker.jobs.qsize()}

    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    app.add_api_route("/v1/models", models)
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


def _check_fields(body: Mapping[str, Any], chat: bool) -> None:
    for key, value in body.items():
        if key in NEUTRAL:
            if value not in NEUTRAL[key]:
                raise Refused(400, f"[serve] {key} is not offered here but got {shown(value)}.")
        elif key in NUMBERS:
            fits = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not fits or (NUMBERS[key] is int and not isinstance(value, int)):
                raise Refused(400, f"[serve] {key} must be a number but got {shown(value)}.")
        elif key not in OTHERS | IGNORED | (CHAT if chat else TEXT):
            raise Refused(400, f"[serve] {shown(key)} is not known here.")
    for key, wanted in (
        ("stream", bool),
        ("echo", bool),
        ("stream_options", dict),
        ("tools", list),
        ("logit_bias", dict),
        ("top_logprobs", int),
        ("logprobs", bool if chat else int),
        ("chat_template_kwargs", dict),
        ("block_size", int),
        ("max_tokens", int),
        ("max_completion_tokens", int),
    ):
        if key in body and type(body[key]) is not wanted:
            raise Refused(400, f"[serve] {key} must not be {kind(body[key])}.")
    if body.get("stream") and body.get("logprobs"):
        raise Refused(400, "[serve] logprobs must go without stream.")


def _starter(
    pair: Pair, prefix: Prefix, body: Mapping[str, Any], limits: Limits, chat: bool
) -> tuple[Callable[[], Stream], str]:
    """What begins the generation, in the worker's thread, and the text to echo before it."""
    given: dict[str, Any] = {key: cast(body[key]) for key, cast in NUMBERS.items() if key in body}
    if "logit_bias" in body:
        given["logit_bias"] = _bias(body["logit_bias"])
    if body.get("logprobs") is not None and body["logprobs"] is not False:
        given["logprobs"] = body.get("top_logprobs", 0) if chat else body["logprobs"]
    sampling = replace(resolve_sampling(pair, None), **given)
    max_tokens = body.get("max_completion_tokens", body.get("max_tokens", limits.default_tokens))
    if max_tokens > limits.max_tokens:
        raise Refused(400, f"[serve] max_tokens must be at most {limits.max_tokens} here.")
    prompt: Prompt = body.get("messages" if chat else "prompt", "")
    if chat and not (isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)):
        raise Refused(400, "[serve] messages must be a list of objects.")
    if not chat and not isinstance(prompt, str) and not _is_ids(prompt):
        raise Refused(400, "[serve] prompt must be one string or one list of token ids.")
    stop = body.get("stop", ())
    if not isinstance(stop, (str, list, tuple)):
        raise Refused(400, "[serve] stop must be a string or a list of strings.")
    variables = dict(body.get("chat_template_kwargs", {}))
    if "tools" in body:
        variables["tools"] = body["tools"]
    echo = prompt if body.get("echo") and isinstance(prompt, str) else ""

    def start() -> Stream:
        return stream(
            prompt,
            pair=pair,
            max_tokens=max_tokens,
            sampling=sampling,
            block_size=body.get("block_size"),
            stop=stop,
            raw=not chat and isinstance(prompt, str),
            variables=variables,
            prefix=prefix,
        )

    # Once here too, so that what is wrong is known before the queue; nothing is processed yet
    start().close()
    return start, echo


def _bias(values: Mapping[str, Any]) -> dict[int, float]:
    try:
        return {int(token): float(value) for token, value in values.items()}
    except (TypeError, ValueError):
        raise Refused(400, "[serve] logit_bias must map token ids to numbers.") from None


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and all(type(i) is int for i in prompt)


class _Reply:
    """The protocol's objects for one request."""

    def __init__(self, pair: Pair, chat: bool, echo: str) -> None:
        self.chat, self.echo = chat, echo
        self.tokenizer = pair.tokenizer
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": pair.name,
        }

    def whole(self, result: Result) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": result.finish_reason or "stop"}
        if self.chat:
            message = {"role": "assistant", "content": result.text}
            if result.thinking is not None:
                message["reasoning_content"] = result.thinking
            choice["message"] = message
        else:
            choice["text"] = self.echo + result.text
        choice["logprobs"] = None if result.logprobs is None else self._logprobs(result.logprobs)
        name = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": name, "choices": [choice], "usage": usage_of(result)}

    def _logprobs(self, rows: list[Logprob]) -> dict[str, Any]:
        """Of every new token, the one that ended the text included."""
        if not self.chat:
            return {
                "tokens": [self.tokenizer.decode([row.token]) for row in rows],
                "token_logprobs": [row.logprob for row in rows],
                "top_logprobs": [
                    {self.tokenizer.decode([t]): p for t, p in row.top} for row in rows
                ],
            }
        content = []
        for row in rows:
            best = [self._spelled(token, logprob) for token, logprob in row.top]
            content.append({**self._spelled(row.token, row.logprob), "top_logprobs": best})
        return {"content": content}

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def piece(self, what: str, text: str) -> dict[str, Any]:
        if not self.chat:
            return self._chunk({"text": text}, None)
        key = "reasoning_content" if what == "thinking" else "content"
        return self._chunk({"delta": {"role": "assistant", key: text}}, None)

    def end(self, result: Result) -> dict[str, Any]:
        return self._chunk(
            {"delta": {}} if self.chat else {"text": ""}, result.finish_reason or "stop"
        )

    def usage(self, result: Result) -> dict[str, Any]:
        return {**self._chunk({}, None), "choices": [], "usage": usage_of(result)}

    def _chunk(self, part: dict[str, Any], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **part, "finish_reason": reason, "logprobs": None}
        name = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": name, "choices": [choice]}


def usage_of(result: Result) -> dict[str, Any]:
    """Token counts of the protocol, and this engine's own: acceptance and speed."""
    stats = result.stats
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": len(result.tokens),
        "total_tokens": stats.prompt_tokens + len(result.tokens),
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
        "drafted_tokens": stats.drafted,
        "accepted_tokens": stats.accepted,
        "acceptance": stats.acceptance,
        "tok_s": stats.tok_s,
    }


async def _whole(request: Request, job: Job, reply: _Reply) -> Response:
    asked = time.monotonic()
    while True:
        if time.monotonic() - asked > POLL_S:
            if await request.is_disconnected():
                job.cancelled.set()
                return Response(status_code=499)
            asked = time.monotonic()
        try:
            said = await asyncio.wait_for(job.pieces.get(), POLL_S)
        except asyncio.TimeoutError:
            continue
        if isinstance(said, Exception):
            return _failure(said)
        if isinstance(said, Result):
            return JSONResponse(reply.whole(said))


async def _streamed(job: Job, reply: _Reply, usage: bool) -> Response:
    first = await job.pieces.get()  # so that an error still has a status
    if isinstance(first, Exception):
        return _failure(first)

    async def events() -> AsyncIterator[str]:
        said: tuple[str, str] | Result | Exception = first
        try:
            if reply.echo:
                yield _event(reply.piece("text", reply.echo))
            while True:
                if isinstance(said, Exception):
                    yield _event(_error_body(_failure_text(said)))
                    break
                if isinstance(said, Result):
                    yield _event(reply.end(said))
                    if usage:
                        yield _event(reply.usage(said))
                    break
                yield _event(reply.piece(*said))
                said = await job.pieces.get()
            yield "data: [DONE]\n\n"
        finally:  # also when the client has left
            job.cancelled.set()

    return StreamingResponse(events(), media_type="text/event-stream")


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _failure(error: Exception) -> Response:
    return _error(400 if isinstance(error, ValueError) else 500, _failure_text(error))


def _failure_text(error: Exception) -> str:
    """Our own sentences go to the client; of anything else it learns nothing."""
    return str(error) if str(error).startswith("[") else "[serve] the generation failed."


def _error(status: int, message: str) -> Response:
    return JSONResponse(_error_body(message), status_code=status)


def _error_body(message: str) -> dict[str, Any]:
    row = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return {"error": row}
