"""What the Metal kernels load and store, counted in the workbench beside MLX's own: no timing.

Prints bench/KERNELS.md, whose text says what each figure is; progress goes to standard error. A
whole run takes minutes.

Run: python bench/count.py [--ops rms_norm glu] [--json]
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
import numpy as np

from pyengine import _ext, ops
from pyengine.drafters import new_drafter
from pyengine.engine import loop
from pyengine.engine import round as on_device
from pyengine.ops import workbench
from pyengine.ops.prepare_qkv import PAGE
from pyengine.ops.recorded import Recorded
from pyengine.sampling.settings import Sampling
from pyengine.task import embedded_pair

SECTOR = 32
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
GROUP_SIZE, BITS = 64, 8

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

# Buffers by what the kernels call them
WEIGHTS = r"(.*_)?w"
MATRICES = r"(.*_)?(w|scales|biases)"
CACHE = r"keys|values"
STREAMS = r"x|h|y|q|k|v|gate|up"  # all but weights and frequencies, which all rows share

# By name: an attribute of `Moved`, the buffers that it is summed over, and those whose needed bytes
# it is divided by. A call has those of its buffers.
RATIOS = {
    "weight_ratio": ("read", WEIGHTS, WEIGHTS),
    "matrix_ratio": ("read", MATRICES, MATRICES),
    "weight_load_ratio": ("loaded", WEIGHTS, WEIGHTS),
    "matrix_load_ratio": ("loaded", MATRICES, MATRICES),
    "load_ratio": ("loaded", ".*", MATRICES),
    "kv_load_ratio": ("loaded", CACHE, CACHE),
    "q_load_ratio": ("loaded", "q", CACHE),
    "between_ratio": ("moved", "scores|sums|states", CACHE),
    "row_ratio": ("loaded", STREAMS, STREAMS),
    "logits_ratio": ("read", "logits", "logits"),
}


@dataclass(frozen=True)
class Moved:
    """Bytes of one buffer, all but ``needed`` those of sectors.

    Attributes:
        needed: Each byte once, of those that are needed; 0 if one launch leaves them for the next.
        read, written: By threadgroup: the sectors that a threadgroup touches, each once. That is
            what has to come to a core if its cache keeps all that the threadgroup needs, and no
            core helps another.
        loaded: By load: the sectors that one load of a simdgroup touches; no cache helps.
    """

    needed: int
    read: int
    written: int
    loaded: int

    @property
    def moved(self) -> int:
        return self.read + self.written


@dataclass(frozen=True)
class Count:
    """What one call moves, by buffer; constants are left out."""

    kernel: str  # of the first launch
    launches: int
    threadgroup_bytes: int  # the most of a threadgroup
    buffers: dict[str, Moved]

    def sum(self, what: str, names: str = ".*") -> int:
        """One attribute of all buffers whose names match."""
        found = (b for name, b in self.buffers.items() if re.fullmatch(names, name))
        return sum(getattr(b, what) for b in found)


class MlxKernel(NamedTuple):
    """A launch of one of MLX's own kernels, and its inputs by name."""

    launch: Any
    arrays: dict[str, np.ndarray]


Result = mx.array | Sequence[mx.array] | MlxKernel


def count(result: Result, needed: float = 1.0) -> Count:
    """Run the launches of an op's lazy result in count mode.

    Args:
        result: One result of an op, or several.
        needed: The part of its matrices, or of the keys and values of a cache, that is needed.

    Raises:
        RuntimeError: There is no compiler.
    """
    include = []
    if isinstance(result, MlxKernel):
        launches, arrays = [result.launch], result.arrays
        outer = {*arrays, "out"}
        include.append(Path(mx.__file__).parent / "include")
    else:
        found, inputs = launches_of(result)
        launches, arrays = found, workbench.named(found, inputs)
        outer = {buffer.name for part in _ext.launch_arguments(found) for buffer in part}
    # block_attention leaves the room for spans that a length does not need as it is
    _, report = workbench.load().run(
        launches, arrays, mode="count", include=include, allow={"unwritten-output"}
    )
    constants = {b.name for launch in launches for b in launch.buffers if b.role == "bytes"}
    buffers = {}
    for name, traffic in report.traffic.items():
        if name in constants:
            continue
        part = needed if re.fullmatch(f"{MATRICES}|{CACHE}", name) else 1.0
        buffers[name] = Moved(
            needed=round(part * traffic.size) if name in outer else 0,
            read=SECTOR * traffic.group_read_sectors,
            written=SECTOR * traffic.group_written_sectors,
            loaded=traffic.device_read_bytes,
        )
    return Count(launches[0].kernel, report.launches, report.threadgroup_bytes, buffers)


