"""What a request of OpenAI's comes to, read as the server reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

pytest.importorskip("pydantic", reason="needs the extra serve")

from pyengine.serve.protocols.ask import Ask, Limits
from pyengine.serve.protocols.chat import Chat
from pyengine.serve.protocols.completions import Completions


def read_request(pair: Any, body: Mapping[str, Any], limits: Limits, chat: bool) -> Ask:
    return (Chat if chat else Completions)(pair, limits).read(body)
