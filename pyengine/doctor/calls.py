"""Calls of the ops as the doctor makes them: inputs from fixed seeds, one function per op.

Each function takes the settings of a `shapes.Case` and returns a :class:`Call` of up to 16 rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import mlx.core as mx
import numpy as np

from pyengine import ops
from pyengine.ops.accept_block import RULES, Rule
from pyengine.ops.glu import Activation
from pyengine.ops.prepare_qkv import PAGE
from pyengine.ops.quantized_gated_matmul import Matrix
from pyengine.ops.quantized_matmul import dequantized

MOST = 16  # rows
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# What one rounding of a dtype may be off by, as a part of the number: two results that round nearly
# the same sum may fall on neighbours
STEP = {mx.float32: 2.0**-23, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
FILTERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "64": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    "256": {"temperature": 1.3, "top_k": 256, "min_p": 0.05},
    # Rows of three sequences in turn, the first of them greedy
    "mixed": {
        "temperature": mx.array([1.0, 0.7, 1.3]),
        "top_k": mx.array([1, 5, 64]),
        "top_p": mx.array([1.0, 0.95, 0.8]),
        "min_p": mx.array([0.0, 0.05, 0.0]),
        "width": 64,
    },
}

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


def absolute_sums(x: mx.array, w: Sequence[mx.array], packing: tuple[int, int] | None) -> mx.array:
    """``sum over k of |x[m, k] * w[n, k]|``, some columns at a time."""
    parts = []
    x = abs(x.astype(mx.float32))
    for begin in range(0, w[0].shape[0], 2048):
        some, *factors = (a[begin : begin + 2048] for a in w)
        if packing is not None:
            scales, biases = factors
            some = dequantized(some, scales, biases, *packing)
        parts.append(x @ abs(some.astype(mx.float32)).T)
        mx.eval(parts)
    return mx.concatenate(parts, axis=-1)


def of_sums(results: Results, sums: Results, K: int, steps: float = 1.0) -> Results:
    """The stated bound of a product: of two orders, before one rounding each."""
    order = 2 * (K / 8 + 8) * 2.0**-24
    return [
        order * s + abs(a.astype(mx.float32)) * (steps * STEP[a.dtype])
        for a, s in zip(results, sums, strict=True)
    ]


# ---- One function per op


def rms_norm(D: int, heads: int, dtype: str) -> Call:
    shape = (MOST, D) if heads == 1 else (MOST, heads, D)
    x, w = normal(1, *shape, dtype=dtype), normal(2, D, dtype=dtype)
    return Call(lambda b, e: [ops.rms_norm(x[b:e], w)], first, rounded(1))


def residual_norm(E: int, dtype: str) -> Call:
    h, y = (normal(i, MOST, E, dtype=dtype) for i in (1, 2))
    w, following, scalar = (normal(i, n, dtype=dtype) for i, n in ((3, E), (4, E), (5, 1)))

    def run(b: int, e: int) -> Results:
        total, x = ops.residual_norm(h[b:e], y[b:e], w, scalar=scalar, next_weight=following)
        assert x is not None
        return [total, x]

    return Call(run, first, rounded(2))


def frequencies(D: int) -> mx.array:
    """Of sliding layers (256) and of full ones, where a quarter of the pairs turns."""
    theta, turning = (1e4, D // 2) if D == 256 else (1e6, D // 8)
    return mx.array([theta ** (-2 * j / D) if j < turning else 0.0 for j in range(D // 2)])


def of_rows() -> tuple[mx.array, mx.array]:
    """Positions and owners of rows of two sequences by turns; across the end of a page."""
    t = mx.arange(MOST)
    return 1021 + t // 2, t % 2


def norm_rope(H: int, D: int, dtype: str) -> Call:
    x, w = normal(1, MOST, H, D, dtype=dtype), normal(2, D, dtype=dtype)
    positions, turn = of_rows()[0], frequencies(D)
    return Call(lambda b, e: [ops.norm_rope(x[b:e], w, positions[b:e], turn)], first, rounded(1))


def copy_pages(K: int, D: int, dtype: str) -> Call:
    """Half of the pages to the other half; a row is a page."""
    kept = normal(1, 2 * MOST, K, PAGE, D, dtype=dtype)
    targets = mx.arange(MOST)
    sources = MOST + 5 * targets % MOST

    def copy(arena: mx.array, b: int, e: int) -> Results:
        return [ops.copy_pages(arena, sources[b:e], targets[b:e])]

    own = copied(kept)
    return Call(
        lambda b, e: copy(copied(kept), b, e),
        lambda results, i, t: [results[0][t]],
        exact_definition=True,
        timed=lambda b, e: copy(own, b, e),
    )


def move_rows(K: int, D: int, dtype: str) -> Call:
    """Two rows of each of several sequences that have a page each; a row is a sequence."""
    keys, values = (normal(i, MOST, K, PAGE, D, dtype=dtype) for i in (1, 2))
    lengths, tables = 3 * mx.arange(MOST), mx.arange(MOST)[:, None]
    rows = mx.broadcast_to(mx.array([0, 2, 5]), (MOST, 3))
    kept = mx.full(MOST, 3)

    def move(arenas: Results, b: int, e: int) -> Results:
        where = (a[b:e] for a in (lengths, tables, rows, kept))
        return list(ops.move_rows(arenas[0], arenas[1], *where))

    own = [copied(keys), copied(values)]
    return Call(
        lambda b, e: move([copied(keys), copied(values)], b, e),
        lambda results, i, t: [a[t] for a in results],
        exact_definition=True,
        timed=lambda b, e: move(own, b, e),
    )


def tree() -> tuple[list[int], list[list[int]]]:
    """Depths and ancestors of 16 rows: two children of each, by turns of an earlier row."""
    paths = [[0]]
    for row in range(1, MOST):
        paths.append([*paths[(row - 1) // 2], row])
    return [len(path) - 1 for path in paths], [path + [0] * (MOST - len(path)) for path in paths]


def prepare_qkv(
    H: int,
    K: int,
    D: int,
    same: bool,
    dtype: str,
    has_slots: bool = False,
    norm_values: bool = True,
) -> Call:
    q, k, v = (normal(i, MOST, n * D, dtype=dtype) for i, n in ((1, H), (2, K), (3, K)))
    norms = normal(4, D, dtype=dtype), normal(5, D, dtype=dtype), frequencies(D)
    keys, values = (normal(i, 5, K, PAGE, D, dtype=dtype) for i in (6, 7))
    positions, owners = of_rows()
    tables = mx.array([[3, 0], [1, 4]])  # page 2 is nobody's
    slots = positions + 3 if has_slots else positions

    def prepare(arenas: Results, b: int, e: int) -> Results:
        rows = q[b:e], k[b:e], (k if same else v)[b:e]
        where = positions[b:e], owners[b:e], tables
        places = slots[b:e] if has_slots else None
        keys, values = arenas
        to = keys, values, *where
        return list(ops.prepare_qkv(*rows, *norms, *to, slots=places, norm_values=norm_values))

    own = [copied(keys), copied(values)]

    def row(results: Results, i: int, t: int) -> Results:
        page = tables[owners[t], slots[t] // PAGE % 2]
        return [results[0][i], *(a[page, :, slots[t] % PAGE] for a in results[1:])]

    return Call(
        lambda b, e: prepare([copied(keys), copied(values)], b, e),
        row,
        rounded(1),
        timed=lambda b, e: prepare(own, b, e),
    )


def copied(arena: mx.array) -> mx.array:
    """An arena of its own: ours is written in place. Evaluates."""
    own = arena + 0
    mx.eval(own)
    return own


def block_attention(
    H: int, K: int, D: int, length: int, window: int | None, dtype: str, is_tree: bool = False
) -> Call:
    """Rows of one sequence behind those of another, as one piece each; or nodes of its tree."""
    q = normal(1, MOST, H, D, dtype=dtype, scale=0.25)
    pages = (length + MOST) // PAGE + 1
    keys, values = (normal(i, pages + 1, K, PAGE, D, dtype=dtype, scale=0.5) for i in (2, 3))
    # From the last page down; the other sequence has one, and none that anybody sees beside it
    own = pages - mx.arange(pages)
    tables = mx.stack([mx.where(mx.arange(pages) == 0, 0, -1), own])

    depths, ancestors = (mx.array([a[0], *a]) for a in tree())

    def run_tree(b: int, e: int) -> Results:  # a node's ancestors stand before it
        rows, lengths = mx.concatenate([q[:1], q[:e]]), mx.array([5, length])
        out = ops.block_attention(
            rows,
            keys,
            values,
            lengths,
            tables,
            [1, e],
            window=window,
            depths=depths[: e + 1],
            ancestors=ancestors[: e + 1],
        )
        return [out[1 + b :]]

    def run(b: int, e: int) -> Results:
        rows = mx.concatenate([q[:1], q[b:e]])
        lengths = mx.array([5, length + b])
        out = ops.block_attention(rows, keys, values, lengths, tables, [1, e - b], window=window)
        return [out[1:]]

    return Call(run_tree if is_tree else run, first, rounded(1))


def dense_matmul(N: int, K: int, dtype: str) -> Call:
    x, w = normal(1, MOST, K, dtype=dtype), normal(2, N, K, dtype=dtype, scale=K**-0.5)
    return Call(
        lambda b, e: [ops.dense_matmul(x[b:e], w)],
        first,
        lambda results: of_sums(results, [absolute_sums(x, [w], None)], K),
        same_bits=False,
        weights=[w],
    )


def quantized_matmul(N: int, K: int, group: int, bits: int, dtype: str) -> Call:
    x = normal(1, MOST, K, dtype=dtype)
    w = quantized(2, N, K, group=group, bits=bits, dtype=dtype)
    return Call(
        lambda b, e: [ops.quantized_matmul(x[b:e], *w, group, bits)],
        first,
        lambda results: of_sums(results, [absolute_sums(x, w, (group, bits))], K),
        same_bits=False,
        weights=w,
    )


def quantized_matmuls(K: int, columns: Sequence[int], group: int, bits: int, dtype: str) -> Call:
    x = normal(1, MOST, K, dtype=dtype)
    packed = [
        quantized(2 + i, N, K, group=group, bits=bits, dtype=dtype) for i, N in enumerate(columns)
    ]

    def slack(results: Results) -> Results:
        return of_sums(results, [absolute_sums(x, w, (group, bits)) for w in packed], K)

    return Call(
        lambda b, e: ops.quantized_matmuls(x[b:e], packed, group, bits),
        first,
        slack,
        same_bits=False,
        weights=[a for w in packed for a in w],
    )


def quantized_gated_matmul(
    N: int, K: int, group: int, bits: int, dtype: str, activation: Activation = "gelu"
) -> Call:
    x = normal(1, MOST, K, dtype=dtype)
    gate, up = (quantized(i, N, K, group=group, bits=bits, dtype=dtype) for i in (2, 3))
    return Call(
        lambda b, e: [ops.quantized_gated_matmul(x[b:e], gate, up, group, bits, activation)],
        first,
        lambda results: [_of_gate(results[0], x, gate, up, K, (group, bits))],
        same_bits=False,
        weights=[*gate, *up],
    )


def _of_gate(
    out: mx.array,
    x: mx.array,
    gate: Matrix,
    up: Matrix,
    K: int,
    packing: tuple[int, int],
) -> mx.array:
    """``|d out| <= |d gate| * 1.13 |up| + |gate| |d up|``, as gelu is no steeper than 1.13 and silu
    than 1.1; each product is rounded, and their meeting once more."""
    sums = [absolute_sums(x, w, packing) for w in (gate, up)]
    products = [abs(ops.quantized_matmul_reference(x, *w, *packing)) for w in (gate, up)]
    products = [a.astype(mx.float32) for a in products]
    errors = [2 * (K / 8 + 8) * 2.0**-24 * s for s in sums]
    errors = [e + STEP[out.dtype] * a for e, a in zip(errors, products, strict=True)]
    total = 1.13 * errors[0] * (products[1] + errors[1]) + (products[0] + errors[0]) * errors[1]
    return total + abs(out.astype(mx.float32)) * STEP[out.dtype]


def quantized_expert_matmul(
    X: int, U: int, N: int, K: int, form: str, group: int, bits: int, dtype: str
) -> Call:
    gated = form == "gated"
    x = normal(1, *((MOST, U, K) if form == "own rows" else (MOST, K)), dtype=dtype)
    stack = quantized(2, X, N, K, group=group, bits=bits, dtype=dtype)
    up = quantized(3, X, N, K, group=group, bits=bits, dtype=dtype) if gated else None
    ids = mx.sort((mx.arange(MOST)[:, None] * 5 + mx.arange(U) * 3) % X, axis=1)
    ids = ids.astype(mx.int32)
    out_dtype = None if gated else mx.float32

    def slack(results: Results) -> Results:
        """Expert by expert, for the rows that chose it."""
        (out,) = results
        parts = mx.zeros(out.shape)
        for expert in np.unique(np.array(ids)).tolist():
            own = stack[0][expert], stack[1][expert], stack[2][expert]
            rows = x[:, None] if x.ndim == 2 else x
            if up is None:
                sums = absolute_sums(rows, own, (group, bits))
                (part,) = of_sums(results, [sums], K)
            else:
                second = up[0][expert], up[1][expert], up[2][expert]
                part = _of_gate(out, rows, own, second, K, (group, bits))
            parts = mx.where((ids == expert)[..., None], part, parts)
            mx.eval(parts)
        return [parts]

    def run(b: int, e: int) -> Results:
        rows = x[b:e], stack, ids[b:e]
        return [ops.quantized_expert_matmul(*rows, group, bits, up=up, out_dtype=out_dtype)]

    return Call(run, first, slack, same_bits=False)


def route_experts(X: int, used: int) -> Call:
    # Few values, so that there are ties
    logits = mx.random.randint(0, 500, (MOST, X), key=mx.random.key(1)).astype(mx.float32) / 32
    scales = abs(normal(2, X)) + 0.5
    return Call(
        lambda b, e: list(ops.route_experts(logits[b:e], scales, used)), first, _of_candidates
    )


def weigh_experts(U: int, E: int, dtype: str) -> Call:
    parts, weights = normal(1, MOST, U, E), normal(2, MOST, U)
    return Call(
        lambda b, e: [ops.weigh_experts(parts[b:e], weights[b:e], DTYPES[dtype])],
        first,
        exact_definition=True,
    )


def glu(F: int, dtype: str, activation: Activation = "gelu") -> Call:
    gate, up = (normal(i, MOST, F, dtype=dtype, scale=2.0) for i in (1, 2))
    return Call(lambda b, e: [ops.glu(gate[b:e], up[b:e], activation)], first, rounded(1))


def embed(V: int, E: int, group: int, bits: int, dtype: str) -> Call:
    ids = mx.random.randint(0, V, (MOST,), key=mx.random.key(1)).astype(mx.int32)
    table: Sequence[mx.array] = [normal(2, V, E, dtype=dtype)]
    if bits < 16:
        table = quantized(2, V, E, group=group, bits=bits, dtype=dtype)
    packing = (group, min(bits, 8))
    return Call(
        lambda b, e: [ops.embed(ids[b:e], table, *packing, scale=math.sqrt(E))],
        first,
        exact_definition=True,
    )


def softcap(V: int, cap: float) -> Call:
    x = normal(1, MOST, V, scale=16.0)
    return Call(lambda b, e: [ops.softcap(x[b:e], cap)], first, rounded(1))


def _of_candidates(results: Results) -> Results:
    """Ids and flags are equal in all orders of addition; probabilities nearly."""
    return [mx.zeros(a.shape) if a.dtype == mx.int32 else 1e-4 * abs(a) + 1e-6 for a in results]


def _filter(name: str, b: int, e: int) -> dict[str, Any]:
    """Settings of rows b to e - 1."""
    owner = {"owner": mx.arange(b, e, dtype=mx.int32) % 3} if name == "mixed" else {}
    return FILTERS[name] | owner


def filter_logits(V: int, filter: str) -> Call:
    logits = normal(1, MOST, V, scale=4.0)

    def run(b: int, e: int) -> Results:
        return list(ops.filter_logits(logits[b:e], **_filter(filter, b, e)))

    return Call(run, first, _of_candidates)


def quantized_filter_logits(
    V: int, K: int, softcap: float | None, filter: str, group: int, bits: int, dtype: str
) -> Call:
    """Of whole numbers and powers of two, so that the sums are the same in every order."""
    whole = mx.random.randint(-4, 5, (MOST, K), key=mx.random.key(1))
    x = whole.astype(DTYPES[dtype])
    w, scales, _ = quantized(2, V, K, group=group, bits=bits, dtype=dtype)
    # Logits of a standard deviation near 8
    unit = 2.0 ** round(math.log2(8 / (2.58 * 0.289 * 2**bits * math.sqrt(K))))
    scales = mx.full(scales.shape, unit, scales.dtype)
    head = (w, scales, scales * -(2.0 ** (bits - 1)))

    def run(b: int, e: int) -> Results:
        settings = {"softcap": softcap, **_filter(filter, b, e)}
        return list(ops.quantized_filter_logits(x[b:e], *head, group, bits, **settings))

    return Call(run, first, _of_candidates, weights=head)


def candidates(seed: int, rows: int, n: int, vocab: int) -> tuple[mx.array, mx.array]:
    """Ids without repetition and probabilities that fall, as a filter gives them."""
    start = mx.random.randint(0, vocab, (rows, 1), key=mx.random.key(seed))
    ids = ((start + 4099 * mx.arange(n)) % vocab).astype(mx.int32)
    weights = -mx.sort(-mx.exp(3 * normal(seed + 1, rows, n)), axis=1)
    return ids, weights / weights.sum(axis=1, keepdims=True)


def draw_token(n: int, shared: bool) -> Call:
    ids, probs = candidates(1, MOST, n, 262144)

    def run(b: int, e: int) -> Results:
        index, count = mx.arange(b, e, dtype=mx.int32), (e - b,)
        position, seed = mx.full(count, 1021, mx.int32), mx.full(count, 7, mx.uint32)
        return [ops.draw_token(ids[b:e], probs[b:e], position, index, seed, mx.full(count, shared))]

    return Call(run, first, exact_definition=True)


def accept_block(n: int, rule: str, vocab: int) -> Call:
    """Blocks whose third draft the target cannot have: what follows does not matter. Before each a
    block of another sequence, without drafts."""
    ids, p = candidates(1, MOST, n, vocab)
    _, other = candidates(1, MOST, n, vocab)
    q = 0.5 * p + 0.5 * other
    refused = mx.arange(MOST)[:, None] == 2
    drafts = ids[:, 0]
    p = mx.where(refused & (mx.arange(n) == 0), 0.0, p) if n > 1 else p
    position, seed = mx.array([77, 1021], mx.int32), mx.array([5, 3], mx.uint32)
    number = mx.array([0, RULES.index(cast(Rule, rule))], mx.int32)

    def run(b: int, e: int) -> Results:
        own, k = drafts[: e - 1], e - 1
        if rule == "coupled":  # what is drawn, up to the third
            at = mx.full((k,), 1021, mx.int32), mx.arange(1, k + 1, dtype=mx.int32)
            key = mx.full((k,), 3, mx.uint32), mx.full((k,), True)
            drawn = ops.draw_token_reference(ids[:k], p[:k], *at, *key)
            own = mx.where(mx.arange(k) < 2, drawn, own)
        of_p = (mx.concatenate([a[-1:], a[:e]]) for a in (ids, p))
        p_ids, p_probs = of_p
        rows = (p_ids, p_probs, ids[:k], q[:k], own)
        return list(ops.accept_block(*rows, position, seed, number, counts=(1, e), vocab=vocab))

    # The rule block may look further than the first draft that is refused
    row = None if rule == "block" else lambda results, i, t: list(results)
    return Call(run, row, rows=(4, 6, MOST), alone=False, exact_definition=True)


def random_uniform(each: int) -> Call:
    words = mx.random.randint(0, 2**31 - 1, (MOST, each, 4), key=mx.random.key(1))
    counters = words.astype(mx.uint32)
    return Call(
        lambda b, e: [ops.random_uniform(counters[b:e], (3, 2**32 - 5))],
        first,
        exact_definition=True,
    )


def call(op: str, settings: dict[str, Any]) -> Call:
    """The call of a case."""
    made: Call = globals()[op](**settings)
    return made
