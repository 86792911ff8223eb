"""A group over a link of some delay and rate, between two network namespaces of this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from groups import FIXTURES, SECONDS, finish, start
from shaped import Side, lacking, link

DELAY_S, RATE, RATE_GB_S = 0.001, "80mbit", 0.01

pytestmark = pytest.mark.ranks


@pytest.fixture
def sides() -> Iterator[tuple[Side, Side]]:
    if (what := lacking()) is not None:
        pytest.skip(f"no two namespaces here: {what}")
    with link(DELAY_S, RATE) as both:
        yield both


def test_texts_are_those_of_plain_decoding(sides: tuple[Side, Side], tmp_path: Path) -> None:
    first, other = finish(start(tmp_path, 2, str(FIXTURES / "dense31"), sides=sides), SECONDS)
    assert (first[0], other[0], other[1]) == (0, 0, ""), (first, other)
    texts = json.loads(first[1])["texts"]
    assert texts["0.0 4"] == texts["0.0 1"] and texts["1.0 4"] == texts["1.0 1"]
    assert len(texts["0.0 1"]) == 24 and texts["1.0 1"] != texts["0.0 1"]


def test_the_doctor_notices_delay_and_rate(sides: tuple[Side, Side], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyengine", "doctor"]
    words = "--json", "--output", str(tmp_path / "out.json")
    first, other = finish(start(tmp_path, 2, *words, command=command, sides=sides), SECONDS)
    assert (first[0], other[0]) == (0, 0), (first, other)
    report = json.loads(first[1])
    found = report["link"]
    assert found["gather_us"]["least"] >= 1e6 * DELAY_S
    assert found["told_us"]["least"] >= 1e6 * DELAY_S
    assert found["gb_s"]["most"] <= 1.02 * RATE_GB_S  # tbf's burst of 64 kB goes at once
    [plain, _] = report["bounds"]["steps"]
    assert plain["messages_ms"] >= 1e3 * DELAY_S * (plain["gathers"] + plain["told"])
