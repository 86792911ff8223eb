"""What the fake pair of the clients' tests says, and a server for it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from serving import Server
from teller import CONTEXT, telling, thinking_tokenizer

from pyengine.serve.protocols.ask import Limits

__all__ = ["BROKEN", "CONTEXT", "RAIN", "SAYS", "WEATHER", "needs", "telling_server"]

CALL = '<|tool_call>call:weather{town:<|"|>Bonn<|"|>}<tool_call|>'
RAIN = "It rains in Bonn."
BROKEN = "call:weather{town:"
# By the last of these words in a prompt
SAYS = {
    "fox": "jumps over the dog",
    "ponder": "a dog<channel|> It sleeps.",
    "rain": f"I look.{CALL}{CALL}<|tool_response>",
    "once": f"{CALL}<|tool_response>",
    "plainly": '{"town": "Bonn"}',
    "object": '```json\n{"town": "Bonn"}\n```',
    "broken": f"<|tool_call>{BROKEN}",
    "wet": RAIN,
}
WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "Weather of a town.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"type": "string", "description": "The town's name."}},
        "required": ["town"],
    },
}


def needs(module: str, extra: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"needs {module}, of the extra {extra}")


@contextmanager
def telling_server(folder: Path, **settings: Any) -> Iterator[Server]:
    """A server whose pair says these things; any model's name will do but for strange ones."""
    tokenizer = thinking_tokenizer(folder)
    with Server(telling(tokenizer, SAYS), Limits(streams=1), **settings) as server:
        yield server
