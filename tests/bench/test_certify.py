"""`bench gemma-mtp --certify`: which settings are not slower, by seconds worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted_runs import Stage
from test_bench_printed import pair, run, stage

from pyengine.bench.gemma_mtp import Setting, certify

__all__ = ["pair", "stage"]  # fixtures


def rows(slower: dict[int, int], n: int) -> list[dict[str, Any]]:
    """Of n prompts, each block size slower on so many."""
    found = []
    for i in range(n):
        for block in (1, *slower):
            fast = block == 1 or i >= slower[block]
            found.append(
                {
                    "block_size": block,
                    "verify": "residual",
                    "drafter": None if block == 1 else "assistant",
                    "tree": None,
                    "tok_s": 10.0 if fast else 9.0,
                    "ar_tok_s": 10.0,
                }
            )
    return found


def test_settings_are_tested_in_their_order() -> None:
    """Of 60 prompts none, one and eight slower, delta .1: .9^60 = .0018; with 60 * .1 * .9^59 more
    .0138; and .8; what stands behind that is not tested, though it is as good as the first."""
    found = certify(rows({2: 0, 4: 1, 6: 8, 3: 0}, 60), 0.1, 0.05)
    told = [(one.setting.block_size, one.slower, one.passed) for one in found]
    assert told == [(2, 0, True), (4, 1, True), (6, 8, False), (3, 0, False)]
    ps = [one.p_value for one in found]
    assert ps[:2] == pytest.approx([0.9**60, 0.9**60 + 6 * 0.9**59])
    assert ps[2] is not None and ps[2] > 0.7 and ps[3] is None
    assert found[0].setting == Setting(2, "residual", "assistant")
    # Another order, fixed as well beforehand: the bad one ends it at once
    again = certify(rows({6: 8, 2: 0}, 60), 0.1, 0.05)
    assert [(one.slower, one.passed) for one in again] == [(8, False), (0, False)]
    assert certify(rows({2: 0}, 28), 0.1, 0.05)[0].passed is False
    assert certify(rows({2: 0}, 29), 0.1, 0.05)[0].passed is True


def test_the_table_and_the_report_say_it(stage: Stage, pair: Any, tmp_path: Path) -> None:
    """Block 3 is faster on both prompts under the rule block, slower on both under coupled."""
    done = run(tmp_path, "--certify", "--delta", "0.5", "--epsilon", "0.3")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    [title] = [i for i, line in enumerate(lines) if line.startswith("certified: ")]
    assert " ".join(" ".join(lines[title : title + 2]).split()).startswith(
        "certified: on prompts like these 2, not slower than plain decoding on all but a share "
        "0.5, with confidence 0.7"
    )
    cells = [line.split("  ") for line in lines[title:]]
    said = [[cell.strip() for cell in row if cell.strip()] for row in cells]
    assert ["block 3 block", "0 of 2", "0.25", "yes"] in said
    assert ["block 3 coupled", "2 of 2", "1", "no"] in said
    whole = json.loads((tmp_path / "out.json").read_text())
    assert whole["certified"] == json.loads(lines[-1])["certified"]
    assert whole["certified"] == {
        "delta": 0.5,
        "epsilon": 0.3,
        "n": 2,
        "settings": [
            {
                "block_size": 3,
                "verify": "block",
                "drafter": "assistant",
                "tree": None,
                "slower": 0,
                "p_value": pytest.approx(0.25),
                "certified": True,
            },
            {
                "block_size": 3,
                "verify": "coupled",
                "drafter": "assistant",
                "tree": None,
                "slower": 2,
                "p_value": 1.0,
                "certified": False,
            },
        ],
    }


def test_nothing_is_certified_unasked(stage: Stage, pair: Any, tmp_path: Path) -> None:
    done = run(tmp_path)
    assert '"certified":' not in done.stdout and "certified: " not in done.stdout
    assert "certified" not in json.loads((tmp_path / "out.json").read_text())


def test_too_few_prompts_and_bad_bounds(stage: Stage, pair: Any, tmp_path: Path) -> None:
    done = run(tmp_path, "--certify")
    assert done.exit_code == 0
    assert done.stderr.splitlines()[0] == (
        "Warning: 2 prompts are too few: even without any loss, delta 0.1 and epsilon 0.05 need 29."
    )
    bad = run(tmp_path, "--certify", "--delta", "1")
    assert bad.exit_code == 2
    assert "[bench] delta must be above 0 and below 1 but got 1.0." in bad.stderr
