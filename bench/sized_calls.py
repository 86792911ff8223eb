"""Calls of ops at the sizes of published models: the sizes, what a call is, and its inputs.

The ops' benches make such calls, and count.py counts them: a bench names its table there, `TABLE`,
and yields its calls from `counted`, whose arguments are those of the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

ROWS = (1, 6, 16)

# Widths of 31B, 12B and E2B, each with that of its feed-forward layer. N is scaled down, which
# leaves every ratio as it is for matrices of up to 8192 columns; above, tiles are twice as wide,
# and up to 6 rows x is loaded half as often.
MODEL_WIDTHS = (5376, 3840, 1536)
WIDTHS = tuple(K for E in MODEL_WIDTHS for K in (E, 4 * E))
COLUMNS = 128
# The width that is counted at every number of rows: its rows of factors are the shortest, so the
# most sectors belong to two of them.
EVERY_ROW_WIDTH = 1536
EVERY_ROW = tuple(range(1, 17))
# An expert layer of 26B-A4B, likewise: of 16 experts here each token uses 8.
EXPERTS, EXPERTS_USED, EXPERT_WIDTH = 16, 8, 2816
GROUP, BITS = 64, 8

# 31B: the stream's width; queries and keys, and their width, of sliding and of full layers
WIDTH = 5376
HEADS = ((32, 16, 256), (32, 4, 512))
LAYER_ROWS = (1, 6)
EPS = 1e-6

VOCAB, TOP_K, DRAFTS = 262144, 64, 5
HEAD_WIDTH = 1536  # of E2B

LENGTH = 1500  # positions before a piece


class Geometry(NamedTuple):
    """Heads of a kind of layer: H / K query heads per key head, head width, sliding window."""

    name: str
    group: int
    D: int
    window: int | None


GEOMETRIES = (
    Geometry("31B sliding", 2, 256, 1024),
    Geometry("31B full", 8, 512, None),
    Geometry("E2B sliding", 8, 256, 512),
    Geometry("12B full", 16, 512, None),
)


class MlxKernel(NamedTuple):
    """A launch of one of MLX's own kernels, and its inputs by name."""

    launch: Any
    arrays: dict[str, np.ndarray]


Result = mx.array | Sequence[mx.array] | MlxKernel


@dataclass(frozen=True)
class Call:
    """An op's lazy result and its place in a table; see :func:`count`."""

    op: str
    result: Result
    labels: dict[str, Any]
    needed: float = 1.0


def random(seed: int, *shape: int) -> mx.array:
    return bfloat16(np.random.default_rng(seed).normal(size=shape))


def bfloat16(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32)).astype(mx.bfloat16)


def quantized(seed: int, *shape: int) -> tuple[mx.array, mx.array, mx.array]:
    w, scales, biases = mx.quantize(random(seed, *shape), GROUP, BITS)
    return w, scales, biases


def frequencies(D: int) -> mx.array:
    return mx.array((1e4 ** (-2 * np.arange(D // 2) / D)).astype(np.float32))
