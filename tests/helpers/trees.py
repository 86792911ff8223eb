"""Trees of rows behind a text, and what a plain step behind a node's path would be given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from pieces import Paged, Piece, paged, piece

# What may stand in a row's line of ancestors behind itself
JUNK = np.array([-(2**31), -1, 0, 16, 2**31 - 1])


class Lines(NamedTuple):
    """Depth of each row of a tree, and its ancestors by depth, itself the last."""

    depths: list[int]
    paths: list[list[int]]

    @staticmethod
    def of(parents: Sequence[int]) -> Lines:
        """Of each row but the first the parent, an earlier row."""
        paths = [[0]]
        for row, parent in enumerate(parents, 1):
            paths.append([*paths[parent], row])
        return Lines([len(path) - 1 for path in paths], paths)

    @staticmethod
    def random(rng: Any, T: int) -> Lines:
        return Lines.of([int(rng.integers(row)) for row in range(1, T)])

    @staticmethod
    def chain(T: int) -> Lines:
        return Lines.of(range(T - 1))


def arrays(trees: Sequence[Lines], rng: Any, room: int = 0) -> dict[str, mx.array]:
    """Depths and ancestors as block_attention takes them, with `room` more entries than needed."""
    A = max(max(tree.depths) for tree in trees) + 1 + room
    paths = [path for tree in trees for path in tree.paths]
    lines = rng.choice(JUNK, (len(paths), A))
    for line, path in zip(lines, paths, strict=True):
        line[: len(path)] = path
    depths = [depth for tree in trees for depth in tree.depths]
    return {
        "depths": mx.array(np.array(depths, np.int32)),
        "ancestors": mx.array(lines.astype(np.int32)),
    }


def step(whole: Piece, tree: Lines, row: int) -> Piece:
    """The plain step behind a node's path: its row alone."""
    path = tree.paths[row]
    places = [*range(whole.length), *(whole.length + at for at in path)]
    return Piece(whole.q[row : row + 1], whole.k[:, places], whole.v[:, places])


def random_trees(rng: Any, Q: int, K: int, G: int, D: int) -> tuple[list[Piece], list[Lines]]:
    """Pieces of 1 to 16 rows behind lengths about pages and spans, and their trees."""
    lengths = [0, 1, 50, 55, 62, 63, 64, 300, 448, 500, 505, 511, 512]
    trees = [Lines.random(rng, int(rng.integers(1, 17))) for _ in range(Q)]
    pieces = [
        piece(int(rng.integers(2**30)), len(t.depths), int(rng.choice(lengths)), K * G, K, D)
        for t in trees
    ]
    return pieces, trees


def steps(
    pieces: Sequence[Piece], trees: Sequence[Lines], window: int | None, dtype: mx.Dtype
) -> list[Paged]:
    """The calls of all nodes' plain steps, one of each."""
    return [
        paged([step(p, tree, row)], window, dtype=dtype)
        for p, tree in zip(pieces, trees, strict=True)
        for row in range(p.rows)
    ]
