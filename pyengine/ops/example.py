"""What an op's module says of itself to `pyengine doctor`: the calls of it that models make.

Beside the op and its reference each module has two functions: ``shapes(sizes)``, the settings of
the calls that a model of such :class:`Sizes` makes, and ``example(**settings)``, one of these, a
:class:`Call` of up to 16 rows on inputs from fixed seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

MOST = 16  # rows
VOCABULARY = 262144  # ids that lists of candidates come from
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# What one rounding of a dtype may be off by, as a part of the number: two results that round nearly
# the same sum may fall on neighbours
STEP = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}

Results = list[mx.array]
Settings = dict[str, Any]  # of `example`: numbers, words and None
Shape = tuple[Settings, dict[str, int]]  # and what is scaled down, with the true size
Packing = tuple[int, int]  # group size and bits


class Call(NamedTuple):
    """One op on fixed inputs of 16 rows.

    Attributes:
        run: The public op on rows b to e, lazily, by the implementation that is chosen.
        row: What of a result belongs to its row i, which is row t of the inputs; None where a
            result is one of all rows.
        slack: How far two results of 16 rows that add in different orders may be apart, for each;
            None where all orders give the same bits.
        rows: How many rows it is run with.
        alone: Whether it can be run with one row from anywhere.
        same_bits: Whether our kernels for different machines give the same bits.
        exact_definition: Whether the plain definition gives them too.
        weights: What a call reads once; its bytes are those of a bandwidth.
        timed: What is timed in place of `run`, where that makes copies for the check.
    """

    run: Callable[[int, int], Results]
    row: Callable[[Results, int, int], Results] | None
    slack: Callable[[Results], Results] | None = None
    rows: tuple[int, ...] = (1, 4, 6, MOST)
    alone: bool = True
    same_bits: bool = True
    exact_definition: bool = False
    weights: Sequence[mx.array] = ()
    timed: Callable[[int, int], Results] | None = None


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


# ---- Inputs


def normal(seed: int, *shape: int, dtype: str = "float32", scale: float = 1.0) -> mx.array:
    return (mx.random.normal(shape, key=mx.random.key(seed)) * scale).astype(DTYPES[dtype])


def quantized(
    seed: int, *shape: int, group: int, bits: int, dtype: str
) -> tuple[mx.array, mx.array, mx.array]:
    """Weights from about -1 to 1, packed as `mx.quantize` packs them."""
    *lead, K = shape
    halves = mx.random.randint(0, 2**16, (*lead, K * bits // 16), key=mx.random.key(seed))
    w = halves.astype(mx.uint16).view(mx.uint32)
    factors = mx.random.uniform(0.5, 1.5, (*lead, K // group), key=mx.random.key(seed + 1))
    scales = (factors * 2.0 ** (1 - bits)).astype(DTYPES[dtype])
    return w, scales, scales * -(2.0 ** (bits - 1))


def frequencies(D: int) -> mx.array:
    """Of sliding layers (256) and of full ones, where a quarter of the pairs turns."""
    theta, turning = (1e4, D // 2) if D == 256 else (1e6, D // 8)
    return mx.array([theta ** (-2 * j / D) if j < turning else 0.0 for j in range(D // 2)])


def of_rows() -> tuple[mx.array, mx.array]:
    """Positions and owners of rows of two sequences by turns; across the end of a page."""
    t = mx.arange(MOST)
    return 1021 + t // 2, t % 2


def candidates(seed: int, n: int, vocab: int) -> tuple[mx.array, mx.array]:
    """Ids without repetition and probabilities that fall, as a filter gives them."""
    start = mx.random.randint(0, vocab, (MOST, 1), key=mx.random.key(seed))
    ids = ((start + 4099 * mx.arange(n)) % vocab).astype(mx.int32)
    weights = -mx.sort(-mx.exp(3 * normal(seed + 1, MOST, n)), axis=1)
    return ids, weights / weights.sum(axis=1, keepdims=True)


def copied(arena: mx.array) -> mx.array:
    """An arena of its own: ours is written in place. Evaluates."""
    own = arena + 0
    mx.eval(own)
    return own


# ---- What of results is compared, and how closely


def first(results: Results, i: int, t: int) -> Results:
    """Row i where rows are the first dimension."""
    return [a[i] for a in results]


def rounded(steps: float) -> Callable[[Results], Results]:
    """Room for float32 sums in other orders, and so many roundings."""

    def slack(results: Results) -> Results:
        sizes = [abs(a.astype(mx.float32)) for a in results]
        return [
            size * (steps * STEP[a.dtype]) + 2e-5 * mx.max(size)
            for a, size in zip(results, sizes, strict=True)
        ]

    return slack


def of_candidates(results: Results) -> Results:
    """Ids and flags are equal in all orders of addition; probabilities nearly."""
    return [mx.zeros(a.shape) if a.dtype == mx.int32 else 1e-4 * abs(a) + 1e-6 for a in results]


def absolute_sums(
    x: mx.array, w: Sequence[mx.array], plain: Callable[..., mx.array] | None = None
) -> mx.array:
    """``sum over k of |x[m, k] * w[n, k]|``, some columns at a time, which `plain` dequantises."""
    parts = []
    x = abs(x.astype(mx.float32))
    for begin in range(0, w[0].shape[0], 2048):
        some = [a[begin : begin + 2048] for a in w]
        weights = plain(*some) if plain else some[0]
        parts.append(x @ abs(weights.astype(mx.float32)).T)
        mx.eval(parts)
    return mx.concatenate(parts, axis=-1)


def of_sums(results: Results, sums: Results, K: int) -> Results:
    """The stated bound of a product: of two orders, before one rounding each."""
    return [
        order_error(K) * s + abs(a.astype(mx.float32)) * STEP[a.dtype]
        for a, s in zip(results, sums, strict=True)
    ]


def order_error(K: int) -> float:
    """By how much two orders of K terms may differ, as a part of their absolute sum."""
    return 2 * (K / 8 + 8) * 2.0**-24
