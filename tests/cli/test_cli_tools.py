"""--tools of `generate` and `chat`: calls printed, results asked for, Ctrl-C, refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_fakes import saying
from typer.testing import CliRunner

import pyengine
from pyengine import cli
from pyengine.chat import NO_RESULT, Chat
from pyengine.cli.chat import Talk
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

NANO = Path(pyengine.__file__).parent / "nano" / "target"
Q = '<|"|>'
F = f"<|tool_call>call:f{{a:{Q}x{Q}}}<tool_call|>"
G = "<|tool_call>call:g{}<tool_call|>"
TOOLS = [{"type": "function", "function": {"name": name}} for name in "fg"]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer(NANO)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOLS))
    return str(path)


@pytest.fixture
def answers(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes the pair that every command gets; it says one script after another."""

    def make(*scripts: str) -> Any:
        pair = saying(tok, *scripts)
        monkeypatch.setattr(cli.common, "load_pair", lambda *_: pair)
        return pair

    return make


def run(*arguments: str, stdin: str = "") -> Any:
    return CliRunner().invoke(cli.app, list(arguments), input=stdin)


# generate


@pytest.mark.parametrize("block_size", ["1", "4", "128"])
@pytest.mark.parametrize(
    ("script", "printed"),
    [
        (F, 'f({"a":"x"})\n'),
        (f"{F}{G}", 'f({"a":"x"})\ng({})\n'),
        (f"See:{F}", 'See:\nf({"a":"x"})\n'),
        (f"See:\n{F}so{G}", 'See:\nso\nf({"a":"x"})\ng({})\n'),
        ("Rain.", "Rain.\n"),
        ("", "\n"),
    ],
)
def test_generate_prints_a_line_per_call(
    answers: Any, file: str, script: str, printed: str, block_size: str
) -> None:
    pair = answers(script)
    done = run("generate", "So?", "--tools", file, "--block-size", block_size)
    assert (done.exit_code, done.stdout, done.stderr) == (0, printed, "")
    assert "<|tool>declaration:g{" in pair.heard[0]


def test_generate_tells_calls_in_json(answers: Any, file: str) -> None:
    answers(f"{F}{G}")
    said = json.loads(run("generate", "So?", "--tools", file, "--json").stdout)
    assert [(c["name"], c["arguments"]) for c in said["tool_calls"]] == [
        *(("f", '{"a":"x"}'), ("g", "{}")),
    ]
    assert (said["text"], said["finish_reason"]) == ("", "tool_calls")


def test_a_broken_call_is_told(answers: Any, file: str) -> None:
    answers("<|tool_call>call:f{a:}<tool_call|>")
    done = run("generate", "So?", "--tools", file)
    assert done.exit_code == 0 and done.stdout == "<|tool_call>call:f{a:}<tool_call|>\n"
    assert done.stderr.startswith("[generate] tool call 1 must have a string")
    assert done.stderr.count("\n") == 1
    assert "warning" in json.loads(run("generate", "So?", "--tools", file, "--json").stdout)


def test_what_may_be_called_is_chosen(
    answers: Any, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    pair = answers(F)
    done = run("generate", "So?", "--tools", file, "--tool-choice", "none", "--max-tokens", "1")
    assert done.exit_code == 0 and "declaration" not in pair.heard[0]
    for choice, said in (
        ("required", "[grammar] llguidance must be installed for grammars but is not"),
        ("g", "[grammar] llguidance must be installed for grammars but is not"),
        ("h", "[generate] tool_choice must name one of the tools but got 'h'."),
    ):
        done = run("generate", "So?", "--tools", file, "--tool-choice", choice)
        assert done.exit_code == 2 and done.stdout == "" and len(pair.heard) == 1
        assert done.stderr.startswith(f"pyengine: {said}")


@pytest.mark.parametrize(
    ("held", "said"),
    [
        ("{", "must be JSON but is not"),
        ("{}", "tools must be a list but got {}."),
        ("[{}]", "tools[0] must be an object of type function but got None."),
        (None, "cannot be read: No such file or directory."),
    ],
)
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_what_holds_no_tools_is_refused_before_the_weights_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str, held: str | None, said: str
) -> None:
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pytest.fail("read"))
    if held is not None:
        (tmp_path / "t.json").write_text(held)
    done = run(command, "--tools", str(tmp_path / "t.json"), stdin="So?\n")
    assert done.exit_code == 2 and done.stdout == "" and said in done.stderr
    assert done.stderr.startswith("pyengine: [generate] ") and done.stderr.count("\n") == 1


