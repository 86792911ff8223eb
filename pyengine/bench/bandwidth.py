"""A machine's memory bandwidth: Apple's published figure for its chip, or a measured one."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import mlx.core as mx

from pyengine import _ext
from pyengine.bench.report import ask

# GB/s, from the technical specifications that Apple publishes. Some chips were sold with two
# memories; the number of GPU cores tells which.
APPLE: dict[str, int | dict[int, int]] = {
    "M1": 68,
    "M1 Pro": 200,
    "M1 Max": 400,
    "M1 Ultra": 800,
    "M2": 100,
    "M2 Pro": 200,
    "M2 Max": 400,
    "M2 Ultra": 800,
    "M3": 100,
    "M3 Pro": 150,
    "M3 Max": {30: 300, 40: 400},
    "M3 Ultra": 819,
    "M4": 120,
    "M4 Pro": 273,
    "M4 Max": {32: 410, 40: 546},
    "M5": 153,
    "M5 Pro": 307,
    "M5 Max": {32: 460, 40: 614},
}
MEASURED_BYTES = 1 << 30
READS = 15


class Bandwidth(NamedTuple):
    """Bytes per second of a machine's memory.

    Attributes:
        gb_s: In GB (10^9 bytes) per second.
        published: Whether it is the maker's figure; otherwise it was measured here.
        source: Which figure, or how it was measured.
    """

    gb_s: float
    published: bool
    source: str


def of_chip(chip: str, gpu_cores: int | None = None) -> int | None:
    """The published GB/s of a chip by its full name; None for any other, a virtual one too."""
    known = APPLE.get(chip.removeprefix("Apple ")) if chip.startswith("Apple ") else None
    return known.get(gpu_cores or 0) if isinstance(known, dict) else known


def bandwidth(chip: str) -> Bandwidth:
    """That of this machine, which has this chip. Measuring evaluates."""
    cores = gpu_cores() if chip.startswith("Apple ") else None
    published = of_chip(chip, cores)
    if published is None:
        return measure()
    with_cores = f" with {cores} GPU cores" if cores else ""
    return Bandwidth(float(published), True, f"published by Apple for {chip}{with_cores}")


def gpu_cores() -> int | None:
    """Of a Mac, as macOS reports them; None if it does not."""
    said = ask("system_profiler", "-json", "SPDisplaysDataType")
    try:
        displays = json.loads(said or "")["SPDisplaysDataType"]
        return next(int(part["sppci_cores"]) for part in displays if "sppci_cores" in part)
    except (ValueError, TypeError, LookupError, StopIteration):
        return None


def measure() -> Bandwidth:
    """The best of some passes over a gigabyte: read by our threads, or copied by the GPU."""
    if mx.default_device() == mx.gpu:
        seconds = min(_copies())
        return Bandwidth(2 * MEASURED_BYTES / seconds / 1e9, False, "measured: a copy by the GPU")
    threads = _ext.threads()
    seconds = min(_reads(threads))
    return Bandwidth(MEASURED_BYTES / seconds / 1e9, False, f"measured: read by {threads} threads")


def _copies() -> list[float]:
    a = mx.zeros(MEASURED_BYTES // 4)
    mx.eval(a + 1.0)
    times = []
    for _ in range(READS):
        start = time.perf_counter()
        mx.eval(a + 1.0)
        times.append(time.perf_counter() - start)
    return times


def _reads(threads: int) -> list[float]:
    import numpy as np

    parts = np.array_split(np.ones(MEASURED_BYTES // 8, np.int64), threads)
    times = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(READS):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            times.append(time.perf_counter() - start)
    return times
