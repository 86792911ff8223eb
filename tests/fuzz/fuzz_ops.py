"""Random calls of every public op: refused in one sentence, or what its reference gives.

Shapes at the edges and of size 0, all dtypes, strided and lazy inputs, scalars of any size and
sign, and offsets, ids and starts outside of their range. A part of the test suite, a few calls an
op; many more, on a build with sanitizers, by `.ci/sanitize.sh`:

    python tests/fuzz/fuzz_ops.py --seconds 60 --seed 1
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from pyengine import _ext, ops
from pyengine.ops.accept_block import RULES
from pyengine.ops.filter_logits import Edits

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


# ---- Comparing


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


# ---- The calls, an op each


def turns_alike(offset: int) -> bool:
    """Whether angles are small enough for two sines to agree."""
    return 0 <= offset <= 2**14


def write_cache(d: Draw) -> Call:
    B, K, C = d.size(1, 2), d.size(1, 2, 3), d.size(1, 2, 7, 33)
    D, T, dtype = d.size(1, 3, 16, 65), d.pick((0, 1, 2, max(C - 1, 0), C, C + 1)), d.dtype()
    cache, new = d.cache(B, K, C, D, dtype=dtype), d.array(B, T, K, D, dtype=dtype)
    return Call((cache, new, d.whole(d.offset(3 * C))), {}, exact)


def frequencies(d: Draw, D: int) -> mx.array:
    inv_freq = d.array(D // 2)
    return inv_freq * d.pick((1.0, 0.0, 1e-3)) if inv_freq.dtype == mx.float32 else inv_freq


def norm_rope(d: Draw) -> Call:
    B, T, H = d.size(1, 2), d.size(1, 2, 17), d.size(1, 3, 8)
    D, dtype = d.size(2, 6, 16, 34, 64, 256, 512, 1024, 1026, 7), d.dtype()
    offset = d.offset(100)
    x, weight = d.array(B, T, H, D, dtype=dtype), d.array(D, dtype=dtype)
    alike = near_sum if turns_alike(offset) else None
    args = (x, weight, d.whole(offset), frequencies(d, D), d.number(1e-6, 1.0))
    return Call(args, {}, alike)


def prepare_qkv(d: Draw) -> Call:
    H, K, C = d.size(1, 2, 4), d.size(1, 2, 3), d.size(1, 2, 9, 40)
    T, D, dtype = d.pick((0, 1, 2, max(C - 1, 0), C)), d.size(2, 6, 16, 34, 64, 256), d.dtype()
    offset = d.offset(3 * C)
    q, k = d.array(T, H * D, dtype=dtype), d.array(T, K * D, dtype=dtype)
    v = k if d.chance(0.2) else d.array(T, K * D, dtype=dtype)
    weights = d.array(D, dtype=dtype), d.array(D, dtype=dtype)
    keys, values = (d.cache(1, K, C, D, dtype=dtype) for _ in range(2))
    # Angles are 0 where they would be too large to compare: slots still are
    inv_freq = frequencies(d, D)
    if not turns_alike(offset):
        inv_freq = inv_freq * 0
    position = d.whole(offset)
    args = (q, k, v, *weights, inv_freq, keys, values, position, d.number(1e-6, 1.0))
    return Call(args, {}, near_sum)


def block_attention(d: Draw) -> Call:
    B, K, G = d.size(1, 2), d.size(1, 2), d.size(1, 2, 5)
    T, C, dtype = d.size(1, 2, 5, 17, 40), d.size(1, 5, 16, 64, 70, 600), d.dtype()
    D = d.size(16, 32, 80, 256, 512, 24)
    H = K * G if d.chance(0.97) else K * G + 1
    q = d.array(B, T, H, D, dtype=dtype)
    k, v = (d.array(B, K, C, D, dtype=dtype) for _ in range(2))
    window = None if d.chance(0.5) else d.integer(1, 3, max(C - T + 1, 1), 512)
    fitting = C - T if window is None or window >= C else 3 * C
    offset = d.whole(d.offset(max(fitting, 0)))
    start = None if d.chance(0.5) else d.whole(d.pick((*INT32, 0, 3, -5, C)))
    options = {"scale": d.pick((0.0, 0.1, -1.0)), "window": window, "start": start}
    return Call((q, k, v, offset), options, near_sum)


def embed(d: Draw) -> Call:
    V, dtype, shape = d.size(1, 5, 300), d.dtype(), d.pick(((), (0,), (1,), (7,), (2, 3)))
    out_dtype = d.pick((None, mx.float32, dtype))
    options = {"scale": d.number(1.0, 3.5), "out_dtype": out_dtype}
    ids = d.ids(shape, V)
    if d.chance(0.5):
        table = (d.array(V, d.size(1, 5, 16, 33, 200), dtype=dtype),)
        return Call((ids, table), options, exact)
    group_size, bits = d.packing()
    E = group_size * d.size(1, 3)
    table = d.quantized(V, E, dtype=dtype, group_size=group_size, bits=bits)
    given = d.integer(group_size), d.integer(bits)
    return Call((ids, table, *given), options, exact)


def dense_matmul(d: Draw) -> Call:
    shape = d.pick(((), (1,), (5,), (16,), (17,), (2, 3), (0,), (2, 0)))
    N, K, dtype = d.size(1, 5, 9, 40, 65), d.size(1, 15, 16, 17, 100, 1030), d.dtype()
    x, w = d.array(*shape, K, dtype=dtype), d.array(N, K, dtype=dtype)
    return Call((x, w), {"out_dtype": d.pick((None, mx.float32, dtype))}, near_sum)


def packed_case(d: Draw) -> tuple[mx.Dtype, int, int, int, tuple[int, ...]]:
    group_size, bits = d.packing()
    shape = d.pick(((1,), (2,), (5,), (16,), (17,), (2, 3), (0,), ()))
    return d.dtype(), group_size, bits, group_size * d.size(1, 2, 3, 9), shape


def quantized_matmul(d: Draw) -> Call:
    dtype, group_size, bits, K, shape = packed_case(d)
    matrix = d.quantized(d.size(1, 5, 9, 40, 65), K, dtype=dtype, group_size=group_size, bits=bits)
    given = d.integer(group_size), d.integer(bits)
    x = d.array(*shape, K, dtype=dtype)
    return Call((x, *matrix, *given), {"out_dtype": d.pick((None, mx.float32, dtype))}, near_sum)


def quantized_gated_matmul(d: Draw) -> Call:
    dtype, group_size, bits, K, shape = packed_case(d)
    N = d.size(1, 5, 9, 40, 65)
    gate, up = (d.quantized(N, K, dtype=dtype, group_size=group_size, bits=bits) for _ in range(2))
    given = d.integer(group_size), d.integer(bits)
    return Call((d.array(*shape, K, dtype=dtype), gate, up, *given), {}, near_sum)


def quantized_matmuls(d: Draw) -> Call:
    dtype, group_size, bits, K, shape = packed_case(d)
    sizes = [d.size(1, 5, 9, 40, 65) for _ in range(d.pick((1, 2, 3, 3, 4)))]
    matrices = [d.quantized(N, K, dtype=dtype, group_size=group_size, bits=bits) for N in sizes]
    given = d.integer(group_size), d.integer(bits)
    return Call((d.array(*shape, K, dtype=dtype), matrices, *given), {}, near_sum)


def quantized_expert_matmul(d: Draw) -> Call:
    group_size, bits = d.packing()
    X, N, K, dtype = d.size(1, 2, 5), d.size(1, 5, 17), group_size * d.size(1, 2, 3), d.dtype()
    T, U = d.size(1, 2, 17), d.size(1, 2, 3, 33)
    rows = (T, K) if d.chance(0.5) else (T, U, K)
    packing = {"dtype": dtype, "group_size": group_size, "bits": bits}
    up = d.quantized(X, N, K, **packing) if d.chance(0.5) else None
    options = {"up": up, "out_dtype": d.pick((None, mx.float32, dtype))}
    stack, ids = d.quantized(X, N, K, **packing), d.ids((T, U), X)
    given = d.integer(group_size), d.integer(bits)
    return Call((d.array(*rows, dtype=dtype), stack, ids, *given), options, near_sum)


def route_experts(d: Draw) -> Call:
    T, X = d.size(1, 2, 17), d.size(1, 2, 31, 32, 33, 128)
    logits = d.array(T, X)
    if d.chance(0.3):  # ties
        logits = mx.round(logits)
    return Call((logits, d.array(X), d.integer(1, 2, 8, X)), {}, near)


def weigh_experts(d: Draw) -> Call:
    T, U, E = d.size(1, 2, 17), d.size(1, 2, 8), d.size(1, 15, 16, 17, 300)
    return Call((d.array(T, U, E), d.array(T, U), d.dtype()), {}, exact)


def random_uniform(d: Draw) -> Call:
    shape = d.pick(((4,), (0, 4), (7, 4), (2, 3, 4), (3,), ()))
    counters = mx.array(d.rng.integers(0, 2**32, shape, dtype=np.uint32))
    key = d.integer(0, 5, 2**32 - 1), d.integer(0, 5, 2**32 - 1)
    return Call((d.laid_out(counters), key), {}, exact)


def rms_norm(d: Draw) -> Call:
    shape = d.pick(((), (1,), (5,), (2, 3), (0,)))
    D, dtype = d.size(1, 5, 16, 63, 64, 65, 1023, 1024, 1100, 3000), d.dtype()
    x, weight = d.array(*shape, D, dtype=dtype), d.array(D, dtype=dtype)
    return Call((x, None if d.chance(0.3) else weight, d.number(1e-6, 1.0)), {}, near_sum)


def residual_norm(d: Draw) -> Call:
    shape = d.pick(((), (1,), (5,), (2, 3), (0,)))
    E, dtype = d.size(1, 5, 16, 63, 64, 65, 1024, 1100), d.dtype()
    h, y = (d.array(*shape, E, dtype=dtype) for _ in range(2))
    options: dict[str, Any] = {"eps": d.number(1e-6, 1.0)}
    if d.chance(0.5):
        options["scalar"] = d.array(1, dtype=dtype)
    if d.chance(0.5):
        options["next_weight"] = d.array(E, dtype=dtype)
    return Call((h, y, d.array(E, dtype=dtype)), options, near_sum)


def geglu(d: Draw) -> Call:
    shape = d.pick(((), (1,), (15,), (16,), (17,), (3, 100), (0, 5), (70000,)))
    dtype = d.dtype()
    return Call((d.array(*shape, dtype=dtype), d.array(*shape, dtype=dtype)), {}, near)


def softcap(d: Draw) -> Call:
    shape = d.pick(((), (1,), (15,), (16,), (17,), (3, 100), (0, 5)))
    cap = d.number(30.0, 1.0)
    return Call((d.array(*shape) * 20, cap), {}, near if 1e-6 < cap < 1e9 else None)


def filter_settings(d: Draw, V: int) -> dict[str, Any]:
    return {
        "temperature": d.number(0.0, 0.5, 1.0),
        "top_k": d.integer(0, 1, 5, 64, 256, 257),
        "top_p": d.number(1.0, 0.9, 1e-9),
        "min_p": d.number(0.0, 0.05),
    }


def edits(d: Draw, T: int, V: int) -> Edits | None:
    if d.chance(0.5):
        return None
    L = d.size(1, 3, 20)
    # Those within the vocabulary once each; of the others any
    ids = d.rng.permutation(max(V, 1))[:L]
    ids = np.concatenate([ids, d.rng.choice([*INT32, V, V + 1, -V], L - len(ids))])
    if L and d.chance(0.5):
        some = d.rng.random(L) < 0.4
        ids = np.where(some, d.rng.choice([*INT32, V, V + 1, -max(V, 1)], L), ids)
    deltas = d.array(T, L)
    if d.chance(0.2):
        deltas = deltas - mx.inf
    return Edits(d.laid_out(mx.array(ids.astype(np.int32))), mx.abs(d.array(T, L)) + 0.5, deltas)


def filtered_alike(settings: dict[str, Any]) -> Callable[..., bool] | None:
    """Ids and flags equal bit for bit, probabilities nearly, where a float32 can hold them."""
    if settings["temperature"] not in (0.0, 0.5, 1.0) or settings["top_p"] not in (1.0, 1e-9):
        return None  # a prefix may end one candidate earlier

    def alike(got: Sequence[mx.array], want: Sequence[mx.array]) -> bool:
        flags = as_numpy(want[2])
        if not np.array_equal(as_numpy(got[2]), flags):
            return False
        good = mx.array(flags < 2)
        (ids, probs), (other_ids, other_probs) = (
            [mx.where(good[:, None], a, 0) for a in out[:2]] for out in (got, want)
        )
        return exact([ids], [other_ids]) and near([probs], [other_probs])

    return alike


def filter_logits(d: Draw) -> Call:
    T, V = d.size(1, 2, 5), d.size(1, 15, 16, 17, 100, 300, 5000)
    logits = d.array(T, V)
    if d.chance(0.3):
        logits = mx.round(2 * logits)
    if d.chance(0.2) and logits.size:
        logits = mx.where(logits > 1.5, d.pick((mx.nan, mx.inf, -mx.inf)), logits)
    settings = filter_settings(d, V)
    options = {**settings, "edits": edits(d, T, V)}
    return Call((logits,), options, filtered_alike(settings))


def quantized_filter_logits(d: Draw) -> Call:
    group_size, bits = d.packing()
    dtype, E = d.dtype(), group_size * d.size(1, 2)
    T, V = d.size(1, 2, 17), d.size(1, 15, 16, 17, 100, 300)
    x = d.array(T, E, dtype=dtype)
    matrix = d.quantized(V, E, dtype=dtype, group_size=group_size, bits=bits)
    options = {
        **filter_settings(d, V),
        "edits": edits(d, T, V),
        "softcap": None if d.chance(0.5) else d.number(30.0),
    }
    given = d.integer(group_size), d.integer(bits)
    return Call((x, *matrix, *given), options, exact)


def head_of_three_ops(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array, *packing: int, **options: Any
) -> Any:
    """The ops it stands for: a sum of other order would choose other candidates."""
    softcap = options.pop("softcap")
    logits = ops.quantized_matmul(x, w, scales, biases, *packing, out_dtype=mx.float32)
    logits = logits if softcap is None else ops.softcap(logits, softcap)
    return ops.filter_logits(logits, **options)


def candidates(d: Draw, rows: int, count: int, vocab: int) -> tuple[mx.array, mx.array]:
    """Ids once a row, some of them outside of the vocabulary, and probabilities."""
    ids = np.stack([d.rng.permutation(vocab)[:count] for _ in range(rows)] or [np.zeros(count)])
    ids = ids[:rows].astype(np.int64)
    if count and d.chance(0.4):
        outside = np.array([*INT32, vocab, vocab + 1, vocab + 2])
        some = d.rng.permutation(count)[: min(3, count)]
        ids[:, some] = d.rng.permutation(outside)[: len(some)]
    probs = d.rng.random((rows, count)).astype(np.float32)
    probs[d.rng.random((rows, count)) < 0.2] = 0
    probs /= np.maximum(probs.sum(axis=-1, keepdims=True), 1e-6)
    return d.laid_out(mx.array(ids.astype(np.int32))), d.laid_out(mx.array(probs))


def draw_token(d: Draw) -> Call:
    T, n = d.size(1, 2, 17), d.size(1, 15, 16, 17, 100)
    ids, probs = candidates(d, T, n, 2 * n + 1)
    position = d.whole(d.pick((*INT32, 0, 5)))
    seed = d.whole(d.pick((0, 7, 2**32 - 1)), mx.uint32)
    options = {"index": d.integer(0, 1, 5), "shared": d.chance(0.5)}
    return Call((ids, probs, position, seed), options, exact)


def accept_block(d: Draw) -> Call:
    k = d.size(1, 2, 7)
    n, m = (d.size(1, 3, 33, 256, 300) for _ in range(2))
    vocab = max(n, m) + int(d.pick((0, 1, 50)))
    p, q = candidates(d, k + 1, n, vocab), candidates(d, k, m, vocab)
    drafts = d.ids((k,), vocab)
    if m and k and d.chance(0.7):
        drafts = mx.contiguous(q[0][:, d.rng.integers(m)])
    position = d.whole(d.pick((*INT32, 0, 5)))
    seed = d.whole(d.pick((0, 7, 2**32 - 1)), mx.uint32)
    options = {"rule": d.pick(RULES), "vocab": d.integer(vocab, vocab, vocab, 1)}
    return Call((*p, *q, drafts, position, seed), options, exact)


CALLS: dict[str, Callable[[Draw], Call]] = {name: globals()[name] for name in ops.dispatch.OPS}


# ---- Running


def flat(result: Any) -> list[mx.array]:
    if isinstance(result, mx.array):
        return [result]
    return [a for a in result if a is not None]


def refused(text: str) -> bool:
    return HOUSE.match(text) is not None


# Arguments that an op writes to
WRITTEN = {"write_cache": (0,), "prepare_qkv": (6, 7)}
# What is known only when the cache is there
LATE = re.compile(r"must be contiguous but got a strided view")


def run(op: str, seed: Any) -> str:
    """One call: "refused", "late" (as it was evaluated), "equal", or "ran" where no result is
    defined.

    Raises:
        AssertionError: Another error, no sentence, or another result.
    """
    call = CALLS[op](Draw(seed))
    reference = getattr(ops, f"{op}_reference")
    if op == "quantized_filter_logits":
        reference = head_of_three_ops
    kept = list(call.args)  # no other argument is touched: a lazy one must stay lazy
    for i in WRITTEN.get(op, ()):
        kept[i] = mx.array(np.array(kept[i].astype(mx.float32))).astype(kept[i].dtype)
        mx.eval(kept[i])
    try:
        result = getattr(ops, op)(*call.args, **call.options)
    except ValueError as error:
        assert refused(str(error)), f"no sentence: {error}"
        return "refused"
    try:
        got = flat(result)
        mx.eval(got)
    except RuntimeError as error:
        assert LATE.search(str(error)), f"refused late: {error}"
        return "late"
    if call.alike is None or not any(a.size for a in got):
        return "ran"
    want = flat(reference(*kept, **call.options))
    mx.eval(want)
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), f"{a.shape} {a.dtype} is not {b.shape}"
    assert call.alike(got, want), "another result than the reference"
    return "equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", nargs="*", default=list(CALLS), choices=list(CALLS))
    parser.add_argument("--call", type=int, help="this call alone, as a failure names it")
    options = parser.parse_args()
    mx.set_cache_limit(0)  # freed memory is not used again, where a sanitizer would not see it
    met: Counter[tuple[str, str, str]] = Counter()
    end = time.monotonic() + options.seconds
    number, failures = options.call or 0, 0
    while time.monotonic() < end:
        if number % 10 == 0:  # where a sanitizer ends the process: its trace names the op
            print(f"--seed {options.seed} --call {number}", file=sys.stderr, flush=True)
        for instructions in _ext.instruction_sets():
            _ext.use_instruction_set(instructions)
            for op in options.ops:
                try:
                    met[op, instructions, run(op, (options.seed, number))] += 1
                except Exception as error:
                    failures += 1
                    print(f"{op} --seed {options.seed} --call {number} ({instructions}): {error!r}")
        number += 1
        if options.call is not None:
            break
    for op in options.ops:
        kinds = Counter()
        for (name, _, kind), count in met.items():
            kinds[kind] += count * (name == op)
        print(f"{op:18}", ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())))
    print(f"{sum(met.values())} calls, {failures} failures")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
