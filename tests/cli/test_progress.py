"""Long work shows how far it is: reading weights and prompts, converting."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyengine import cli
from pyengine.checkpoint.pair import load
from pyengine.model.plan import CHUNK

FLOATS = Path(__file__).parents[1] / "fixtures"


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error as a terminal that moves."""
    monkeypatch.setattr(cli.common, "moves", lambda: True)


def shares(text: str, what: str) -> list[int]:
    """The percentages that were shown."""
    return [int(share) for share in re.findall(rf"\r{what} \.\.\. (\d+) %", text)]


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("name", ["uni12", "e2b", "moe26", "dense31"])
def test_reading_weights_counts_every_byte(name: str, dtype: str | None) -> None:
    import mlx.core as mx

    told: list[tuple[int, int]] = []
    parts = [FLOATS / name / part for part in ("target", "assistant")]
    load(
        *[part for part in parts if part.is_dir()],
        dtype=getattr(mx, dtype) if dtype else None,
        on_progress=lambda *now: told.append(now),
    )
    assert len(told) > 20 and told == sorted(told)
    [total] = {total for _, total in told}
    # Ids that a file keeps in 64 bits are counted as that and held in 32
    assert 0.99 * total < told[-1][0] <= total


def test_commands_show_the_weights(moves: None) -> None:
    done = CliRunner().invoke(cli.app, ["generate", "Snake", "--max-tokens", "2"])
    seen = shares(done.stderr, "Reading the weights")
    assert done.exit_code == 0 and len(seen) > 20
    assert seen == sorted(seen) and seen[-1] == 100


@pytest.mark.parametrize(("least", "told"), [(0.0, True), (3600.0, False)])
def test_a_long_load_is_told(monkeypatch: pytest.MonkeyPatch, least: float, told: bool) -> None:
    monkeypatch.setattr(cli.common, "WORTH_TELLING_S", least)
    done = CliRunner().invoke(cli.app, ["generate", "Snake", "--max-tokens", "2"])
    said = re.findall(r"^The weights were read in \d+\.\d s\.$", done.stderr, re.MULTILINE)
    assert done.exit_code == 0 and bool(said) is told


LONG = "snake " * 2 * CHUNK


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_commands_show_the_prompt(moves: None, command: str) -> None:
    words = [command, "--max-tokens", "2", *(["--raw"] if command == "generate" else [])]
    done = CliRunner().invoke(cli.app, words, input=LONG)
    seen = shares(done.stderr, "Reading the prompt")
    assert done.exit_code == 0 and len(seen) >= 2
    assert seen == sorted(seen) and 0 < seen[0] < seen[-1] < 100


def test_nothing_is_drawn_on_a_pipe() -> None:
    done = CliRunner().invoke(cli.app, ["generate", "--raw", "--max-tokens", "2"], input=LONG)
    assert done.exit_code == 0 and "Reading" not in done.stderr and "\r" not in done.stderr


def test_ctrl_c_between_two_chunks_ends(monkeypatch: pytest.MonkeyPatch, moves: None) -> None:
    """It comes with the first share that is shown, so that the second is never reached."""
    whole = cli.common.typer.echo

    def echo(text: object = "", **kw: Any) -> None:
        whole(text, **kw)
        if re.search(r"prompt \.\.\. \d+ %", str(text)):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli.common.typer, "echo", echo)
    done = CliRunner().invoke(cli.app, ["generate", "--raw", "--max-tokens", "2"], input=LONG)
    assert done.exit_code == 130 and done.stdout == ""
    assert len(shares(done.stderr, "Reading the prompt")) == 1
    assert done.stderr.endswith("Interrupted.\n")


def test_converting_is_shown(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["convert", str(FLOATS / "uni12"), str(tmp_path / "out")])
    seen = [int(share) for share in re.findall(r"converting: (\d+) %", done.stderr)]
    assert done.exit_code == 0 and len(seen) > 5 and seen == sorted(seen) and seen[-1] == 100
