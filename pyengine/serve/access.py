"""Who may ask: a key that requests must carry, and the web pages that may ask from elsewhere."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from pyengine.serve.front import error_response
from pyengine.serve.protocols.ask import Refused
from pyengine.serve.web import FILES
from pyengine.untrusted import shown

# What watches a server has no key, nor has a page before somebody types it there
OPEN = ("/health", *FILES)
_KEY = re.compile(r"[!-~]{1,512}")
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")


class KeyGuard:
    """Lets only requests with the key through, as a bearer's token or in ``x-api-key``."""

    def __init__(self, app: ASGIApp, *, key: str) -> None:
        self._app, self._digest = app, _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["path"] in OPEN or scope["method"] == "OPTIONS"
        if is_open or self._is_known(Headers(scope=scope)):
            await self._app(scope, receive, send)
            return
        message = "[serve] the request must carry the server's key but does not."
        refused = Refused(401, message, code="invalid_api_key")
        headers = {"www-authenticate": "Bearer", "connection": "close"}
        await error_response(refused, headers, path=scope["path"])(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip()] if scheme.lower() == "bearer" else []
        given.append(headers.get("x-api-key", ""))
        # Of digests, whose length says nothing, and in a time that says nothing either
        return True in [hmac.compare_digest(_digest(one), self._digest) for one in given]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def check_key(key: str | None) -> None:
    """Refuse what a header cannot carry, without showing it.

    Raises:
        ValueError: The key has blanks, other letters than ASCII's, or too many.
    """
    if key is not None and not _KEY.fullmatch(key):
        raise ValueError("[serve] the key must be 1 to 512 visible ASCII characters but is not.")


def check_origins(origins: Sequence[str]) -> None:
    """Refuse what no browser names as the origin of a page.

    Raises:
        ValueError: One is no scheme and host, nor ``*``.
    """
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError(
                "[serve] an origin must be like https://example.com:8443, or *, but got "
                f"{shown(origin)}."
            )
