"""Published numbers: every field of a row and of the summary, and all that a run is asked.

The runs are in scripted_runs.py, the figures are worked out by hand from them.
"""

from __future__ import annotations

import itertools
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from scripted_runs import BLOCK, CASES, MAX_TOKENS, REPEATS, RULES, SEED, Stage, run

from pyengine.bench import gemma_mtp
from pyengine.sampling.settings import Sampling

PAIR: Any = object()
SETTINGS: dict[str, Any] = {
    "max_tokens": MAX_TOKENS,
    "block_sizes": [BLOCK],
    "sampling": Sampling(temperature=0.5, top_p=0.75, top_k=3, seed=SEED),
    "repeats": REPEATS,
    "rules": RULES,
}
PLAIN, BLOCKS, COUPLED = (1, "residual"), (3, "block"), (3, "coupled")

# Column by column: case one's plain, block and coupled rows, then case two's
ROWS: dict[str, list[Any]] = {
    "prompt_id": ["one", "one", "one", "two", "two", "two"],
    "category": [*["chat"] * 3, *["continuation"] * 3],
    "prompt_sha256": [  # printf fox | sha256sum
        *["776cb326ab0cd5f0a974c1b9606044d8485201f2db19cf8e3749bdee5f36e200"] * 3,
        *["b9776d7ddf459c9ad5b0e1d6ac61e27befb5e99fd62446677600d7cacef544d0"] * 3,
    ],
    "prompt_tokens": [7, 8, 9, 21, 22, 23],
    "seed": [5, 5, 5, 6, 6, 6],
    "block_size": [1, 3, 3, 1, 3, 3],
    "verify": ["residual", "block", "coupled"] * 2,
    "drafter": [None, "assistant", "assistant"] * 2,
    "tree": [None] * 6,
    "token_budget": [20, 20, 20, 9, 9, 9],
    "hit_token_budget": [False, False, True, False, True, False],
    "finish_reason": ["stop", "stop", "length", "stop", "length", "stop"],
    "generated_tokens": [11, 13, 20, 5, 9, 5],
    "generation_started_at": ["3/3", "4/4", "5/5", "12/12", "13/13", "14/14"],
    "generation_ended_at": ["11/11", "12/12", "10/10", "20/20", "21/21", "19/19"],
    "elapsed_s": [11.0, 6.5, 40.0, 2.5, 3.0, 12.5],
    "prompt_eval_time_s": [0.5, 2.0, 0.125, 5.0, 0.25, 8.0],
    "decode_elapsed_s": [4.0, 1.5, 9.5, 1.0, 0.5, 8.0],
    "tok_s": [2.5, 8.0, 2.0, 4.0, 16.0, 0.5],
    "ar_tok_s": [2.5, 2.5, 2.5, 4.0, 4.0, 4.0],
    "speedup_vs_ar": [1.0, 3.2, 0.8, 1.0, 4.0, 0.125],
    "end_to_end_tok_s": [1.0, 2.0, 0.5, 2.0, 3.0, 0.4],
    "end_to_end_speedup_vs_ar": [1.0, 2.0, 0.5, 1.0, 1.5, 0.2],
    "verify_calls": [8, 5, 4, 2, 5, 2],
    "tokens_per_round": [1.25, 2.4, 4.75, 2.0, 1.6, 2.0],
    "drafts_per_round": [0.0, 2.0, 4.0, 0.0, 4.0, 2.5],
    "round_cost_in_plain_steps": [1.25, 0.75, 5.9375, 2.0, 0.4, 16.0],
    "drafted_tokens": [0, 10, 16, 0, 20, 5],
    "accepted_drafts": [0, 7, 4, 0, 15, 1],
    "rejected_drafts": [0, 3, 12, 0, 5, 4],
    "acceptance_rate": [None, 0.7, 0.25, None, 0.75, 0.2],
    "drafted_by_depth": [[], [5, 5], [8, 8], [], [10, 10], [4, 2]],
    "accepted_by_depth": [[], [4, 3], [4, 0], [], [9, 6], [1, 0]],
    "acceptance_by_depth": [[], [0.8, 0.6], [0.5, 0.0], [], [0.9, 0.6], [0.25, 0.0]],
    "kept_by_depth": [[], [0.8, 0.6], [1.0, 0.0], [], [1.8, 1.2], [0.5, 0.0]],
    "by_drafter": [{}, {}, {}, {}, {}, {}],
    "bonus_tokens": [0, 3, 1, 0, 2, 4],
    "correction_tokens": [0, 2, 6, 0, 3, 7],
    "peak_memory_bytes": [500, 70, 9, 3000, 13, 6],
    "repeats_agree": [True, False, True, False, True, True],
    "exact_match": [None, None, False, None, None, True],
    "samples": [
        [("3/3", 5.0, 0.5, 2.0, 11.0), ("8/8", 2.0, 0.25, 5.0, 5.5), ("10/10", 2.5, 0.75, 4.0, 22)],
        [("4/4", 4.0, 1.5, 3.0, 6.5), ("6/6", 16.0, 2.5, 1.0, 4.25), ("11/11", 8.0, 2.0, 1.5, 26)],
        [
            ("5/5", 4.0, 0.125, 4.75, 40.0),
            ("7/7", 2.0, 0.375, 9.5, 5.0),
            ("9/9", 0.5, 0.0625, 38.0, 80.0),
        ],
        [
            ("12/12", 4.0, 4.0, 1.0, 10.0),
            ("17/17", 2.0, 5.0, 2.0, 2.5),
            ("19/19", 8.0, 6.0, 0.5, 1),
        ],
        [("13/13", 32.0, 0.5, 0.25, 3), ("15/15", 16.0, 0.25, 0.5, 1), ("20/20", 8.0, 0.125, 1, 9)],
        [
            ("14/14", 0.5, 7.0, 8.0, 12.5),
            ("16/16", 0.25, 9.0, 16.0, 50.0),
            ("18/18", 1.0, 8.0, 4.0, 6.25),
        ],
    ],
    "tokens": [
        [100, 101, 102, 103, 104, 105, 106, 107, 108, 109, 110],
        [200, 201, 202, 203, 204, 205, 206, 207, 208, 209, 210, 211, 212],
        [*range(400, 420)],
        [500, 501, 502, 503, 504],
        [600, 601, 602, 603, 604, 605, 606, 607, 608],
        [500, 501, 502, 503, 504],
    ],
    "text": [f"text from [{first}]" for first in (100, 200, 400, 500, 600, 500)],
}
SAMPLE = ("started_at", "tok_s", "prefill_s", "decode_s", "elapsed_s")

