"""What every request passes on its way in and out: its id, its line in the log, the host it names.

Also the form of errors, and what becomes of a request that our own code fails.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pyengine.serve.protocols import messages
from pyengine.serve.protocols.ask import Refused
from pyengine.serve.protocols.choices import error_body
from pyengine.serve.queue import ending
from pyengine.untrusted import shown

RETRY_S = 5
LEFT = 499  # the status of a request whose client has left, in log and metrics
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_FORBIDDEN_TOGETHER = {"content-length", "transfer-encoding"}

log = logging.getLogger("pyengine.serve.server")


class Front:
    """The outermost layer of the app."""

    def __init__(self, app: ASGIApp, *, any_host: bool, hosts: Collection[str]) -> None:
        self._app, self._any_host, self._hosts = app, any_host, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        given = headers.get("x-request-id", "")
        own = given if _ID.fullmatch(given) else secrets.token_hex(8)
        seen = note(scope, id=own)
        begun = time.monotonic()
        status = 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = own
            await send(message)

        try:
            refused = self._refusal(headers)
            if refused is None:
                await self._app(scope, receive, told)
            else:
                close = {"connection": "close"}
                await error_response(refused, close, path=path)(scope, receive, told)
        except asyncio.CancelledError:  # the server ends and has waited long enough
            if not status:
                await error_response(ending(), path=path)(scope, receive, told)
        except Exception as error:
            log.error("%s the request failed", own, exc_info=error)
            if not status:
                failed = "[serve] the request failed; the server's log has the reason."
                await error_response(Refused(500, failed), path=path)(scope, receive, told)
        finally:
            if seen.get("left"):
                status = LEFT
            prompt, new = seen.get("tokens", (0, 0))
            log.info(
                "%s %s %s %d %d+%d tokens %.3f s",
                *(own, scope["method"], shown(path)[1:-1], status, prompt, new),
                time.monotonic() - begun,
            )

    def _refusal(self, headers: Headers) -> Refused | None:
        if {name.lower() for name in headers} >= _FORBIDDEN_TOGETHER:
            # A proxy may have taken the other one of the two for the request's end
            message = "[serve] a request must not have both Content-Length and Transfer-Encoding."
            return Refused(400, message)
        host = headers.get("host", "")
        name = host_name(host)
        if name is None and (host or not self._any_host):
            message = f"[serve] the host must be a name or an address but got {shown(host)}."
            return Refused(400, message)
        if self._any_host or is_loopback(name or "") or name in self._hosts:
            return None
        message = f"[serve] the host must be this machine's loopback but got {shown(host)}."
        return Refused(400, message)


def host_name(host: str) -> str | None:
    """The name or address in a Host header, without port and final dot; None if it is neither."""
    found = _HOST.fullmatch(host)
    return found[1].strip("[]").removesuffix(".").lower() or None if found else None


def allowed_names(hosts: Sequence[str]) -> set[str]:
    """What a Host header may name.

    Raises:
        ValueError: One is no name and no address, or has a port.
    """
    for host in hosts:
        found = _HOST.fullmatch(host)
        if not found or found[2]:
            raise ValueError(
                "[serve] an allowed host must be a name or an address without a port but got "
                f"{shown(host)}."
            )
    return {host_name(host) or "" for host in hosts}


def is_loopback(name: str) -> bool:
    """Whether a name or address is this machine's loopback, however it is spelled."""
    if name.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def note(scope: Scope, **what: Any) -> dict[str, Any]:
    """What is known of a request for its line in the log; some more of it."""
    known: dict[str, Any] = scope.setdefault("state", {}).setdefault("pyengine", {})
    known.update(what)
    return known


def error_response(
    error: Refused, headers: Mapping[str, str] | None = None, *, path: str = ""
) -> Response:
    """An error in the envelope of the protocol that a path belongs to."""
    retry = {"retry-after": str(RETRY_S)} if error.retry else {}
    body = messages.error_body(error) if path.startswith(messages.PATH) else error_body(error)
    return JSONResponse(body, error.status, {**(headers or {}), **retry})
