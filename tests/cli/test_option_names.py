"""Options have one name each in all commands; the published spellings are taken beside them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from pyengine import cli
from pyengine.bench import gemma_mtp
from pyengine.cli.bench import PUBLISHED

COMMANDS = typer.main.get_command(cli.app)


def options(*path: str) -> dict[str, Any]:
    """Each option of a command by its name."""
    found: Any = COMMANDS
    for name in path:
        found = found.commands[name]
    return {name: option for option in found.params for name in option.opts}


def help_of(*path: str) -> str:
    out = CliRunner().invoke(cli.app, [*path, "--help"]).stdout
    return re.sub(r"\x1b\[[0-9;]*m", "", out)


@pytest.mark.parametrize(
    "command", ["generate", "chat", "serve", "bench gemma-mtp", "bench sweep", "bench card"]
)
def test_the_pair_is_named_alike_everywhere(command: str) -> None:
    path = command.split()
    text = help_of(*path)
    for name in ("--target", "--assistant", "--bundle"):
        assert name in options(*path) and name in text
    for name in PUBLISHED:
        assert name not in options(*path) and name not in text


def test_defaults_of_generate_and_chat_are_the_same() -> None:
    own, other = options("generate"), options("chat")
    shared = set(own) & set(other) - {"--help"}
    assert {"--max-tokens", "--seed", "--verify", "--block-size", "--temperature"} <= shared
    for name in shared:
        assert own[name].default == other[name].default, name
    assert own["--max-tokens"].default is None and own["--seed"].default is None


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the bench was asked for; it does not get as far as a run."""
    seen: dict[str, Any] = {}

    def check_settings(blocks: list[int], *_: Any) -> None:
        seen["blocks"] = blocks

    def load_pair(target: Any, assistant: Any, *_: Any) -> None:
        seen["pair"] = (target, assistant)
        raise ValueError("[load] this is far enough.")

    monkeypatch.setattr(gemma_mtp, "check_settings", check_settings)
    monkeypatch.setattr(cli.common, "load_pair", load_pair)
    return seen


@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
@pytest.mark.parametrize("published", [True, False])
def test_the_published_command_line_works(
    asked: dict[str, Any], form: str, published: bool
) -> None:
    values = {"--target-model": "t", "--assistant-model": "a", "--draft-block-sizes": "3,5"}
    assert set(values) == set(PUBLISHED)
    words = [
        form.format(name if published else PUBLISHED[name], value) for name, value in values.items()
    ]
    other = "--prompt-suite {} --max-tokens 9 --temperature 1 --top-p 1 --top-k 0 --seed 3"
    suite = str(gemma_mtp.__file__).replace("gemma_mtp.py", "prompts/nano.jsonl")
    done = CliRunner().invoke(
        cli.app,
        ["bench", "gemma-mtp", *" ".join([*words, other.format(suite)]).split(), "--repeats=1"],
    )
    assert done.exit_code == 2 and "far enough" in done.stderr, done.stderr
    assert asked == {"blocks": [3, 5], "pair": ("t", "a")}


def test_the_published_flags_are_there() -> None:
    flags = "prompt-suite max-tokens temperature top-p top-k seed repeats allow-unverified-gemma "
    known = options("bench", "gemma-mtp")
    assert all(f"--{flag}" in known for flag in [*flags.split(), "output", "json"])
