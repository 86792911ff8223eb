"""Timed runs that are scripted: what a bench asks is recorded, what it is answered is given here.

Every figure of a run is unlike that of any other setting, case and repeat, so that a figure that
was taken from the wrong place is another number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from pyengine.bench.suite import Case
from pyengine.engine.stats import Stats
from pyengine.task import Result

# Of the first one the bench's budget is the lower, of the second its own
CASES = [Case("one", "chat", "fox", 24), Case("two", "continuation", "the", 9)]
MAX_TOKENS, REPEATS, BLOCK, RULES, SEED = 20, 3, 3, ("block", "coupled"), 5


class Clock:
    """Stands in for ``time.perf_counter`` and moves only where a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Run:
    """One generation: its tokens, what its own clocks say, and how long it takes from outside."""

    tokens: list[int]
    finish_reason: str
    elapsed: float
    stats: Stats


def run(
    first: int,
    count: int,
    seconds: tuple[float, float, float],
    rounds: int = 0,
    depths: tuple[list[int], list[int]] = ([], []),
    ends: tuple[int, int] = (0, 0),
    *,
    prompt: int,
    peak: int,
    reason: str = "stop",
    drafts: tuple[int, int] = (0, 0),
) -> Run:
    """``seconds``: prefill, decode, elapsed. ``depths`` and ``drafts``: drafted, accepted."""
    prefill_s, decode_s, elapsed = seconds
    stats = Stats(
        block_size=77,
        seed=77,
        prompt_tokens=prompt,
        reused_tokens=77,
        generated_tokens=count + 700,  # with what a stop string cut off: not what a row counts
        prefill_s=prefill_s,
        decode_s=decode_s,
        rounds=rounds,
        drafted=drafts[0],
        accepted=drafts[1],
        drafted_by_depth=depths[0],
        accepted_by_depth=depths[1],
        bonus_tokens=ends[0],
        correction_tokens=ends[1],
        peak_memory_bytes=peak,
    )
    return Run(list(range(first, first + count)), reason, elapsed, stats)


def warm_up() -> Run:
    """Would spoil every figure that it got into."""
    return run(9000, 99, (1e6, 1e6, 1e6), 1, prompt=999, peak=10**9)


def scripted() -> dict[tuple[str, int, str], list[Run]]:
    """Runs by prompt, block size and rule, in the order they are asked for."""
    one, two = (
        {"rounds": 8, "prompt": 7},
        {"rounds": 2, "prompt": 21},
    )
    changed = run(500, 5, (6.0, 0.5, 1.0), **two, peak=2000)
    changed.tokens[-1] = 999
    return {
        ("fox", 1, "residual"): [
            warm_up(),
            run(100, 11, (0.5, 2.0, 11.0), **one, peak=300),
            run(100, 11, (0.25, 5.0, 5.5), **one, peak=500),
            run(100, 11, (0.75, 4.0, 22.0), **one, peak=400),
        ],
        ("fox", 3, "block"): [
            warm_up(),
            run(
                200,
                13,
                (1.5, 3.0, 6.5),
                5,
                ([5, 5], [4, 3]),
                (3, 2),
                drafts=(10, 7),
                prompt=8,
                peak=50,
            ),
            run(
                300,
                17,
                (2.5, 1.0, 4.25),
                6,
                ([6, 6], [6, 3]),
                (5, 1),
                drafts=(12, 9),
                prompt=88,
                peak=70,
                reason="length",
            ),
            run(
                200,
                13,
                (2.0, 1.5, 26.0),
                7,
                ([7, 7], [2, 1]),
                (0, 7),
                drafts=(14, 3),
                prompt=89,
                peak=60,
            ),
        ],
        ("fox", 3, "coupled"): [
            warm_up(),
            *(
                run(
                    400,
                    20,
                    seconds,
                    rounds,
                    ([8, 8], [4, 0]),
                    (1, 6),
                    drafts=(16, 4),
                    prompt=9,
                    peak=peak,
                    reason="length",
                )
                for seconds, rounds, peak in (
                    ((0.125, 4.75, 40.0), 4, 9),
                    ((0.375, 9.5, 5.0), 5, 8),
                    ((0.0625, 38.0, 80.0), 6, 7),
                )
            ),
        ],
        ("the", 1, "residual"): [
            run(500, 5, (4.0, 1.0, 10.0), **two, peak=1000),
            run(500, 5, (5.0, 2.0, 2.5), **two, peak=3000),
            changed,
        ],
        ("the", 3, "block"): [
            run(
                600,
                9,
                seconds,
                rounds,
                ([10, 10], [9, 6]),
                (2, 3),
                drafts=(20, 15),
                prompt=22,
                peak=peak,
                reason="length",
            )
            for seconds, rounds, peak in (
                ((0.5, 0.25, 3.0), 5, 11),
                ((0.25, 0.5, 1.0), 6, 13),
                ((0.125, 1.0, 9.0), 7, 12),
            )
        ],
        ("the", 3, "coupled"): [
            run(
                500,
                5,
                seconds,
                rounds,
                ([4, 2], [1, 0]),
                (4, 7),
                drafts=(5, 1),
                prompt=23,
                peak=peak,
            )
            for seconds, rounds, peak in (
                ((7.0, 8.0, 12.5), 2, 5),
                ((9.0, 16.0, 50.0), 3, 4),
                ((8.0, 4.0, 6.25), 4, 6),
            )
        ],
    }


class Stage:
    """In place of ``bench.stream``: records what is asked, and answers with the next scripted run.

    Half of a run's time passes while its text is read, a quarter each before and after. ``fail_at``
    is the number of a run that raises ``error``.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.runs = Clock(), scripted()
        self.asked: list[tuple[Any, dict[str, Any]]] = []
        self.begun = self.ended = 0
        self.fail_at, self.error = -1, KeyboardInterrupt()
        monkeypatch.setattr("time.perf_counter", self.clock)
        monkeypatch.setattr("pyengine.bench.gemma_mtp.stream", self.stream)
        for place in ("gemma_mtp", "report"):
            monkeypatch.setattr(f"pyengine.bench.{place}.now", lambda: f"{self.begun}/{self.ended}")

    def stream(self, content: Any, **asked: Any) -> Running:
        self.asked.append((content, asked))
        if len(self.asked) - 1 == self.fail_at:
            raise self.error
        self.begun += 1
        key = (content, asked["block_size"], asked["sampling"].verify)
        return Running(self, self.runs[key].pop(0))


class Running(Iterator[str]):
    def __init__(self, stage: Stage, own: Run) -> None:
        self.stage, self.own, self.read = stage, own, 0
        stage.clock.now += own.elapsed / 4

    def __next__(self) -> str:
        self.read += 1
        self.stage.clock.now += self.own.elapsed / 4
        if self.read <= 2:
            return "piece"
        self.stage.ended += 1
        raise StopIteration

    @property
    def result(self) -> Result:
        assert self.read == 3, "the text must be read to its end"
        text = f"text from {self.own.tokens[:1]}"
        return Result(text, self.own.tokens, self.own.finish_reason, self.own.stats)
