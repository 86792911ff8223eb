"""What Metal is told for a pair: which memory stays where it is, how long command buffers are.

Both follow from the sources of MLX 0.32 and from what others measured on Macs; nothing here has
been timed on an Apple GPU by us.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import threading
import weakref
from typing import Any

import mlx.core as mx

from pyengine.checkpoint.memory import GB
from pyengine.model.config import TargetConfig

MARGIN = 4_000_000_000  # bytes beside weights and cache: what a forward pass has in flight

# Dispatches and mebi-elements until MLX ends a command buffer; by default 20 to 50 of either.
# A boundary is some 20 us of the GPU's time (ml-explore/mlx#4521: +5 to +8 % with these values on
# a mixture on an M3 Ultra, nothing on a dense 27B; lablup/mlxcel#353: +11 to +13 % on small models
# on an M1 Ultra, slower on M5).
COMMAND_BUFFERS = {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "400"}
LAST_GENERATION = 4  # of Apple silicon that gains

_lock = threading.Lock()
_held: dict[int, int] = {}  # bytes of each loaded pair
_before: int | None = None  # the limit that the process had set itself, while pairs are loaded
_limit = 0  # as set here


def lengthen_command_buffers(config: TargetConfig) -> None:
    """Set MLX's two variables for models that are many small launches, unless they are set.

    MLX reads them once, when it first uses the GPU: call this before. After that it does nothing.
    """
    small = config.per_layer_width > 0 or config.num_experts > 0
    if small and mx.metal.is_available() and 1 <= _generation() <= LAST_GENERATION:
        for name, value in COMMAND_BUFFERS.items():
            os.environ.setdefault(name, value)


def wire(owner: Any, needed: int) -> None:
    """Keep ``needed`` bytes and a margin resident as long as ``owner`` lives; on Metal only.

    Unless it is asked to, macOS may take a model's memory from the GPU between two rounds. The
    limit is at most what the device recommends, and never lower than what the process had set.
    """
    global _before
    if not mx.metal.is_available() or mx.default_device() != mx.gpu:
        return
    with _lock:
        if not _held:
            _before = mx.set_wired_limit(0)
        _held[id(owner)] = needed
        _set()
    weakref.finalize(owner, _release, id(owner)).atexit = False


def wired_bytes() -> int:
    """The limit that is set for loaded pairs; 0 where none is."""
    return _limit


def wired_line() -> str:
    """The same in a few words, for a report."""
    if not mx.metal.is_available():
        return "no Metal here: nothing is wired"
    if not _limit:
        return "nothing is wired until a pair is loaded"
    return f"up to {_limit / GB:.1f} GB stay resident while a pair is loaded"


def _release(key: int) -> None:
    with _lock:
        del _held[key]
        _set()


def _set() -> None:
    global _before, _limit
    before = _before or 0
    if _held:
        most = int(mx.device_info()["max_recommended_working_set_size"])
        _limit = max(min(sum(_held.values()) + MARGIN, most), before)
    else:
        _limit, _before = 0, None
    mx.set_wired_limit(_limit or before)


def _generation() -> int:
    """Of this machine's Apple silicon, 3 for an M3; 0 for any other machine."""
    if platform.system() != "Darwin":
        return 0
    asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        name = subprocess.run(asked, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.match(r"Apple M(\d+)\b", name)
    return int(found[1]) if found else 0
