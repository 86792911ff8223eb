"""Clients in JavaScript: OpenAI's own, and Vercel's AI SDK by both of OpenAI's protocols."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server
from telling import RAIN, SAYS, WEATHER, telling_server

FOLDER = Path(__file__).parent / "npm"

pytestmark = [
    pytest.mark.npm,
    pytest.mark.skipif(shutil.which("node") is None, reason="needs node"),
    pytest.mark.skipif(
        not (FOLDER / "node_modules").exists(),
        reason="needs npm install --prefix tests/clients/npm",
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with telling_server(tmp_path_factory.mktemp("pair"), key="sesame") as made:
        yield made


def run(server: Server, script: str, *arguments: str) -> dict[str, Any]:
    given = [f"{server.url}/v1", "sesame", json.dumps(WEATHER), *arguments]
    done = subprocess.run(
        ["node", script, *given], cwd=FOLDER, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_openai(server: Server) -> None:
    told = run(server, "openai.mjs")
    for way in ("whole", "streamed", "response", "events"):
        assert told[way] == SAYS["fox"], way
    assert told["reason"] == "tool_calls" and told["calls"] == [{"town": "Bonn"}] * 2
    assert told["after"] == RAIN
    assert told["error"]["name"] == "BadRequestError" and told["error"]["status"] == 400
    assert "seed must be 0" in told["error"]["message"]


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_ai_sdk(server: Server, api: str) -> None:
    told = run(server, "ai.mjs", api)
    assert told["whole"] == told["streamed"] == SAYS["fox"]
    assert told["calls"] == [{"town": "Bonn"}] * 4  # two whole, two streamed
    assert told["after"] == RAIN and told["afterStreamed"] == "I look." + RAIN
    assert told["object"] == {"town": "Bonn"}
    assert told["error"]["status"] == 400
    assert "max_tokens must be at most 8192" in told["error"]["message"]
