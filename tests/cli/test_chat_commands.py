"""Commands of `pyengine chat` on a pipe, and conversations in files: saved, refused, taken up."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from text_fakes import script_pair, write_tokenizers
from typer.testing import CliRunner

from pyengine import cli
from pyengine.chat import Chat
from pyengine.cli.chat import COMMANDS
from pyengine.text.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


@pytest.fixture
def pair(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    made = script_pair(tok, "jumps")
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: made)
    monkeypatch.chdir(tmp_path)
    return made


def run(stdin: str | bytes, *arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["chat", *arguments], input=stdin)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/hlep", "[chat] /hlep is not a command; did you mean /help?"),
        ("/hepl me", "[chat] /hepl is not a command; did you mean /help?"),
        ("/xyzzy", "[chat] /xyzzy is not a command; /help lists the commands."),
        ("/Bye", "[chat] /Bye is not a command; did you mean /bye?"),
        ("/bye now", "[chat] the command must be /bye but got /bye now."),
        ("/save", "[chat] the command must be /save FILE but got /save."),
        ("/stats", "[chat] a question must be asked before there is a result."),
    ],
)
def test_what_is_no_command_does_not_go_to_the_model(pair: Any, line: str, said: str) -> None:
    done = run(f"{line}\nfox\n")
    assert done.exit_code == 2 and done.stdout == "" and pair.target.prompt == []
    assert done.stderr.startswith(f"pyengine: {said}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "text", [" /help", "//help", "/ help", "/usr/bin/fox", "/* fox */", "/**/ fox", "/1/2 fox"]
)
def test_text_that_begins_with_a_slash_can_be_sent(pair: Any, tok: Tokenizer, text: str) -> None:
    done = run(f"{text}\n")
    assert (done.exit_code, done.stdout) == (0, "jumps\n")
    assert tok.decode(pair.target.prompt) == f"user\n{text.strip()}\nmodel\n"


def test_help_names_every_command(pair: Any) -> None:
    done = run("/help\n/bye\nfox\n")
    assert done.exit_code == 0 and done.stdout == "" and pair.target.prompt == []
    words = " ".join(done.stderr.split())
    for name, purpose in COMMANDS.items():
        assert f"{name} {purpose}" in words


@pytest.mark.parametrize("text", ["fox\n", "\nfox\n", "fox"])
def test_a_byte_order_mark_is_not_part_of_the_first_turn(
    pair: Any, tok: Tokenizer, text: str
) -> None:
    for begin in ("\ufeff", ""):
        assert run((begin + text).encode()).stdout == "jumps\n"
        assert tok.decode(pair.target.prompt) == "user\nfox\nmodel\n"
        CliRunner().invoke(cli.app, ["generate"], input=(begin + text).encode())
        assert tok.decode(pair.target.prompt) == "user\nfox\nmodel\n"
    inside = run("fox\n\ufeffdog\n".encode())
    assert inside.exit_code == 0 and "\ufeffdog" in tok.decode(pair.target.prompt)
    done = CliRunner().invoke(cli.app, ["generate"], input="\ufeff".encode())
    assert done.exit_code == 2 and "prompt must not be empty" in done.stderr


def test_saved_and_taken_up_in_another_process(pair: Any, tok: Tokenizer, tmp_path: Path) -> None:
    done = run("fox\n/save a.json\ndog\n/save a.json\n", "--system", "Brief.")
    assert done.exit_code == 0 and done.stdout == "jumps\njumps\n"
    assert done.stderr == "Saved: 2 turns to a.json\nSaved: 4 turns to a.json\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    done = run("/load a.json\nfox\n")
    assert done.stderr == "Loaded: 4 turns from a.json\n"
    want = "system\nBrief." + "".join(f"\nuser\n{q}\nmodel\njumps" for q in ("fox", "dog"))
    assert tok.decode(pair.target.prompt) == f"{want}\nuser\nfox\nmodel\n"


def test_an_empty_conversation_comes_back(pair: Any, tok: Tokenizer) -> None:
    assert run("/save a.json\n/load a.json\nfox\n").stdout == "jumps\n"
    assert tok.decode(pair.target.prompt) == "user\nfox\nmodel\n"


@pytest.mark.parametrize("path", ["there.json", "folder", "no/where.json", "/dev/full"])
def test_files_that_cannot_be_saved_to(pair: Any, tmp_path: Path, path: str) -> None:
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "folder").mkdir()
    done = run(f"fox\n/save {path}\n")
    assert done.exit_code == 2 and done.stdout == "jumps\n"
    assert re.fullmatch(r"pyengine: \[chat\] .* must .*\n", done.stderr), done.stderr
    assert (tmp_path / "there.json").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "there.json"]


GOOD = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    "held",
    [
        None,
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        b'{"messages": []}',
        {"model": "x", "messages": [], "more": 1},
        {"model": "x", "messages": {}},
        {"model": "x", "messages": [3]},
        {"model": "x", "messages": GOOD[:1]},
        {"model": "x", "messages": GOOD[::-1]},
        {"model": "x", "messages": [*GOOD, {"role": "system", "content": "a"}]},
        {"model": "x", "messages": [{"role": "tool", "content": "a"}, GOOD[1]]},
        {"model": "x", "messages": [{"role": ["user"], "content": "a"}, GOOD[1]]},
        {"model": "x", "messages": [{"role": "user"}, GOOD[1]]},
        {"model": "x", "messages": [{"role": "user", "content": None}, GOOD[1]]},
        {"model": "x", "messages": [{"role": "user", "content": ["a"]}, GOOD[1]]},
        {"model": "x", "messages": [{"role": "user", "content": "\ud800"}, GOOD[1]]},
        {"model": "x", "messages": [{**GOOD[0], "name": "me"}, GOOD[1]]},
    ],
)
def test_damaged_files_are_one_sentence(pair: Any, tmp_path: Path, held: Any) -> None:
    file = tmp_path / "a.json"
    if held is not None:
        file.write_bytes(held if isinstance(held, bytes) else json.dumps(held).encode())
    done = run("/load a.json\nfox\n")
    assert done.exit_code == 2 and done.stdout == "" and pair.target.prompt == []
    assert done.stderr.startswith("pyengine: [chat] ") and done.stderr.count("\n") == 1


def test_a_refused_conversation_changes_nothing(pair: Any) -> None:
    chat = Chat(pair, system="Brief.")
    chat.resume([{"role": "system", "content": "Long."}, *GOOD])
    before = chat.messages
    assert before == [{"role": "system", "content": "Long."}, *GOOD]
    with pytest.raises(ValueError, match=r"\[chat\] messages must be of user and assistant in tu"):
        chat.resume(GOOD[:1])
    assert chat.messages == before