def test_options_that_do_not_go_together(answers: Any, file: str) -> None:
    answers("a")
    done = run("generate", "So?", "--tool-choice", "none")
    assert "--tool-choice must go with --tools but is alone." in done.stderr
    done = run("generate", "So?", "--tools", file, "--raw")
    assert "--tools must go with the template but got --raw too." in done.stderr


# chat


def test_results_are_the_next_lines_of_a_pipe(answers: Any, file: str) -> None:
    pair = answers(f"{F}{G}", F, "Rain.", "Bye.")
    done = run("chat", "--tools", file, stdin='So?\n{"t": [3]}\nrain\n\nThanks.\n')
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == 'f({"a":"x"})\ng({})\nf({"a":"x"})\nRain.\nBye.\n'
    rain = f"response:g{{value:{Q}rain{Q}}}<tool_response|>"
    assert pair.heard[1].endswith(f"response:f{{t:[3]}}<tool_response|><|tool_response>{rain}")
    assert pair.heard[2].endswith(f"response:f{{value:{Q}{Q}}}<tool_response|>")
    assert "user\nThanks." in pair.heard[3]


@pytest.mark.parametrize("line", ["3", "[1]", '"a"', "/bye", "{a: 1}", '{"a": 1, "a": 2}', "{"])
def test_a_result_that_is_no_object_is_text(answers: Any, file: str, line: str) -> None:
    pair = answers(F, "Rain.")
    assert run("chat", "--tools", file, stdin=f"So?\n{line}\n").exit_code == 0
    assert pair.heard[1].endswith(f"response:f{{value:{Q}{line}{Q}}}<tool_response|>")


def test_each_answer_is_a_line_of_json(answers: Any, file: str) -> None:
    answers(F, "Rain.")
    done = run("chat", "--tools", file, "--json", stdin="So?\n3\n")
    calls, rain = (json.loads(line) for line in done.stdout.splitlines())
    assert calls["tool_calls"][0]["name"] == "f" and calls["finish_reason"] == "tool_calls"
    assert (rain["text"], rain["finish_reason"]) == ("Rain.", "stop")


def test_an_end_of_input_leaves_the_calls_open(answers: Any, file: str) -> None:
    pair = answers(f"{F}{G}")
    done = run("chat", "--tools", file, stdin="So?\n3\n")
    assert (done.exit_code, done.stderr, len(pair.heard)) == (0, "", 1)


def test_saved_and_gone_on_with(answers: Any, file: str, tmp_path: Path) -> None:
    pair, saved = answers(F, "Rain.", "Bye."), tmp_path / "a.json"
    done = run("chat", "--tools", file, stdin=f"So?\n3\n/save {saved}\n")
    assert done.exit_code == 0 and done.stderr == f"Saved: 4 turns to {saved}\n"
    done = run("chat", "--tools", file, stdin=f"/load {saved}\nThanks.\n")
    assert done.exit_code == 0 and done.stdout == "Bye.\n"
    assert f"{F}<|tool_response>response:f" in pair.heard[2]


def talk(tok: Tokenizer, read: Any, *scripts: str) -> Talk:
    chat = Chat(saying(tok, *scripts), tools=TOOLS)
    return Talk(chat, as_json=False, think=False, terminal=True, read=read)


def test_ctrl_c_at_a_result_leaves_the_calls_open(
    tok: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def read(prompt: str) -> str:
        asked.append(prompt)
        if prompt == "g = ":
            raise KeyboardInterrupt
        return "3"

    talking = talk(tok, read, f"{F}{G}", "Well.")
    assert talking.take("So?") and asked == ["f = ", "g = "]
    shown = capsys.readouterr()
    assert shown.out == 'f({"a":"x"})\ng({})\n' and "The calls have no results." in shown.err
    assert talking.take("Never mind.") and capsys.readouterr().out == "Well.\n"
    assert talking.chat.pair.heard[1].count(NO_RESULT) == 2
    piped = talk(tok, read, f"{F}{G}")
    piped.terminal = False
    with pytest.raises(KeyboardInterrupt):
        piped.take("So?")


def test_ctrl_c_in_an_answer_asks_for_no_results(
    tok: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    talking = talk(tok, lambda _: pytest.fail("asked"), f"{F}{'a' * 200}")
    steps = talking.chat.steps

    def until_it_called(text: str) -> Any:
        for step in steps(text):
            yield step
            if step.tool_calls:
                raise KeyboardInterrupt

    talking.chat.steps = until_it_called  # type: ignore[method-assign]
    assert talking.take("So?")
    assert 'f({"a":"x"})\n' in capsys.readouterr().out and len(talking.chat.open_calls) == 1
