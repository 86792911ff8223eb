"""Whole agents in a terminal: Claude Code and Codex ask, run the command that they are told to, and
go on with what it printed. Their prompts are 36,000 and 17,000 of the pair's tokens."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import teller
from serving import Server

FOLDER = Path(__file__).parent / "agents"
COMMANDS = FOLDER / "node_modules" / ".bin"

pytestmark = [
    pytest.mark.agents,
    pytest.mark.skipif(
        not COMMANDS.exists(), reason="needs npm install --prefix tests/clients/agents"
    ),
]


def count(name: str, argument: str) -> str:
    """A call of a tool that runs commands."""
    return (
        f'<|tool_call>call:{name}{{{argument}:<|"|>echo fox-$((40+2))<|"|>}}'
        "<tool_call|><|tool_response>"
    )


@pytest.fixture
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    call, thought = request.param
    answers = {
        "": f"{thought}Nothing.",
        "Count the foxes": f"{thought}I count.{call}",
        "fox-42": f"{thought}There is fox-42.",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teller, "CONTEXT", 1 << 18)
        pair = teller.telling(teller.thinking_tokenizer(tmp_path), answers)
        with Server(pair, key="sesame") as made:
            yield made


def run(folder: Path, command: list[str], **variables: str) -> list[dict[str, object]]:
    """In a home of its own; the JSON lines that it prints."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    done = subprocess.run(
        [str(COMMANDS / command[0]), *command[1:]],
        env={**kept, "HOME": str(folder), **variables},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("server", [(count("Bash", "command"), "hm<channel|>")], indirect=True)
def test_claude_code(server: Server, tmp_path: Path) -> None:
    """It asks for thoughts; the answers are behind them."""
    [told] = run(
        tmp_path,
        ["claude", "-p", "Count the foxes", "--allowedTools", "Bash", "--output-format", "json"],
        ANTHROPIC_BASE_URL=server.url,
        ANTHROPIC_API_KEY="sesame",
        ANTHROPIC_MODEL="teller",
        ANTHROPIC_DEFAULT_HAIKU_MODEL="teller",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
    )
    assert told["result"] == "There is fox-42."
    assert not told["is_error"]


@pytest.mark.parametrize("server", [(count("exec_command", "cmd"), "")], indirect=True)
def test_codex(server: Server, tmp_path: Path) -> None:
    """It offers a namespace of functions and a search of the web beside its own functions."""
    config = {
        "model": "teller",
        "model_provider": "here",
        "model_providers.here.name": "here",
        "model_providers.here.base_url": f"{server.url}/v1",
        "model_providers.here.wire_api": "responses",
        "model_providers.here.env_key": "KEY",
    }
    settings = [part for key, value in config.items() for part in ("-c", f'{key}="{value}"')]
    told = run(
        tmp_path,
        [
            *("codex", "exec", *settings, "--json", "--skip-git-repo-check"),
            *("--dangerously-bypass-approvals-and-sandbox", "Count the foxes"),
        ],
        KEY="sesame",
    )
    items = [line["item"] for line in told if line["type"] == "item.completed"]
    said = [item["text"] for item in items if item["type"] == "agent_message"]  # type: ignore[index]
    assert said == ["I count.", "There is fox-42."]
    [ran] = [item for item in items if item["type"] == "command_execution"]  # type: ignore[index]
    assert ran["aggregated_output"] == "fox-42\n"  # type: ignore[index]
