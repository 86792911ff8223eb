"""Arguments of timed ops: random ones, in as many copies as no cache holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
CALLS = 200  # of an op whose arguments stay in the cache, as they do when a model runs


def cold_copies(nbytes: int) -> int:
    """How many arrays of this size make four times the last-level cache (64 MB if not known)."""
    cache = int(CACHE.read_text().strip().rstrip("K")) * 1024 if CACHE.exists() else 64 << 20
    return math.ceil(4 * cache / nbytes)


def turns(*arguments: Any, nbytes: int) -> list[tuple[Any, ...]]:
    """Arguments of the calls of a round, evaluated: copies that no cache holds, or the same ones
    where more than `CALLS` copies would be needed."""
    if cold_copies(nbytes) > CALLS:
        mx.eval(arguments)
        return [arguments] * CALLS
    return cold(*arguments, nbytes=nbytes)


def cold(*arguments: Any, nbytes: int) -> list[tuple[Any, ...]]:
    """Arguments in as many copies as no cache holds, evaluated."""
    count = cold_copies(nbytes)
    copies = [arguments, *(tree_map(lambda a: a + 0, arguments) for _ in range(count - 1))]
    mx.eval(copies)
    return copies


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def quantized(
    seed: int, *shape: int, group_size: int = 64, bits: int = 8
) -> tuple[mx.array, mx.array, mx.array]:
    """Weights from -1 to 1, packed as `mx.quantize` packs them, which takes longer."""
    *rows, K = shape
    halves = mx.random.randint(0, 2**16, (*rows, K * bits // 16), key=mx.random.key(seed))
    w = halves.astype(mx.uint16).view(mx.uint32)
    factors = mx.abs(normal(seed, *rows, K // group_size)) + 0.5
    scales = factors * 2.0**-bits
    return w, scales, factors * -0.5
