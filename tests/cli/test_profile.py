"""Profiles of block sizes: measured once, kept as they are, shown, and ignored where damaged."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytest

from pyengine.checkpoint.pair import load
from pyengine.doctor import profile, quarantine
from pyengine.doctor.profile import Profile
from pyengine.drafters import new_drafter
from pyengine.drafters.assistant import AssistantDrafter
from pyengine.engine.controller import Acceptance, Controller, Known, Shape, Text
from pyengine.engine.known import known_of
from pyengine.generation import generate
from pyengine.ops import dispatch
from pyengine.sampling import Sampling

EXAMPLE = Profile(
    "a pair",
    (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4),
    0.1,
    (100, 80, 64, 50, 40, 32, 26),
    (80, 64, 51, 40, 32, 26, 21),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of its own, and a process that has seen no pair."""
    monkeypatch.setattr(quarantine, "folder", lambda: tmp_path / "pyengine")
    forget(monkeypatch)
    return tmp_path / "pyengine"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "_profiles", WeakKeyDictionary())


@pytest.fixture(scope="module")
def pair() -> Any:
    return load()


def test_the_best_block_has_most_expected_tokens_per_second() -> None:
    rates = EXAMPLE.acceptance
    assert all(0.75 < rate < 0.85 for rate in rates)
    expected = []
    for k, took in enumerate(EXAMPLE.round_s):
        expected.append(sum(0.8**i for i in range(k + 1)) / took)
    assert EXAMPLE.best_block == 1 + expected.index(max(expected)) == 5
    none = Profile("x", EXAMPLE.round_s, 0.1, (50,) * 7, (0,) * 7)
    assert none.best_block == 1
    assert EXAMPLE.verify_s[7] == pytest.approx(1.7) and EXAMPLE.verify_s[0] == 1.0


def test_it_is_measured_once_and_then_stays(
    folder: Path, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def measured(pair: Any, drafter: str) -> Profile:
        made.append(pair)
        return EXAMPLE

    monkeypatch.setattr(profile, "measured", measured)
    assert profile.kept(pair) is None and not made  # nothing is measured to look
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 3, "sampling": Sampling(seed=1)}
    assert generate("x", **ask).stats.block_size == EXAMPLE.best_block
    [file] = folder.iterdir()
    text = file.read_text()
    for _ in range(2):
        assert profile.ready(pair) == profile.kept(pair) == EXAMPLE
        forget(monkeypatch)  # another process
    assert len(made) == 1 and file.read_text() == text and [*folder.iterdir()] == [file]
    file.unlink()
    assert profile.ready(pair) == EXAMPLE and len(made) == 2


def test_a_measurement_is_of_the_pair(pair: Any) -> None:
    seconds = itertools.count(0.0, 1e-3)  # however busy the machine is
    found = profile.measured(pair, "assistant", lambda: next(seconds))
    assert found is not None and found.pair == pair.name
    assert len(found.round_s) == 8 and min(found.round_s) > 0 < found.draft_s
    assert found.drafted[0] >= 40 and 1 <= found.best_block <= 8
    assert all(a <= d for a, d in zip(found.accepted, found.drafted, strict=True))
    assert sum(found.accepted) > 0.5 * sum(found.drafted)  # of a trained assistant
    assert Profile(**json.loads(json.dumps(profile.asdict(found)))).pair == pair.name


def test_what_is_too_slow_has_none_and_is_not_tried_again(
    folder: Path, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter(range(0, 10_000, 6))
    assert profile.measured(pair, "assistant", lambda: float(next(seconds))) is None
    made: list[Any] = []
    monkeypatch.setattr(profile, "measured", lambda pair, drafter: made.append(pair))
    for _ in range(3):
        assert profile.ready(pair) is None
        forget(monkeypatch)
    assert len(made) == 1
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 3, "sampling": Sampling(seed=1)}
    assert generate("x", **ask).stats.block_size == 4


