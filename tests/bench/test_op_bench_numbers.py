"""Published numbers: what the benches of single ops report, on scripted clocks, by hand.

The benches lie beside the package, and time nothing here: `compare` is what makes their figures.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from scripted_runs import Clock

from pyengine.bench import arrays
from pyengine.ops import dispatch

BENCH = Path(__file__).parents[2] / "bench"


def module(name: str) -> ModuleType:
    """A file of the bench folder, which is no package."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    assert spec and spec.loader
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def timing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    made = module("timing")
    monkeypatch.setitem(sys.modules, "timing", made)
    return made


class Benchmark:
    """pytest-benchmark's fixture, as far as it is used: runs setup and kernel by turns."""

    def __init__(self, median: float, iqr: float) -> None:
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=median, iqr=iqr))
        self.extra_info: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}

    def pedantic(self, kernel: Any, **asked: Any) -> None:
        self.asked = asked
        for _ in range(asked["warmup_rounds"] + asked["rounds"]):
            if "setup" in asked:
                asked["setup"]()
            kernel()


def test_every_figure_of_a_comparison(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel's 200 calls take 10 ms in the median, so one takes 50 us, and 400 kB in 50 us are
    8 GB/s. 40 of the baseline take 4, 6, 8, 12, 16 and 24 ms: 10 ms in the median, 250 us each,
    five times as long; the middle half lies between 5.5 and 18 ms, 12.5 ms / 40 = 312.5 us.
    """
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    # One to warm up, untimed; then one before the kernel's own warm-up and before each round
    seconds = [1e9, 0.016, 0.006, 0.024, 0.012, 0.004, 0.008]
    order: list[tuple[str, int]] = []

    def baseline(turn: int) -> mx.array:
        if turn % 40 == 0:
            clock.now += seconds.pop(0)
        order.append(("baseline", turn))
        return mx.array(0)

    def kernel(turn: int) -> mx.array:
        order.append(("kernel", turn))
        clock.now += 1e6
        return mx.array(0)

    benchmark = Benchmark(median=0.01, iqr=0.002)
    timing.compare(
        benchmark,
        kernel,
        baseline,
        [(turn,) for turn in range(200)],
        nbytes=400_000,
        baseline_calls=40,
        rounds=5,
        shape="s",
        M=6,
    )
    want = {
        "shape": "s",
        "M": 6,
        "us": 50.0,
        "us_iqr": 10.0,
        "gb_s": 8.0,
        "baseline_us": 250.0,
        "baseline_us_iqr": 312.5,
        "speedup": 5.0,
    }
    assert (timing.ROWS, benchmark.extra_info) == ([want], want)
    # The baseline takes the next 40 arguments each time
    theirs = [[("baseline", turn % 200) for turn in range(n, n + 40)] for n in range(0, 280, 40)]
    ours = [("kernel", turn) for turn in range(200)]
    assert order == [*theirs[0], *(call for some in theirs[1:] for call in (*some, *ours))]
    assert benchmark.asked["rounds"] == 5 and benchmark.asked["warmup_rounds"] == 1


def test_a_slower_kernel_has_a_speedup_below_one(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)

    def baseline(x: mx.array) -> mx.array:
        clock.now += 0.25
        return x

    turns = [(mx.array(0),)] * 2
    timing.compare(Benchmark(4.0, 0.0), lambda x: x, baseline, turns, nbytes=10**9, rounds=3)
    row = timing.ROWS[0]
    assert (row["us"], row["baseline_us"], row["speedup"]) == (2e6, 2.5e5, 0.12)
    assert (row["gb_s"], row["us_iqr"], row["baseline_us_iqr"]) == (0.5, 0.0, 0.0)


def test_the_middle_half(timing: ModuleType) -> None:
    """As Python's statistics have it: quarters at 1/4 and 3/4 of n + 1 places."""
    assert timing.iqr([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]) == 32.0 - 2.0
    assert timing.iqr([7.0, 1.0, 3.0]) == 7.0 - 1.0


def test_copies_that_no_cache_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(arrays, "CACHE", tmp_path / "size")
    assert arrays.cold_copies(64 << 20) == 4 and arrays.cold_copies((64 << 20) + 1) == 4
    assert arrays.cold_copies((64 << 20) - 1) == 5 and arrays.cold_copies(10**12) == 1
    (tmp_path / "size").write_text("1024K\n")
    assert arrays.cold_copies(1 << 20) == 4 and arrays.cold_copies(3 << 20) == 2


def test_turns_are_cold_or_as_many_as_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    a, pair = mx.arange(4), (mx.arange(3), mx.arange(2))
    monkeypatch.setattr(arrays, "cold_copies", lambda nbytes: nbytes)
    copies = arrays.turns(a, pair, nbytes=3)
    assert len(copies) == 3 and len({id(turn[0]) for turn in copies}) == 3
    assert all(mx.array_equal(turn[1][0], pair[0]) for turn in copies)
    same = arrays.turns(a, nbytes=arrays.CALLS + 1)
    assert len(same) == arrays.CALLS and all(turn[0] is a for turn in same)


def test_a_check_sees_a_bit_a_shape_and_a_dtype(timing: ModuleType) -> None:
    a = mx.array([1.0, 2.0])
    timing.check([a, a], (a, a))
    timing.check(a + 2**-8, a, rtol=2**-7)
    for other, text in (
        (a + 2**-20, "they differ by up to 9.53"),
        (a[None], r"\(2,\) .*float32 is not \(1, 2\)"),
        (a.astype(mx.float16), "float32 is not .*float16"),
    ):
        with pytest.raises(AssertionError, match=text):
            timing.check(a, other)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2 is shorter"):
        timing.check([a, a], [a])


@pytest.mark.parametrize("op", dispatch.OPS)
def test_a_bench_checks_its_op_and_says_what_a_call_moves(
    op: str, timing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bytes are worked out by hand beside the op's tests."""
    checked: set[str] = set()
    check = timing.check

    def recorded(out: Any, expected: Any, **tolerance: float) -> None:
        checked.update(nodes(out))
        check(out, expected, **tolerance)

    compared: list[tuple[Any, ...]] = []

    def compare(_: Any, kernel: Any, baseline: Any, turns: Any, **asked: Any) -> None:
        compared.append((kernel, baseline, turns, asked))

    monkeypatch.setattr(arrays, "cold_copies", lambda nbytes: 2)
    monkeypatch.setattr(timing, "check", recorded)
    monkeypatch.setattr(timing, "compare", compare)
    bench = module(f"bench_{op}")
    getattr(bench, f"test_{op}")(None, **bench.SMALL)
    ((kernel, baseline, turns, asked),) = compared
    assert asked["nbytes"] == importlib.import_module(f"test_{op}").BENCH_BYTES
    assert {name: str(value) for name, value in bench.SMALL.items()}.items() <= {
        name: f"mlx.core.{value}" if name == "dtype" else str(value)
        for name, value in asked.items()
    }.items()
    # What is timed is the op, and it was checked
    assert {name for name in nodes(kernel(*turns[0])) if name in dispatch.OPS} == {op}
    assert op in checked
    assert op not in nodes(baseline(*turns[0]))


def nodes(result: Any) -> set[str]:
    """Names in the graph of a lazy result."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *([result] if isinstance(result, mx.array) else result))
    return set(re.findall(r'label ="(\w+)', graph.getvalue()))


def test_rows_are_printed_as_a_table_and_as_json(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each under its heading, whatever the rows before it had."""
    report = module("conftest")
    monkeypatch.setattr(report, "machine", lambda: {"chip": "Chip 9", "threads": 3})
    lines: list[str] = []
    out = SimpleNamespace(section=lambda title: lines.append(title), line=lines.append)
    report.pytest_terminal_summary(out)
    assert lines == []
    timing.ROWS[:] = [{"M": 1, "us": 12.5, "speedup": 1.25}, {"bits": 8, "us": 7.0, "speedup": 0.5}]
    report.pytest_terminal_summary(out)
    _, *table, last = lines
    assert [line.split() for line in table] == [
        ["M", "us", "speedup", "bits"],
        ["1", "12.5", "1.25"],
        ["7.0", "0.5", "8"],
    ]
    ends = [[line.find(word) + len(word) for word in line.split()] for line in table]
    assert ends == [[1, 7, 16, 22], [1, 7, 16], [7, 16, 22]]
    assert json.loads(last) == {
        "machine": {"chip": "Chip 9", "threads": 3},
        "rows": timing.ROWS,
    }
    assert report.pytest_report_header() == "chip Chip 9, threads 3"


def test_every_figure_of_builds_in_turns() -> None:
    """A round took 2, 4 and 3 ms in the old build and 3, 5 and 3 ms in the new one: 3 ms both in
    the median, and 1.5, 1.25 and 1 times the old one's, 1.25 in the median. The best took 2 and 3.
    """
    turns = [[{"round": ms} for ms in side] for side in ((2.0, 4.0, 3.0), (3.0, 5.0, 3.0))]
    (row,) = module("alternate").compare(*turns)
    assert row == {
        "what": "round",
        "old_ms": 3.0,
        "new_ms": 3.0,
        "ratio": 1.25,
        "least": 1.0,
        "greatest": 1.5,
        "bests": 1.5,
    }