# Pooled over both cases: plain, block, coupled
SUMMARY: dict[str, list[Any]] = {
    "block_size": [1, 3, 3],
    "verify": ["residual", "block", "coupled"],
    "drafter": [None, "assistant", "assistant"],
    "tree": [None, None, None],
    "tok_s": [2.8, 10.0, 46 / 35],
    "acceptance_rate": [None, 11 / 15, 5 / 21],
    "tokens_per_round": [1.4, 2.0, 23 / 6],
    "drafts_per_round": [0.0, 3.0, 3.5],
    "speedup_vs_ar": [1.0, 25 / 7, 23 / 49],
    "round_cost_in_plain_steps": [1.4, 0.56, 49 / 6],
    "drafted_by_depth": [[], [15, 15], [12, 10]],
    "accepted_by_depth": [[], [13, 9], [5, 0]],
    "acceptance_by_depth": [[], [13 / 15, 9 / 15], [5 / 12, 0.0]],
    "kept_by_depth": [[], [1.3, 0.9], [5 / 6, 0.0]],
    "by_drafter": [{}, {}, {}],
    "generated_tokens": [16, 22, 25],
    "decode_elapsed_s": [5.0, 2.0, 17.5],
    "prompt_eval_time_s": [5.5, 2.25, 8.125],
    "peak_memory_bytes": [3000, 70, 9],
    "repeats_agree": [False, False, True],
    "exact_match": [None, None, False],
}


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def check(rows: list[gemma_mtp.Row], wanted: dict[str, list[Any]]) -> None:
    """Every key of the rows has its column here, and every value in it is the row's."""
    for at, row in enumerate(rows):
        assert set(row) == set(wanted), "a figure that no test works out, or one that is gone"
        for key, column in wanted.items():
            want = column[at]
            if key == "samples":
                want = [pytest.approx(dict(zip(SAMPLE, one, strict=True))) for one in want]
            elif isinstance(want, float):
                want = pytest.approx(want, rel=1e-12)
            assert row[key] == want, (at, key)
            assert type(row[key]) is type(column[at]), (at, key)


