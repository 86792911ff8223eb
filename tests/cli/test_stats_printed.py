"""Published numbers: what `--stats`, `/stats` and the line after an answer print, word by word."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from scripted_runs import Clock
from test_stats_numbers import STATS, TOLD
from text_fakes import script_pair, write_tokenizers
from typer.testing import CliRunner

from pyengine import cli
from pyengine.cli import common, tables
from pyengine.cli.chat import Talk
from pyengine.cli.generate import print_stats
from pyengine.engine.stats import Stats
from pyengine.task import Result
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

WHOLE = [
    " finish       length",
    " prompt       120 tokens in 0.50 s",
    " generated    31 tokens in 12.00 s, 2.5 tok/s",
    " seed         11",
    " block size   4",
    " rounds       8, 3.75 tokens each",
    " acceptance   0.640 of 25 drafts",
    " tree         3.1 drafts per round, of which one path is kept",
    " of lookup    2 rounds, 7 of 9 drafts kept",
    " by depth     1.12 0.25 0.38 of the rounds",
    " exits        20 behind layer 6, 10 behind layer 24; 12.0 layers per token",
    " forced       3 tokens by the grammar, without a draft",
    " peak memory  123 MB",
]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("time.perf_counter", made)
    return made


@pytest.fixture
def pair(tok: Tokenizer, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Half a second for the prompt and a quarter for a round."""
    made = script_pair(tok, "jumps over a lazy dog", context=100)
    prefill = made.target.prefill

    def slow(*args: Any, **kwargs: Any) -> Any:
        clock.now += 0.5
        return prefill(*args, **kwargs)

    def on_round(rows: int) -> None:
        clock.now += 0.25

    made.target.prefill, made.target.before_call = slow, on_round
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: made)
    monkeypatch.setattr("mlx.core.get_peak_memory", lambda: 7_499_999)
    return made


def chat_of(stats: Stats, **more: Any) -> Any:
    result = Result("text", [1, 2, 3], "length", stats)
    pair = SimpleNamespace(target=SimpleNamespace(context=4321))
    return SimpleNamespace(result=result, pair=pair, turns=[{}] * 6, forgotten=14, **more)


def test_every_line_of_stats(capsys: pytest.CaptureFixture[str]) -> None:
    print_stats(Result("text", [1, 2, 3], "length", STATS))
    said = capsys.readouterr()
    assert said.out == "" and said.err.splitlines() == WHOLE


def test_stats_of_chains_tell_of_no_tree(capsys: pytest.CaptureFixture[str]) -> None:
    print_stats(Result("text", [1, 2, 3], "length", replace(STATS, tree=None)))
    wanted = [line for line in WHOLE if not line.startswith((" tree", " by depth"))]
    wanted.insert(8, " by depth     0.90 0.25 0.75")
    assert capsys.readouterr().err.splitlines() == wanted


def test_stats_of_plain_decoding_tell_no_acceptance(capsys: pytest.CaptureFixture[str]) -> None:
    plain = Stats(1, 0, 7, 0, 1, 0.125, 0.0, peak_memory_bytes=1_500_001)
    print_stats(Result("text", [1], None, plain))
    assert capsys.readouterr().err.splitlines() == [
        " finish       unfinished",
        " prompt       7 tokens in 0.12 s",
        " generated    1 tokens in 0.00 s, 0.0 tok/s",
        " seed         0",
        " block size   1",
        " rounds       0, 0.00 tokens each",
        " peak memory  2 MB",
    ]


