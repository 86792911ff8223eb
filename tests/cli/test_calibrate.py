"""`pyengine calibrate` and `generate --early-exit` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyengine import calibration, cli
from pyengine.checkpoint.certificate import read_certificate

GAMES = ("Snake", "Pong", "Breakout", "Space Shooter", "Flappy Bird", "Road Crossing", "Invaders")
ASKED = ("Write a {} game.", "Create a {} game with canvas.", "Please build {}.", "Make {}.", "{}!")
# A wide delta: 36 prompts would decide by one token more or less, and bits differ between machines
QUICK = ("--temperature", "0", "--max-tokens", "8", "--layer", "6", "--delta", "0.2")


def run(*arguments: Any, stdin: str | None = None) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments], input=stdin)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    prompts = [asked.format(game) for asked in ASKED for game in GAMES]
    rows = [
        {"id": str(i), "category": "game", "prompt": text, "max_tokens": 1}
        for i, text in enumerate(prompts)
    ]
    rows.append({"id": "c", "category": "continuation", "prompt": "import os\n", "max_tokens": 1})
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path / "prompts.jsonl"


def test_a_certificate_is_made_and_used(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "exit.json"
    done = run("calibrate", suite, *QUICK, "--lambdas", "0.95,0.9", "--output", out, "--json")
    assert done.exit_code == 0, done.output
    *table, line = done.stdout.splitlines()
    told = json.loads(line)
    assert told["lambda"] == 0.9 and told["n"] == 36 and told["max_tokens"] == 8
    assert told == json.loads(out.read_text())
    assert told == read_certificate(out).to_dict()
    text = " ".join(" ".join(table).split())
    assert "exit behind layer 6, 36 prompts, lcs, delta 0.2, epsilon 0.05" in text
    assert "lambda 0.9: approximate: on prompts like the 36 calibrated ones, answers" in text
    assert text.count("passed") == 2 and "not passed" not in text
    assert "calibration: 100 % done" in done.stderr and f"Certificate: {out}" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exit.json", "prompts.jsonl"]

    used = run("generate", "--early-exit", out, "--temperature", 0, "--stats", "Write a Pong game.")
    assert used.exit_code == 0, used.output
    label, *rest = used.stderr.splitlines()
    assert label == (
        "approximate: on prompts like the 36 calibrated ones, answers differ from the full model's "
        "by at most 0.2 on average, with confidence 0.95."
    )
    assert rest[0] == "The answer was cut at 8 tokens; longer ones were not calibrated."
    assert any("behind layer 6" in row and "layers per token" in row for row in rest)
    whole = run("generate", "--early-exit", out, "--temperature", 0, "--json", "Write a Pong game.")
    result = json.loads(whole.stdout)
    assert result["early_exit"]["label"] + "." == label
    assert sum(result["stats"]["exits"].values()) == 7
    assert result["stats"]["mean_layers"] < 24 and used.stdout.strip() in result["text"].strip()


def test_a_chat_says_of_each_answer_that_it_is_approximate(suite: Path, tmp_path: Path) -> None:
    out, saved, again = (tmp_path / name for name in ("exit.json", "chat.json", "again.json"))
    assert run("calibrate", suite, *QUICK, "--lambdas", "0.9", "--output", out).exit_code == 0
    ask = ("chat", "--early-exit", out, "--temperature", 0)
    lines = f"Write a Pong game.\nNow Snake.\n/save {saved}\n"
    done = run(*ask, stdin=lines)
    assert done.exit_code == 0, done.output
    label = json.loads(saved.read_text())["early_exit"]
    assert label.startswith("approximate: on prompts like the 36 calibrated ones")
    assert done.stderr.count(f"{label}.\n") == 2
    alone = run("generate", "--early-exit", out, "--temperature", 0, "Write a Pong game.")
    assert done.stdout.startswith(alone.stdout)
    told = [json.loads(line) for line in run(*ask, "--json", stdin=lines).stdout.splitlines()]
    assert [one["early_exit"]["label"] for one in told] == [label] * 2
    assert all(one["stats"]["mean_layers"] < 24 for one in told)
    # Text that was loaded stays what it was, whoever goes on
    loaded = run("chat", "--max-tokens", 4, stdin=f"/load {saved}\nMore.\n/save {again}\n")
    assert loaded.exit_code == 0 and f"{label}.\n" in loaded.stderr
    assert json.loads(again.read_text())["early_exit"] == label
    fresh = tmp_path / "fresh.json"
    run("chat", "--max-tokens", 4, stdin=f"/load {saved}\n/new\nFox.\n/save {fresh}\n")
    assert set(json.loads(fresh.read_text())) == {"model", "messages"}
    for words, message in (
        (("--drafter", "lookup"), "an early exit must go without drafts but some are asked for."),
        (("--temperature", "1"), "temperature must be 0.0 as calibrated but got 1"),
    ):
        refused = run("chat", "--early-exit", out, *words, stdin="Fox.\n")
        assert refused.exit_code == 2 and f"[early-exit] {message}" in refused.stderr


def test_none_is_exit_code_1_and_no_file(suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "exit.json"
    ask = ("--temperature", "0", "--max-tokens", "8", "--layer", "3", "--lambdas", "0.1,0")
    done = run("calibrate", suite, *ask, "--output", out, "--json")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == "None: no lambda passed, and nothing was written."
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["lambda"] is None and len(told["tested"]) == 1
    assert "not passed" in done.stdout and not out.exists()
    # What was there stays
    out.write_text("mine")
    assert run("calibrate", suite, *ask, "--output", out).exit_code == 1
    assert out.read_text() == "mine"


def test_too_few_prompts_are_told_before(
    suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibration, "calibrate", ended)
    ask = ("calibrate", suite, *QUICK, "--output", tmp_path / "exit.json")
    done = run(*ask, "--delta", "0.05")
    assert done.exit_code == 130
    assert done.stderr.splitlines()[0] == (
        "Warning: 36 prompts are too few: even without any loss, delta 0.05 and epsilon 0.05 need "
        "59."
    )
    assert "Warning" not in run(*ask).stderr


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--layer", 0), "[calibrate] layer must be at least 1 but got 0."),
        (("--layer", 24), "[calibrate] layer must leave a layer of the target's 24 out but got 24"),
        (("--delta", 2), "[calibrate] delta must be above 0 and below 1 but got 2.0."),
        (("--lambdas", "x"), "[calibrate] --lambdas must be numbers like 0.9,0.8,0.7 but got 'x'."),
        (("--lambdas", "0.1,0.2"), "[calibrate] thresholds must be 1 to 1000 numbers, each below"),
        (
            ("--lambdas", "2,1"),
            "[calibrate] thresholds must be from 1 down to 0 but got [2.0, 1.0]",
        ),
        (("--decay", -1), "[calibrate] decay must be 0 to 1e+06 but got -1.0."),
        (("--max-tokens", 1), "[calibrate] max_tokens must be at least 2 but got 1."),
        (("--top-p", 0), "[sampling] top_p must be above 0 and at most 1 but got 0.0."),
        (
            ("--output", "nowhere/x.json"),
            "[calibrate] output must lie in a folder that exists but ",
        ),
    ],
)
def test_bad_arguments(suite: Path, tmp_path: Path, asked: tuple[Any, ...], message: str) -> None:
    ask = ("calibrate", suite, "--layer", 6, "--output", tmp_path / "exit.json")
    done = run(*ask, *asked)
    assert done.exit_code == 2 and done.stdout == "", done.output
    assert done.stderr.splitlines()[-1].startswith(f"pyengine: {message}")


def test_bad_prompts(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text("{}\n")
    done = run("calibrate", tmp_path / "x.jsonl", "--layer", 6, "--output", tmp_path / "exit.json")
    assert done.exit_code == 2 and "x.jsonl line 1: must have 'id' but lacks it." in done.stderr
