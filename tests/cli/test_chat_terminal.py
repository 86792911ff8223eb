"""`pyengine chat` in a terminal of its own: keys, pasting, history, Ctrl-C, commands, speed."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from text_fakes import write_tokenizers

HERE = Path(__file__).parents[1] / "helpers"
LIMIT_S = 60.0
CHAT = """
import json, sys
sys.path.insert(0, {here!r})
from pathlib import Path
from text_fakes import script_pair
from pyengine import cli
from pyengine.__main__ import main
from pyengine.text.tokenizer import load_tokenizer
pair = script_pair(
    load_tokenizer(Path({folder!r})), {script!r}, held_after={held_after!r}, embedded={embedded!r}
)
whole = pair.target.prefill
def prefill(ids, cache, reader):
    with open({folder!r} + "/prompts", "a") as file:
        print(json.dumps(pair.tokenizer.decode(list(ids))), file=file)
    return whole(ids, cache, reader=reader)
pair.target.prefill = prefill
cli.common.load_pair = lambda *arguments: pair
sys.argv = ["pyengine", *{arguments!r}]
main()
"""
UP, PASTE, PASTED, ALT_ENTER = "\x1b[A", "\x1b[200~", "\x1b[201~", "\x1b\r"
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """A process that has a terminal as its standard streams, and what it has shown there."""

    def __init__(self, folder: Path, arguments: list[str], **pair: Any) -> None:
        pair = {"script": "jumps over", "held_after": None, "embedded": False, **pair}
        source = CHAT.format(here=str(HERE), folder=str(folder), arguments=arguments, **pair)
        self.prompts = folder / "prompts"
        self.fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", source],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"},
            preexec_fn=_own_terminal,
        )
        os.close(theirs)
        self.shown, self.seen = "", 0
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def until(self, pattern: str) -> str:
        """What is shown up to a match, from the last one on."""
        end = time.monotonic() + LIMIT_S
        while not (found := re.search(pattern, self.shown[self.seen :])):
            assert self._read(end), f"no {pattern!r} in {self.shown!r}"
        before = self.seen
        self.seen += found.end()
        return self.shown[before : self.seen]

    def prompt(self) -> None:
        """Until the editor waits: bracketed paste is on and the prompt is drawn."""
        self.until(r"\x1b\[\?2004h(?s:.*?)>")

    def end(self) -> int:
        """The exit code."""
        end = time.monotonic() + LIMIT_S
        while self._read(end):
            pass
        return self.process.wait(timeout=LIMIT_S)

    def said(self) -> list[str]:
        """The prompts that the model was given."""
        lines = self.prompts.read_text().splitlines() if self.prompts.exists() else []
        return [json.loads(line) for line in lines]

    def _read(self, end: float) -> bool:
        ready, _, _ = select.select([self.fd], [], [], max(end - time.monotonic(), 0))
        if not ready:
            return False
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # Linux says so when the other side is closed
            return False
        self.shown += self._decode(data)
        return bool(data)


def _own_terminal() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return folder


@pytest.fixture
def folder(tokenizer: Path, tmp_path: Path) -> Path:
    """The process's own folder."""
    return Path(shutil.copytree(tokenizer, tmp_path, dirs_exist_ok=True))


@contextmanager
def talk(folder: Path, *arguments: str, **pair: Any) -> Iterator[Terminal]:
    terminal = Terminal(folder, ["chat", *arguments], **pair)
    try:
        terminal.prompt()
        yield terminal
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.fd)


def last_turn(prompt: str) -> str:
    return prompt.rpartition("user\n")[2].removesuffix("\nmodel\n")


def test_a_pasted_text_of_four_lines_is_one_turn(folder: Path) -> None:
    with talk(folder) as it:
        it.send(f"{PASTE}fox\r\nover\rlazy\ndog{PASTED}\r")
        it.until("jumps over")
        it.prompt()
        it.send("/bye\r")
        assert it.end() == 0
        assert [last_turn(prompt) for prompt in it.said()] == ["fox\nover\nlazy\ndog"]


@pytest.mark.parametrize("keys", [f"fox{ALT_ENTER}dog\r", "fox\\\rdog\r"])
def test_keys_for_a_new_line(folder: Path, keys: str) -> None:
    with talk(folder) as it:
        it.send(keys)
        it.until("jumps over")
        it.prompt()
        assert [last_turn(prompt) for prompt in it.said()] == ["fox\ndog"]


def test_the_line_is_edited(folder: Path) -> None:
    """Left twice, a letter, Ctrl-E, a letter, Backspace."""
    with talk(folder) as it:
        it.send("fx\x1b[Do\x05y\x7f\r")
        it.until("jumps over")
        assert last_turn(it.said()[0]) == "fox"


