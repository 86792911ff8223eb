"""How much memory a pair needs, and how much there is: known before a gigabyte is read."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import mlx.core as mx

from pyengine.cache import CAPACITY_STEP
from pyengine.config import TargetConfig
from pyengine.shards import BYTES, read_headers
from pyengine.weights import Layout, is_text

FLOATS = ("F16", "BF16", "F32")
GB = 1e9


def weight_bytes(folder: Path, layout: Layout, dtype: mx.Dtype | None = None) -> int:
    """Memory of a checkpoint's text tensors as loaded; ``dtype`` as for loading.

    Raises:
        ValueError: The files are damaged.
    """
    total = 0
    for _, header in read_headers(folder):
        for name, entry in header.items():
            if not is_text(name, layout):
                continue
            convert = dtype is not None and entry.dtype in FLOATS
            size = dtype.size if convert and dtype is not None else BYTES[entry.dtype]
            total += entry.elements * size
    return total


def cache_bytes(config: TargetConfig, context: int, block_size: int, size: int) -> int:
    """Memory of keys and values for ``context`` positions of ``size``-byte numbers.

    Sliding layers hold a window and a block, whatever the context.
    """
    steps = -(-context // CAPACITY_STEP) * CAPACITY_STEP
    slots = {True: config.window - 1 + block_size, False: steps}
    own = [layer for i, layer in enumerate(config.layers) if layer.kv_source == i]
    return sum(2 * n.num_kv_heads * n.head_dim * slots[n.sliding] * size for n in own)


def available_bytes() -> int | None:
    """Memory a new process could have: free or freed at once; None where nobody says.

    On macOS what Metal recommends, else the machine's whole memory: the system swaps others out.
    """
    if mx.metal.is_available():
        return int(mx.device_info()["max_recommended_working_set_size"])
    if platform.system() != "Linux":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    known = [_available_to_machine(), _available_to_group(Path("/sys/fs/cgroup"))]
    return min((n for n in known if n is not None), default=None)


def check(needed: int, what: str) -> None:
    """Refuse what would not fit.

    Raises:
        ValueError: The machine has less memory free; the message names both.
    """
    there = available_bytes()
    if there is not None and needed > there:
        raise ValueError(
            f"[load] {what} must fit the free memory of {there / GB:.1f} GB but needs "
            f"{needed / GB:.1f} GB."
        )


def _available_to_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _available_to_group(folder: Path) -> int | None:
    """What a container's limit leaves."""
    try:
        limit = int((folder / "memory.max").read_text())
        return limit - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no limit is the word "max"
        return None