def launches_of(result: mx.array | Sequence[mx.array]) -> tuple[list[_ext.Launch], list[mx.array]]:
    """What a GPU runs for an op's lazy result, one launch at least, and their inputs."""
    launches, inputs = _ext.launches_of(result)
    assert launches, "no kernel takes these arguments"
    return launches, inputs


@dataclass(frozen=True)
class Call:
    """An op's lazy result and its place in a table; see :func:`count`."""

    op: str
    result: Result
    labels: dict[str, Any]
    needed: float = 1.0


def matrices() -> Iterator[Call]:
    for K in WIDTHS:
        for M in EVERY_ROW if K == EVERY_ROW_WIDTH else ROWS:
            yield from matmuls(M, COLUMNS, K)
    for M in EVERY_ROW:
        yield experts(M, COLUMNS // 2, EXPERT_WIDTH)


def matmuls(M: int, N: int, K: int) -> Iterator[Call]:
    labels = {"M": M, "N": N, "K": K}
    x = random(0, M, K)
    gate, up = (quantized(seed, N, K) for seed in (1, 2))
    result: Result = ops.quantized_matmul(x, *gate, GROUP_SIZE, BITS)
    yield Call("quantized_matmul", result, labels)
    # MLX's kernels load byte by byte: counting their longest rows would take minutes
    if M in ROWS and K // 4 not in MODEL_WIDTHS:
        # As MLX chooses them: qmv_fast where a simdgroup's steps divide K
        narrow = "qmv_fast" if K % 512 == 0 else "qmv"
        for name in (narrow, "qmv_wide") if M > 1 else (narrow,):
            yield Call("quantized_matmul", mlx_kernel(name, x, *gate), labels)
    # q, k and v with the columns of one matrix between them, in E2B's proportions but for rounding
    w, scales, biases = gate
    ends = (0, N // 2, 3 * N // 4, N)
    parts = [(w[i:j], scales[i:j], biases[i:j]) for i, j in pairwise(ends)]
    yield Call("quantized_matmuls", ops.quantized_matmuls(x, parts, GROUP_SIZE, BITS), labels)
    result = ops.quantized_gated_matmul(x, gate, up, GROUP_SIZE, BITS)
    yield Call("quantized_gated_matmul", result, labels)
    yield Call("dense_matmul", ops.dense_matmul(x, random(3, N, K)), labels)


def experts(M: int, N: int, K: int) -> Call:
    """The gated form; needed are the weights of the experts that some token uses."""
    draw = np.random.default_rng(M)
    ids = np.stack([np.sort(draw.permutation(EXPERTS)[:EXPERTS_USED]) for _ in range(M)])
    stack, up = (quantized(seed, EXPERTS, N, K) for seed in (1, 2))
    at = mx.array(ids.astype(np.int32))
    result = ops.quantized_expert_matmul(random(0, M, K), stack, at, GROUP_SIZE, BITS, up=up)
    labels = {"M": M, "N": N, "K": K}
    return Call("quantized_expert_matmul", result, labels, len(np.unique(ids)) / EXPERTS)


def mlx_kernel(
    name: str, x: mx.array, w: mx.array, scales: mx.array, biases: mx.array
) -> MlxKernel:
    """One of MLX's kernels as its own code starts it."""
    bench = workbench.load()
    (M, K), N = x.shape, w.shape[0]
    wide = name == "qmv_wide"
    arrays = {"w": w, "scales": scales, "biases": biases, "x": x}
    given = {name: workbench.to_numpy(a) for name, a in arrays.items()}
    sizes = [K, N, M] if wide else [K, N]
    launch = bench.Launch(
        library=str(Path(__file__).with_name("mlx_quantized.metal")),
        kernel=f"affine_{name}<bfloat, {GROUP_SIZE}, {BITS}, {'4, 8, ' if wide else ''}false>",
        constants={},
        grid=((M + 3) // 4 if wide else M, N // 8, 1),
        threadgroup=(32, 2, 1),
        buffers=[
            *(
                bench.Buffer(name, "in", a.shape, "uint32" if name == "w" else "bfloat16")
                for name, a in given.items()
            ),
            bench.Buffer("out", "out", (M, N), "bfloat16"),
            *(bench.Buffer("size", "bytes", data=size.to_bytes(4, "little")) for size in sizes),
            *[bench.Buffer("unused", "bytes", data=bytes(64))] * 8,
        ],
        threadgroup_memory=[],
    )
    return MlxKernel(launch, given)


def attention(
    geometries: Sequence[Geometry] = GEOMETRIES,
    rows: Sequence[int] = ROWS,
    length: int = LENGTH,
) -> Iterator[Call]:
    """Key heads are independent of each other, so one is counted, with its query heads."""
    for layer, G, D, window in geometries:
        for T in rows:
            seen = T + (length if window is None else min(length, window - 1))
            first, behind = (length + T - seen) // PAGE, (length + T - 1) // PAGE + 1
            N = behind - first
            shapes = ((T, G, D), (N, 1, PAGE, D), (N, 1, PAGE, D))
            draw = np.random.default_rng(T)
            q, keys, values = (bfloat16(draw.normal(size=shape)) for shape in shapes)
            table = np.zeros((1, N), np.int32)
            table[0, np.arange(first, behind) % N] = draw.permutation(N)
            where = mx.array([length]), mx.array(table), [T]
            result = ops.block_attention(q, keys, values, *where, window=window)
            labels = {"layer": layer, "D": D, "M": T, "rows": T * G, "keys": seen}
            yield Call("block_attention", result, labels, seen / (N * PAGE))


def layers(rows: Sequence[int] = LAYER_ROWS) -> Iterator[Call]:
    weight, next_weight = (random(i, WIDTH) for i in range(2))
    for T in rows:
        x, h, y = (random(i, T, WIDTH) for i in range(3))
        labels = {"M": T, "shape": f"{WIDTH}"}
        yield Call("rms_norm", ops.rms_norm(x, weight), labels)
        result = ops.residual_norm(
            h, y, weight, scalar=random(5, 1), next_weight=next_weight, eps=EPS
        )[0]
        yield Call("residual_norm", result, labels)
        for H, K, D in HEADS:
            yield from heads(T, H, K, D)
        gate, up = random(6, T * WIDTH), random(7, T * WIDTH)
        yield Call("glu", ops.glu(gate, up), labels)


def heads(T: int, H: int, K: int, D: int) -> Iterator[Call]:
    """A sequence per row, each with a page; copied is one page of two."""
    q, k, v = random(1, T, H * D), random(2, T, K * D), random(3, T, K * D)
    q_norm, k_norm = random(4, D), random(5, D)
    inv_freq = mx.array((1e4 ** (-2 * np.arange(D // 2) / D)).astype(np.float32))
    keys, values = random(6, T, K, PAGE, D), random(6, T, K, PAGE, D)
    positions, owners = 4000 + mx.arange(T), mx.arange(T)
    where = (keys, values, positions, owners, owners[:, None])
    result = ops.prepare_qkv(q, k, v, q_norm, k_norm, inv_freq, *where, eps=EPS)[0]
    yield Call("prepare_qkv", result, {"M": T, "shape": f"{H} + 2 * {K} of {D}"}, 1 / 64)
    result = ops.norm_rope(q.reshape(T, H, D), q_norm, positions, inv_freq, eps=EPS)
    yield Call("norm_rope", result, {"M": T, "shape": f"{H} of {D}"})
    if T == 1:
        result = ops.copy_pages(random(7, 2, K, PAGE, D), mx.array([1]), mx.array([0]))
        yield Call("copy_pages", result, {"M": 1, "shape": f"{K} of {D}"})


def rules(vocab: int = VOCAB, rows: Sequence[int] = ROWS) -> Iterator[Call]:
    """The vocabulary of the fused head is scaled down."""
    draw = np.random.default_rng(0)
    for T in rows:
        logits = mx.array(draw.normal(0, 4, (T, vocab)).astype(np.float32))
        result: Result = ops.filter_logits(logits, top_k=TOP_K, top_p=0.95)
        yield Call("filter_logits", result, {"M": T, "N": vocab})
    V = vocab // 32
    head = mx.quantize(bfloat16(draw.normal(size=(V, HEAD_WIDTH))), GROUP_SIZE, BITS)
    for T in rows:
        x = bfloat16(draw.normal(size=(T, HEAD_WIDTH)))
        yield Call("quantized_filter_logits", filtered(x, head), {"M": T, "N": V, "K": HEAD_WIDTH})
    k = DRAFTS
    ids_ = np.stack([draw.permutation(vocab)[:TOP_K] for _ in range(k + 1)])
    ids = mx.array(ids_.astype(np.int32))
    probs = mx.array(draw.dirichlet(np.full(TOP_K, 0.5), k + 1).astype(np.float32))
    at, seed, number = mx.array([7], mx.int32), mx.array([3], mx.uint32), mx.array([1], mx.int32)
    result = ops.draw_token(ids[:1], probs[:1], at, number, seed, mx.array([False]))
    yield Call("draw_token", result, {"M": 1, "N": TOP_K})
    drafts = mx.contiguous(ids[:k, 0])
    # `number` is the rule too: block
    rows = (ids, probs, ids[:k], probs[:k], drafts)
    result = ops.accept_block(*rows, at, seed, number, counts=(k + 1,), vocab=VOCAB)
    yield Call("accept_block", result, {"M": k + 1, "N": TOP_K})


def filtered(x: mx.array, head: Sequence[mx.array]) -> Sequence[mx.array]:
    w, scales, biases = head
    return ops.quantized_filter_logits(x, w, scales, biases, softcap=30.0, top_k=TOP_K, top_p=0.95)


def random(seed: int, *shape: int) -> mx.array:
    return bfloat16(np.random.default_rng(seed).normal(size=shape))


def bfloat16(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32)).astype(mx.bfloat16)


def quantized(seed: int, *shape: int) -> tuple[mx.array, mx.array, mx.array]:
    w, scales, biases = mx.quantize(random(seed, *shape), GROUP_SIZE, BITS)
    return w, scales, biases


Row = dict[str, Any]


class Table(NamedTuple):
    """Calls and how they are shown: heads of columns, and what stands in a row, between bars."""

    name: str
    heading: str
    heads: str
    cells: str
    calls: Callable[[], Iterator[Call]]


MATRICES_SHOWN = Table(
    "matrices",
    """# What the Metal kernels read and write

Made by `python bench/count.py > bench/KERNELS.md`, in the workbench: counts, no timings.
Bytes are those of sectors of 32 bytes. *By threadgroup*: the sectors that a threadgroup touches,
each once. *By load*: the sectors that one load of a simdgroup touches, summed over all loads, so
that no cache helps; given for our kernels, since MLX's load single bytes that a compiler may join.
bfloat16, 8 bits, groups of 64; N is scaled down; of expert stacks only the experts that some token
uses are needed. MLX's kernels come from the headers of the installed package.

* weights: packed weights by threadgroup, over those that are needed.
* w+s+b: weights, scales and biases together, likewise.
* by load: weights alone, then w+s+b, by load.
* all loads: every load, x with them, by load, over needed weights, scales and biases.
* total: all bytes read and written by threadgroup, over every input and output once.
""",
    "op | kernel | M | N | K | launches | weights | w+s+b | by load | all loads | total "
    "| threadgroup memory",
    "{op} | {kernel} | {M} | {N} | {K} | {launches} | {weight_ratio:.2f} | {matrix_ratio:.3f} "
    "| {weight_load_ratio:.2f}, {matrix_load_ratio:.3f} | {load_ratio:.2f} | {ratio:.2f} "
    "| {threadgroup_bytes}",
    matrices,
)
ATTENTION_SHOWN = Table(
    "attention",
    f"""
## Attention

Pieces behind {LENGTH} positions, bfloat16, one key head with the query heads that share it.
Keys + values, q: bytes by load over those of the visible keys and values. Between: bytes that one
launch leaves for the next, written and read, likewise. Total: as above, of visible keys and values.
""",
    "layer | D | T | rows | keys | launches | keys + values | q | between | total "
    "| threadgroup memory",
    "{layer} | {D} | {M} | {rows} | {keys} | {launches} | {kv_load_ratio:.3f} "
    "| {q_load_ratio:.2f} | {between_ratio:.2f} | {ratio:.2f} | {threadgroup_bytes}",
    attention,
)
LAYERS_SHOWN = Table(
    "layers",
    """
## Norms, heads and gates

Rows: bytes that all loads of the rows bring, over the bytes of the rows. Total: as above, and of
an arena only what is written; weights and frequencies are read by every threadgroup, which has one
row, or four heads.
""",
    "op | M | shape | launches | read | written | rows | total | threadgroup memory",
    "{op} | {M} | {shape} | {launches} | {read_bytes} | {written_bytes} | {row_ratio:.2f} "
    "| {ratio:.2f} | {threadgroup_bytes}",
    layers,
)
RULES_SHOWN = Table(
    "rules",
    f"""
## Sampling rules

{TOP_K} candidates a row. Logits: bytes of logits read over those there are. Between: bytes that one
launch leaves for the next, written and read. Total: as above.
""",
    "op | rows | n | launches | logits | between | total | threadgroup memory",
    "{op} | {M} | {N} | {launches} | {logits_ratio:.2f} | {between_bytes} | {ratio:.2f} "
    "| {threadgroup_bytes}",
    rules,
)
ROUND_SHOWN = Table(
    "round",
    f"""
## Launches of a round

A round of the embedded pair with {DRAFTS} drafts, sampled, rule `block`: how often each op is
called, and how many launches that is; operations of MLX's own are mostly one launch each.
""",
    "op | calls | launches",
    "{op} | {calls} | {launches}",
    lambda: iter(()),
)


def row(call: Call) -> Row:
    """The figures of a call."""
    made = count(call.result, call.needed)
    mlx = isinstance(call.result, MlxKernel)
    read, written, needed = (made.sum(what) for what in ("read", "written", "needed"))
    figures = {
        "op": call.op,
        "source": "mlx" if mlx else "ours",
        "kernel": made.kernel,
        **call.labels,
        "launches": made.launches,
        "read_bytes": read,
        "written_bytes": written,
        "compulsory_bytes": needed,
        "between_bytes": sum(b.moved for b in made.buffers.values() if not b.needed),
        "ratio": (read + written) / needed,
        "threadgroup_bytes": made.threadgroup_bytes,
    }
    for name, (what, names, over) in RATIOS.items():
        below = made.sum("needed", over)
        if below and not (mlx and what == "loaded"):
            figures[name] = made.sum(what, names) / below
    return figures


def count_table(table: Table, wanted: Sequence[str]) -> list[Row]:
    """The rows of the ops that are wanted, or all; each is told on standard error before it."""
    rows = []
    for call in table.calls():
        if not wanted or call.op in wanted:
            labels = ", ".join(f"{name} = {value}" for name, value in call.labels.items())
            print(f"{table.name}: {call.op}, {labels}", file=sys.stderr, flush=True)
            rows.append(row(call))
    return rows


# Nodes of MLX's graph that give an array another shape, or none at all, without work
_VIEWS = {"Broadcast", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze"}
_VIEWS |= {"Transpose", "Unflatten", "View"}


def count_round(drafts: int = DRAFTS, sampling: Sampling | None = None) -> list[Row]:
    """Calls of each op in one round of the embedded pair, read off its recorded graph.

    The last row, "MLX", is of all operations of MLX's own that do work: their launches are None.
    """
    pair = embedded_pair()
    played: list[Recorded[..., Any]] = []

    def record(function: Callable[..., Any]) -> Recorded[..., Any]:
        played.append(Recorded(function))
        return played[-1]

    with mock.patch.object(on_device, "recorded", record):
        rounds = loop.decode(
            pair.target,
            new_drafter("assistant", pair.target, pair.assistant),
            [5, 6, 7, 8],
            sampling=sampling or Sampling(verify="block", seed=0),
            block_size=drafts + 1,
            max_tokens=drafts + 3,
        )
        next(rounds)  # the prefill
        next(rounds)
        rounds.close()
    calls: Counter[str] = Counter()
    for name, number in Counter(node.split()[0] for node in played[0].nodes).items():
        if name not in _VIEWS:
            calls[name if hasattr(ops, name) else "MLX"] += number
    one, page = mx.zeros((1, 1, 16)), mx.zeros((1, 1, PAGE, 16))
    x, w = (mx.zeros((rows, HEAD_WIDTH), mx.bfloat16) for rows in (1, VOCAB))
    several: dict[str, mx.array | Sequence[mx.array]] = {
        "block_attention": ops.block_attention(
            one, page, page, mx.array([0]), mx.array([[0]]), [1]
        ),
        "filter_logits": ops.filter_logits(mx.zeros((1, VOCAB)), top_k=TOP_K),
        "quantized_filter_logits": filtered(x, mx.quantize(w, GROUP_SIZE, BITS)),
    }
    each = {op: len(launches_of(result)[0]) for op, result in several.items()}
    return [
        {
            "op": op,
            "source": "round",
            "calls": number,
            "launches": None if op == "MLX" else number * each.get(op, 1),
        }
        for op, number in sorted(calls.items(), key=lambda item: (item[0] == "MLX", item[0]))
    ]


def markdown(table: Table, rows: Sequence[Row]) -> str:
    """A table under its heading."""
    heads = table.heads.split(" | ")
    aligned = ("---" if head in ("op", "kernel", "layer") else "--:" for head in heads)
    if table is MATRICES_SHOWN:  # the rest is for the table of every number of rows
        rows = [r for r in rows if r["M"] in ROWS]
    lines = [table.heading, line(heads), line(aligned)]
    return "\n".join([*lines, *(line(shown(table, r)) for r in rows)])


def shown(table: Table, figures: Row) -> Iterator[str]:
    """The cells of a row; one is empty if the row lacks its figure."""
    values = {name: "MLX" if value is None else value for name, value in figures.items()}
    if "kernel" in values:
        name, mark = values["kernel"].partition("<")[0], " (MLX)" * (values["source"] == "mlx")
        values["kernel"] = f"`{name}`{mark}"
    for cell in table.cells.split(" | "):
        lacking = set(re.findall(r"{(\w+)", cell)) - set(values)
        yield "" if lacking else cell.format_map(values)


def every_row(rows: Sequence[Row]) -> str:
    """Our kernels at every number of rows, of the widths that have them."""
    form = "{weight_load_ratio:.2f}, {matrix_load_ratio:.3f}, {ratio:.2f}"
    found = {
        (r["op"], r["M"]): form.format_map(r)
        for r in rows
        if r["source"] == "ours" and r["K"] in (EVERY_ROW_WIDTH, EXPERT_WIDTH)
    }
    names = list(dict.fromkeys(op for op, _ in found))
    lines = [line(["M", *names]), line(["--:"] * (1 + len(names)))]
    for M in sorted({M for _, M in found}):
        lines.append(line([str(M), *(found.get((op, M), "") for op in names)]))
    heading = (
        f"\nOur kernels at every number of rows, K = {EVERY_ROW_WIDTH} (experts {EXPERT_WIDTH}): "
        "weights and w+s+b by load, total.\n"
    )
    return "\n".join([heading, *lines])


def line(parts: Iterable[str]) -> str:
    return f"| {' | '.join(parts)} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", default=[], metavar="OP", help="count these alone")
    parser.add_argument("--json", action="store_true", help="print the rows as a JSON list")
    options = parser.parse_args(arguments)
    for op in options.ops:
        if op not in ops.__all__:
            parser.error(f"--ops must name ops but got {op}.")
    tables = (MATRICES_SHOWN, ATTENTION_SHOWN, LAYERS_SHOWN, RULES_SHOWN)
    made = [(table, count_table(table, options.ops)) for table in tables]
    launches = [r for r in count_round() if not options.ops or r["op"] in options.ops]
    made.append((ROUND_SHOWN, launches))
    if options.json:
        print(json.dumps([r for _, rows in made for r in rows]))
        return
    for table, rows in made:
        if rows:
            print(markdown(table, rows))
            if table is MATRICES_SHOWN:
                print(every_row(rows))


if __name__ == "__main__":
    main()
