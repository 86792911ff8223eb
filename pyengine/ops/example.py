"""One call of an op, for `pyengine doctor`: its inputs, from fixed seeds, and how it is judged.

Beside the op and its reference each module has two functions: ``shapes(sizes)``, the settings of
the calls that a model of such `Sizes` makes, and ``example(**settings)``, one of these, a
:class:`Call` of up to 16 rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

MOST = 16  # rows
VOCABULARY = 262144  # ids that lists of candidates come from
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# What one rounding of a dtype may be off by, as a part of the number: two results that round nearly
# the same sum may fall on neighbours
STEP = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}

Results = list[mx.array]


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


def of_sums(results: Results, errors: Results) -> Results:
    """The stated bound of a product: of two sums with these errors, before one rounding each."""
    return [
        error + abs(a.astype(mx.float32)) * STEP[a.dtype]
        for a, error in zip(results, errors, strict=True)
    ]


def order_error(K: int) -> float:
    """By how much two orders of K terms may differ, as a part of their absolute sum."""
    return 2 * (K / 8 + 8) * 2.0**-24