def test_every_field_of_every_row_and_of_the_summary(stage: Stage) -> None:
    handed: list[list[gemma_mtp.Row]] = []
    rows, summary = gemma_mtp.gemma_mtp(PAIR, CASES, on_rows=handed.append, **SETTINGS)
    assert len(rows) == 6 and len(summary) == 3
    check(rows, ROWS)
    check(summary, SUMMARY)
    assert handed == [rows[:3], rows[3:]]
    assert gemma_mtp.summarise(rows) == summary
    assert not any(stage.runs.values()), "every scripted run was asked for"


def test_every_run_is_asked_for_with_its_own_settings(stage: Stage) -> None:
    gemma_mtp.gemma_mtp(PAIR, CASES, **SETTINGS)
    # Every case begins with the next setting in turn
    turns = [PLAIN, BLOCKS, COUPLED, BLOCKS, COUPLED, PLAIN, COUPLED, PLAIN, BLOCKS]
    warm_up = [("fox", False, 16, 5, setting) for setting in (PLAIN, BLOCKS, COUPLED)]
    one = [("fox", False, 20, 5, setting) for setting in turns]
    two = [("the", True, 9, 6, setting) for setting in turns]
    assert len(stage.asked) == 21
    for (content, asked), want in zip(stage.asked, [*warm_up, *one, *two], strict=True):
        prompt, raw, budget, seed, (block, rule) = want
        assert content == prompt
        assert asked == {
            "pair": PAIR,
            "max_tokens": budget,
            "sampling": Sampling(0.5, 0.75, 3, seed=seed, verify=rule),
            "block_size": block,
            "drafter": None if block == 1 else "assistant",
            "tree": None,
            "raw": raw,
        }


def test_every_block_size_runs_with_every_rule(stage: Stage) -> None:
    stage.runs = {
        (prompt, block, rule): [run(1, 2, (1.0, 1.0, 1.0), 1, prompt=1, peak=1) for _ in range(2)]
        for prompt, block, rule in itertools.product(("fox", "the"), (1, 2, 128), gemma_mtp.RULES)
    }
    labels: list[tuple[int, int, str]] = []
    settings = {**SETTINGS, "block_sizes": [2, 128], "repeats": 1, "rules": ["coupled", "residual"]}
    settings["sampling"] = Sampling(seed=SEED, verify="block")
    rows, _ = gemma_mtp.gemma_mtp(PAIR, CASES, on_run=lambda *now: labels.append(now), **settings)
    order = [(1, "block"), (2, "coupled"), (128, "coupled"), (2, "residual"), (128, "residual")]
    asked = [(kw["block_size"], kw["sampling"].verify) for _, kw in stage.asked]
    assert asked == order * 3
    assert [(row["block_size"], row["verify"]) for row in rows] == order * 2
    names = ["plain", "block 2 coupled", "block 128 coupled", "block 2", "block 128"]
    told = [f"one, {name}, warm-up" for name in names]
    told += [f"{case}, {name}, repeat 1 of 1" for case in ("one", "two") for name in names]
    assert labels == [(i, 15, text) for i, text in enumerate([*told, "done"])]


def test_drafters_stand_side_by_side(stage: Stage) -> None:
    """Plain decoding once; then every rule and block size of one drafter, and all of the next."""
    stage.runs = {
        (prompt, block, rule): [run(1, 2, (1.0, 1.0, 1.0), 1, prompt=1, peak=1) for _ in range(4)]
        for prompt, block, rule in itertools.product(("fox", "the"), (1, 2, 4), gemma_mtp.RULES)
    }
    labels: list[str] = []
    settings = {**SETTINGS, "block_sizes": [2, 4], "repeats": 1, "rules": ["residual", "coupled"]}
    rows, summary = gemma_mtp.gemma_mtp(
        PAIR,
        CASES,
        drafters=["lookup", "assistant"],
        on_run=lambda done, total, label: labels.append(label),
        **settings,
    )
    every = [(b, r, d) for d in ("lookup", "assistant") for r in settings["rules"] for b in (2, 4)]
    order = [(1, "residual", None), *every]
    keys = ("block_size", "verify", "drafter")
    assert [tuple(row[key] for key in keys) for row in rows] == order * 2
    assert [tuple(row[key] for key in keys) for row in summary] == order
    asked = [(kw["block_size"], kw["sampling"].verify, kw["drafter"]) for _, kw in stage.asked]
    assert asked == order * 3
    names = ["plain", "block 2 lookup", "block 4 lookup", "block 2 coupled lookup"]
    assert [label.split(", ")[1] for label in labels[:6]] == [
        *names,
        "block 4 coupled lookup",
        "block 2",
    ]


