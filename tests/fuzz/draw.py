"""Random arguments of any op, and when two results are alike: what tests/ops makes calls of."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

HOUSE = re.compile(r"^\[\w+\] [^\n]+ must [^\n]+ but got [^\n]+\.$")
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
# Of results that are sums: in float32, and one rounding of the dtype
TOLERANCE = {mx.float32: 2e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}
INTEGERS = (0, 1, -1, 2, 7, 2**15, 2**31 - 1, -(2**31), 2**31, 2**32 + 8, 2**63, -(2**70))
FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, 1e300, float("inf"), -float("inf"), float("nan"))
INT32 = (-(2**31), -(2**31) + 1, -1, -2, 2**30 - 1, 2**30, 2**31 - 2, 2**31 - 1)


class Call(NamedTuple):
    """Arguments of an op, and what of its result the reference decides."""

    args: tuple[Any, ...]
    options: dict[str, Any]
    # Compares two results: None where the call has no defined one
    alike: Callable[[Sequence[mx.array], Sequence[mx.array]], bool] | None
    written: tuple[int, ...] = ()  # places of the arguments that the op writes to
    reference: Callable[..., Any] | None = None  # what decides, if not the op's own


class Draw:
    """What a call is made of."""

    def __init__(self, seed: Any) -> None:
        self.rng = np.random.default_rng(seed)

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def pick(self, values: Sequence[Any]) -> Any:
        return values[int(self.rng.integers(len(values)))]

    def size(self, *usual: int) -> int:
        """One of these, seldom 0."""
        return 0 if self.chance(0.04) else self.pick(usual)

    def integer(self, *usual: int) -> int:
        """A scalar argument; seldom any number at all."""
        return self.pick(INTEGERS) if self.chance(0.06) else self.pick(usual)

    def number(self, *usual: float) -> float:
        return self.pick(FLOATS) if self.chance(0.06) else self.pick(usual)

    def dtype(self) -> mx.Dtype:
        return self.pick(DTYPES)

    def array(self, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
        """Normal numbers, in memory of any layout; seldom of another shape or dtype."""
        if self.chance(0.015):
            dtype = self.pick((*DTYPES, mx.int32, mx.uint32, mx.uint8))
        if shape and self.chance(0.015):
            shape = self.pick((shape[1:], (*shape, 1), (*shape[:-1], shape[-1] + 1)))
        values = mx.array(self.rng.normal(size=shape).astype(np.float32))
        return self.laid_out(values.astype(dtype))

    def laid_out(self, a: mx.array) -> mx.array:
        """The same numbers, perhaps strided, backwards, in the middle of others, or still lazy."""
        way = self.rng.integers(8)
        if a.ndim and a.size:
            axis = int(self.rng.integers(a.ndim))
            front = (slice(None),) * axis
            if way == 0:  # every second one
                doubled = mx.contiguous(mx.repeat(a, 2, axis=axis))
                mx.eval(doubled)
                a = doubled[(*front, slice(None, None, 2))]
            elif way == 1:
                turned = mx.contiguous(a[(*front, slice(None, None, -1))])
                mx.eval(turned)
                a = turned[(*front, slice(None, None, -1))]
            elif way == 2 and a.ndim > 1:
                order = [*range(axis), *range(axis + 1, a.ndim), axis]
                back = [order.index(i) for i in range(a.ndim)]
                moved = mx.contiguous(a.transpose(order))
                mx.eval(moved)
                a = moved.transpose(back)
            elif way == 3:
                wide = mx.contiguous(mx.concatenate([a, a, a], axis=axis))
                mx.eval(wide)
                n = a.shape[axis]
                a = wide[(*front, slice(n, 2 * n))]
        if self.chance(0.8):
            mx.eval(a)
        return a

    def ids(self, shape: tuple[int, ...], count: int) -> mx.array:
        """From 0 to count - 1, and a few that are not."""
        values = self.rng.integers(0, max(count, 1), shape)
        if self.chance(0.4):
            wrong = self.rng.choice([*INT32, count, count + 1, -count], shape)
            values = np.where(self.rng.random(shape) < 0.3, wrong, values)
        return self.laid_out(mx.array(values.astype(np.int32)))

    def whole(self, value: int, dtype: mx.Dtype = mx.int32) -> mx.array:
        """A scalar of the device, which the host may know or not."""
        known = mx.array(value, dtype)
        return known if self.chance(0.5) else known + mx.array(0, dtype)

    def offset(self, most: int) -> int:
        return self.pick(INT32) if self.chance(0.3) else int(self.rng.integers(0, most + 1))

    def positions(self, rows: int, most: int) -> mx.array:
        """Of so many rows, from 0 to `most`; some that are none; seldom of one row less."""
        values = self.rng.integers(0, most + 1, rows)
        if self.chance(0.3):
            wrong = self.rng.choice(INT32, rows)
            values = np.where(self.rng.random(rows) < 0.4, wrong, values)
        if self.chance(0.02):
            values = values[1:]
        return self.laid_out(mx.array(values.astype(np.int32)))

    def packing(self) -> tuple[int, int]:
        """Of quantised weights: group size and bits."""
        return self.pick((32, 64, 128)), self.pick((4, 6, 8))

    def quantized(
        self, *shape: int, dtype: mx.Dtype, group_size: int, bits: int
    ) -> tuple[mx.array, mx.array, mx.array]:
        *rows, K = shape
        words = self.rng.integers(0, 2**32, (*rows, K * bits // 32), dtype=np.uint32)
        factors = (*rows, K // group_size)
        scales = self.array(*factors, dtype=dtype) * (0.5 / 2**bits)
        biases = self.array(*factors, dtype=dtype) * 0.2
        return self.laid_out(mx.array(words)), scales, biases

    def cache(self, *shape: int, dtype: mx.Dtype) -> mx.array:
        """Memory of its own, as a cache must be."""
        a = mx.array(self.rng.normal(size=shape).astype(np.float32)).astype(dtype)
        mx.eval(a)
        return a


def as_numpy(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a)


def exact(got: Sequence[mx.array], want: Sequence[mx.array]) -> bool:
    """Bit for bit, NaN for NaN."""
    pairs = [(as_numpy(a), as_numpy(b)) for a, b in zip(got, want, strict=True)]
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)


def near(got: Sequence[mx.array], want: Sequence[mx.array], slack: float = 1.0) -> bool:
    """Within the dtype's tolerance of the largest number there is."""
    for a, b in zip(got, want, strict=True):
        bound = slack * TOLERANCE.get(a.dtype, 0)
        a, b = as_numpy(a), as_numpy(b)
        finite = np.isfinite(b)
        largest = np.abs(b[finite]).max(initial=1.0)
        if not np.array_equal(np.isfinite(a), finite):
            return False
        if not np.all(np.abs(a[finite] - b[finite]) <= bound * largest):
            return False
    return True


def near_sum(got: Sequence[mx.array], want: Sequence[mx.array]) -> bool:
    return near(got, want, slack=4.0)