def test_every_line_of_the_chats_stats(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the answer, then how full the context is: 120 of the prompt and 31 new."""
    Talk(chat_of(STATS), as_json=False, think=False, terminal=False, read=lambda _: None).take(
        "/stats"
    )
    assert capsys.readouterr().err.splitlines() == [
        *WHOLE,
        " context      151 of 4321 tokens",
        " turns        6, 14 forgotten",
    ]


@pytest.mark.parametrize(
    ("width", "lines"),
    [
        (80, ["title", " a b  12, 34, 56", " c    yes"]),
        # A blank, the longest name, two blanks and the longest word: 9
        (9, ["title", " a b  12,", "      34,", "      56", " c    yes"]),
        (8, ["title", "  a b:", "    12,", "    34,", "    56", "  c: yes"]),
    ],
)
def test_names_and_values_fold(width: int, lines: list[str]) -> None:
    out = Console(file=StringIO(), width=width)
    rows = {"a_b": [12, 34, 56], "c": True}
    tables.two_columns(out, "title", rows)
    assert out.file.getvalue().splitlines() == lines


@pytest.mark.parametrize(
    ("stats", "line"),
    [
        (STATS, "31 tokens, 2.5 tok/s, acceptance 0.64"),
        (replace(STATS, drafted=0), "31 tokens, 2.5 tok/s"),
        (replace(STATS, decode_s=0.0), "31 tokens, acceptance 0.64"),
        (Stats(generated_tokens=1), "1 tokens"),
    ],
)
def test_the_line_after_an_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stats: Stats, line: str
) -> None:
    chat = chat_of(stats)
    monkeypatch.setattr(common, "dimmed", lambda: ("\x1b[2m", "\x1b[0m"))
    Talk(chat, as_json=False, think=False, terminal=True, read=lambda _: None)._tell_speed()
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"\x1b[2m{line}\x1b[0m\n")


def test_generate_prints_the_numbers_of_its_own_run(pair: Any, tmp_path: Path) -> None:
    """Five tokens after the first, in as many rounds of a quarter of a second as it says."""
    words = ["generate", "fox", "--seed", "6", "--block-size", "3", "--max-tokens", "6"]
    done = CliRunner().invoke(cli.app, [*words, "--stats"])
    prompt = len(pair.target.prompt)
    told = json.loads(CliRunner().invoke(cli.app, [*words, "--json"]).stdout)["stats"]
    rounds = told["rounds"]
    assert set(told) == set(TOLD)
    assert (told["prompt_tokens"], told["generated_tokens"]) == (prompt, 6)
    assert (told["prefill_s"], told["decode_s"]) == (0.5, rounds / 4)
    assert told["tok_s"] == 5 / (rounds / 4) and told["prefill_tok_s"] == prompt / 0.5
    assert told["drafted"] == 2 * rounds and told["peak_memory_bytes"] == 7_499_999
    lines = done.stderr.splitlines()
    assert lines[0] == "The answer was cut at 6 tokens; a larger --max-tokens lifts that."
    assert lines[1:8] == [
        " finish       length",
        f" prompt       {prompt} tokens in 0.50 s",
        f" generated    6 tokens in {rounds / 4:.2f} s, {20 / rounds:.1f} tok/s",
        " seed         6",
        " block size   3",
        f" rounds       {rounds}, {5 / rounds:.2f} tokens each",
        f" acceptance   {told['accepted'] / (2 * rounds):.3f} of {2 * rounds} drafts",
    ]
    assert lines[8].split()[:2] == ["by", "depth"] and lines[9:] == [" peak memory  7 MB"]


def test_the_chat_prints_the_numbers_of_its_last_answer(pair: Any) -> None:
    words = ["chat", "--block-size", "1", "--max-tokens", "4", "--seed", "8"]
    done = CliRunner().invoke(cli.app, words, input="the quick brown fox\ndog\n/stats\n")
    prompt = len(pair.target.prompt)
    cut = "The answer was cut at 4 tokens; a larger --max-tokens lifts that."
    assert done.stderr.splitlines() == [
        cut,
        cut,
        " finish       length",
        f" prompt       {prompt} tokens in 0.50 s",
        " generated    4 tokens in 0.75 s, 4.0 tok/s",
        " seed         8",
        " block size   1",
        " rounds       3, 1.00 tokens each",
        " peak memory  7 MB",
        f" context      {prompt + 4} of 100 tokens",
        " turns        4, 0 forgotten",
    ]