def test_trees_stand_behind_the_block_sizes(stage: Stage) -> None:
    """With each rule. Of 7 and of 3 drafts, at depths from 1 on, and what was kept of them."""
    seven = {"depths": ([8, 12, 8], [4, 3, 1]), "drafts": (28, 8), "rounds": 4}
    three = {"depths": ([9, 6], [5, 2]), "drafts": (15, 7), "rounds": 5}
    told: dict[str, Any] = {"prompt": 1, "peak": 1}
    seconds = (1.0, 1.0, 1.0)
    for prompt, rule in itertools.product(("fox", "the"), ("coupled", "residual")):
        stage.runs[prompt, 1, rule] = [run(1, 9, seconds, 8, **told) for _ in range(4)]
        stage.runs[prompt, 2, rule] = [run(1, 9, seconds, 8, **told) for _ in range(2)]
        both = [run(1, 13, seconds, **seven, **told), run(1, 13, seconds, **three, **told)]
        stage.runs[prompt, "auto", rule] = both * (2 if prompt == "fox" else 1)
    settings = {**SETTINGS, "block_sizes": [2], "repeats": 1, "rules": ["coupled", "greedy"]}
    rows, summary = gemma_mtp.gemma_mtp(PAIR, CASES, drafters=["dflash"], trees=[7, 3], **settings)
    order = [(2, None), ("auto", 7), ("auto", 3)]
    asked = [(kw["block_size"], kw["tree"]) for _, kw in stage.asked]
    assert asked == [(1, None), (1, None), *order, *order] * 3
    assert [(row["block_size"], row["tree"]) for row in summary[2:]] == order * 2
    for row in (rows[3], rows[6], rows[11]):
        assert (row["tree"], row["drafts_per_round"], row["tokens_per_round"]) == (7, 7.0, 3.0)
        assert row["acceptance_by_depth"] == [0.5, 0.25, 0.125]
        assert row["kept_by_depth"] == [1.0, 0.75, 0.25]
    for line in (summary[4], summary[7]):
        assert (line["tree"], line["drafts_per_round"], line["tokens_per_round"]) == (3, 3.0, 2.4)
        assert line["kept_by_depth"] == [1.0, 0.4] and line["acceptance_rate"] == 7 / 15
    assert str(gemma_mtp.Setting("auto", "coupled", "dflash", 7)) == "tree 7 coupled dflash"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"trees": [16]}, r"\[bench\] tree must be 1 to 15 but got 16\."),
        ({"trees": [0]}, r"\[bench\] tree must be 1 to 15 but got 0\."),
        ({"trees": [7, 7]}, r"\[bench\] tree must name a number once but got \[7, 7\]\."),
        ({"drafters": ["dflash", "lookup"]}, r"drafter must be dflash with a tree.* got lookup\."),
        ({"rules": ["greedy", "block"]}, r"verify must be coupled or greedy with.* got block\."),
    ],
)
def test_what_a_tree_does_not_go_with(more: dict[str, Any], told: str) -> None:
    asked = {"rules": ["coupled"], "drafters": ["dflash"], "trees": [7]}
    with pytest.raises(ValueError, match=told):
        gemma_mtp.check_settings([4], 1, 8, **{**asked, **more})


@pytest.mark.parametrize(("seed", "seeds"), [(None, [0, 0, 1]), (0, [0, 0, 1]), (7, [7, 7, 8])])
def test_a_case_has_its_own_seed(stage: Stage, seed: int | None, seeds: list[int]) -> None:
    settings = {**SETTINGS, "sampling": Sampling(seed=seed), "repeats": 1, "rules": ["block"]}
    rows, _ = gemma_mtp.gemma_mtp(PAIR, CASES, **settings)
    assert [kw["sampling"].seed for _, kw in stage.asked[::2]] == seeds
    assert [row["seed"] for row in rows] == [seeds[1]] * 2 + [seeds[2]] * 2


