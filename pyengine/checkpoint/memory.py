"""Whether a pair and a prompt fit the memory there is: known before a gigabyte is read, and before
a prompt is processed."""

from __future__ import annotations

import os
import platform
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from pyengine import mapped
from pyengine.checkpoint.safetensors import BYTES, read_headers
from pyengine.checkpoint.weights import Layout, is_text
from pyengine.model.config import LayerConfig

FLOATS = ("F16", "BF16", "F32")
GB = 1e9


class TargetLike(Protocol):
    """What the check of a prompt asks of a target (:class:`pyengine.model.target.Target`)."""

    @property
    def context(self) -> int: ...

    def prompt_bytes(
        self, tokens: int, block_size: int, marks: int, beside: Sequence[LayerConfig] = ()
    ) -> int: ...


class PrefixLike(Protocol):
    """What it asks of a prefix (:class:`pyengine.engine.prefix.Prefix`)."""

    @property
    def marks(self) -> int: ...

    @property
    def nbytes(self) -> int: ...


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


def check_prompt(
    target: TargetLike,
    tokens: int,
    max_tokens: int | None,
    block_size: int,
    prefix: PrefixLike | None = None,
    there: int | None = None,
    beside: Sequence[LayerConfig] = (),
) -> None:
    """Refuse a prompt whose keys and values would not fit, before it is processed.

    Args:
        target: The target.
        tokens: Length of the prompt.
        max_tokens: Room that was asked for behind it; None asks for none: the cache grows with the
            answer, and :func:`check_growth` has the say.
        block_size: Block size of the generation.
        prefix: The prefix it uses: its memory counts as free, for this prompt takes it over.
        there: Bytes that it may have; None for those that are free.
        beside: Layers of a drafter, whose keys and values are kept too.

    Raises:
        ValueError: The memory that is free holds fewer tokens; the message says how many.
    """
    there = free_bytes() if there is None else there
    if there is None:
        return
    marks = 0
    if prefix is not None:
        marks = prefix.marks
        there += prefix.nbytes
    wanted = min(tokens + (max_tokens or 0), target.context)

    def needed(count: int) -> int:
        return target.prompt_bytes(count, block_size, marks, beside)

    if needed(wanted) <= there:
        return
    fit = bisect_right(range(wanted), there, key=needed) - 1
    what = "prompt" if max_tokens is None else "prompt and max_tokens"
    raise ValueError(
        f"[generate] {what} must fit the free memory of {max(there, 0) / GB:.2f} GB but got "
        f"{wanted} tokens, which need {needed(wanted) / GB:.2f} GB; {max(fit, 0)} fit."
    )


def check_growth(more: int) -> None:
    """Refuse to let a cache grow by bytes that are not there.

    Raises:
        RuntimeError: The machine has less memory free; the message names the ways out.
    """
    there = free_bytes() if more else None
    if there is not None and more > there:
        raise RuntimeError(
            f"[generate] the answer must fit the free memory but {more / GB:.2f} GB more are "
            f"needed and {max(there, 0) / GB:.2f} GB there; end other programs, shorten the prompt "
            "or set max_tokens."
        )


def free_bytes() -> int | None:
    """Memory this process can have beside what it has; None where nobody says."""
    there = available_bytes()
    if there is None:
        return None
    if platform.system() == "Linux" and not mx.metal.is_available():
        return there + mx.get_cache_memory()  # which MLX keeps for itself to use again
    return there - mx.get_active_memory()  # available_bytes counts as if this process had none


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
        there = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable:"))
        return there - mapped.nbytes()  # of files, which the system would give away
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _available_to_group(folder: Path) -> int | None:
    """What a container's limit leaves."""
    try:
        limit = int((folder / "memory.max").read_text())
        return limit - int((folder / "memory.current").read_text())
    except (OSError, ValueError):  # no limit is the word "max"
        return None
