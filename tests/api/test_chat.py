"""Conversations: history, the reused cache, the full context, and the terminal's commands."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from text_fakes import script_pair, write_tokenizers
from typer.testing import CliRunner

from pyengine import cli
from pyengine.chat import Chat
from pyengine.checkpoint.pair import load
from pyengine.generation import generate
from pyengine.sampling.settings import Sampling
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

GREEDY = Sampling(temperature=0.0)
HERE = Path(__file__).parents[1] / "helpers"


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


def say(chat: Chat, text: str) -> str:
    return "".join(chat.ask(text))


def test_turns_follow_each_other_and_reuse_the_cache() -> None:
    pair = load()
    chat = Chat(pair, system="You write games.", max_tokens=40, sampling=GREEDY)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "You write games."}]
    for turn, question in enumerate(("Snake, please.", "Now Pong.", "And Tetris?")):
        answer = say(chat, question)
        messages.append({"role": "user", "content": question})
        alone = generate(messages, pair=pair, max_tokens=40, sampling=GREEDY)
        assert answer == alone.text == chat.result.text, turn
        stats = chat.result.stats
        assert stats.prompt_tokens == alone.stats.prompt_tokens
        if turn:
            assert stats.reused_tokens > 0.5 * stats.prompt_tokens
        messages.append({"role": "assistant", "content": answer})
    assert [*chat.system, *chat.turns] == messages
    chat.clear()
    assert say(chat, "Snake, please.") == messages[2]["content"] and len(chat.turns) == 2


def test_an_answer_left_early_is_part_of_the_history(tok: Tokenizer) -> None:
    chat = Chat(script_pair(tok, "jumps over a lazy dog"), block_size=1)
    answer = chat.ask("fox")
    text = next(answer) + next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert chat.turns[-1] == {"role": "assistant", "content": text}
    assert chat.result.finish_reason is None
    with pytest.raises(ValueError, match="must be asked before"):
        _ = Chat(chat.pair).result


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(tok: Tokenizer) -> None:
    pair = script_pair(tok, "jumps", context=120)
    chat = Chat(pair, system="Be brief.", max_tokens=20)
    for turn in range(12):
        assert say(chat, f"the quick brown fox {turn}") == "jumps"
        text = pair.tokenizer.decode(pair.target.prompt)
        assert len(pair.target.prompt) <= 100
        assert text.startswith("system\nBe brief.\nuser\n") and f"fox {turn}\n" in text
        assert len(chat.turns) + chat.forgotten == 2 * (turn + 1)
    assert chat.forgotten >= 8 and chat.forgotten % 2 == 0
    assert "fox 0\n" not in text
    with pytest.raises(ValueError, match="prompt must be shorter than the context of 120 tokens"):
        say(chat, "fox " * 200)
    assert say(chat, "still here") == "jumps"


# The command


def run(pair: Any, monkeypatch: pytest.MonkeyPatch, stdin: str, *arguments: str) -> Any:
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pair)
    return CliRunner().invoke(cli.app, ["chat", *arguments], input=stdin)


def test_lines_are_turns(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = script_pair(tok, "jumps")
    done = run(pair, monkeypatch, "fox\n\ndog\n", "--system", "Brief.")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "jumps\njumps\n", "")
    said = tok.decode(pair.target.prompt)
    assert said == "system\nBrief.\nuser\nfox\nmodel\njumps\nuser\ndog\nmodel\n"
    run(pair, monkeypatch, "fox\n/new\ndog\n/bye\nover\n")
    assert tok.decode(pair.target.prompt) == "user\ndog\nmodel\n"
    done = run(pair, monkeypatch, "fox\ndog", "--json", "--seed", "7", "--max-tokens", "2")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["finish_reason"] for line in lines] == ["length"] * 2
    assert lines[0]["forgotten_turns"] == 0 and lines[0]["stats"]["generated_tokens"] == 2


def test_the_options_of_generate_are_there(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = script_pair(tok, tok.encode("<|channel>thought\nhm<channel|>") + tok.encode("jumps"))
    done = run(pair, monkeypatch, "fox\n", "--think", "--stop", "mps")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "ju\n", "hm\n")
    assert "think" in tok.decode(pair.target.prompt)
    done = run(pair, monkeypatch, "fox\n", "--json", "--logprobs", "1", "--logit-bias", "5=-9")
    said = json.loads(done.stdout)
    assert said["thinking"] == "hm" and said["text"] == "jumps"
    assert [row["token"] for row in said["logprobs"]] == said["tokens"]
    asked = (
        "--top-p 0.5 --top-k 3 --min-p 0.1 --repetition-penalty 2 --presence-penalty 3 "
        "--frequency-penalty 4 --logit-bias 7=1 --seed 6 --verify block --temperature 2"
    )
    kept = []
    monkeypatch.setattr("pyengine.chat.Chat.__init__", lambda self, pair, **kw: kept.append(kw))
    run(pair, monkeypatch, "", *asked.split())
    want = Sampling(2.0, 0.5, 3, 0.1, 6, (), 2.0, 3.0, 4.0, {7: 1.0}, "block")
    assert kept[0]["sampling"] == want


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["--max-tokens", "0"], "a\n", "[generate] max_tokens must be at least 1"),
        (["--block-size", "500"], "a\n", "[generate] block_size must be 1 to 128"),
        (["--logprobs", "1"], "a\n", "[generate] --logprobs must go with --json"),
        (["--stop", ""], "a\n", "[generate] stop must hold strings of text"),
        (["--temperature", "-3"], "a\n", "[sampling] temperature must be 0 or more"),
        ([], "fox " * 5000 + "\n", "[generate] prompt must be shorter than the context"),
    ],
)
def test_errors(
    tok: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    stdin: str,
    message: str,
) -> None:
    done = run(script_pair(tok, "jumps"), monkeypatch, stdin, *arguments)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith(f"pyengine: {message}") and done.stderr.count("\n") == 1


def test_a_pair_without_a_template(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = script_pair(tok, "jumps")
    monkeypatch.setattr(Tokenizer, "has_chat_template", False)
    done = run(pair, monkeypatch, "fox\n")
    assert done.exit_code == 2 and "[chat] the checkpoint must have a chat template" in done.stderr
    monkeypatch.undo()
    monkeypatch.setattr(Tokenizer, "channel_ids", lambda self: ())
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pair)
    for command in ("chat", "generate"):
        done = CliRunner().invoke(cli.app, [command, "--think"], input="fox\n")
        assert done.exit_code == 2 and "has a channel for thoughts but scripted's" in done.stderr


TERMINAL = """
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from text_fakes import script_pair, write_tokenizers
from pyengine import cli
from pyengine.__main__ import main
from pyengine.text.tokenizer import load_tokenizer
write_tokenizers(Path({folder!r}))
pair = script_pair(load_tokenizer(Path({folder!r})), "jumps over " * 99, held_after=20)
cli.common.load_pair = lambda *arguments: pair
sys.argv = ["pyengine", "chat", "--max-tokens", "300", "--block-size", "1"]
main()
"""


def test_ctrl_c_stops_an_answer_and_not_the_conversation(tmp_path: Path) -> None:
    """At a terminal of its own."""
    mine, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINAL.format(here=str(HERE), folder=str(tmp_path))],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=HERE,
    )
    os.close(theirs)
    assert process.stdout is not None
    os.write(mine, b"fox\n")
    first = b""
    while b"jumps" not in first:
        first += os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    os.write(mine, b"/bye\n")  # read after the answer, which only Ctrl-C ends
    out, err = process.communicate(timeout=60)
    os.close(mine)
    assert process.returncode == 0, err
    text = (first + out).decode()
    assert text.startswith("jumps") and text.endswith("\n")
    assert b"Traceback" not in err and b"/help lists" in err
