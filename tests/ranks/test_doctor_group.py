"""`pyengine doctor` over ranks: what it compares, measures and works out."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from groups import FIXTURES, SECONDS, changed_weights, finish, start
from typer.testing import CliRunner

from pyengine import cli
from pyengine.checkpoint.inspect import inspect
from pyengine.doctor import group

NANO = Path(__file__).parents[2] / "pyengine/nano"
LINK = {
    "gather_us": {"median": 200.0, "least": 100.0},
    "told_us": {"median": 300.0, "least": 50.0},
    "gb_s": {"median": 0.5, "most": 1.0},
}


def host(**more: Any) -> dict[str, Any]:
    found = {"host": "a", "pyengine": "0.1.0", "mlx": "0.32.4", "sources": "s", "python": "3.11.7"}
    return {**found, "weights": "w" * 64, "bandwidth": {"gb_s": 100.0}, **more}


def doctor(folder: Path, size: int, *arguments: str) -> list[tuple[int, str, str]]:
    command = [sys.executable, "-m", "pyengine", "doctor"]
    output = str(folder / "out.json")
    return finish(
        start(folder, size, *arguments, "--json", "--output", output, command=command), SECONDS
    )


@pytest.mark.ranks
def test_a_group_that_is_well(tmp_path: Path) -> None:
    first, other = doctor(tmp_path, 2)
    assert (first[0], other[0], other[1]) == (0, 0, ""), (first, other)
    found = json.loads(first[1])
    assert found == json.loads((tmp_path / "out.json").read_text())
    assert found["ok"] and found["backend"] == "ring" and found["ranks"] == 2
    assert len({one["weights"] for one in found["hosts"]}) == 1 and len(found["hosts"]) == 2
    told = inspect(NANO, ranks=2)["ranks"]
    assert [one["weight_bytes"] for one in found["hosts"]] == [one["weights"] for one in told]
    link = found["link"]
    for what in ("gather_us", "told_us"):
        assert 0 < link[what]["least"] <= link[what]["median"]
    assert 0 < link["gb_s"]["median"] <= link["gb_s"]["most"]
    plain, block = found["bounds"]["steps"]
    assert (plain["rows"], block["rows"]) == (1, group.BLOCK)
    assert "not a speed" in found["bounds"]["label"]
    times = [plain[name] for name in plain if name.endswith("_ms") and name != "total_ms"]
    assert plain["tok_s_at_acceptance"] == {"0": pytest.approx(1000 / sum(times))}


@pytest.mark.ranks
@pytest.mark.parametrize("what", ["other weights", "no pair"])
def test_a_host_that_is_not_like_the_first_is_named(what: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    if what == "other weights":
        changed_weights(FIXTURES / "dense31", own)
    else:
        own.mkdir()
    program = (
        "import os, sys; from pyengine.__main__ import main; "
        "own = sys.argv.pop(); sys.argv[-1] = own if os.environ['MLX_RANK'] == '1' "
        "else sys.argv[-1]; main()"
    )
    words = ("doctor", "--output", str(tmp_path / "out.json"), "--json", "--bundle")
    shutil.copytree(FIXTURES / "dense31", tmp_path / "first")
    command = [sys.executable, "-c", program]
    processes = start(tmp_path, 2, *words, str(tmp_path / "first"), str(own), command=command)
    first, other = finish(processes, SECONDS)
    assert (first[0], other[0], other[1]) == (1, 1, ""), (first, other)
    found = json.loads(first[1])
    [problem] = found["problems"]
    assert problem.startswith("rank 1 (")
    if what == "no pair":
        assert "[load] " in problem and str(own) in problem and "bounds" not in found
    else:
        ours, theirs = (one["weights"][:12] for one in found["hosts"])
        assert problem.endswith(f"must have rank 0's weights {ours} but has {theirs}.")


def test_what_differs_is_a_sentence_each() -> None:
    assert group.unlike([host(), host()]) == []
    other = host(host="b", mlx="0.33.0", sources="t", python="3.12.1", weights="v" * 64)
    assert group.unlike([host(), other]) == [
        "rank 1 (b) must have rank 0's mlx 0.32.4 but has 0.33.0.",
        "rank 1 (b) must have rank 0's sources s but has t.",
        f"rank 1 (b) must have rank 0's weights {12 * 'w'} but has {12 * 'v'}.",
    ]
    bad = host(host="b", fault="[load] x is damaged.")
    del bad["weights"]
    assert group.unlike([host(), bad]) == ["rank 1 (b): [load] x is damaged."]


def test_a_bound_worked_out_by_hand() -> None:
    """The slower rank's weights, the least times of messages, the best rate, rank 0's drafts."""
    hosts = [host(), host(bandwidth={"gb_s": 10.0})]
    report: dict[str, Any] = {"hosts": hosts, "link": LINK, "ranks": 2}
    group.add_bounds(report, NANO)
    plain, block = report["bounds"]["steps"]
    assert plain["weights_ms"] == pytest.approx(
        max(hosts[0]["read_bytes"] / 1e8, hosts[1]["read_bytes"] / 1e7)
    )
    assert hosts[1]["read_bytes"] == hosts[1]["weight_bytes"]  # it has no table but its head's part
    assert plain["messages_ms"] == pytest.approx(plain["gathers"] * 0.1 + 5 * 0.05)
    assert (
        plain["sending_ms"] == pytest.approx(plain["sent_bytes"] / 1e6) and plain["drafts_ms"] == 0
    )
    whole = inspect(NANO)["assistant"]["tensors"]["bytes"]
    assert 0 < block["drafts_ms"] <= 5 * whole / 1e8
    rates = block["tok_s_at_acceptance"]
    assert rates["0.8"] / rates["0.4"] == pytest.approx(5 / 3)
    assert rates["0.8"] == pytest.approx(5000 / block["total_ms"])
    text = "\n".join(
        group.lines(
            {
                **report,
                "backend": "ring",
                "bundle": "x",
                "problems": ["p."],
                "hints": [],
                "hosts": [
                    one
                    | {
                        "chip": "c",
                        "os": "o",
                        "available_bytes": None,
                        "bandwidth": {"gb_s": 1.0, "source": "s"},
                    }
                    for one in hosts
                ],
                "link": LINK | {"clock": "messages between processes, ring"},
            }
        )
    )
    assert "at acceptance 0.8" in text and "not a speed" in text and "problem: p." in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bundle", "x"], "--bundle must come with --hostfile but stands alone."),
        (["--hostfile", "/nowhere.json"], "/nowhere.json cannot be read"),
    ],
)
def test_refused_alone(words: list[str], said: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["doctor", "--output", str(tmp_path / "x.json"), *words])
    assert done.exit_code == 2 and said in done.stderr and not done.stdout


def test_settings_of_ops_are_refused_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_RANK", "0")
    monkeypatch.setenv("MLX_HOSTFILE", "x")
    done = CliRunner().invoke(cli.app, ["doctor", "--quick"])
    assert done.exit_code == 2
    assert "--quick, --op and --device must be left out where ranks are examined." in done.stderr
