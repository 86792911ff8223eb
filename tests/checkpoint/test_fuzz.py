"""Spoiled files: every reader takes them or refuses them in one sentence, and nothing else.

A dozen cases a reader by default. More, with a summary of what was met:

    FUZZ_EXAMPLES=5000 pytest -s tests/checkpoint/test_fuzz.py

Guided by coverage, a reader at a time: fuzz_atheris.py.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from fuzz_targets import TARGETS, Finding, house, seeds
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "15"))
MET: Counter[tuple[str, bool]] = Counter()

# Values that have broken a reader somewhere
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**30, 10**400]),
    st.floats(),
    st.sampled_from(["", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "\u2028", "x" * 5000]),
    st.text(max_size=8),
    st.lists(st.integers(0, 5), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(0, 5), max_size=2),
)


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """Paths to every part of a JSON value; of long lists, to some."""
    if at:
        yield at
    if isinstance(value, (dict, list)):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in list(inner)[:40]:
            yield from places(part, (*at, key))


@st.composite
def spoiled_json(draw: Any, data: bytes) -> bytes:
    """A few values replaced or removed."""
    value = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(places(value))
        if not paths:
            break
        *outer, last = draw(st.sampled_from(paths))
        place = value
        for key in outer:
            place = place[key]
        if draw(st.booleans()):
            place[last] = draw(ODD)
        else:
            del place[last]
    return json.dumps(value).encode()


@st.composite
def spoiled_bytes(draw: Any, data: bytes) -> bytes:
    """Cut, overwritten, repeated; near the beginning, where formats say what follows."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        near = draw(st.sampled_from([16, 400, max(len(out), 1)]))
        at = draw(st.integers(0, min(near, len(out))))
        what = draw(st.integers(0, 3))
        new = draw(st.binary(min_size=1, max_size=9))
        if what == 0:
            del out[at:]
        elif what == 1:
            out[at : at + len(new)] = new
        elif what == 2:
            out[at:at] = new
        else:
            out[at:at] = out[: draw(st.integers(0, min(len(out), 200)))]
    return bytes(out)


def spoiled(name: str) -> st.SearchStrategy[bytes]:
    whole = seeds(name)
    ways = [st.binary(max_size=64), *map(spoiled_bytes, whole)]
    lines = [line for seed in whole for line in seed.splitlines()] if name == "suite" else whole
    return st.one_of(*ways, *(spoiled_json(part) for part in lines if is_json(part)))


def is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", TARGETS)
def test_spoiled_files(name: str) -> None:
    read = TARGETS[name]

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize="FUZZ_EXAMPLES" not in os.environ,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(spoiled(name))
    def run(data: bytes) -> None:
        MET[name, read(data)] += 1

    run()
    taken, refused = MET[name, True], MET[name, False]
    print(f"{name}: {taken + refused} cases, {taken} taken, {refused} refused")
    assert refused > 0


@pytest.mark.parametrize("name", TARGETS)
def test_right_files_are_taken(name: str) -> None:
    assert all(TARGETS[name](seed) for seed in seeds(name)), name


def test_a_wrong_error_is_a_finding() -> None:
    for error in (ValueError("no sentence of ours"), ValueError("[load] no full stop")):

        def read(_: bytes, error: ValueError = error) -> None:
            raise error

        with pytest.raises(Finding, match=re.escape(str(error))):
            house(read)(b"")
    with pytest.raises(KeyError, match="one of ours"):
        house(lambda data: {}["one of ours"])(b"")
