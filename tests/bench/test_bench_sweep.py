"""`pyengine bench sweep`: greedy beside the rules, what it shows, writes, draws and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from text_fakes import script_pair, write_tokenizers
from typer.testing import CliRunner

import pyengine
from pyengine import cli
from pyengine.bench import gemma_mtp, picture, sweep_picture
from pyengine.bench.suite import Case
from pyengine.sampling.settings import Sampling
from pyengine.text.tokenizer import load_tokenizer

# It comes back to its own words, so that lookup finds some
STORY = "the lazy dog jumps over the lazy fox; the lazy dog jumps over the brown fox"
CASES = [Case("one", "chat", "fox", 30), Case("two", "continuation", "the", 9)]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    write_tokenizers(folder)
    made = script_pair(load_tokenizer(folder), STORY)
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: made)
    return made


def test_greedy_runs_have_plain_runs_of_their_own(pair: Any) -> None:
    labels: list[str] = []
    rows, summary = gemma_mtp.gemma_mtp(
        pair,
        CASES,
        max_tokens=20,
        block_sizes=[3],
        sampling=Sampling(seed=5, verify="block"),
        repeats=2,
        rules=["coupled", "greedy"],
        on_run=lambda done, total, label: labels.append(label),
    )
    said = ["plain", "plain greedy", "block 3 coupled", "block 3 greedy"]
    assert [label.split(", ")[1] for label in labels[:4]] == said
    kinds = [(1, "block"), (1, "greedy"), (3, "coupled"), (3, "greedy")]
    assert [(row["block_size"], row["verify"]) for row in rows] == 2 * kinds
    for of_case in (rows[:4], rows[4:], summary):
        sampled, greedy, coupled, drafted = of_case
        assert coupled["speedup_vs_ar"] == coupled["tok_s"] / sampled["tok_s"]
        assert drafted["speedup_vs_ar"] == drafted["tok_s"] / greedy["tok_s"]
        assert sampled["speedup_vs_ar"] == greedy["speedup_vs_ar"] == 1.0
    assert [row["exact_match"] for row in summary] == [None, True, True, True]
    # Asked for alone, nothing is sampled
    _, alone = gemma_mtp.gemma_mtp(
        pair,
        CASES[:1],
        max_tokens=5,
        block_sizes=[2],
        sampling=Sampling(),
        repeats=1,
        rules=["greedy"],
    )
    assert [(row["block_size"], row["verify"]) for row in alone] == [(1, "greedy"), (2, "greedy")]


def run(folder: Path, *more: str) -> Any:
    suite = folder / "suite.jsonl"
    keys = ("id", "category", "prompt", "max_tokens")
    suite.write_text("\n".join(json.dumps({k: getattr(c, k) for k in keys}) for c in CASES))
    words = ["bench", "sweep", "--allow-unverified-gemma", "--repeats", "1", "--max-tokens", "30"]
    # So wide that a table is no list, however long its figures
    return CliRunner(env={"COLUMNS": "200"}).invoke(
        cli.app, [*words, "--prompt-suite", str(suite), *more]
    )


def test_the_command_shows_writes_and_draws(pair: Any, tmp_path: Path) -> None:
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    words = "--drafter assistant,lookup --block-sizes 2,4,128 --verify coupled,greedy --json"
    done = run(tmp_path, *words.split(), "--output", str(out), "--plot", str(png))
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    rows = report.pop("rows")
    assert json.loads(done.stdout.splitlines()[-1]) == report
    assert report["bench"] == "sweep" and report["complete"]
    assert len(report["summary"]) == 2 + 2 * 3 * 2 and len(rows) == 2 * len(report["summary"])
    exact = {row["exact_match"] for row in [*rows, *report["summary"]] if row["block_size"] != 1}
    assert exact == {True}
    lines = done.stdout.splitlines()
    for title in ("one, ", "two, ", "all 2 prompts", "acceptance by draft, longest block of each"):
        assert any(line.startswith(title) for line in lines), title
    last = lines[lines.index("acceptance by draft, longest block of each") + 1 :]
    depths = (1, 2, 4, 8, 16, 32, 64, 99, 127)
    assert last[0].split() == ["block", "verify", *map(str, depths)]
    [row] = [line.split() for line in last if line.split()[1:3] == ["assistant", "coupled"]]
    [told] = [
        r
        for r in report["summary"]
        if (r["block_size"], r["drafter"], r["verify"]) == (128, "assistant", "coupled")
    ]
    assert row[3:] == [f"{told['acceptance_by_depth'][depth - 1]:.2f}" for depth in depths]
    assert png.read_bytes() == sweep_picture.draw({**report, "rows": rows})
    assert "Picture: " in done.stderr and not list(tmp_path.glob("*.tmp*"))


@pytest.mark.native("the embedded pair takes plain MLX minutes")
def test_trees_stand_beside_the_chains(tmp_path: Path) -> None:
    """Of the embedded pair: in the tables, the report and the picture."""
    out, png = tmp_path / "out.json", tmp_path / "out.png"
    words = "--drafter dflash --verify greedy --block-sizes 2,4 --tree 7,3 --max-tokens 12"
    suite = tmp_path / "one.jsonl"
    one = {"id": "one", "category": "page", "prompt": "Write Pong.", "max_tokens": 12}
    suite.write_text(json.dumps(one))
    ask = ["bench", "sweep", *words.split(), "--repeats", "1", "--prompt-suite", str(suite)]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(
        cli.app, [*ask, "--output", str(out), "--plot", str(png)]
    )
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    named = [(row["block_size"], row["tree"]) for row in report["summary"]]
    assert named == [(1, None), (2, None), (4, None), ("auto", 7), ("auto", 3)]
    assert report["settings"]["tree"] == [7, 3]
    assert all(row["exact_match"] for row in report["summary"])
    lines = done.stdout.splitlines()
    title = "acceptance by draft, longest block of each; of trees, rounds that kept one there"
    *_, chain, tree = [line.split() for line in lines[lines.index(title) :] if line.strip()]
    assert chain[:3] == ["4", "dflash", "greedy"] and tree[:4] == ["tree", "7", "dflash", "greedy"]
    kept = report["summary"][3]["kept_by_depth"]
    assert tree[4:] == [f"{kept[depth - 1]:.2f}" for depth in (1, 2, 4)]
    assert png.read_bytes() == sweep_picture.draw(report)
    without = {**report, "summary": report["summary"][:3]}
    assert png.read_bytes() != sweep_picture.draw(without)


def end_at(monkeypatch: pytest.MonkeyPatch, run: int) -> None:
    """Ctrl-C before a run, counted from 0."""
    whole = gemma_mtp.gemma_mtp

    def on_run(done: int, total: int, label: str) -> None:
        if done == run:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        gemma_mtp, "gemma_mtp", lambda *a, **kw: whole(*a, **{**kw, "on_run": on_run})
    )


def test_ctrl_c_keeps_and_draws_what_was_measured(
    pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    end_at(monkeypatch, 3 + 3 + 1)  # in the second prompt
    files = ["--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    done = run(tmp_path, "--drafter", "lookup", "--block-sizes", "2,4", *files)
    assert done.exit_code == 130 and done.stderr.endswith("Interrupted.\n")
    assert "Not complete: 1 of 2 prompts" in done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert not report["complete"] and {row["prompt_id"] for row in report["rows"]} == {"one"}
    assert (tmp_path / "out.png").read_bytes() == sweep_picture.draw(report)


def test_ctrl_c_before_that_leaves_nothing(
    pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    end_at(monkeypatch, 2)
    files = ["--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert run(tmp_path, "--block-sizes", "2", *files).exit_code == 130
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--block-sizes 129", "[bench] block sizes must be 2 to 128 but got 129."),
        ("--drafter best", "[bench] drafter must be of assistant, dflash, lookup"),
        ("--verify best", "verify must be of residual, block, coupled, greedy but got 'best'."),
        ("--plot no/where.png", "[bench] output must lie in a folder that exists but got no/where"),
    ],
)
def test_what_it_refuses_before_it_loads(
    more: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pytest.fail("weights were read"))
    done = run(tmp_path, *more.split())
    assert done.exit_code == 2 and message in done.stderr


def test_no_run_begins_without_what_draws_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "available", lambda: False)
    done = run(tmp_path, "--plot", str(tmp_path / "x.png"))
    assert done.exit_code == 1 and "[bench] the picture needs matplotlib" in done.stderr


def row(block: Any, drafter: str | None, verify: str, **more: Any) -> dict[str, Any]:
    figures = dict.fromkeys((key for key, _, _ in sweep_picture.PLOTS), 0.5)
    named = {"block_size": block, "drafter": drafter, "verify": verify, "tree": None}
    return {**figures, **named, "acceptance_by_depth": [0.5, 0.25], **more}


SUMMARY = [
    row(1, None, "residual", acceptance_rate=None, acceptance_by_depth=[]),
    row(1, None, "greedy", acceptance_rate=None, acceptance_by_depth=[]),
    row(16, "lookup", "residual", acceptance_by_depth=[0.5, None]),
    row(2, "lookup", "residual", acceptance_rate=None),  # never drafted
    row("auto", "lookup", "residual"),
    row(4, "a+b: $x$", "greedy"),
]


def test_lines_are_drafters_and_rules_by_block_size() -> None:
    named = {
        line: [row["block_size"] for row in own]
        for line, own in sweep_picture.lines(SUMMARY).items()
    }
    assert named == {("lookup", "residual"): [2, 16], ("a+b: $x$", "greedy"): [4]}
    assert [row["block_size"] for row in sweep_picture.longest(SUMMARY)] == [16, 4]


def test_trees_are_lines_of_their_own_by_the_rows_they_verify() -> None:
    trees = [row("auto", "dflash", "greedy", tree=n, kept_by_depth=[0.9, n / 16]) for n in (15, 3)]
    chain = row(8, "dflash", "greedy")
    found = sweep_picture.lines([SUMMARY[1], chain, *trees])
    assert found == {
        ("dflash", "greedy"): [chain],
        ("trees of dflash", "greedy"): [trees[1], trees[0]],
    }
    assert [[sweep_picture.size(one) for one in own] for own in found.values()] == [[8], [4, 16]]
    assert sweep_picture.longest([chain, *trees]) == [chain, trees[0]]
    assert sweep_picture.by_depth(trees[0]) == [0.9, 15 / 16]
    assert sweep_picture.by_depth(chain) == [0.5, 0.25]


def test_the_picture_is_a_png_of_its_report() -> None:
    report: dict[str, Any] = {
        "summary": SUMMARY,
        "settings": {"max_tokens": 7, "repeats": 3},
        "sampler": {"temperature": 1.0, "top_p": 0.95, "top_k": 64},
        "machine": {"chip": "Chip $9$", "cores": 2, "load_average": [0.5, 0, 0]},
        "versions": {"pyengine": "1"},
        "prompts": [1, 2],
        "pair": {"name": "a pair: $x"},
        "started_at": "2031-02-03T",
        "complete": False,
    }
    png = sweep_picture.draw(report)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    size = (sweep_picture.WIDTH, sweep_picture.HEIGHT)
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == size
    assert png == sweep_picture.draw(report)
    changed = [{**SUMMARY[0], "tok_s": 0.75}, *SUMMARY[1:]]
    assert png != sweep_picture.draw({**report, "summary": changed})


def test_blocks_longer_than_a_launch_give_plain_text() -> None:
    """Of the embedded pair: a launch takes 16 rows, these blocks have 17 to 128."""
    ask: dict[str, Any] = {"sampling": {"temperature": 0}, "max_tokens": 60}
    prompt = "Create a single-file HTML5 canvas Snake game."
    plain = pyengine.generate(prompt, block_size=1, **ask)
    for drafter, block in (
        ("assistant", 17),
        ("early:6", 100),
        ("assistant", 128),
        ("lookup", 128),
    ):
        got = pyengine.generate(prompt, block_size=block, drafter=drafter, **ask)
        assert got.tokens == plain.tokens, (drafter, block)
        assert len(got.stats.drafted_by_depth) in (0, block - 1)
        assert drafter == "lookup" or got.stats.rounds < 30
