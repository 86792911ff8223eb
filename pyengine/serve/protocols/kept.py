"""Answers of the Responses API that are kept in memory for requests that follow on them."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

from pyengine.serve.protocols.ask import Limits, Refused
from pyengine.untrusted import shown


class Kept(NamedTuple):
    """A conversation up to an answer, and the answer, which has its items under "output"."""

    messages: list[dict[str, Any]]
    response: dict[str, Any]
    nbytes: int


class Store:
    """So many answers and bytes, the oldest are forgotten first. Readers come from any thread.

    An answer counts with all of its conversation, though parts of it may be another's too.
    """

    def __init__(self, limits: Limits) -> None:
        self._most, self._most_bytes = limits.kept, limits.kept_bytes
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._items: dict[str, dict[str, Any]] = {}
        self._nbytes = 0
        self._lock = threading.Lock()

    def keep(self, messages: list[dict[str, Any]], response: dict[str, Any]) -> None:
        kept = Kept(messages, response, len(json.dumps([messages, response])))
        with self._lock:
            self._kept[response["id"]] = kept
            self._items.update((item["id"], item) for item in response["output"])
            self._nbytes += kept.nbytes
            while len(self._kept) > self._most or self._nbytes > self._most_bytes:
                self._drop(next(iter(self._kept)))

    def forget(self, name: str) -> None:
        """Keep an answer no longer; errors as :meth:`response`."""
        with self._lock:
            if name not in self._kept:
                raise _lost(name, "the path")
            self._drop(name)

    def _drop(self, name: str) -> None:
        old = self._kept.pop(name)
        self._nbytes -= old.nbytes
        for item in old.response["output"]:
            del self._items[item["id"]]

    def response(self, name: str) -> dict[str, Any]:
        """An answer, as its request was answered.

        Raises:
            Refused: It is not there, or not any more.
        """
        return self._find(name, "the path").response

    def conversation(self, name: str) -> Sequence[dict[str, Any]]:
        """The messages up to an answer and with it; errors as :meth:`response`."""
        return self._find(name, "previous_response_id").messages

    def _find(self, name: str, where: str) -> Kept:
        with self._lock:
            kept = self._kept.get(name)
        if kept is None:
            raise _lost(name, where)
        return kept

    def item(self, name: str, where: str) -> dict[str, Any]:
        """An item of an answer; errors as :meth:`response`."""
        with self._lock:
            item = self._items.get(name)
        if item is None:
            raise Refused(
                404,
                f"[serve] {where} must name an item that is kept but {shown(name)} is not, or not "
                "any more.",
                param="input",
            )
        return item


def _lost(name: str, where: str) -> Refused:
    follows = where == "previous_response_id"
    return Refused(
        404,
        f"[serve] {where} must name an answer that is kept but {shown(name)} is not, or not any "
        "more.",
        code="previous_response_not_found" if follows else "not_found",
        param=where if follows else None,
    )
