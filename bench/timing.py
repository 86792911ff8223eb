"""What the op benches share: a cold working set, the check, baseline and kernel in alternation."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from pyengine.bench.arrays import CALLS, normal, quantized, turns

__all__ = ["CALLS", "candidates", "check", "compare", "normal", "quantized", "turns"]
ROWS: list[dict[str, Any]] = []  # what conftest.py prints at the end


def check(out: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Fail unless two results of an op agree: bit for bit if no tolerance is given."""
    pairs = [(out, expected)] if isinstance(out, mx.array) else zip(out, expected, strict=True)
    for a, b in pairs:
        kinds = f"{a.shape} {a.dtype}", f"{b.shape} {b.dtype}"
        assert kinds[0] == kinds[1], " is not ".join(kinds)
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        most = mx.abs(a - b).max().item()
        assert mx.allclose(a, b, rtol=rtol, atol=atol), f"they differ by up to {most}"


def compare(
    benchmark: Any,
    kernel: Callable[..., object],
    baseline: Callable[..., object],
    arguments: Sequence[tuple[Any, ...]],
    *,
    nbytes: int,
    baseline_calls: int | None = None,
    rounds: int = 5,
    **labels: object,
) -> None:
    """Time `kernel` with pytest-benchmark and `baseline` before each of its rounds.

    A round of `kernel` is a call with each of `arguments`, evaluated together inside the clock; of
    `baseline` as many, or `baseline_calls`, which go on where the last ones ended. A call must move
    `nbytes`.
    """
    before: list[float] = []
    cold, theirs = itertools.cycle(arguments), baseline_calls or len(arguments)

    def run_kernel() -> None:
        mx.eval([kernel(*turn) for turn in arguments])

    def run_baseline() -> None:
        some = [next(cold) for _ in range(theirs)]
        start = time.perf_counter()
        mx.eval([baseline(*turn) for turn in some])
        before.append(time.perf_counter() - start)

    run_baseline()
    before.clear()
    benchmark.pedantic(run_kernel, setup=run_baseline, rounds=rounds, warmup_rounds=1)
    stats = benchmark.stats.stats
    median, their_median = stats.median / len(arguments), statistics.median(before) / theirs
    row = {
        **labels,
        "us": round(median * 1e6, 1),
        "us_iqr": round(stats.iqr / len(arguments) * 1e6, 1),
        "gb_s": round(nbytes / median / 1e9, 2),
        "baseline_us": round(their_median * 1e6, 1),
        "baseline_us_iqr": round(iqr(before) / theirs * 1e6, 1),
        "speedup": round(their_median / median, 2),
    }
    benchmark.extra_info.update(row)
    ROWS.append(row)


def iqr(times: list[float]) -> float:
    quarters = statistics.quantiles(times, n=4)
    return quarters[2] - quarters[0]


# ---- Arguments


def candidates(seed: int, rows: int, count: int) -> tuple[mx.array, mx.array]:
    """Ids, which are the same in every row, and probabilities."""
    ids = mx.broadcast_to(mx.arange(count, dtype=mx.int32), (rows, count))
    return mx.contiguous(ids), mx.softmax(normal(seed, rows, count, dtype=mx.float32), axis=-1)
