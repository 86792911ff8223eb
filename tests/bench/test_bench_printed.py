"""Published numbers: what `bench gemma-mtp` prints and writes, cell by cell, on scripted runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted_runs import CASES, Stage, scripted
from test_bench_numbers import ROWS, SUMMARY, check
from text_fakes import script_pair
from typer.testing import CliRunner

from pyengine import cli
from pyengine.bench import report
from pyengine.sampling.settings import Sampling

CHECK = Path(__file__).parents[2] / ".ci" / "check_bench.py"
HEAD = ["block", "verify", "tok/s", "acceptance", "tokens/round", "speedup_vs_ar", "round cost"]
TABLES = {
    "one, 7 prompt tokens": [
        ["plain", "-", "2.5", "-", "1.25", "1.00", "1.25"],
        ["3", "block", "8.0", "0.700", "2.40", "3.20", "0.75"],
        ["3", "coupled", "2.0", "0.250", "4.75", "0.80", "5.94"],
    ],
    "two, 21 prompt tokens": [
        ["plain", "-", "4.0", "-", "2.00", "1.00", "2.00"],
        ["3", "block", "16.0", "0.750", "1.60", "4.00", "0.40"],
        ["3", "coupled", "0.5", "0.200", "2.00", "0.12", "16.00"],
    ],
    "all 2 prompts": [
        ["plain", "-", "2.8", "-", "1.40", "1.00", "1.40"],
        ["3", "block", "10.0", "0.733", "2.00", "3.57", "0.56"],
        ["3", "coupled", "1.3", "0.238", "3.83", "0.47", "8.17"],
    ],
}
RUN_ON: dict[str, Any] = {
    "started_at": "then",
    "machine": {
        "chip": "Chip 9",
        "device": "Device(gpu, 3)",
        "architecture": "arm65",
        "os": "system-7",
        "cores": 11,
        "memory_bytes": 13 * 2**30,
        "load_average": [0.125, 2.5, 3.5],
    },
    "versions": {"pyengine": "1.2.3", "mlx": "4.5.6", "python": "7.8.9"},
    "commit": "abc123",
}
COMMAND = [
    *("bench", "gemma-mtp", "--allow-unverified-gemma", "--json"),
    *("--verify", "block,coupled", "--block-sizes", "3", "--repeats", "3", "--max-tokens", "20"),
    *("--temperature", "0.5", "--top-p", "0.75", "--top-k", "3", "--seed", "5"),
]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(report, "environment", lambda: RUN_ON)
    return Stage(monkeypatch)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Any:
    tok = SimpleNamespace(id_of=lambda _: 9, vocab_size=16)
    made = script_pair(tok, [1, 2])  # type: ignore[arg-type]
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: made)
    return made


def run(folder: Path, *more: str) -> Any:
    suite = folder / "suite.jsonl"
    keys = ("id", "category", "prompt", "max_tokens")
    suite.write_text("\n".join(json.dumps({k: getattr(c, k) for k in keys}) for c in CASES))
    return CliRunner().invoke(
        cli.app,
        [*COMMAND, "--prompt-suite", str(suite), "--output", str(folder / "out.json"), *more],
    )


def tables(lines: list[str]) -> dict[str, list[list[str]]]:
    """Cells of each printed table under its title; the line of JSON is none."""
    found: dict[str, list[list[str]]] = {}
    for i, line in enumerate(lines):
        if line.split()[:2] == ["block", "verify"]:
            heads = [head.strip() for head in line.split("  ") if head.strip()]
            assert heads == HEAD
            rows = lines[i + 2 :]
            found[lines[i - 1]] = [row.split() for row in rows[: rows.index("")]]
    return found


def test_every_printed_cell(stage: Stage, pair: Any, tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "Chip 9, 11 cores, 13 GiB, system-7",
        "pyengine 1.2.3 at abc123, mlx 4.5.6 on Device(gpu, 3), python 7.8.9",
        "scripted, unverified geometry, load average 0.12",
    ]
    assert tables(lines) == TABLES
    assert all(asked["pair"] is pair for _, asked in stage.asked)
    assert done.stderr.splitlines()[0] == "[0/21] one, plain, warm-up"
    assert done.stderr.splitlines()[-1] == f"Report: {tmp_path / 'out.json'}"


def test_the_options_are_what_is_run(stage: Stage, pair: Any, tmp_path: Path) -> None:
    run(tmp_path)
    used = {
        (kw["block_size"], kw["sampling"].verify, kw["sampling"].seed): kw["sampling"]
        for _, kw in stage.asked
    }
    assert used == {
        (block, rule, seed): Sampling(0.5, 0.75, 3, seed=seed, verify=rule)
        for block, rule in ((1, "residual"), (3, "block"), (3, "coupled"))
        for seed in (5, 6)
    }


def test_a_narrow_terminal_prints_the_same_figures(
    stage: Stage, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row becomes a block of lines, a heading and its figure in each."""
    monkeypatch.setenv("COLUMNS", "40")
    lines = run(tmp_path).stdout.splitlines()
    for title, rows in TABLES.items():
        at = lines.index(title) + 1
        for row in rows:
            said = [f"  {head}: {cell}" for head, cell in zip(HEAD, row, strict=True)]
            assert lines[at : at + 8] == [*said, ""]
            at += 8


