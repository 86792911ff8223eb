"""The server's connections: how many, how long they may be silent, and how all of them end.

uvicorn speaks HTTP. What it has not stands here: a limit to connections that holds before a
descriptor is missing, time limits for a request's head and body and for clients that do not read,
and an end that answers every client.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from pyengine.serve.front import error_response
from pyengine.serve.protocols.ask import Refused

SPARE_FILES = 64  # descriptors for everything but connections
MAX_CONNECTIONS = 512
GRACE_S = 2  # for answers under way when the server is ended

log = logging.getLogger("pyengine.serve.server")


@dataclass(frozen=True)
class Patience:
    """Seconds for which a client is waited for.

    Attributes:
        head_s: From the connection, or the last answer, to the end of a request's head.
        body_s: From there to the end of its body.
        unread_s: While an answer is not read at all.
    """

    head_s: float = 10.0
    body_s: float = 60.0
    unread_s: float = 20.0


class Connection(H11Protocol):
    """One connection, closed when its client is silent for too long."""

    def __init__(self, patience: Patience, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._patience = patience
        self._awaited: Any = None  # the part of a request that is coming in
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_part()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_part()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_part()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("reader")

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "[serve] the request must be HTTP/1.1 but is not.")

    def _start(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, then)

    def _stop(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()

    def _await_part(self) -> None:
        """Start the clock of the part that comes next; more of the same part does not stop it."""
        part = None if self.transport.is_closing() else self.conn.their_state
        if part is self._awaited:
            return
        self._awaited = part
        self._stop("part")
        if part is h11.IDLE:
            self._start("part", self._patience.head_s, self._late)
        elif part is h11.SEND_BODY:
            self._start("part", self._patience.body_s, self._late)

    def _late(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.transport.close()  # nothing was asked
        else:
            self._refuse(408, "[serve] the request must come in sooner.")

    def _await_reader(self, unread: int) -> None:
        """Drop the client if it has taken nothing of what is unread by then."""

        def look() -> None:
            left = self.transport.get_write_buffer_size()
            if left < unread:
                self._await_reader(left)
            else:
                self.transport.abort()

        self._start("reader", self._patience.unread_s, look)

    def _refuse(self, status: int, message: str) -> None:
        """Close the connection, with an answer where none has begun."""
        if not self.transport.is_closing():
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self.transport.write(_answer(Refused(status, message)))
            self.transport.close()


class Server(uvicorn.Server):
    """Serves an app at a socket until a signal; ``ended_by`` is that signal."""

    def __init__(
        self,
        app: ASGIApp,
        sock: socket.socket,
        *,
        on_end: Callable[[], None],
        patience: Patience | None = None,
        max_connections: int | None = None,
    ) -> None:
        # uvicorn's own log is of no use beside ours; nothing is to be done when it starts and ends
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )
        super().__init__(config)
        self.ended_by: int | None = None
        self._sock, self._on_end = sock, on_end
        self._patience = patience or Patience()
        self._most = max_connections or open_files() - SPARE_FILES
        self._accepted: set[asyncio.Task[Any]] = set()  # on their way to be connections

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        self._sock.setblocking(False)
        self._listen()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().remove_reader(self._sock)
        self._sock.close()
        self._on_end()
        await super().shutdown()

    def end(self, sig: int) -> None:
        """What a signal does; the second one waits for nobody."""
        self.ended_by = self.ended_by or sig
        self.force_exit = self.should_exit
        self.should_exit = True
        self._on_end()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop, signals = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
        for sig in signals:
            loop.add_signal_handler(sig, self.end, sig)
        try:
            yield
        finally:
            for sig in signals:
                loop.remove_signal_handler(sig)

    def _listen(self) -> None:
        if not self.should_exit:
            asyncio.get_running_loop().add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        """Take one connection. asyncio's own server takes all that wait, and fails on the way."""
        loop = asyncio.get_running_loop()
        try:
            conn, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError as error:  # no descriptor is left, for all that was spared
            log.error("[serve] a connection could not be taken: %s", error.strerror)
            loop.remove_reader(self._sock)
            loop.call_later(1, self._listen)
            return
        if len(self.server_state.connections) + len(self._accepted) >= self._most:
            _turn_away(conn)
            return
        conn.setblocking(False)
        made = partial(
            Connection,
            self._patience,
            config=self.config,
            server_state=self.server_state,
            app_state={},
        )
        task = loop.create_task(loop.connect_accepted_socket(made, conn))
        self._accepted.add(task)
        task.add_done_callback(self._taken)

    def _taken(self, task: asyncio.Task[Any]) -> None:
        self._accepted.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("[serve] a connection could not be taken: %s", error)


def open_files() -> int:
    """Files this process may have open, raised as far as connections need and the system lets it.

    Raises:
        RuntimeError: They are too few for any connection.
    """
    wanted = MAX_CONNECTIONS + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    if most <= SPARE_FILES:
        raise RuntimeError(
            f"[serve] the machine must allow more than {SPARE_FILES} open files but allows {most}; "
            "see `ulimit -n`."
        )
    return most


def _turn_away(conn: socket.socket) -> None:
    """Answer without having heard; what has come already is read, else its sender is told off."""
    message = "[serve] too many connections are open; try again later."
    with conn:
        conn.setblocking(False)
        try:
            conn.send(_answer(Refused(503, message, retry=True)))
            conn.shutdown(socket.SHUT_WR)
            conn.recv(1 << 16)
        except OSError:  # gone, or nothing has come yet
            pass


def _answer(error: Refused) -> bytes:
    """A whole response in bytes."""
    response = error_response(error, {"connection": "close"})
    head = b"".join(b"%s: %s\r\n" % header for header in response.raw_headers)
    return b"HTTP/1.1 %d \r\n%s\r\n%s" % (error.status, head, bytes(response.body))