def test_earlier_turns_come_back(folder: Path) -> None:
    with talk(folder) as it:
        for text in ("fox", f"{PASTE}lazy\ndog{PASTED}"):
            it.send(f"{text}\r")
            it.until("jumps over")
            it.prompt()
        it.send(f"{UP}{UP}{UP}\r")
        it.until("jumps over")
        assert [last_turn(prompt) for prompt in it.said()] == ["fox", "lazy\ndog", "fox"]
    assert not any(path.name.startswith(".") for path in folder.iterdir())


def test_ctrl_c_during_an_answer_stops_it_alone(folder: Path) -> None:
    with talk(folder, "--block-size", "1", script="jumps over " * 99, held_after=20) as it:
        it.send("fox\r")
        it.until("jumps over")
        it.send(CTRL_C)
        it.until(r" \.\.\.\r\n")
        it.until(r"\d+ tokens, \d+\.\d tok/s\r\n")
        it.prompt()
        it.send("dog\r")
        it.until("jumps over")
        it.send(CTRL_C)
        it.prompt()
        # What was said before the stop is part of the conversation
        assert re.search(r"user\nfox\nmodel\njumps over.*\nuser\ndog\nmodel\n$", it.said()[1])
        it.send(CTRL_D)
        assert it.end() == 0 and "Traceback" not in it.shown


def test_ctrl_c_at_the_prompt_drops_the_line_and_then_ends(folder: Path) -> None:
    with talk(folder) as it:
        it.send("fox")
        it.until("fox")
        it.send(CTRL_C)
        it.prompt()
        it.send(CTRL_C)
        it.until("Interrupted.")
        assert it.end() == 130 and it.said() == [] and "Traceback" not in it.shown


def test_ctrl_d_ends(folder: Path) -> None:
    with talk(folder) as it:
        it.send(CTRL_D)
        assert it.end() == 0


def test_commands(folder: Path) -> None:
    with talk(folder) as it:
        it.send("/hlep\r")
        it.until(r"/hlep is not a command; did you mean /help\?")
        it.prompt()
        it.send("/help\r")
        text = it.until("Ctrl-D")
        for word in ("/new", "/stats", "/save FILE", "/load FILE", "/bye", "Alt-Enter", "a space"):
            assert word in " ".join(text.split()), word
        it.prompt()
        it.send("/stats\r")
        it.until("a question must be asked")
        it.prompt()
        it.send("fox\r")
        it.until(r"jumps over\r\n\d+ tokens, \d+\.\d tok/s, acceptance \d\.\d\d\r\n")
        it.prompt()
        it.send("/stats\r")
        text = it.until(r"turns +2, 0 forgotten")
        for word in ("seed", "acceptance", "tok/s", "of 4096 tokens"):
            assert word in text
        it.prompt()
        for text in (" /help me", "//dog", "/a/b fox"):
            it.send(f"{text}\r")
            it.until("jumps over")
            it.prompt()
        said = [last_turn(prompt) for prompt in it.said()]
        assert said == ["fox", "/help me", "//dog", "/a/b fox"]  # the template trims


def test_a_conversation_is_saved_and_taken_up(folder: Path) -> None:
    with talk(folder, "--system", "Brief.") as it:
        it.send("fox\r")
        it.until("jumps over")
        it.prompt()
        it.send("/save kept file.json\r")
        it.until("Saved: 2 turns to kept file.json")
        it.prompt()
        it.send("/new\r")
        it.prompt()
        it.send("/save kept file.json\r")
        it.until("must not exist yet but kept file.json does")
        it.prompt()
        it.send("/load kept file.json\r")
        it.until("Loaded: 2 turns from kept file.json")
        it.prompt()
        it.send("dog\r")
        it.until("jumps over")
        it.prompt()
        assert it.said()[1] == "system\nBrief.\nuser\nfox\nmodel\njumps over\nuser\ndog\nmodel\n"
        it.send("/save kept file.json\r")  # its own file
        it.until("Saved: 4 turns to")
    file = folder / "kept file.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert [message["role"] for message in json.loads(file.read_text())["messages"]] == [
        "system",
        *["user", "assistant"] * 2,
    ]


def test_the_demo_pair_is_introduced_once(folder: Path) -> None:
    with talk(folder, embedded=True) as it:
        it.send("fox\r")
        it.until("jumps over")
        it.prompt()
        assert it.shown.count("embedded demo pair (10 MB)") == 1
    with talk(folder) as it:
        assert "demo" not in it.shown


def test_generate_introduces_it_too(folder: Path) -> None:
    for embedded in (True, False):
        it = Terminal(folder, ["generate", "fox"], embedded=embedded)
        assert it.end() == 0 and it.shown.count("embedded demo pair (10 MB)") == embedded
        assert "jumps over" in it.shown
        os.close(it.fd)
