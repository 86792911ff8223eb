"""Pieces of sequences in an arena of pages, which holds nothing but NaN beside what they see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from pyengine.ops.prepare_qkv import PAGE

NO_PAGE = np.array([-(2**31), -1, 2**20, 2**31 - 1])


class Piece(NamedTuple):
    """T rows behind `length` positions; S = length + T."""

    q: np.ndarray  # [T, H, D]
    k: np.ndarray  # [K, S, D]
    v: np.ndarray

    @property
    def rows(self) -> int:
        return self.q.shape[0]

    @property
    def length(self) -> int:
        return self.k.shape[1] - self.rows

    def part(self, begin: int, end: int) -> Piece:
        """Rows [begin, end) and what they may see."""
        upto = self.length + end
        return Piece(self.q[begin:end], self.k[:, :upto], self.v[:, :upto])


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def piece(seed: int, T: int, length: int, H: int, K: int, D: int) -> Piece:
    S = length + T
    return Piece(normal(seed, T, H, D), normal(seed + 1, K, S, D), normal(seed + 2, K, S, D))


class Paged(NamedTuple):
    """The arguments of block_attention."""

    q: mx.array
    keys: mx.array
    values: mx.array
    lengths: mx.array
    tables: mx.array
    counts: list[int]


def paged(
    pieces: Sequence[Piece],
    window: int | None = None,
    *,
    dtype: mx.Dtype = mx.float32,
    seed: int = 0,
    spare: int = 2,
    room: int = 0,
    junk: float = float("nan"),
) -> Paged:
    """Pages in random order, among `spare` free ones; tables with `room` more entries than any
    piece needs, which name no page or any. All that no row sees is junk."""
    rng = np.random.default_rng(seed)
    K, _, D = pieces[0].k.shape
    spans = [seen_pages(p.length, p.rows, window) for p in pieces]
    N = max(end - begin for begin, end in spans) + room
    P = sum(end - begin for begin, end in spans) + spare
    free = rng.permutation(P).tolist()
    tables = np.where(
        rng.random((len(pieces), N)) < 0.5,
        rng.choice(NO_PAGE, (len(pieces), N)),
        rng.integers(0, P, (len(pieces), N)),
    ).astype(np.int32)
    keys, values = (np.full((P, K, PAGE, D), junk, np.float32) for _ in "kv")
    for p, table, (begin, end) in zip(pieces, tables, spans, strict=True):
        oldest = 0 if window is None else max(0, p.length - window + 1)
        for j in range(begin, end):
            table[j % N] = page = free.pop()
            first, behind = max(j * PAGE, oldest), min((j + 1) * PAGE, p.k.shape[1])
            places = slice(first - j * PAGE, behind - j * PAGE)
            keys[page, :, places] = p.k[:, first:behind]
            values[page, :, places] = p.v[:, first:behind]
    return Paged(
        mx.array(np.concatenate([p.q for p in pieces])).astype(dtype),
        mx.array(keys).astype(dtype),
        mx.array(values).astype(dtype),
        mx.array(np.array([p.length for p in pieces], np.int32)),
        mx.array(tables),
        [p.rows for p in pieces],
    )


def seen_pages(length: int, T: int, window: int | None) -> tuple[int, int]:
    """The first page that T rows see, and the one behind their last."""
    oldest = 0 if window is None else max(0, length - window + 1)
    return oldest // PAGE, (length + T - 1) // PAGE + 1


def unseen(call: Paged) -> Paged:
    """The same where the host does not know lengths and tables."""
    zero = mx.array(0)
    return call._replace(lengths=call.lengths + zero, tables=call.tables + zero)


def random_pieces(rng: Any, Q: int, most: int, K: int, G: int, D: int) -> list[Piece]:
    """Of 1 to `most` rows, behind lengths about pages and spans."""
    lengths = [0, 1, 62, 63, 64, 65, 300, 511, 512, 513]
    return [
        piece(
            int(rng.integers(2**30)),
            int(rng.integers(1, most + 1)),
            int(rng.choice(lengths)),
            K * G,
            K,
            D,
        )
        for _ in range(Q)
    ]
