"""Write down which bits the ops give, to compare two builds.

    python -m tests.op_bits OUT.json                     # this checkout's: many minutes
    python tests/op_bits.py OUT.json                     # the pyengine that is installed
    python -m tests.op_bits --compare OLD.json NEW.json

Every op runs on fixed inputs, at the shapes of the five published pairs and their assistants, in
each dtype, with 1, 4, 6, 16 and 17 rows, in each instruction set that the machine has. A file has a
hash of the results per case, instruction set and row count, and a few of the numbers. The bits are
fixed within one instruction set, so files of different machines agree where both have it.

Columns of a matrix are independent of each other, and only time would grow with them: there are
fewer than in the models. The widths that are summed over, heads, windows, experts and the
vocabulary that is sampled from are true.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from pyengine import _ext, ops
from pyengine.ops.accept_block import RULES
from pyengine.ops.filter_logits import Edits

ROWS = (1, 4, 6, 16, 17)  # 17 is two slices
MOST = max(ROWS)
VOCAB = 262144
CENTROIDS_USED = 32
EXPERTS_USED, EXPERT_WIDTH = 8, 704
# The published table of pyengine: (layers, hidden, heads, kv heads sliding and full, window,
# feed-forward, per-layer width, shared layers, experts), (hidden, heads, feed-forward, centroids)
PAIRS = {
    "E2B": ((35, 1536, 8, 1, 1, 512, 6144, 256, 20, 0), (256, 4, 2048, 2048)),
    "E4B": ((42, 2560, 8, 2, 2, 512, 10240, 256, 18, 0), (256, 4, 2048, 2048)),
    "12B": ((48, 3840, 16, 8, 1, 1024, 15360, 0, 0, 0), (1024, 16, 8192, 0)),
    "26B-A4B": ((30, 2816, 16, 8, 2, 1024, 2112, 0, 0, 128), (1024, 16, 8192, 0)),
    "31B": ((60, 5376, 32, 16, 4, 1024, 21504, 0, 0, 0), (1024, 32, 8192, 0)),
}
# What the build of bcd85bd calls them
EARLIER = {
    "quantized_matmul": "q8_matmul",
    "quantized_matmuls": "q8_shared_matmul",
    "quantized_gated_matmul": "q8_gated_matmul",
    "quantized_expert_matmul": "q8_expert_matmul",
    "quantized_filter_logits": "q8_filter_logits",
}
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
BITS = (8, 6, 4)
COLUMNS = 136  # full tiles of every kernel and a rest

Results = Sequence["mx.array | None"]
Run = Callable[[int], Results]  # of so many rows


class Case(NamedTuple):
    """One op at one shape; `make` makes the inputs and returns what runs on the first T rows."""

    op: str
    make: Callable[..., Run]
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.settings.items())


def op(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(ops, name if hasattr(ops, name) else EARLIER[name])
    return found


# Inputs: raw words of a counter-based generator and arithmetic without rounding, so that they are
# the same on every machine.


def words(label: str, count: int) -> np.ndarray:
    return np.random.Philox(key=zlib.crc32(label.encode())).random_raw(count)


def normal(label: str, *shape: int, dtype: str = "float32", scale: float = 1.0) -> mx.array:
    """Sums of four uniform numbers: mean 0, standard deviation about 1."""
    parts = words(label, math.prod(shape)).view(np.uint16).reshape(-1, 4).astype(np.int32)
    values = (parts.sum(axis=1) - 2 * 65535).astype(np.float32) * np.float32(1.75 / 65536 * scale)
    return mx.array(values.reshape(shape)).astype(DTYPES[dtype])


def integers(label: str, *shape: int, below: int) -> np.ndarray:
    return (words(label, math.prod(shape)) % below).astype(np.int32).reshape(shape)


def quantized(label: str, *shape: int, bits: int, group: int, dtype: str) -> tuple[mx.array, ...]:
    """A matrix ``[..., N, K]``. A long one repeats its integers, with other scales."""
    *lead, N, K = shape
    width = K * bits // 32
    own = min(N, 4096)
    part = words(f"{label} w", math.prod(lead) * own * width // 2 + 1).view(np.uint32)
    w = np.tile(part[: math.prod(lead) * own * width].reshape(*lead, own, width), (N // own, 1))
    unit = 2.0 ** -(bits - 1 + round(math.log2(K) / 2))
    steps = integers(f"{label} s", *lead, N, K // group, below=256)
    scales = mx.array(((steps + 128) / 256 * unit).astype(np.float32)).astype(DTYPES[dtype])
    return mx.array(w), scales, -scales * 2 ** (bits - 1)


def frequencies(D: int) -> mx.array:
    """Of sliding layers (256) and of full ones, where a quarter of the pairs turns."""
    theta, turning = (1e4, D // 2) if D == 256 else (1e6, D // 8)
    inv_freq = [theta ** (-2 * j / D) if j < turning else 0.0 for j in range(D // 2)]
    return mx.array(np.array(inv_freq, dtype=np.float32))


def candidates(label: str, rows: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids without repetition and probabilities that fall, as a filter gives them."""
    ids = (integers(label, rows, 1, below=VOCAB) + 4099 * np.arange(n)) % VOCAB
    weights = integers(f"{label} p", rows, n, below=1 << 20).astype(np.int64) + 1
    weights = -np.sort(-weights >> (np.arange(n) // 4).clip(max=16), axis=1)
    return ids.astype(np.int32), (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


# One function per op


def rms_norm(D: int, heads: int, dtype: str) -> Run:
    x, w = normal("x", MOST, heads, D, dtype=dtype), normal("w", D, dtype=dtype)
    return lambda T: [op("rms_norm")(x[:T], w), op("rms_norm")(x[:T], None, 1e-5)]


def residual_norm(E: int, dtype: str) -> Run:
    h, y = (normal(label, MOST, E, dtype=dtype) for label in "hy")
    w, next_w, scalar = (normal(f"w{n}", n, dtype=dtype) for n in (E, E, 1))

    def run(T: int) -> Results:
        results: list[mx.array | None] = []
        for s in (None, scalar):
            for n in (None, next_w):
                results += op("residual_norm")(h[:T], y[:T], w, scalar=s, next_weight=n)
        return results

    return run


def norm_rope(H: int, D: int, dtype: str) -> Run:
    x, w = normal("x", 1, MOST, H, D, dtype=dtype)[0], normal("w", D, dtype=dtype)

    def run(T: int) -> Results:
        return [
            op("norm_rope")(x[:T], w, offset + mx.arange(T), frequencies(D))[None]
            for offset in (0, 1021, 100_003)
        ]

    return run


def copy_pages(K: int, D: int, dtype: str) -> Run:
    P, arena = 6, normal("a", 6, K, 64, D, dtype=dtype)

    def run(T: int) -> Results:
        own = arena + 0  # written in place
        mx.eval(own)
        n = min(T, P - 1)
        return [op("copy_pages")(own, mx.full((n,), n), mx.arange(n))]

    return run


def move_rows(K: int, D: int, dtype: str) -> Run:
    """Of two sequences, across the end of a page."""
    keys, values = (normal(x, 5, K, 64, D, dtype=dtype) for x in ("keys", "values"))
    rows = mx.array([[0, 2, 3, 9], [1, 2, 7, 8]])

    def run(T: int) -> Results:
        own = [keys + 0, values + 0]  # written in place
        mx.eval(own)
        where = mx.array([58, 0]), mx.array([[4, 1], [0, 2]]), rows, mx.array([4, min(T, 4)])
        return list(op("move_rows")(*own, *where))

    return run


def prepare_qkv(H: int, K: int, C: int, D: int, same: bool, dtype: str) -> Run:
    """Its keys and values as a ring of C places, which the digests that are kept are of."""
    q, k, v = (normal(x, MOST, n * D, dtype=dtype) for x, n in (("q", H), ("k", K), ("v", K)))
    q_norm, k_norm = normal("qn", D, dtype=dtype), normal("kn", D, dtype=dtype)
    rings = [normal(label, 1, K, C, D, dtype=dtype) for label in ("keys", "values")]

    def run(T: int) -> Results:
        results: list[mx.array] = []
        owners, tables = mx.zeros(T, mx.int32), mx.array([[2, 0]])
        for offset in (0, 5 * C - 3):
            arenas = [mx.zeros((3, K, 64, D), q.dtype) for _ in rings]  # written in place
            mx.eval(arenas)
            rows = q[:T], k[:T], (k if same else v)[:T]
            norms = q_norm, k_norm, frequencies(D)
            at = offset + mx.arange(T)
            turned, *arenas = op("prepare_qkv")(*rows, *norms, *arenas, at, owners, tables)
            results.append(turned[None])
            for ring, arena in zip(rings, arenas, strict=True):
                own = ring + 0
                new = arena[tables[0, at // 64 % 2], :, at % 64]  # [T, K, D]
                own[:, :, at % C] = new.swapaxes(0, 1)[None]
                results.append(own)
        return results

    return run


def block_attention(H: int, K: int, D: int, window: int | None, offset: int, dtype: str) -> Run:
    """Its keys and values from a ring of C places, which the digests that are kept are of."""
    C = (window or offset) + 2 * MOST
    q = normal("q", 1, MOST, H, D, dtype=dtype, scale=0.25)[0]
    rings = [normal(label, 1, K, C, D, dtype=dtype, scale=0.5)[0] for label in "kv"]
    start = 0 if window is None else offset // 3
    first = 0 if window is None else max(0, offset - window + 1) // 64
    behind = (offset + MOST - 1) // 64 + 1
    # Page n of the arena has the last but n of them
    positions = mx.arange(first * 64, behind * 64)
    arenas = [
        mx.contiguous(ring[:, (positions - start) % C].reshape(K, -1, 64, D).swapaxes(0, 1)[::-1])
        for ring in rings
    ]
    N = behind - first
    pages = behind - 1 - mx.arange(first, behind)
    tables = mx.zeros(N, mx.int32)
    tables[mx.arange(first, behind) % N] = pages
    mx.eval(q, arenas, tables)

    def run(T: int) -> Results:
        where = mx.array([offset]), tables[None], [T]
        return [op("block_attention")(q[:T], *arenas, *where, window=window)[None]]

    return run


def dense_matmul(K: int, dtype: str, out: str) -> Run:
    x = normal("x", MOST, K, dtype=dtype)
    w = normal("w", COLUMNS, K, dtype=dtype, scale=2.0 ** -round(math.log2(K) / 2))
    return lambda T: [op("dense_matmul")(x[:T], w, out_dtype=DTYPES[out])]


def quantized_matmul(K: int, bits: int, group: int, dtype: str, out: str) -> Run:
    x = normal("x", MOST, K, dtype=dtype)
    w = quantized("w", COLUMNS, K, bits=bits, group=group, dtype=dtype)
    return lambda T: [op("quantized_matmul")(x[:T], *w, group, bits, out_dtype=DTYPES[out])]


def quantized_matmuls(K: int, columns: str, bits: int, group: int, dtype: str) -> Run:
    x = normal("x", MOST, K, dtype=dtype)
    matrices = [
        quantized(f"w{i}", int(N), K, bits=bits, group=group, dtype=dtype)
        for i, N in enumerate(columns.split(","))
    ]
    return lambda T: op("quantized_matmuls")(x[:T], matrices, group, bits)


def quantized_gated_matmul(K: int, bits: int, group: int, dtype: str) -> Run:
    x = normal("x", MOST, K, dtype=dtype)
    gate, up = (quantized(w, COLUMNS, K, bits=bits, group=group, dtype=dtype) for w in ("g", "u"))
    return lambda T: [op("quantized_gated_matmul")(x[:T], gate, up, group, bits)]


def quantized_expert_matmul(
    X: int, U: int, K: int, form: str, bits: int, group: int, dtype: str, out: str
) -> Run:
    x = normal("x", MOST, *([U] if form == "own x" else []), K, dtype=dtype)
    gate, up = (quantized(w, X, 40, K, bits=bits, group=group, dtype=dtype) for w in ("g", "u"))
    order = words("ids", MOST * X).reshape(MOST, X).argsort(axis=1, kind="stable")
    ids = mx.array(np.sort(order[:, :U], axis=1).astype(np.int32))
    options = {"up": up if form == "gated" else None, "out_dtype": DTYPES[out]}
    return lambda T: [op("quantized_expert_matmul")(x[:T], gate, ids[:T], group, bits, **options)]


def route_experts(X: int, used: int) -> Run:
    # Few values, so that there are ties
    logits = mx.array(integers("l", MOST, X, below=500).astype(np.float32) / 32)
    scales = normal("s", X)
    return lambda T: op("route_experts")(logits[:T], scales, used)


def weigh_experts(U: int, E: int, out: str) -> Run:
    parts, weights = normal("p", MOST, U, E), normal("w", MOST, U)
    return lambda T: [op("weigh_experts")(parts[:T], weights[:T], DTYPES[out])]


def glu(F: int, dtype: str) -> Run:
    gate, up = (normal(label, MOST, F, dtype=dtype, scale=2.0) for label in "gu")
    return lambda T: [op("glu")(gate[:T], up[:T])]


def embed(E: int, bits: int, group: int, scale: float, dtype: str, out: str) -> Run:
    # A row is read by its id, so the length of the table does not matter; 16 bits are not quantised
    ids = mx.array(integers("ids", MOST, below=100))
    table: Sequence[mx.array] = [normal("t", 100, E, dtype=dtype)]
    if bits < 16:
        table = quantized("t", 100, E, bits=bits, group=group, dtype=dtype)
    packing = (group, min(bits, 8))
    return lambda T: [op("embed")(ids[:T], table, *packing, scale=scale, out_dtype=DTYPES[out])]


def softcap(V: int, cap: float) -> Run:
    x = normal("x", MOST, V, scale=16.0)
    return lambda T: [op("softcap")(x[:T], cap)]


# What is sampled with: greedy, the published settings, others, every candidate
FILTERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "published": {"temperature": 1.0, "top_k": 64, "top_p": 0.95},
    "edited": {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    "256": {"temperature": 1.3, "top_k": 256, "min_p": 0.05},
    "all": {"temperature": 1.0, "top_k": 0, "top_p": 0.9},
}


def edits(filter: str, rows: int, V: int) -> Edits | None:
    if filter != "edited":
        return None
    ids = np.unique(integers("edited", 300, below=V))
    factors = 1 + integers("factors", rows, ids.size, below=4).astype(np.float32) / 8
    deltas = integers("deltas", rows, ids.size, below=9).astype(np.float32) - 4
    deltas[:, ::17] = -np.inf
    return Edits(mx.array(ids)[None], mx.array(factors), mx.array(deltas))


def filter_logits(V: int, filter: str) -> Run:
    logits = normal("l", MOST, V, scale=4.0)
    return lambda T: op("filter_logits")(logits[:T], **FILTERS[filter], edits=edits(filter, T, V))


def quantized_filter_logits(
    K: int, V: int, bits: int, group: int, softcap: float | None, filter: str, dtype: str
) -> Run:
    x = normal("x", MOST, K, dtype=dtype, scale=8.0)
    w = quantized("w", V, K, bits=bits, group=group, dtype=dtype)

    def run(T: int) -> Results:
        if K * V > 1 << 29 and T == MOST:
            return []  # half a minute; slices of narrower matrices are run
        options = {**FILTERS[filter], "edits": edits(filter, T, V), "softcap": softcap}
        results: Results = op("quantized_filter_logits")(x[:T], *w, group, bits, **options)
        return results

    return run


def draw_token(n: int, shared: bool) -> Run:
    ids, probs = map(mx.array, candidates("d", MOST, n))

    def run(T: int) -> Results:
        return [
            op("draw_token")(
                ids[:T],
                probs[:T],
                mx.full((T,), p, mx.int32),
                mx.arange(i, i + T, dtype=mx.int32),
                mx.full((T,), s, mx.uint32),
                mx.full((T,), shared),
            )
            for p in (0, 1021, 100_003)
            for s in range(8)
            for i in (0, 1)
        ]

    return run


def accept_block(n: int, m: int, rule: str) -> Run:
    p_ids, p_probs = candidates("p", MOST, n)
    _, q_probs = candidates("q", MOST, m)
    at = integers("drafts", MOST, below=max(1, min(m, n) // 8))
    q_ids = p_ids[:, :m]
    drafts = q_ids[np.arange(MOST), at]

    def run(T: int) -> Results:
        k = max(1, T - 1)
        p = mx.array(p_ids[: k + 1]), mx.array(p_probs[: k + 1])
        q = mx.array(q_ids[:k]), mx.array(q_probs[:k])
        results: list[mx.array] = []
        for position in (0, 1021, 100_003):
            for s in range(8):
                own = mx.array(drafts[:k])
                if rule == "coupled":  # what is drawn, up to the fifth
                    at = mx.full((k,), position, mx.int32), mx.arange(1, k + 1, dtype=mx.int32)
                    key = mx.full((k,), s, mx.uint32), mx.full((k,), True)
                    drawn = op("draw_token")(p[0][:k], p[1][:k], *at, *key)
                    own = mx.where(mx.arange(k) < 5, drawn, own)
                counter = mx.array([position]), mx.array([s], mx.uint32)
                number = mx.array([RULES.index(rule)], mx.int32)
                accepted, token = op("accept_block")(
                    *p, *q, own, *counter, number, counts=(k + 1,), vocab=VOCAB
                )
                results += [accepted.squeeze(), token]
        return results

    return run


def random_uniform(each: int) -> Run:
    counters = mx.array(words("c", MOST * each * 2).view(np.uint32).reshape(MOST, each, 4))
    return lambda T: [op("random_uniform")(counters[:T], key) for key in ((0, 1), (2**32 - 1, 7))]


def settings(pair: str) -> Iterator[tuple[Callable[..., Run], dict[str, Any]]]:
    """What a published pair calls its ops with."""
    target, assistant = PAIRS[pair]
    layers, hidden, heads, kv_sliding, kv_full, window, ffn, per_layer, _, experts = target
    own_hidden, own_heads, own_ffn, centroids = assistant
    kinds = [(256, kv_sliding), (512, kv_full)]
    one_of = [{"dtype": dtype} for dtype in DTYPES]
    outs = [
        {"dtype": dtype, "out": out}
        for dtype in DTYPES
        for out in dict.fromkeys((dtype, "float32"))
    ]
    packings = [{"bits": bits, "group": 64} for bits in BITS]
    packings += [{"bits": bits, "group": group} for group in (32, 128) for bits in BITS]

    for D, n in [(hidden, 1), (own_hidden, 1), (256, kv_sliding), (512, kv_full)] + (
        [(per_layer, layers)] if per_layer else []
    ):
        for dtype in one_of:
            yield rms_norm, {"D": D, "heads": n, **dtype}
    for E in (hidden, own_hidden):
        for dtype in one_of:
            yield residual_norm, {"E": E, **dtype}
    for D, K in kinds:
        C = window - 1 + MOST if D == 256 else 64
        for dtype in one_of:
            for H in (heads, own_heads, K):
                yield norm_rope, {"H": H, "D": D, **dtype}
            yield copy_pages, {"K": K, "D": D, **dtype}
            yield move_rows, {"K": K, "D": D, **dtype}
            same = D == 512 and not per_layer
            yield prepare_qkv, {"H": heads, "K": K, "C": C, "D": D, "same": same, **dtype}
            # The assistant's query stands behind the newest key
            for H, W in ((heads, window), (own_heads, window - 1)):
                for offset in (0, 37, 700) if D == 512 else (5, 400, window + 300):
                    shape = {"H": H, "K": K, "D": D, "window": W if D == 256 else None}
                    yield block_attention, {**shape, "offset": offset, **dtype}
    shape = {"H": heads, "K": kv_full, "D": 512, "window": None}
    yield block_attention, {**shape, "offset": 4100, "dtype": "bfloat16"}

    widths = [hidden, heads * 256, heads * 512, ffn, 2 * hidden]
    widths += [own_hidden, own_heads * 256, own_heads * 512, own_ffn]
    widths += [per_layer, 2 * ffn] if pair == "E2B" else [per_layer] if per_layer else []
    for K in widths:
        for out in outs:
            yield dense_matmul, {"K": K, **out}
            for packing in packings if hidden == K else packings[: len(BITS)]:
                yield quantized_matmul, {"K": K, **packing, **out}
    for packing in packings:
        for dtype in one_of if packing["group"] == 64 else one_of[-1:]:
            for D, K in kinds:
                sizes = [heads * D // 32, K * D // 32]
                sizes += [] if D == 512 and not per_layer else [K * D // 32]
                columns = ",".join(str(size + 4) for size in sizes)
                yield quantized_matmuls, {"K": hidden, "columns": columns, **packing, **dtype}
            for K in (hidden, own_hidden):
                yield quantized_gated_matmul, {"K": K, **packing, **dtype}
    for F in [ffn, own_ffn, *([per_layer] if per_layer else [])]:
        for dtype in one_of:
            yield glu, {"F": F, **dtype}
    for E in [hidden, *([layers * per_layer] if per_layer else [])]:
        scale = math.sqrt(hidden if hidden == E else per_layer)
        for out in outs:
            for packing in [*packings[: len(BITS)], {"bits": 16, "group": 64}]:
                yield embed, {"E": E, **packing, "scale": round(scale, 3), **out}
    if experts:
        yield glu, {"F": EXPERT_WIDTH, "dtype": "bfloat16"}
        for used in (1, EXPERTS_USED, 32):
            yield route_experts, {"X": experts, "used": used}
        for name in DTYPES:
            yield weigh_experts, {"U": EXPERTS_USED, "E": hidden, "out": name}
        for packing in packings:
            for out in outs:
                shape = {"X": experts, "U": EXPERTS_USED}
                for K, form in ((hidden, "gated"), (hidden, "plain"), (EXPERT_WIDTH, "own x")):
                    fits = K % packing["group"] == 0
                    if fits and (form != "gated" or out["dtype"] == out["out"]):
                        values = {**shape, "K": K, "form": form, **packing, **out}
                        yield quantized_expert_matmul, values

    yield softcap, {"V": VOCAB, "cap": 30.0}
    for name in FILTERS:
        yield filter_logits, {"V": VOCAB, "filter": name}
        if centroids:
            yield filter_logits, {"V": VOCAB // centroids * CENTROIDS_USED, "filter": name}
    head = {"K": hidden, "V": VOCAB, "bits": 8, "group": 64, "softcap": 30.0}
    yield quantized_filter_logits, {**head, "filter": "published", "dtype": "bfloat16"}
    head = {"K": own_hidden, "V": VOCAB}
    for packing in packings if own_hidden == 256 else packings[:1]:
        for dtype in one_of if own_hidden == 256 else one_of[-1:]:
            options = {**packing, "softcap": None, "filter": "published", **dtype}
            yield quantized_filter_logits, {**head, **options}
    for name in ("greedy", "edited", "256"):
        options = {**packings[0], "softcap": 30.0, "filter": name, "dtype": "bfloat16"}
        yield quantized_filter_logits, {"K": 256, "V": VOCAB, **options}
    for n in (1, 64, 256):
        for shared in (False, True):
            yield draw_token, {"n": n, "shared": shared}
    for rule in ("residual", "block", "coupled"):
        for n, m in ((64, 64), (1, 1), (64, 1), (256, 64), (256, 256)):
            yield accept_block, {"n": n, "m": m, "rule": rule}
    for each in (1, 64, 1000):
        yield random_uniform, {"each": each}


def cases(pairs: Sequence[str] = tuple(PAIRS)) -> list[Case]:
    """Each once, though several pairs have it."""
    found: dict[tuple[str, str], Case] = {}
    for pair in pairs:
        for make, values in settings(pair):
            case = Case(make.__name__, make, values)
            found.setdefault((case.op, case.name), case)
    return sorted(found.values(), key=lambda case: case.op)


def as_numpy(a: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(a).view(mx.uint16) if a.dtype.size == 2 else mx.contiguous(a))


def digest(results: Results) -> str:
    """Of dtypes, shapes and bits."""
    mx.eval([a for a in results if a is not None])
    found = hashlib.blake2b(digest_size=3)
    for a in results:
        if a is None:
            found.update(b"none")
            continue
        found.update(f"{a.dtype} {a.shape} ".encode())
        found.update(as_numpy(a).tobytes())
    return found.hexdigest()


def bits(case: Case) -> dict[str, str]:
    """Digests, one per count of rows, by instruction set."""
    run = case.make(**case.settings)
    found = {}
    before = _ext.instruction_set()
    try:
        for name in _ext.instruction_sets():
            _ext.use_instruction_set(name)
            found[name] = " ".join(digest(run(T)) for T in ROWS)
    finally:
        _ext.use_instruction_set(before)
    return found


def joined(found: dict[str, str]) -> dict[str, str]:
    """With sets that agree under one name: "portable, avx2"."""
    names: dict[str, list[str]] = {}
    for name, digests in found.items():
        names.setdefault(digests, []).append(name)
    return {", ".join(same): digests for digests, same in names.items()}


def split(row: dict[str, Any]) -> dict[str, str]:
    """Digests by instruction set again."""
    return {name: row[names] for names in row if names != "first" for name in names.split(", ")}


def numbers(case: Case) -> list[float]:
    """A few of the first result's, for the eye."""
    first = case.make(**case.settings)(1)[0]
    assert first is not None
    values: list[float] = first.reshape(-1)[:3].astype(mx.float32).tolist()
    return [float(f"{value:.5g}") for value in values]


def write(path: Path, only: Sequence[str]) -> None:
    built_from = getattr(_ext, "built_from", "")  # bcd85bd does not say it
    about = {"mlx": mx.__version__, "built_from": built_from, "rows": ROWS}
    kept: dict[str, dict[str, dict[str, Any]]] = {}
    wanted = [case for case in cases() if not only or case.op in only]
    for case in wanted:
        if case.op not in kept:
            print(case.op, file=sys.stderr, flush=True)
        row: dict[str, Any] = {**joined(bits(case)), "first": numbers(case)}
        kept.setdefault(case.op, {})[case.name] = row
    path.write_text(as_text(about, kept))
    print(f"{len(wanted)} cases of {len(kept)} ops: {path}", file=sys.stderr)


def as_text(about: dict[str, Any], kept: dict[str, dict[str, dict[str, Any]]]) -> str:
    """One line per case."""
    blocks = []
    for name, rows in kept.items():
        lines = [f"  {json.dumps(case)}: {json.dumps(row)}" for case, row in rows.items()]
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    return f'{{"about": {json.dumps(about)},\n"ops": {{\n' + ",\n".join(blocks) + "\n}}\n"


def differences(old: dict[str, Any], new: dict[str, Any]) -> tuple[int, list[str]]:
    """How many cases were compared, and a line for each that differs or that one side lacks."""
    lines = []
    compared = 0
    flat = [
        {(name, case): row for name, rows in side["ops"].items() for case, row in rows.items()}
        for side in (old, new)
    ]
    for key in dict.fromkeys([*flat[0], *flat[1]]):
        label = ": ".join(key)
        if not all(key in side for side in flat):
            lines.append(f"{label}: only in the {'first' if key in flat[0] else 'second'}")
            continue
        a, b = (split(side[key]) for side in flat)
        shared = [name for name in a if name in b]
        if not shared:
            lines.append(f"{label}: no instruction set in common")
        for name in shared:
            compared += 1
            pairs = zip(ROWS, a[name].split(), b[name].split(), strict=True)
            rows = [str(T) for T, one, other in pairs if one != other]
            if rows:
                firsts = " and ".join(str(side[key]["first"]) for side in flat)
                lines.append(f"{label}: {name}, {', '.join(rows)} rows: {firsts} (one row)")
    return compared, lines


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.op_bits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT.json")
    parser.add_argument("--ops", default="", help="only these, between commas")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("OLD.json", "NEW.json"))
    options = parser.parse_args()
    if (options.out is None) == (options.compare is None):
        parser.error("give either a file to write or --compare and two files.")
    if options.out:
        write(options.out, [name for name in options.ops.split(",") if name])
        return
    old, new = (json.loads(path.read_text()) for path in options.compare)
    compared, lines = differences(old, new)
    print(*lines, sep="\n" if lines else "")
    print(f"{compared} compared, {len(lines)} differ")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
