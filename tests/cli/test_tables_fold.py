"""At every width of a terminal each figure of a table is whole, and beside its name."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from pyengine import cli
from pyengine.checkpoint.inspect import inspect
from pyengine.cli import bench, tables

WIDTHS = range(20, 201)
ROWS = [
    {
        "block_size": block,
        "verify": "residual",
        "drafter": "lookup",
        "tree": None,
        "tok_s": 1234.56 / block,
        "acceptance_rate": 0.8761 if block > 1 else None,
        "tokens_per_round": 12.345 + block,
        "speedup_vs_ar": 1.0 * block,
        "round_cost_in_plain_steps": 10.987,
    }
    for block in (1, 16, 128)
]
FIGURES = [
    "1234.6",
    "77.2",
    "9.6",
    "0.876",
    "13.35",
    "28.34",
    "140.34",
    "1.00",
    "16.00",
    "128.00",
    "10.99",
]
LONG = {
    "os": "Linux-6.1.0-18-amd64-x86_64-with-glibc2.36",
    "by depth": "0.911 0.822 0.733 0.644 0.555",
    "peak memory": "12345 MB",
    "window": [1024, 131072],
}


def console(width: int) -> Console:
    return Console(file=io.StringIO(), width=width)


def text_of(out: Console) -> str:
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_no_figure_of_the_bench_table_is_cut() -> None:
    for width in WIDTHS:
        out = console(width)
        bench.show_settings(out, "flappy_html5_canvas, 421 prompt tokens", ROWS)
        text = text_of(out)
        for figure in (*FIGURES, "plain", "residual", "421", *bench.HEADS[:6]):
            assert figure in text.split() or f"{figure}:" in text.split(), (width, figure)
        assert "\u2026" not in text
        # Only a word that is longer than the terminal may pass its edge
        assert all(len(line.rstrip()) <= max(width, 20) for line in text.splitlines()), width


def test_headings_stay_with_their_figures() -> None:
    folded = 0
    for width in WIDTHS:
        out = console(width)
        bench.show_settings(out, "all", ROWS)
        lines = text_of(out).splitlines()
        if any("tok/s" in line and "speedup_vs_ar" in line for line in lines):
            assert width > 60
            continue
        folded += 1
        words = text_of(out).split()
        for head, value in (("tok/s:", "1234.6"), ("speedup_vs_ar:", "128.00")):
            places = [i for i, word in enumerate(words) if word == head]
            assert len(places) == 3 and value in [words[i + 1] for i in places], width
    assert 0 < folded < len(WIDTHS)


def test_no_value_of_two_columns_is_cut() -> None:
    for width in WIDTHS:
        out = console(width)
        tables.two_columns(out, "machine", LONG)
        words = text_of(out).split()
        for value in ("12345", "1024,", "131072", "0.911", "0.555", str(LONG["os"])):
            assert value in words, (width, value)


@pytest.mark.parametrize("columns", ["20", "44", "80"])
def test_commands_print_every_figure_whole(monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    nano = str(cli.__file__).replace("cli/__init__.py", "nano")
    words = CliRunner().invoke(cli.app, ["inspect", nano]).stdout.split()
    report = inspect(nano)
    parameters = {str(report[part]["tensors"]["parameters"]) for part in ("target", "assistant")}
    assert {*parameters, "8192", "1280"} <= set(words)
    quick = ["bench", "gemma-mtp", "--repeats", "1", "--max-tokens", "2", "--block-sizes", "2,16"]
    text = CliRunner().invoke(cli.app, quick).stdout
    assert "\u2026" not in text and "speedup_vs_ar" in text
    stats = ["generate", "Snake", "--stats", "--max-tokens", "30", "--temperature", "0"]
    said = CliRunner().invoke(cli.app, stats).stderr
    assert "\u2026" not in said and "30" in said.split()
