"""A bench that ends early keeps the rows that are finished: printed, written, and told apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from text_fakes import script_pair, write_tokenizers
from typer.testing import CliRunner

from pyengine import cli
from pyengine.bench import gemma_mtp
from pyengine.bench.suite import Case
from pyengine.sampling.settings import Sampling
from pyengine.text.tokenizer import load_tokenizer

CASES = [Case("one", "chat", "fox", 8), Case("two", "chat", "dog", 8), Case("six", "chat", "a", 8)]
SETTINGS: dict[str, Any] = {
    "max_tokens": 8,
    "block_sizes": [2, 3],
    "sampling": Sampling(seed=0),
    "repeats": 2,
}
WARM_UP, CASE = 3, 6  # runs: of each setting one, and of each setting two per case


@pytest.fixture
def pair(tmp_path: Path) -> Any:
    write_tokenizers(tmp_path)
    return script_pair(load_tokenizer(tmp_path), "the quick brown fox jumps over")


def end_at(run: int, error: BaseException) -> Any:
    """Ends the bench before a run, counted from 0."""

    def on_run(done: int, total: int, label: str) -> None:
        if done == run:
            raise error

    return on_run


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("[decode] it failed.")])
@pytest.mark.parametrize(
    ("run", "repeats_of"),
    [
        (0, []),
        (WARM_UP + 2, []),
        (WARM_UP + 3, [1]),
        (WARM_UP + CASE, [2]),
        (WARM_UP + CASE + 4, [2, 1]),
        (WARM_UP + 3 * CASE - 1, [2, 2, 1]),
    ],
)
def test_rows_of_finished_repeats_are_kept(
    pair: Any, run: int, repeats_of: list[int], error: BaseException
) -> None:
    rows: list[gemma_mtp.Row] = []
    with pytest.raises(type(error)) as ended:
        gemma_mtp.gemma_mtp(pair, CASES, on_run=end_at(run, error), on_rows=rows.extend, **SETTINGS)
    assert ended.value is error
    assert [len(row["samples"]) for row in rows] == [n for n in repeats_of for _ in range(3)]
    names = [case.id for case in CASES[: len(repeats_of)] for _ in range(3)]
    assert [row["prompt_id"] for row in rows] == names
    assert [row["block_size"] for row in gemma_mtp.summarise(rows)] == ([1, 2, 3] if rows else [])


def test_whole_runs_hand_out_what_they_return(pair: Any) -> None:
    rows: list[gemma_mtp.Row] = []
    assert gemma_mtp.gemma_mtp(pair, CASES, on_rows=rows.extend, **SETTINGS)[0] == rows


def run_command(
    pair: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, run: int, error: BaseException
) -> Any:
    suite = folder / "suite.jsonl"
    keys = ("id", "category", "prompt", "max_tokens")
    lines = [json.dumps({key: getattr(case, key) for key in keys}) for case in CASES]
    suite.write_text("\n".join(lines))
    whole = gemma_mtp.gemma_mtp
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pair)
    monkeypatch.setattr(
        gemma_mtp, "gemma_mtp", lambda *a, **kw: whole(*a, **{**kw, "on_run": end_at(run, error)})
    )
    words = "bench gemma-mtp --allow-unverified-gemma --repeats 2 --max-tokens 8 --json"
    more = ["--block-sizes", "2,3", "--prompt-suite", str(suite)]
    return CliRunner().invoke(
        cli.app, [*words.split(), *more, "--output", str(folder / "report.json")]
    )


def test_ctrl_c_prints_and_writes_them(
    pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended = KeyboardInterrupt()
    done = run_command(pair, monkeypatch, tmp_path, WARM_UP + CASE + 4, ended)
    assert done.exit_code == 130 and done.stderr.endswith("Interrupted.\n")
    assert "Not complete: 2 of 3 prompts, the last with 1 of 2 repeats." in done.stderr
    assert "one, " in done.stdout and "two, " in done.stdout and "2 of 3 prompts" in done.stdout
    last = json.loads(done.stdout.splitlines()[-1])
    report = json.loads((tmp_path / "report.json").read_text())
    assert last["complete"] is report["complete"] is False and len(report["rows"]) == 6


def test_a_failure_prints_and_writes_them(
    pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    failed = RuntimeError("[decode] the machine failed.")
    done = run_command(pair, monkeypatch, tmp_path, WARM_UP + CASE, failed)
    assert done.exit_code == 1 and "[decode] the machine failed." in done.stderr
    assert len(json.loads((tmp_path / "report.json").read_text())["rows"]) == 3


def test_nothing_finished_leaves_nothing(
    pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done = run_command(pair, monkeypatch, tmp_path, 2, KeyboardInterrupt())
    assert done.exit_code == 130 and not (tmp_path / "report.json").exists()
    assert "tok/s" not in done.stdout


def test_a_whole_run_says_so(pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = run_command(pair, monkeypatch, tmp_path, 999, KeyboardInterrupt())
    assert done.exit_code == 0 and "Not complete" not in done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["complete"] is True
