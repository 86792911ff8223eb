"""Which calls a prompt causes: worked out by hand, and as laws over random prompts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyengine.model.plan import (
    CHUNK,
    ROWS,
    Call,
    border,
    chunk_end,
    last_chunk,
    plan,
    reusable,
    whole,
)
from pyengine.ops import dispatch

LENGTHS = st.integers(0, 4000)
BORROWS = st.booleans()


def makers(stop: int, borrows: bool) -> list[Call | str]:
    """By position of a prompt, what made its keys and values: a call of MLX's, or kernels whose
    bits do not go with the call."""
    calls = plan(0, stop, borrows)
    return [c if c.kernel == "mlx" else "own" for c in calls for _ in range(c.rows)]


@pytest.mark.parametrize(
    ("start", "stop", "borrows", "calls"),
    [
        (0, 1100, False, [(0, 512), (512, 512), (1024, 76)]),
        (0, 1100, True, [(0, 512), (512, 512), (1024, 76)]),
        (0, 512, True, [(0, 512)]),
        (0, 511, True, [(0, 128), (128, 128), (256, 128), (384, 127)]),
        (0, 511, False, [(0, 511)]),
        (700, 1600, True, [(700, 68), (768, 128), (896, 128), (1024, 512), (1536, 64)]),
        (700, 1600, False, [(700, 324), (1024, 512), (1536, 64)]),
        (512, 1023, True, [(512, 128), (640, 128), (768, 128), (896, 127)]),
        (9, 9, True, []),
    ],
)
def test_by_hand(start: int, stop: int, borrows: bool, calls: list[tuple[int, int]]) -> None:
    found = plan(start, stop, borrows)
    assert [call[:2] for call in found] == calls
    assert all(c.kernel == ("mlx" if borrows and c.rows == 512 else "own") for c in found)


@given(start=LENGTHS, more=LENGTHS, borrows=BORROWS)
def test_calls_meet_and_keep_to_the_grid(start: int, more: int, borrows: bool) -> None:
    at = start
    for call in plan(start, start + more, borrows):
        assert call.start == at and call.rows > 0
        at += call.rows
        assert at // CHUNK == call.start // CHUNK or at % CHUNK == 0
        if call.kernel == "mlx":
            assert borrows and call.start % CHUNK == 0 and call.rows == CHUNK > ROWS
        elif borrows:  # by the number of rows an op tells which kernel it is
            assert call.rows <= ROWS
            assert at % ROWS == 0 or at == start + more
    assert at == start + more


@given(stop=LENGTHS, cut=LENGTHS, borrows=BORROWS)
def test_a_plan_may_be_parted_at_a_border(stop: int, cut: int, borrows: bool) -> None:
    at = border(min(cut, stop), stop, borrows)
    assert at <= cut and (borrows or at == min(cut, stop))
    assert makers(stop, borrows)[:at] == makers(at, borrows)
    parts = plan(0, at, borrows) + plan(at, stop, borrows)
    made = [c if c.kernel == "mlx" else "own" for c in parts for _ in range(c.rows)]
    assert made == makers(stop, borrows)


@given(old=LENGTHS, answer=LENGTHS, new=LENGTHS, shared=LENGTHS, borrows=BORROWS)
def test_what_is_reused_was_made_alike(
    old: int, answer: int, new: int, shared: int, borrows: bool
) -> None:
    """And no more could be: either the next position was made otherwise, or its call began before
    what is shared ended."""
    shared = min(shared, old + answer, new)
    there = makers(old, borrows) + ["own"] * answer  # an answer is written by our kernels
    wanted = makers(new, borrows)
    count = reusable(shared, whole(old, borrows), new, borrows)
    assert 0 <= count <= shared and there[:count] == wanted[:count]
    assert border(count, new, borrows) == count
    if count < shared:
        inside = isinstance(wanted[count], Call) and wanted[count].start + CHUNK > shared  # type: ignore[union-attr]
        assert there[count] != wanted[count] or inside


@given(start=LENGTHS, more=st.integers(1, 3000), borrows=BORROWS)
def test_chunks_of_a_prefill_are_whole_calls(start: int, more: int, borrows: bool) -> None:
    """A prefill that goes from chunk's end to chunk's end makes the calls of the whole."""
    stop, at, calls, ends = start + more, start, [], [start]
    while at < stop:
        calls += plan(at, end := chunk_end(at, stop), borrows)
        ends.append(at := end)
    assert calls == plan(start, stop, borrows)
    last = last_chunk(start, stop)
    assert last in ends and stop - last <= CHUNK
    assert last == start or last + CHUNK >= stop > last


def test_a_processor_borrows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not dispatch.borrows()
    monkeypatch.setattr(dispatch, "_gpu_rules", True)
    assert dispatch.borrows()
    monkeypatch.setattr(dispatch, "_chosen", "workbench")
    assert not dispatch.borrows()