@pytest.mark.parametrize(
    ("most", "budgets"), [(3, [3, 3, 3]), (18, [16, 18, 9]), (30, [16, 24, 9])]
)
def test_a_budget_is_the_lower_of_the_two(stage: Stage, most: int, budgets: list[int]) -> None:
    settings = {**SETTINGS, "max_tokens": most, "repeats": 1, "rules": ["block"]}
    rows, _ = gemma_mtp.gemma_mtp(PAIR, CASES, **settings)
    assert [kw["max_tokens"] for _, kw in stage.asked[::2]] == budgets
    assert [row["token_budget"] for row in rows[::2]] == budgets[1:]


def test_the_clock_stands_while_others_work(stage: Stage) -> None:
    """Neither what is drawn between runs nor what is done with rows is in a figure."""

    def on_run(done: int, total: int, label: str) -> None:
        stage.clock.now += 4096

    def on_rows(rows: list[gemma_mtp.Row]) -> None:
        stage.clock.now += 4096

    rows, _ = gemma_mtp.gemma_mtp(PAIR, CASES, on_run=on_run, on_rows=on_rows, **SETTINGS)
    check(rows, ROWS)


def test_rows_of_an_interrupted_case_are_of_whole_repeats(stage: Stage) -> None:
    """Three warm-ups, one repeat of three, and one run of the next, which counts nowhere."""
    stage.fail_at = 8
    rows: list[gemma_mtp.Row] = []
    with pytest.raises(KeyboardInterrupt):
        gemma_mtp.gemma_mtp(PAIR, CASES, on_rows=rows.extend, **SETTINGS)
    assert [row["tok_s"] for row in rows] == [5.0, 4.0, 4.0]
    assert [row["ar_tok_s"] for row in rows] == [5.0, 5.0, 5.0]
    assert [row["speedup_vs_ar"] for row in rows] == [1.0, 0.8, 0.8]
    assert [row["end_to_end_speedup_vs_ar"] for row in rows] == [1.0, 2.0, 0.5]
    assert [row["decode_elapsed_s"] for row in rows] == [2.0, 3.0, 4.75]
    assert [row["generation_ended_at"] for row in rows] == ["4/4", "5/5", "6/6"]
    assert [row["repeats_agree"] for row in rows] == [True, True, True]
    assert [len(row["samples"]) for row in rows] == [1, 1, 1]


@pytest.mark.parametrize("repeats", [1, 2])
def test_figures_are_medians(stage: Stage, repeats: int) -> None:
    """Of one repeat itself, of two the mean."""
    rows, _ = gemma_mtp.gemma_mtp(PAIR, CASES[:1], **{**SETTINGS, "repeats": repeats})
    assert [row["tok_s"] for row in rows] == [[5.0, 4.0, 4.0], [3.5, 10.0, 3.0]][repeats - 1]
    assert rows[1]["speedup_vs_ar"] == pytest.approx([4 / 5, 10 / 3.5][repeats - 1])
    assert rows[1]["decode_elapsed_s"] == [3.0, 2.0][repeats - 1]
    assert rows[1]["prompt_eval_time_s"] == [1.5, 2.0][repeats - 1]
    assert rows[1]["elapsed_s"] == [6.5, 5.375][repeats - 1]
    assert rows[1]["end_to_end_tok_s"] == [2.0, 3.0][repeats - 1]


@pytest.mark.parametrize(
    ("sampling", "matches", "pooled"),
    [
        (Sampling(seed=1), [None, None, False, None, None, True], [None, None, False]),
        (
            Sampling(seed=1, verify="coupled"),
            [True, None, False, True, None, True],
            [True, None, False],
        ),
        (
            Sampling(temperature=0.0),
            [True, False, False, True, False, True],
            [True, False, False],
        ),
    ],
)
def test_exact_match_compares_with_plain_text(
    stage: Stage, sampling: Sampling, matches: list[bool | None], pooled: list[bool | None]
) -> None:
    """Where the text must be plain decoding's: greedily, and by the coupled rule."""
    if sampling.verify != "residual":
        for prompt in ("fox", "the"):
            stage.runs[prompt, 1, sampling.verify] = stage.runs.pop((prompt, 1, "residual"))
    rows, summary = gemma_mtp.gemma_mtp(PAIR, CASES, **{**SETTINGS, "sampling": sampling})
    assert [row["exact_match"] for row in rows] == matches
    assert [line["exact_match"] for line in summary] == pooled


