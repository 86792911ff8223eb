"""The bench: order of runs, figures, report. A scripted pair makes the figures foreseeable."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from text_fakes import script_pair, write_tokenizers

from pyengine.bench import gemma_mtp, report
from pyengine.bench.suite import Case
from pyengine.cli.bench import show_settings
from pyengine.cli.output import check_output
from pyengine.sampling.settings import Sampling
from pyengine.text.tokenizer import Tokenizer, load_tokenizer
from pyengine.untrusted import write_whole

STORY = "the quick brown fox jumps over a lazy dog; print(value) if total > 0 else return None"
CASES = [Case("one", "chat", "fox", 24), Case("two", "continuation", "the", 9)]
SETTINGS: dict[str, Any] = {
    "max_tokens": 20,
    "block_sizes": [2, 4],
    "sampling": Sampling(seed=5),
    "repeats": 3,
}


@pytest.fixture(scope="session")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(directory)
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def run(tok: Tokenizer) -> Any:
    """One run of the bench: pair, rows, summary and the labels in the order they came."""
    pair = script_pair(tok, STORY)
    labels: list[tuple[int, int, str]] = []
    rows, summary = gemma_mtp.gemma_mtp(
        pair, CASES, on_run=lambda *now: labels.append(now), **SETTINGS
    )
    return pair, rows, summary, labels


def row_of(rows: list[gemma_mtp.Row], case: str, block: int) -> gemma_mtp.Row:
    [row] = [r for r in rows if (r["prompt_id"], r["block_size"]) == (case, block)]
    return row


def test_settings_alternate_and_rotate_after_a_warm_up(run: Any) -> None:
    *_, labels = run
    assert [done for done, _, _ in labels] == list(range(22))
    assert {total for _, total, _ in labels} == {21}
    warm = [label for _, _, label in labels[:3]]
    assert warm == ["one, plain, warm-up", "one, block 2, warm-up", "one, block 4, warm-up"]
    order = [label.split(", ")[1] for _, _, label in labels[3:12]]
    assert order[:3] == ["plain", "block 2", "block 4"]
    assert order[3:6] == ["block 2", "block 4", "plain"]
    assert order[6:] == ["block 4", "plain", "block 2"]
    assert labels[11][2] == "one, block 2, repeat 3 of 3" and labels[12][2].startswith("two")


def test_rules_stand_side_by_side(tok: Tokenizer) -> None:
    pair = script_pair(tok, STORY)
    kw = {**SETTINGS, "block_sizes": [3], "repeats": 1, "rules": ["residual", "coupled"]}
    labels: list[str] = []
    rows, summary = gemma_mtp.gemma_mtp(
        pair, CASES, on_run=lambda done, total, label: labels.append(label), **kw
    )
    want = [(1, "residual"), (3, "residual"), (3, "coupled")]
    assert [(r["block_size"], r["verify"]) for r in summary] == want
    assert [(r["block_size"], r["verify"]) for r in rows] == 2 * want
    assert [r["exact_match"] for r in summary] == [None, None, True]
    assert all(r["acceptance_rate"] > 0 for r in rows if r["block_size"] == 3)
    assert labels[2] == "one, block 3 coupled, warm-up"


def test_rows_hold_the_figures(run: Any) -> None:
    _, rows, _, _ = run
    assert len(rows) == 6
    plain, four = row_of(rows, "one", 1), row_of(rows, "one", 4)
    assert plain["token_budget"] == 20 and row_of(rows, "two", 1)["token_budget"] == 9
    assert (plain["seed"], row_of(rows, "two", 4)["seed"]) == (5, 6)
    assert plain["generated_tokens"] == four["generated_tokens"] == 20
    assert plain["hit_token_budget"] and plain["finish_reason"] == "length"
    assert plain["verify_calls"] == 19 and plain["drafted_tokens"] == 0
    assert plain["acceptance_rate"] is None and plain["speedup_vs_ar"] == 1
    assert plain["round_cost_in_plain_steps"] == pytest.approx(1, rel=0.05)
    # The assistant errs at every third place: a full block, then one with two of three right.
    assert four["accepted_drafts"] + four["rejected_drafts"] == four["drafted_tokens"] > 0
    assert four["acceptance_rate"] == four["accepted_drafts"] / four["drafted_tokens"]
    assert four["tokens_per_round"] == 19 / four["verify_calls"] > 2
    assert (
        four["speedup_vs_ar"] == four["tok_s"] / plain["tok_s"] == four["tok_s"] / four["ar_tok_s"]
    )
    cost = four["tokens_per_round"] / four["speedup_vs_ar"]
    assert four["round_cost_in_plain_steps"] == pytest.approx(cost, rel=0.05)
    rates = [sample["tok_s"] for sample in four["samples"]]
    assert len(rates) == 3 and min(rates) <= four["tok_s"] <= max(rates)
    assert all(row["repeats_agree"] and row["exact_match"] is None for row in rows)
    assert len(four["prompt_sha256"]) == 64 and STORY.startswith(four["text"])


def test_summary_pools_the_cases(run: Any) -> None:
    _, rows, summary, _ = run
    assert [s["block_size"] for s in summary] == [1, 2, 4]
    for line in summary:
        own = [r for r in rows if r["block_size"] == line["block_size"]]
        seconds = sum(r["decode_elapsed_s"] for r in own)
        assert line["tok_s"] == pytest.approx((19 + 8) / seconds)
        assert line["speedup_vs_ar"] == pytest.approx(line["tok_s"] / summary[0]["tok_s"])
        ratio = line["tokens_per_round"] / line["round_cost_in_plain_steps"]
        assert line["speedup_vs_ar"] == pytest.approx(ratio)
    assert summary[0]["acceptance_rate"] is None


def test_greedy_runs_are_compared_token_for_token(tok: Tokenizer) -> None:
    pair = script_pair(tok, STORY)
    settings = {**SETTINGS, "sampling": Sampling(temperature=0.0), "repeats": 1}
    rows, summary = gemma_mtp.gemma_mtp(pair, CASES, **settings)
    assert all(row["exact_match"] is True for row in [*rows, *summary])

    script = pair.target.script

    def differ(rows: int) -> None:  # a target that says something else to a block
        pair.target.script = script if rows == 1 else script[:1] + script[:0:-1]

    pair.target.before_call = differ
    _, summary = gemma_mtp.gemma_mtp(pair, CASES[:1], **settings)
    assert [line["exact_match"] for line in summary] == [True, False, False]


def test_one_token_texts_have_no_rate(tok: Tokenizer) -> None:
    pair = script_pair(tok, [])  # stops at once
    rows, summary = gemma_mtp.gemma_mtp(pair, CASES[:1], **SETTINGS)
    assert [row["generated_tokens"] for row in rows] == [1, 1, 1]
    assert [line["speedup_vs_ar"] for line in summary] == [None] * 3
    show_settings(Console(quiet=True), "none", summary)


def test_report_is_whole(run: Any, tmp_path: Path) -> None:
    pair, rows, summary, _ = run
    run_on = report.environment()
    whole = report.make_report(run_on, pair, CASES, rows, summary, {"repeats": 3}, Sampling(seed=5))
    path = tmp_path / "report.json"
    check_output("bench", path)
    assert not path.exists()
    write_whole(path, json.dumps(whole, indent=2))
    back = json.loads(path.read_text())
    assert back == json.loads(json.dumps(whole))
    assert os.listdir(tmp_path) == ["report.json"]
    assert back["sampler"]["seed"] == 5 and back["settings"] == {"repeats": 3}
    assert back["machine"]["cores"] == os.cpu_count() and back["machine"]["chip"]
    assert set(back["versions"]) == {"pyengine", "mlx", "python"}
    assert [p["id"] for p in back["prompts"]] == ["one", "two"]
    assert back["pair"]["position"] == "n-1" and back["pair"]["dtype"] == "float32"
    assert back["pair"]["quantization"]["target"]["bits"] == 8
    assert back["pair"]["quantization"]["assistant"] is None
    assert len(back["rows"]) == 6 and back["rows"][0]["tokens"]


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"output must be a file but .* is a folder"):
        check_output("bench", tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):  # else root would put a file in its place
        with pytest.raises(ValueError, match=r"output must be a file but .* is a device or a pipe"):
            check_output("bench", path)
    with pytest.raises(ValueError, match="output must lie in a folder that exists but got"):
        check_output("bench", tmp_path / "absent" / "report.json")
    if Path("/proc/self").exists():  # not even root may write there
        with pytest.raises(ValueError, match="output must be writable but /proc/self/x is not"):
            check_output("bench", Path("/proc/self/x"))


def test_table_has_the_columns(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, summary, _ = run
    show_settings(Console(width=80), "all", summary)
    text = capsys.readouterr().out
    for head in ("block", "tok/s", "acceptance", "tokens/round", "speedup_vs_ar", "round cost"):
        assert head in text
    assert "plain" in text and "residual" in text and "1.00" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_sizes": []}, "block sizes must name at least one but got none."),
        ({"block_sizes": [1]}, "block sizes must be 2 to 128 but got 1."),
        ({"block_sizes": [4, 129]}, "block sizes must be 2 to 128 but got 129."),
        ({"block_sizes": [4, 4]}, "block sizes must differ but got [4, 4]."),
        ({"rules": ["best"]}, "verify must be of residual, block, coupled, greedy but got 'best'."),
        ({"rules": ["block", "block"]}, "verify must name a rule once but got block,block."),
        (
            {"drafters": ["best"]},
            "drafter must be of assistant, dflash, lookup, early:N, NAME+lookup but got 'best'.",
        ),
        (
            {"drafters": ["lookup", "lookup"]},
            "drafter must name one once but got lookup,lookup.",
        ),
        ({"repeats": 0}, "repeats must be at least 1 but got 0."),
        ({"max_tokens": 1}, "max tokens must be at least 2 but got 1."),
    ],
)
def test_impossible_settings(tok: Tokenizer, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        gemma_mtp.gemma_mtp(script_pair(tok, STORY), CASES, **{**SETTINGS, **changes})
    assert str(error.value) == f"[bench] {message}"
