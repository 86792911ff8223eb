"""Bits of every op at the shapes of the published pairs: those that were written down once.

`tests/fixtures/op_bits.json` is what `tests/op_bits.py` wrote on the build of commit bcd85bd; the
lines of `copy_pages` and `move_rows` are newer, and so is all that is said of `vnni` and `amx`,
which were not there yet. An op that is meant to give other bits has its lines written anew, and its
entry in CHANGELOG.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import pytest

from pyengine import ops
from pyengine.checkpoint.published import PUBLISHED

TESTS = Path(__file__).parents[1]
KEPT = json.loads((TESTS / "fixtures/op_bits.json").read_text())["ops"]


def script() -> ModuleType:
    """No module of a package, since it runs on other builds too."""
    spec = importlib.util.spec_from_file_location("op_bits", TESTS / "op_bits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


op_bits = script()
NAMES = sorted(name for name in ops.__all__ if f"{name}_reference" in ops.__all__)
LIKE = {"neon": "avx2"}  # whose lanes, fma and trees of additions it shares


def assert_kept(cases: Sequence[tuple]) -> None:
    assert cases
    for case in cases:
        kept = op_bits.split(KEPT[case.op][case.name])
        got = op_bits.bits(case)
        same = {name: got[name] == kept[LIKE.get(name, name)] for name in got}
        assert all(same.values()), f"{case.op}: {case.name}: {same}"


def quick(op: str) -> list[tuple]:
    """Of one pair, in the dtype of the published weights, without its head: seconds in all."""
    cases = [case for case in op_bits.cases(["26B-A4B"]) if case.op == op]
    return [
        case
        for case in cases
        if case.settings.get("dtype", "bfloat16") == "bfloat16"
        and case.settings.get("K", 0) * case.settings.get("V", 0) < 1 << 27
    ]


@pytest.mark.parametrize("op", NAMES)
def test_bits_of_one_pair(op: str) -> None:
    assert_kept(quick(op))


@pytest.mark.long
@pytest.mark.parametrize("op", NAMES)
def test_bits_of_all_pairs(op: str) -> None:
    assert_kept([case for case in op_bits.cases() if case.op == op])


def test_every_op_and_pair_is_there() -> None:
    assert op_bits.PAIRS == PUBLISHED
    found = op_bits.cases()
    assert sorted({case.op for case in found}) == NAMES == sorted(KEPT)
    assert {op: list(rows) for op, rows in KEPT.items()} == {
        op: [case.name for case in found if case.op == op] for op in KEPT
    }


def test_a_bit_more_is_another_digest() -> None:
    one = mx.array([1.0, 2.0])
    others = [one.at[1].add(2.0**-22), one[None], one.astype(mx.float16), one[:1]]
    digests = [op_bits.digest([a]) for a in (one, *others)]
    assert len(set(digests)) == len(digests)
    assert op_bits.digest([one, None]) != op_bits.digest([one])
    assert op_bits.digest([one + 0]) == digests[0]


def test_what_differs_is_named() -> None:
    rows = "aa bb cc dd ee"
    old = {"ops": {"f": {"K=1": {"portable, avx2": rows, "first": [1.0]}, "K=2": {}}}}
    new = {"ops": {"f": {"K=1": {"avx2": rows, "portable": "aa bb cc dd ff", "first": [2.0]}}}}
    compared, lines = op_bits.differences(old, new)
    assert compared == 2
    assert lines == [
        "f: K=1: portable, 17 rows: [1.0] and [2.0] (one row)",
        "f: K=2: only in the first",
    ]
    assert op_bits.differences(old, old) == (2, ["f: K=2: no instruction set in common"])
