"""Limits that cut an answer, and seeds that were drawn, are told."""

from __future__ import annotations

import json
from typing import Any

import pytest
from text_fakes import script_pair, write_tokenizers
from typer.testing import CliRunner

from pyengine import cli
from pyengine.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


def run(pair: Any, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pair)
    return CliRunner().invoke(cli.app, list(arguments), input="fox\n")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_an_answer_is_as_long_as_the_model_makes_it(
    tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    text = "jumps over a lazy dog " * 400
    pair = script_pair(tok, text.strip(), context=8192)
    assert len(pair.target.script) > 1100
    done = run(pair, monkeypatch, command)
    assert (done.exit_code, done.stdout, done.stderr) == (0, f"{text.strip()}\n", "")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_cut_an_answer_is_told(
    tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    pair = script_pair(tok, "jumps over " * 300, context=200)
    done = run(pair, monkeypatch, command, "--max-tokens", "9")
    cut = "The answer was cut at 9 tokens; a larger --max-tokens lifts that.\n"
    assert (done.exit_code, done.stderr) == (0, cut)
    full = "The answer was cut: the context of 200 tokens is full.\n"
    for more in ([], ["--max-tokens", "5000"]):
        done = run(pair, monkeypatch, command, *more)
        assert (done.exit_code, done.stderr) == (0, full)
    done = run(pair, monkeypatch, command, "--json")
    assert json.loads(done.stdout)["finish_reason"] == "length" and done.stderr == ""
    # A stop string or a stop id within the limit cuts nothing
    assert run(pair, monkeypatch, command, "--stop", "over").stderr == ""
    short = script_pair(tok, "jumps")
    count = str(len(short.target.script))
    assert run(short, monkeypatch, command, "--max-tokens", count).stderr == ""


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_seeds_are_drawn_and_told(
    tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    pair = script_pair(tok, "jumps over")

    def seed(*more: str) -> int:
        done = run(pair, monkeypatch, command, "--json", *more)
        return int(json.loads(done.stdout)["stats"]["seed"])

    drawn = {seed() for _ in range(4)}
    assert len(drawn) == 4 and seed("--seed", "7") == 7 and seed("--seed", "0") == 0
    if command == "generate":
        said = run(pair, monkeypatch, command, "--stats", "--seed", "12345").stderr
        assert ["seed", "12345"] in [line.split() for line in said.splitlines()]


def test_a_told_seed_gives_the_text_again() -> None:
    def generate(*more: str) -> dict[str, Any]:
        words = ["generate", "Write a Snake game.", "--max-tokens", "60", "--json", *more]
        return json.loads(CliRunner().invoke(cli.app, [*words, "--temperature", "1.5"]).stdout)

    first, second = generate(), generate()
    assert first["text"] != second["text"]
    assert generate("--seed", str(first["stats"]["seed"]))["tokens"] == first["tokens"]
