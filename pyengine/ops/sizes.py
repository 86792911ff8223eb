"""Numbers of a model from which an op's module makes the shapes that it is called with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Settings = dict[str, Any]  # of an op's `example`: numbers, words and None
Shape = tuple[Settings, dict[str, int]]  # and what is scaled down, with the true size
Packing = tuple[int, int]  # group size and bits


class Limits(NamedTuple):
    """How large a call may be on a device; what is larger is scaled down, and says so."""

    matrix_bytes: float
    columns: int = 1 << 30

    def fitting(self, columns: int, row_bytes: float, least: int = 64) -> int:
        """Columns of a matrix with that many bytes per column: at least `least`, else multiples of
        64. Columns do not depend on each other, and only time grows with them."""
        most = int(min(self.columns, self.matrix_bytes / row_bytes))
        return columns if columns <= most else max(least, most // 64 * 64)


class Heads(NamedTuple):
    """An attention layer that writes keys and values."""

    H: int
    K: int
    D: int
    key_is_value: bool = False
    norm_values: bool = True
    has_trees: bool = True  # whether rows of it are moved, and written out of order


class Attended(NamedTuple):
    """What the queries of a layer meet: keys and values behind `length` positions."""

    H: int
    K: int
    D: int
    length: int
    window: int | None
    is_tree: bool = False


class Stack(NamedTuple):
    """Matrices of X experts, of which a row has U; `form` as quantized_expert_matmul's example."""

    X: int
    U: int
    N: int
    K: int
    form: str
    dtype: str


@dataclass
class Sizes:
    """Numbers of a model, from which the shapes of its calls follow; K stands before N.

    Attributes:
        limits: Of the device.
        dtype: Of activations.
        packings: Of its matrices, in order; None is not quantised.
        normed: Rows that are normalised: width, how many a token has, dtype.
        streams: Widths to which layers add their results.
        gates: Widths of gates, and their activation.
        queries: Heads that are normalised and turned without keys of their own, and their width.
        heads, attended: Layers of attention.
        matrices, dense: Quantised ones, and the others with their dtype.
        together: Matrices that the same rows meet: K, and columns of each.
        gated: Gate and up projection, and their activation.
        tables: Of embeddings: V, E.
        lm_heads: V, K, the cap of the logits, and names of filters.
        stacks, routers: Of experts; X, how many are used, E.
        vocabularies: Ids, and the cap of their logits.
    """

    limits: Limits
    dtype: str
    packings: Sequence[Packing | None]
    normed: list[tuple[int, int, str]] = field(default_factory=list)
    streams: list[int] = field(default_factory=list)
    gates: list[tuple[int, str]] = field(default_factory=list)
    queries: list[tuple[int, int]] = field(default_factory=list)
    heads: list[Heads] = field(default_factory=list)
    attended: list[Attended] = field(default_factory=list)
    matrices: list[tuple[int, int]] = field(default_factory=list)
    dense: list[tuple[int, int, str]] = field(default_factory=list)
    together: list[tuple[int, list[int]]] = field(default_factory=list)
    gated: list[tuple[int, int, str]] = field(default_factory=list)
    tables: list[tuple[int, int]] = field(default_factory=list)
    lm_heads: list[tuple[int, int, float | None, Sequence[str]]] = field(default_factory=list)
    stacks: list[Stack] = field(default_factory=list)
    routers: list[tuple[int, int, int]] = field(default_factory=list)
    vocabularies: list[tuple[int, float | None]] = field(default_factory=list)

    @property
    def quantized(self) -> list[Packing]:
        """The packings of what is quantised."""
        return [packing for packing in self.packings if packing]

    def fitted(
        self, true: int, K: int, packing: Packing | None, *, matrices: int = 1, least: int = 64
    ) -> int:
        """As many columns as the device takes of so many matrices."""
        return self.limits.fitting(true, matrices * row_bytes(K, packing), least)


def row_bytes(K: int, packing: Packing | None) -> float:
    """Of K weights, with their scales and biases."""
    return 2 * K if packing is None else K * packing[1] / 8 + 4 * K / packing[0]


def packed(packing: Packing, dtype: str) -> Settings:
    return {"group": packing[0], "bits": packing[1], "dtype": dtype}


def scaled(name: str, true: int, fit: int) -> dict[str, int]:
    return {} if true == fit else {name: true}