def test_a_terminal_just_wide_enough_has_the_table(
    stage: Stage, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headings and cells are 5, 7, 5, 10, 12, 13 and 10 wide, two blanks lie between them and one
    before: 75."""
    monkeypatch.setenv("COLUMNS", "75")
    lines = run(tmp_path).stdout.splitlines()
    assert tables(lines) == TABLES
    assert max(len(line) for line in lines if line.split()[:2] == ["block", "verify"]) == 75
    stage.runs = scripted()
    monkeypatch.setenv("COLUMNS", "74")
    assert "  speedup_vs_ar: 3.20" in run(tmp_path).stdout.splitlines()


def test_the_report_holds_what_was_measured(
    stage: Stage, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["pyengine", "bench", "as typed"])
    pair.generation.suppress_tokens = (12, 4)
    done = run(tmp_path)
    whole = json.loads((tmp_path / "out.json").read_text())
    check(whole.pop("rows"), ROWS)
    check(whole["summary"], SUMMARY)
    assert json.loads(done.stdout.splitlines()[-1]) == whole
    whole.pop("summary")
    kernels = whole.pop("ops")
    assert {row["op"] for row in kernels} >= {"accept_block", "quantized_matmul"}
    assert whole == {
        "bench": "gemma-mtp",
        "report_version": 1,
        **RUN_ON,
        "pair": {
            "name": "scripted",
            "path": "nowhere",
            "verified": False,
            "embedded": False,
            "dtype": "float32",
            "position": "n-1",
            "quantization": {
                "target": {"bits": 8, "group_size": 64, "overrides": {"layers.0.mlp": None}},
                "assistant": None,
                "dflash": None,
            },
            "manifest": {},
        },
        "sampler": {
            "temperature": 0.5,
            "top_p": 0.75,
            "top_k": 3,
            "min_p": 0.0,
            "seed": 5,
            "suppress_tokens": [4, 12],
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "logit_bias": {},
            "verify": "residual",
            "logprobs": None,
        },
        "settings": {
            "command": ["bench", "as typed"],
            "prompt_suite": str(tmp_path / "suite.jsonl"),
            "max_tokens": 20,
            "draft_block_sizes": [3],
            "verify": ["block", "coupled"],
            "drafter": ["assistant"],
            "tree": [],
            "repeats": 3,
        },
        "complete": True,
        "prompts": [
            {"id": "one", "category": "chat", "sha256": ROWS["prompt_sha256"][0]},
            {"id": "two", "category": "continuation", "sha256": ROWS["prompt_sha256"][3]},
        ],
    }


def test_a_report_takes_the_place_of_the_last(stage: Stage, pair: Any, tmp_path: Path) -> None:
    """Whole lines that others may read, and nothing left beside it."""
    out = tmp_path / "out.json"
    out.write_text("the last")
    assert run(tmp_path).exit_code == 0
    text = out.read_text()
    assert text.startswith("{\n  ") and text.endswith("\n}\n")
    assert out.stat().st_mode & 0o777 == 0o644
    assert {path.name for path in tmp_path.iterdir()} == {"out.json", "suite.jsonl"}


def test_an_interrupted_run_says_how_far_it_got(stage: Stage, pair: Any, tmp_path: Path) -> None:
    """Three warm-ups, nine runs of the first prompt, one repeat of the second, and a run more."""
    stage.fail_at = 16
    done = run(tmp_path)
    assert done.exit_code == 130
    assert "Not complete: 2 of 2 prompts, the last with 1 of 3 repeats.\n" in done.stderr
    found = tables(done.stdout.splitlines())
    assert found["one, 7 prompt tokens"] == TABLES["one, 7 prompt tokens"]
    assert found["two, 21 prompt tokens"] == [
        ["plain", "-", "4.0", "-", "2.00", "1.00", "2.00"],
        ["3", "block", "32.0", "0.750", "1.60", "8.00", "0.20"],
        ["3", "coupled", "0.5", "0.200", "2.00", "0.12", "16.00"],
    ]
    assert found["all 2 prompts"] == [
        ["plain", "-", "2.8", "-", "1.40", "1.00", "1.40"],
        ["3", "block", "11.4", "0.733", "2.00", "4.08", "0.49"],
        ["3", "coupled", "1.3", "0.238", "3.83", "0.47", "8.17"],
    ]


def ci_check(folder: Path, **speedups: float) -> Any:
    """What `.ci/check_bench.py` says to a report: by setting, the speed-up it measured."""
    lines = [
        {"block_size": int(name.strip("b")), "speedup_vs_ar": value, "tok_s": 99.0, "verify": "x"}
        for name, value in speedups.items()
    ]
    path = folder / "report.json"
    path.write_text(json.dumps({"summary": lines, "rows": []}))
    return subprocess.run([sys.executable, CHECK, path], capture_output=True, text=True)


@pytest.mark.skipif(not CHECK.exists(), reason="needs the checkout's .ci folder")
def test_ci_fails_where_speculation_does_not_pay(stage: Stage, pair: Any, tmp_path: Path) -> None:
    done = ci_check(tmp_path, b1=1.0, b2=0.97, b4=1.26, b6=1.1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "best speedup_vs_ar 1.26\n", "")
    for slow in (0.5, 1.0):  # plain decoding's own figure does not count
        done = ci_check(tmp_path, b1=3.0, b2=0.25, b4=slow)
        assert (done.returncode, done.stdout) == (1, f"best speedup_vs_ar {slow:.2f}\n")
        assert done.stderr == f"speedup_vs_ar must be above 1 but got {slow:.2f}\n"
    run(tmp_path)
    done = subprocess.run(
        [sys.executable, CHECK, tmp_path / "out.json"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "best speedup_vs_ar 3.57\n")
