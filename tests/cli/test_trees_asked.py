"""``--tree``: what it prints, and what is refused in one sentence before any weights are read."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from pyengine import cli


def run(*arguments: str, given: str = "") -> Any:
    return CliRunner().invoke(cli.app, list(arguments), input=given)


def test_a_text_and_its_statistics() -> None:
    ask = ("generate", "Write Pong.", "--temperature", "0", "--max-tokens", "20")
    plain = run(*ask, "--block-size", "1", "--json")
    tree = run(*ask, "--drafter", "dflash", "--tree", "7", "--json", "--stats")
    assert plain.exit_code == tree.exit_code == 0
    told, stats = json.loads(tree.stdout), json.loads(tree.stdout)["stats"]
    assert told["text"] == json.loads(plain.stdout)["text"]
    assert stats["tree"] == 7 and stats["drafts_per_round"] == 7.0 and stats["block_size"] == 8
    assert sum(stats["drafted_by_depth"]) == 7 * stats["rounds"]
    by_depth = " ".join(f"{share:.2f}" for share in stats["kept_by_depth"])
    assert " tree         7.0 drafts per round, of which one path is kept\n" in tree.stderr
    assert f" by depth     {by_depth} of the rounds\n" in tree.stderr


def test_a_conversation_and_its_statistics() -> None:
    ask = ("chat", "--temperature", "0", "--max-tokens", "12")
    lines = "Write Pong.\nNow Snake.\n/stats\n"
    plain = run(*ask, "--block-size", "1", given=lines)
    tree = run(*ask, "--drafter", "dflash", "--tree", "5", given=lines)
    assert plain.exit_code == tree.exit_code == 0
    assert tree.stdout == plain.stdout
    assert " tree         5.0 drafts per round, of which one path is kept\n" in tree.stderr
    refused = run("chat", "--drafter", "dflash", "--tree", "5", "--json", given="x\n")
    told = "pyengine: [generate] verify must be coupled, or temperature 0, with a tree, whose "
    assert refused.exit_code == 2 and refused.stderr.startswith(told) and not refused.stdout


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tree", "16", "--drafter", "dflash"], "[generate] tree must be 1 to 15 but got 16."),
        (
            ["--tree", "7"],
            "[generate] drafter must be dflash with a tree, for it judges all places of a block at "
            "once, but got assistant.",
        ),
        (
            ["--tree", "7", "--drafter", "dflash", "--block-size", "1"],
            "[generate] block_size must be at least 2 with a tree but got 1.",
        ),
    ],
)
def test_no_weights_are_read_for_nothing(
    command: str, arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cli.common, "load_pair")
    done = run(command, *arguments, given="Write Pong.\n")
    assert (done.exit_code, done.stderr) == (2, f"pyengine: {told}\n")


@pytest.mark.parametrize("command", ["gemma-mtp", "sweep"])
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--tree", "many", "--drafter", "dflash"], "--tree must be whole numbers like 2,4,6"),
        (["--tree", "3,16", "--drafter", "dflash"], "[bench] tree must be 1 to 15 but got 16."),
        (["--tree", "3"], "[bench] drafter must be dflash with a tree"),
        (["--tree", "3", "--drafter", "dflash"], "but got residual."),
    ],
)
def test_a_bench_refuses_it_too(
    command: str, arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cli.common, "load_pair")
    done = run("bench", command, "--drafter", "assistant", *arguments)
    assert done.exit_code == 2 and told in done.stderr and done.stderr.count("\n") == 1