def test_where_none_can_be_kept_none_is_made(
    tmp_path: Path, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(quarantine, "folder", lambda: tmp_path / "file" / "pyengine")
    monkeypatch.setattr(profile, "measured", None)
    forget(monkeypatch)
    assert profile.ready(pair) is None
    monkeypatch.setattr(quarantine, "folder", lambda: tmp_path)
    forget(monkeypatch)
    monkeypatch.setattr(dispatch, "exact", lambda: False)
    assert profile.ready(pair) is None and [*tmp_path.iterdir()] == [tmp_path / "file"]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda value: "{", "JSON"),
        (lambda value: "[]", "must have format 2"),
        (lambda value: {**value, "format": 1}, "must have format 2"),
        (lambda value: {**value, "key": {**value["key"], "pair": "0"}}, "of another pair, drafter"),
        (lambda value: {**value, "key": None}, "must have a key"),
        (lambda value: {**value, "profile": {}}, "must hold a profile"),
        (lambda value: changed(value, round_s=[1.0]), "`round_s` must hold 8 numbers"),
        (lambda value: changed(value, round_s=[0] * 8), "`round_s` must hold numbers that can be"),
        (lambda value: changed(value, accepted=["1"] * 7), "`accepted` must hold numbers that"),
        (lambda value: changed(value, accepted=[900] * 7), "`accepted` must be at most `drafted`"),
        (lambda value: changed(value, drafter=3), "`pair` and `drafter` must be names"),
        (lambda value: changed(value, draft_s=None), "`draft_s` must be a number"),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_a_line(
    folder: Path, pair: Any, monkeypatch: pytest.MonkeyPatch, damage: Any, why: str
) -> None:
    monkeypatch.setattr(profile, "measured", lambda pair, drafter: EXAMPLE)
    profile.ready(pair)
    [file] = folder.iterdir()
    value = damage(json.loads(file.read_text()))
    file.write_text(value if isinstance(value, str) else json.dumps(value))
    forget(monkeypatch)
    told: list[str] = []
    assert profile.kept(pair, told.append) is None
    assert len(told) == 1 and why in told[0] and told[0].startswith(f"{file} is ignored: ")
    assert profile.here() == [] or "another pair" in why
    assert profile.ready(pair, told.append) == EXAMPLE  # and made anew
    forget(monkeypatch)
    assert profile.kept(pair, told.append) == EXAMPLE and len(told) == 2


def changed(value: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**value, "profile": {**value["profile"], **fields}}


def test_pairs_have_profiles_of_their_own(
    folder: Path, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = load(dtype="float16")
    assert profile.path(pair) == profile.path(load()) != profile.path(other)
    monkeypatch.setattr(profile, "measured", lambda pair, drafter: EXAMPLE)
    profile.ready(pair)
    assert profile.kept(other) is None
    profile.ready(other)
    assert profile.here() == [EXAMPLE, EXAMPLE]
    assert len(EXAMPLE.line()) < 160 and EXAMPLE.line().startswith("block size 5 for 'a pair'")
    assert EXAMPLE.to_dict()["best_block"] == 5
    alone = load(Path(pair.path) / "target")
    assert profile.ready(alone) is None  # without an assistant


@pytest.mark.parametrize("drafter", ["dflash", "early:6"])
def test_other_drafters_have_profiles_of_their_own(
    folder: Path, pair: Any, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    seconds = itertools.count(0.0, 1e-3)
    found = profile.measured(pair, drafter, lambda: next(seconds))
    assert found is not None and found.drafter == drafter and 1 <= found.best_block <= 8
    assert found.drafted[0] >= 40 and found.accepted[0] > 10
    # By the clock's steps a round takes as long with drafts as without
    steps = 1 if drafter == "dflash" else 7
    assert [t - v for t, v in zip(found.round_s, found.verify_s, strict=True)] == pytest.approx(
        [min(k, steps) * found.draft_s for k in range(8)]
    )
    own = replace(EXAMPLE, drafter=drafter)
    monkeypatch.setattr(profile, "measured", lambda pair, drafter: replace(own, drafter=drafter))
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 3, "sampling": Sampling(seed=1)}
    assert generate("x", drafter=f"{drafter}+lookup", **ask).stats.block_size == own.best_block
    assert profile.kept(pair, drafter=drafter) == own and profile.kept(pair) is None
    assert profile.path(pair, drafter) != profile.path(pair)
    assert profile.here() == [own]
    assert own.line().startswith(f"block size 5 for 'a pair' with {drafter}: plain step")
    assert (
        len(
            known_of(
                pair.target, type(new_drafter(drafter, pair.target, None, pair.dflash))
            ).costs.shapes
        )
        == 8
    )
    assert generate("x", drafter="lookup", **ask).stats.block_size == 8
    assert len([*folder.iterdir()]) == 1  # of lookup there is none


def test_a_controller_begins_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known()
    EXAMPLE.teach(known)
    [k] = Controller(known).choose([Text(Acceptance(known.acceptance))])
    assert k + 1 in (EXAMPLE.best_block - 1, EXAMPLE.best_block, EXAMPLE.best_block + 1)
    assert known.costs.estimate(Shape(1, 5, 5)) == pytest.approx(2.0, rel=0.1)
    monkeypatch.setattr(profile, "measured", lambda pair, drafter: EXAMPLE)
    own = load()
    profile.ready(own)
    assert len(known_of(own.target, AssistantDrafter).costs.shapes) == 8