def test_a_text_as_long_as_plain_is_not_its_equal(stage: Stage) -> None:
    """Equality is of every token, of the first repeat."""
    for at, same in ((0, False), (-1, False), (None, True)):
        stage.runs = {
            ("fox", block, "coupled"): [
                run(100, 6, (1.0, 1.0, 1.0), 1, prompt=1, peak=1) for _ in range(3)
            ]
            for block in (1, 3)
        }
        if at is not None:
            stage.runs["fox", 3, "coupled"][1].tokens[at] = 7
        settings = {**SETTINGS, "repeats": 2, "rules": ["coupled"]}
        rows, _ = gemma_mtp.gemma_mtp(
            PAIR, CASES[:1], **{**settings, "sampling": Sampling(verify="coupled")}
        )
        assert [row["exact_match"] for row in rows] == [True, same]
        assert [row["repeats_agree"] for row in rows] == [True, same]


def test_nothing_decoded_has_no_rate(stage: Stage) -> None:
    """One token, which belongs to the prefill, in no time: no figure is made up, none divides."""
    for runs in stage.runs.values():
        runs[:] = [run(5, 1, (1.0, 0.0, 2.0), 0, prompt=3, peak=1) for _ in range(4)]
    rows, summary = gemma_mtp.gemma_mtp(PAIR, CASES, **SETTINGS)
    for row in rows:
        assert (row["tok_s"], row["ar_tok_s"]) == (0.0, 0.0)
        none = ("speedup_vs_ar", "tokens_per_round", "round_cost_in_plain_steps")
        none += ("acceptance_rate",)
        assert [row[key] for key in none] == [None] * 4
        assert (row["end_to_end_tok_s"], row["end_to_end_speedup_vs_ar"]) == (0.5, 1.0)
    for line in summary:
        none = ("tok_s", "speedup_vs_ar", "tokens_per_round", "round_cost_in_plain_steps")
        assert [line[key] for key in none] == [None] * 4
        assert line["generated_tokens"] == 2 and line["decode_elapsed_s"] == 0


def test_one_token_told_of_a_round_has_no_rate(stage: Stage) -> None:
    """A stop string may cut a whole round: time has passed, and nothing decoded was told."""
    for runs in stage.runs.values():
        runs[:] = [run(5, 1, (1.0, 2.0, 4.0), 3, prompt=3, peak=1) for _ in range(4)]
    rows, summary = gemma_mtp.gemma_mtp(PAIR, CASES, **SETTINGS)
    for line in (*rows, *summary):
        assert line["tok_s"] == line["tokens_per_round"] == 0.0
        assert line["speedup_vs_ar"] is line["round_cost_in_plain_steps"] is None


def test_nothing_at_all_has_no_rate(stage: Stage) -> None:
    """No token in no time, of drafts alone: the plain runs have their figures."""
    for (_, block, _), runs in stage.runs.items():
        if block == 3:
            runs[:] = [run(5, 0, (0.0, 0.0, 0.0), 4, prompt=3, peak=1) for _ in range(4)]
    rows, summary = gemma_mtp.gemma_mtp(PAIR, CASES, **SETTINGS)
    assert [row["ar_tok_s"] for row in rows[:3]] == [2.5] * 3
    for row in (*rows[1:3], *rows[4:]):
        names = ("tok_s", "speedup_vs_ar", "end_to_end_tok_s", "end_to_end_speedup_vs_ar")
        assert [row[name] for name in names] == [0.0] * 4
        assert row["tokens_per_round"] == 0.0 and row["round_cost_in_plain_steps"] is None
    assert [line["tok_s"] for line in summary] == [pytest.approx(2.8), None, None]
    assert [line["speedup_vs_ar"] for line in summary] == [1.0, None, None]


def test_the_least_and_the_most_that_can_be_asked() -> None:
    assert gemma_mtp.check_settings([2, 128], 1, 2) is None  # not refused
    assert gemma_mtp.check_settings([2], 1, 2, ["residual", "block", "coupled"]) is None


def test_times_are_utc_to_the_millisecond(monkeypatch: pytest.MonkeyPatch) -> None:
    before = datetime.now(timezone.utc)
    said = gemma_mtp.now()
    after = datetime.now(timezone.utc)
    moment = datetime.fromisoformat(said)
    assert moment.utcoffset() == timedelta(0)
    assert before - timedelta(milliseconds=1) <= moment <= after
    assert len(said) == len("2026-01-31T12:34:56.789+00:00")
