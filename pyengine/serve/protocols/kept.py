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
    """A conversation up to an answer, and the answer's items."""

    messages: list[dict[str, Any]]
    items: list[dict[str, Any]]
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

    def keep(self, name: str, messages: list[dict[str, Any]], items: list[dict[str, Any]]) -> None:
        kept = Kept(messages, items, len(json.dumps([messages, items])))
        with self._lock:
            self._kept[name] = kept
            self._items.update((item["id"], item) for item in items)
            self._nbytes += kept.nbytes
            while len(self._kept) > self._most or self._nbytes > self._most_bytes:
                _, old = self._kept.popitem(last=False)
                self._nbytes -= old.nbytes
                for item in old.items:
                    del self._items[item["id"]]

    def conversation(self, name: str) -> Sequence[dict[str, Any]]:
        """The messages up to an answer and with it.

        Raises:
            Refused: It is not there, or not any more.
        """
        with self._lock:
            kept = self._kept.get(name)
        if kept is None:
            raise Refused(
                404,
                f"[serve] previous_response_id must name an answer that is kept but {shown(name)} "
                "is not, or not any more.",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        return kept.messages

    def item(self, name: str, where: str) -> dict[str, Any]:
        """An item of an answer; errors as :meth:`conversation`."""
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
