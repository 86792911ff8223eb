"""How much memory a pair and a prompt need, and how much there is: known before a gigabyte is
read, and before a prompt is processed."""

from __future__ import annotations

import os
import platform
from bisect import bisect_right
from pathlib import Path
from typing import Protocol

import mlx.core as mx

from pyengine import _ext
from pyengine.checkpoint.safetensors import BYTES, read_headers
from pyengine.checkpoint.weights import Layout, is_text
from pyengine.model.cache import CAPACITY_STEP, CHUNK
from pyengine.model.config import TargetConfig
from pyengine.ops.dispatch import chosen

FLOATS = ("F16", "BF16", "F32")
GB = 1e9
IN_FLIGHT = 24  # arrays of a chunk that are alive at once, measured: MLX runs ahead of its results


class TargetLike(Protocol):
    """What the check of a prompt asks of a target (:class:`pyengine.model.target.Target`)."""

    @property
    def context(self) -> int: ...

    def prompt_bytes(self, tokens: int, max_block: int, marks: int) -> int: ...


class PrefixLike(Protocol):
    """What it asks of a prefix (:class:`pyengine.engine.prefix.Prefix`)."""

    @property
    def marks(self) -> int: ...

    @property
    def nbytes(self) -> int: ...

    def max_block(self, block_size: int) -> int: ...


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


def prompt_bytes(config: TargetConfig, tokens: int, max_block: int, marks: int, size: int) -> int:
    """Memory while ``tokens`` positions are processed and after: their keys and values, copies of
    the sliding layers' (marks), and what the last chunk needs in between.

    The last is an estimate from what was measured: a grown cache stands beside the old one, a layer
    at a time, and attention that is plain MLX keeps its scores.
    """
    rings = cache_bytes(config, 0, max_block, size)
    rows = min(tokens, CHUNK)
    steps = -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
    full = [n for i, n in enumerate(config.layers) if not n.sliding and n.kv_source == i]
    layer = max((n.num_kv_heads * n.head_dim for n in full), default=0) * steps
    widest = max(
        config.hidden_size,
        len(config.layers) * config.per_layer_width,
        2 * config.num_experts_used * config.hidden_size,
        *(2 * n.ffn_width for n in config.layers),
        *(config.num_heads * n.head_dim for n in config.layers),
    )
    on_gpu = chosen() == "native" and mx.default_device() == mx.gpu
    plain = chosen() == "reference" or (on_gpu and rows > _ext.max_launch_rows)
    scores = 3 * 4 * config.num_heads * rows * steps if plain else 0
    chunk = (IN_FLIGHT * rows * widest + 2 * layer) * size + scores
    return cache_bytes(config, tokens, max_block, size) + marks * rings + chunk


def check_prompt(
    target: TargetLike,
    tokens: int,
    max_tokens: int | None,
    block_size: int,
    prefix: PrefixLike | None = None,
) -> None:
    """Refuse a prompt whose keys and values would not fit, before it is processed.

    Args:
        target: The target.
        tokens: Length of the prompt.
        max_tokens: Room that was asked for behind it; None asks for none: the cache grows with the
            answer, and :func:`check_growth` has the say.
        block_size: Block size of the generation.
        prefix: The prefix it uses: its memory counts as free, for this prompt takes it over.

    Raises:
        ValueError: The memory that is free holds fewer tokens; the message says how many.
    """
    there = free_bytes()
    if there is None:
        return
    marks = 0
    if prefix is not None:
        marks, block_size = prefix.marks, prefix.max_block(block_size)
        there += prefix.nbytes
    wanted = min(tokens + (max_tokens or 0), target.context)

    def needed(count: int) -> int:
        return target.prompt_bytes(count, block_size, marks)

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
