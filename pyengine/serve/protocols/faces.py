"""What the server needs of a protocol: it reads a request, and a reply tells what became of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from typing import Protocol as Face

from pyengine.serve.protocols.ask import Ask, Refused
from pyengine.task import Result, Step


class Reply(Face):
    """Tells a client of its request, as one object or as events of a stream."""

    done: str  # what ends a stream

    def whole(self, echoed: Mapping[int, Step], results: Sequence[Result]) -> dict[str, Any]:
        """The answer; ``echoed`` are prompts that shall come back, by index."""

    def start(self) -> Iterable[dict[str, Any]]:
        """What a stream begins with."""

    def chunks(self, index: int, step: Step) -> Iterable[dict[str, Any]]:
        """What a round adds to a text; it may add nothing that can be told yet."""

    def end(self, index: int, result: Result) -> Iterable[dict[str, Any]]:
        """The end of a text."""

    def close(self, results: Sequence[Result]) -> Iterable[dict[str, Any]]:
        """What is told when all texts have ended."""

    def failed(self, error: Refused) -> Iterable[dict[str, Any]]:
        """The last of a stream that broke off."""

    def spell(self, event: dict[str, Any]) -> str:
        """An event as it is sent."""


class Protocol(Face):
    """One of the ways in which clients ask."""

    path: str

    def read(self, given: Mapping[str, Any]) -> Ask:
        """What a body asks, whose fields are those that were given.

        Raises:
            Refused, ValueError: The request cannot be served; the message says why.
        """

    def reply(self, ask: Ask) -> Reply:
        """Tells what became of it."""


def approximate(ask: Ask) -> dict[str, Any]:
    """What an answer has beside its text where tokens may leave early: what bounds its error.
    Nothing where they may not."""
    certificate = ask.task().early_exit
    return {} if certificate is None else {"early_exit": certificate.told()}


def data_event(event: dict[str, Any]) -> str:
    """A server-sent event without a name."""
    return f"data: {json.dumps(event)}\n\n"


def named_event(event: dict[str, Any]) -> str:
    """A server-sent event that is named after its type."""
    return f"event: {event['type']}\n{data_event(event)}"
