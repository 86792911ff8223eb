"""Published numbers: what the benches of single ops report, on scripted clocks, by hand.

The benches lie beside the package, and time nothing here: `compare` is what makes their figures.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from scripted_runs import Clock

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
    order: list[str] = []

    def baseline() -> None:
        order.append("baseline")
        clock.now += seconds.pop(0)

    def kernel() -> None:
        order.append("kernel")
        clock.now += 1e6

    benchmark = Benchmark(median=0.01, iqr=0.002)
    timing.compare(
        benchmark,
        kernel,
        baseline,
        calls=200,
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
    assert order == ["baseline", *["baseline", "kernel"] * 6]
    assert benchmark.asked["rounds"] == 5 and benchmark.asked["warmup_rounds"] == 1


def test_a_slower_kernel_has_a_speedup_below_one(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)

    def baseline() -> None:
        clock.now += 0.5

    timing.compare(Benchmark(4.0, 0.0), lambda: None, baseline, calls=2, nbytes=10**9, rounds=3)
    row = timing.ROWS[0]
    assert (row["us"], row["baseline_us"], row["speedup"]) == (2e6, 5e5, 0.25)
    assert (row["gb_s"], row["us_iqr"], row["baseline_us_iqr"]) == (0.5, 0.0, 0.0)


def test_the_middle_half(timing: ModuleType) -> None:
    """As Python's statistics have it: quarters at 1/4 and 3/4 of n + 1 places."""
    assert timing.iqr([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]) == 32.0 - 2.0
    assert timing.iqr([7.0, 1.0, 3.0]) == 7.0 - 1.0


def test_copies_that_no_cache_holds(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timing, "CACHE", tmp_path / "size")
    assert timing.cold_copies(64 << 20) == 4 and timing.cold_copies((64 << 20) + 1) == 4
    assert timing.cold_copies((64 << 20) - 1) == 5 and timing.cold_copies(10**12) == 1
    (tmp_path / "size").write_text("1024K\n")
    assert timing.cold_copies(1 << 20) == 4 and timing.cold_copies(3 << 20) == 2


def compared(name: str, monkeypatch: pytest.MonkeyPatch, timing: ModuleType) -> Any:
    """A bench whose comparison is recorded, and not made; its working set is one copy."""
    monkeypatch.setattr(timing, "cold_copies", lambda nbytes: 2)
    kept: dict[str, Any] = {}

    def compare(benchmark: Any, kernel: Any, baseline: Any, **asked: Any) -> None:
        kept.update(asked, kernel=kernel, baseline=baseline)

    monkeypatch.setattr(timing, "compare", compare)
    return module(name), kept


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_bytes_of_quantised_weights(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    """4096 weights, and for each 64 a scale and a bias of two bytes."""
    bench, asked = compared("bench_quantized_matmul", monkeypatch, timing)
    bench.test_quantized_matmul(None, N=32, K=128, bits=bits, M=2)
    assert asked["nbytes"] == {8: 4096, 6: 3072, 4: 2048}[bits] + 256
    assert (asked["calls"], asked.get("baseline_calls", 1)) == (2, 1)
    assert [asked[key] for key in ("N", "K", "bits", "M")] == [32, 128, bits, 2]
    runs(asked)


def runs(asked: dict[str, Any]) -> None:
    """What would be timed works; neither hands anything out."""
    assert asked["kernel"]() is asked["baseline"]() is None


@pytest.mark.parametrize(("dtype", "nbytes"), [(mx.bfloat16, 8192), (mx.float32, 16384)])
def test_bytes_of_dense_weights(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, nbytes: int
) -> None:
    bench, asked = compared("bench_dense_matmul", monkeypatch, timing)
    bench.test_dense_matmul(None, N=32, K=128, dtype=dtype, M=3)
    assert asked["nbytes"] == nbytes and asked["calls"] == 2
    assert [asked[key] for key in ("N", "K", "M")] == [32, 128, 3]
    assert asked["dtype"] in ("bfloat16", "float32")
    runs(asked)


def test_bytes_of_shared_weights(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 + 32 + 32 columns of 128 at 8 bits, and 2 * 2 bytes for each 64 of them."""
    bench, asked = compared("bench_quantized_matmuls", monkeypatch, timing)
    monkeypatch.setitem(bench.SHAPES, "small", ((64, 32, 32), 128))
    bench.test_quantized_matmuls(None, name="small", M=2)
    assert asked["nbytes"] == 16384 + 1024
    assert (asked["calls"], asked["baseline_calls"]) == (2, 2)
    assert (asked["shape"], asked["M"]) == ("small", 2)
    runs(asked)


@pytest.mark.parametrize(("bits", "nbytes"), [(8, 3 * 136), (4, 3 * 72)])
def test_bytes_of_rows_that_are_looked_up(
    timing: ModuleType, monkeypatch: pytest.MonkeyPatch, bits: int, nbytes: int
) -> None:
    """Rows of 128 weights and 2 * 2 numbers of two bytes; three of them a call."""
    bench, asked = compared("bench_embed", monkeypatch, timing)
    bench.test_embed(None, E=128, T=3, bits=bits)
    assert asked["nbytes"] == nbytes
    assert (asked["calls"], asked["baseline_calls"]) == (200, 200)
    runs(asked)


def test_bytes_of_the_head(timing: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """512 rows of 128 weights at 8 bits, and 2 * 2 numbers of two bytes a row."""
    bench, asked = compared("bench_quantized_filter_logits", monkeypatch, timing)
    monkeypatch.setattr(bench, "E", 128)
    rng = np.random.default_rng(0)
    w = mx.array(rng.normal(size=(512, 128)).astype(np.float32)).astype(mx.bfloat16)
    bench.test_quantized_filter_logits(None, mx.quantize(w, 64, 8), T=2)
    assert (asked["nbytes"], asked["calls"]) == (512 * 136, 1)
    runs(asked)


def test_bytes_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of 12 places (window 8 and a block of 5) for 2 heads of 256, two bytes a
    number: 12,288 bytes each. Queries in and results out, 5 for 4 heads: 10,240 bytes each. That is
    45,056 bytes in 2 us."""
    bench = module("bench_block_attention")
    monkeypatch.setitem(bench.SHAPES, "small", (4, 2, 256, 8, 8))
    for implementation in ("mlx", "native"):
        benchmark = Benchmark(median=2e-6, iqr=0.0)
        bench.test_block_attention(benchmark, "small", 5, implementation)
        assert benchmark.extra_info == {"GB/s": 22.53}


def test_microseconds_of_a_call_in_a_chain() -> None:
    """200 of them take 5 ms."""
    bench = module("bench_residual_norm")
    for implementation in ("mlx", "native"):
        benchmark = Benchmark(median=0.005, iqr=0.0)
        bench.test_residual_norm(benchmark, 128, 1, implementation)
        assert benchmark.extra_info == {"us per call": 25.0}


def test_every_bench_has_its_figures_checked() -> None:
    """A new bench without a test here fails."""
    checked = {
        "embed",
        "quantized_matmul",
        "dense_matmul",
        "quantized_matmuls",
        "quantized_filter_logits",
    }
    checked |= {"block_attention", "residual_norm"}
    assert {path.stem.removeprefix("bench_") for path in BENCH.glob("bench_*.py")} == checked


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
