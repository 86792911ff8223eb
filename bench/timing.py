"""What the op benches share: a cold working set, and baseline and kernel in alternation."""

import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
ROWS: list[dict[str, Any]] = []  # what conftest.py prints at the end


def cold_copies(nbytes: int) -> int:
    """How many arrays of this size make four times the last-level cache (64 MB if not known)."""
    cache = int(CACHE.read_text().strip().rstrip("K")) * 1024 if CACHE.exists() else 64 << 20
    return math.ceil(4 * cache / nbytes)


def compare(
    benchmark: Any,
    kernel: Callable[[], object],
    baseline: Callable[[], object],
    *,
    calls: int,
    nbytes: int,
    baseline_calls: int = 1,
    rounds: int = 5,
    **labels: object,
) -> None:
    """Time `kernel` with pytest-benchmark and `baseline` before each of its rounds.

    `kernel` makes `calls` calls and evaluates them, `baseline` as many as it says; a call must read
    `nbytes`.
    """
    before: list[float] = []

    def run_baseline() -> None:
        start = time.perf_counter()
        baseline()
        before.append(time.perf_counter() - start)

    baseline()
    benchmark.pedantic(kernel, setup=run_baseline, rounds=rounds, warmup_rounds=1)
    stats = benchmark.stats.stats
    median, theirs = stats.median / calls, statistics.median(before) / baseline_calls
    row = {
        **labels,
        "us": round(median * 1e6, 1),
        "us_iqr": round(stats.iqr / calls * 1e6, 1),
        "gb_s": round(nbytes / median / 1e9, 2),
        "baseline_us": round(theirs * 1e6, 1),
        "baseline_us_iqr": round(iqr(before) / baseline_calls * 1e6, 1),
        "speedup": round(theirs / median, 2),
    }
    benchmark.extra_info.update(row)
    ROWS.append(row)


def iqr(times: list[float]) -> float:
    quarters = statistics.quantiles(times, n=4)
    return quarters[2] - quarters[0]
