"""What the Metal kernels load and store, counted in the workbench beside MLX's own: no timing.

Bytes are those of sectors of 32 bytes, in one of two ways. By load: the sectors that one load of a
simdgroup touches, summed over all loads; no cache helps. By threadgroup: the sectors that a
threadgroup touches, each once: what has to come to a core if its cache keeps all that the
threadgroup needs, and no core helps another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from pyengine import _ext, ops
from pyengine.ops import workbench

# Widths of 31B, 12B and E2B, each with that of its feed-forward layer; N is scaled down, which
# leaves every ratio as it is.
MODEL_WIDTHS = (5376, 3840, 1536)
WIDTHS = tuple(K for E in MODEL_WIDTHS for K in (E, 4 * E))
COLUMNS = 128
ROWS = (1, 6, 16)
# The width that is counted at every number of rows: its rows of factors are the shortest, so the
# most sectors belong to two of them.
EVERY_ROW_WIDTH = 1536
EVERY_ROW = tuple(range(1, 17))
# An expert layer of 26B-A4B, likewise: of 16 experts here each token uses 8.
EXPERTS, EXPERTS_USED, EXPERT_WIDTH = 16, 8, 2816
GROUP_SIZE, BITS = 64, 8
_SECTOR = 32

OnCount = Callable[[int, int, str], None]  # steps done, steps in all, and what comes next


@dataclass(frozen=True)
class Count:
    """One kernel at one shape.

    Attributes:
        source: "ours" or "mlx".
        read_bytes, written_bytes: Device memory touched, by threadgroup.
        compulsory_bytes: Every input and output once.
        weight_ratio: Bytes of packed weights by threadgroup, over those that are needed.
        matrix_ratio: The same of weights, scales and biases together.
        ratio: Bytes read and written, by threadgroup, over the compulsory ones.
        weight_load_ratio, matrix_load_ratio: Like their namesakes, but by load.
        load_ratio: Bytes of all loads, x with them, by load, over those of the matrices needed.
        threadgroup_bytes: Threadgroup memory of a threadgroup.
    """

    op: str
    kernel: str
    source: str
    M: int
    N: int
    K: int
    dtype: str
    launches: int
    read_bytes: int
    written_bytes: int
    compulsory_bytes: int
    weight_ratio: float
    matrix_ratio: float
    ratio: float
    weight_load_ratio: float
    matrix_load_ratio: float
    load_ratio: float
    threadgroup_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def count_kernels(
    widths: Sequence[int] = WIDTHS,
    rows: Sequence[int] = ROWS,
    columns: int = COLUMNS,
    *,
    every_row_width: int | None = EVERY_ROW_WIDTH,
    expert_width: int | None = EXPERT_WIDTH,
    on_count: OnCount = lambda done, total, label: None,
) -> Iterator[Count]:
    """Count every kernel at every width and number of rows; ours at `every_row_width`, and the
    experts, for 1 to 16 rows.

    Runs each of them, which takes a while.

    Raises:
        RuntimeError: There is no checkout, or no compiler.
    """
    steps = [(K, M) for K in widths for M in (EVERY_ROW if every_row_width == K else rows)]
    expert_rows = EVERY_ROW if expert_width is not None else ()
    total = len(steps) + len(expert_rows)
    for done, (K, M) in enumerate(steps):
        on_count(done, total, f"matrices, K = {K}, M = {M}")
        # MLX's kernels load byte by byte: counting their longest rows would take minutes
        mlx = M in rows and K // 4 not in MODEL_WIDTHS
        yield from _matmuls(M, columns, K, mlx=mlx)
    for done, M in enumerate(expert_rows, len(steps)):
        assert expert_width is not None
        on_count(done, total, f"experts, K = {expert_width}, M = {M}")
        yield _experts(M, columns // 2, expert_width)


def _matmuls(M: int, N: int, K: int, *, mlx: bool) -> Iterator[Count]:
    x = _random(0, M, K)
    names = ("w", "scales", "biases")
    gate, up = (dict(zip(names, _quantized(seed, N, K), strict=True)) for seed in (1, 2))
    result = ops.quantized_matmul(x, gate["w"], gate["scales"], gate["biases"], GROUP_SIZE, BITS)
    launch = launch_of(result)
    yield _count("quantized_matmul", launch, {"x": x, **gate}, {"w"}, M, N, K)
    # As MLX chooses them: qmv_fast where a simdgroup's steps divide K
    narrow = "qmv_fast" if K % 512 == 0 else "qmv"
    for name in ((narrow, "qmv_wide") if M > 1 else (narrow,)) if mlx else ():
        launch = _mlx_launch(name, M, N, K)
        yield _count("quantized_matmul", launch, {"x": x, **gate}, {"w"}, M, N, K, source="mlx")
    # q, k and v with the columns of one matrix between them, in E2B's proportions but for rounding
    shared, matrices, begin = {"x": x}, [], 0
    parts = {"first_": N // 2, "second_": N // 4, "third_": N // 4}
    for side, part in parts.items():
        w, scales, biases = (a[begin : begin + part] for a in gate.values())
        matrices.append((w, scales, biases))
        shared |= {side + name: a for name, a in zip(names, matrices[-1], strict=True)}
        begin += part
    launch = launch_of(ops.quantized_matmuls(x, matrices, GROUP_SIZE, BITS))
    yield _count("quantized_matmuls", launch, shared, {side + "w" for side in parts}, M, N, K)
    pair = {
        f"{side}_{name}": a for side, q in (("gate", gate), ("up", up)) for name, a in q.items()
    }
    first, second = ((q["w"], q["scales"], q["biases"]) for q in (gate, up))
    launch = launch_of(ops.quantized_gated_matmul(x, first, second, GROUP_SIZE, BITS))
    yield _count("quantized_gated_matmul", launch, {"x": x, **pair}, {"gate_w", "up_w"}, M, N, K)
    w = _random(3, N, K)
    launch = launch_of(ops.dense_matmul(x, w))
    yield _count("dense_matmul", launch, {"x": x, "w": w}, {"w"}, M, N, K)


def launch_of(result: mx.array | list[mx.array]) -> _ext.Launch:
    """The one launch that a lazy result of an op takes, or several of them."""
    launches, _ = _ext.launches_of(result)
    assert launches is not None and len(launches) == 1
    return launches[0]


def _experts(M: int, N: int, K: int) -> Count:
    """The gated form; compulsory are the weights of the experts that some token uses."""
    draw = np.random.default_rng(M)
    ids = np.stack([np.sort(draw.permutation(EXPERTS)[:EXPERTS_USED]) for _ in range(M)])
    arrays = {"x": _random(0, M, K), "ids": mx.array(ids.astype(np.int32))}
    stacks = []
    for prefix, seed in (("", 1), ("up_", 2)):
        w, scales, biases = (a.reshape(EXPERTS, N, -1) for a in _quantized(seed, EXPERTS * N, K))
        stacks.append((w, scales, biases))
        arrays |= {prefix + "w": w, prefix + "scales": scales, prefix + "biases": biases}
    launch = launch_of(
        ops.quantized_expert_matmul(
            arrays["x"], stacks[0], arrays["ids"], GROUP_SIZE, BITS, up=stacks[1]
        )
    )
    touched = len(np.unique(ids)) / EXPERTS
    return _count(
        "quantized_expert_matmul", launch, arrays, {"w", "up_w"}, M, N, K, touched=touched
    )


def _count(
    op: str,
    launch: Any,
    arrays: dict[str, mx.array],
    weights: set[str],
    M: int,
    N: int,
    K: int,
    *,
    source: str = "ours",
    touched: float = 1.0,
) -> Count:
    """Run one launch in count mode; `touched` is the part of the matrices that is needed."""
    _, report = workbench.load().run(
        launch,
        {name: workbench.to_numpy(a) for name, a in arrays.items()},
        mode="count",
        include=[Path(mx.__file__).parent / "include"],
    )
    traffic = report.traffic
    # dense_matmul has no factors
    matrices = [
        name
        for w in weights
        for name in (w, w[:-1] + "scales", w[:-1] + "biases")
        if name in arrays
    ]
    outs = [name for name, entry in traffic.items() if entry.writes]
    stored = {name: a.nbytes for name, a in arrays.items()}
    stored |= {name: round(stored[name] * touched) for name in matrices}
    written = _SECTOR * sum(traffic[name].group_written_sectors for name in outs)
    compulsory = sum(stored.values()) + sum(traffic[name].size for name in outs)
    by_group = {name: _SECTOR * traffic[name].group_read_sectors for name in arrays}
    by_load = {name: traffic[name].device_read_bytes for name in arrays}

    def ratio(bytes_: dict[str, int], names: Iterable[str]) -> float:
        return sum(bytes_[name] for name in names) / sum(stored[name] for name in names)

    return Count(
        op=op,
        kernel=launch.kernel,
        source=source,
        M=M,
        N=N,
        K=K,
        dtype="bfloat16",
        launches=report.launches,
        read_bytes=sum(by_group.values()),
        written_bytes=written,
        compulsory_bytes=compulsory,
        weight_ratio=ratio(by_group, weights),
        matrix_ratio=ratio(by_group, matrices),
        ratio=(sum(by_group.values()) + written) / compulsory,
        weight_load_ratio=ratio(by_load, weights),
        matrix_load_ratio=ratio(by_load, matrices),
        load_ratio=sum(by_load.values()) / sum(stored[name] for name in matrices),
        threadgroup_bytes=report.threadgroup_bytes,
    )


def _mlx_launch(name: str, M: int, N: int, K: int) -> Any:
    """One of MLX's kernels as its own code starts it."""
    bench = workbench.load()
    wide = name == "qmv_wide"
    kernel = f"affine_{name}<bfloat, {GROUP_SIZE}, {BITS}, {'4, 8, ' if wide else ''}false>"

    def array(name: str, role: str, *shape: int, dtype: str = "bfloat16") -> Any:
        return bench.Buffer(name, role, shape, dtype)

    sizes = [K, N, M] if wide else [K, N]
    return bench.Launch(
        library=str(_checkout() / "bench" / "mlx_quantized.metal"),
        kernel=kernel,
        constants={},
        grid=((M + 3) // 4 if wide else M, N // 8, 1),
        threadgroup=(32, 2, 1),
        buffers=[
            array("w", "in", N, K * BITS // 32, dtype="uint32"),
            array("scales", "in", N, K // GROUP_SIZE),
            array("biases", "in", N, K // GROUP_SIZE),
            array("x", "in", M, K),
            array("out", "out", M, N),
            *(bench.Buffer("size", "bytes", data=size.to_bytes(4, "little")) for size in sizes),
            *[bench.Buffer("unused", "bytes", data=bytes(64))] * 8,
        ],
        threadgroup_memory=[],
    )


def _random(seed: int, *shape: int) -> mx.array:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return mx.array(values).astype(mx.bfloat16)


def _quantized(seed: int, N: int, K: int) -> tuple[mx.array, mx.array, mx.array]:
    w, scales, biases = mx.quantize(_random(seed, N, K), GROUP_SIZE, BITS)
    return w, scales, biases


_HEADING = """# What the Metal kernels read and write

Made by `pyengine bench kernels --count > bench/KERNELS.md`, in the workbench: counts, no timings.
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
"""


def markdown(counts: Sequence[Count]) -> str:
    """The counts as a page."""
    lines = [
        _HEADING,
        "| op | kernel | M | N | K | launches | weights | w+s+b | by load | all loads | total "
        "| threadgroup memory |",
        "| --- | --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for c in counts:
        if c.M not in ROWS:
            continue
        ours = c.source == "ours"
        kernel = f"`{c.kernel.partition('<')[0]}`" + ("" if ours else " (MLX)")
        by_load = f"{c.weight_load_ratio:.2f}, {c.matrix_load_ratio:.3f} | {c.load_ratio:.2f}"
        lines.append(
            f"| {c.op} | {kernel} | {c.M} | {c.N} | {c.K} | {c.launches} | {c.weight_ratio:.2f} "
            f"| {c.matrix_ratio:.3f} | {by_load if ours else '|'} | {c.ratio:.2f} "
            f"| {c.threadgroup_bytes} |"
        )
    every = [c for c in counts if c.source == "ours" and c.K in (EVERY_ROW_WIDTH, EXPERT_WIDTH)]
    if every:
        ops = list(dict.fromkeys(c.op for c in every))
        cells = {
            (c.op, c.M): f"{c.weight_load_ratio:.2f}, {c.matrix_load_ratio:.3f}, {c.ratio:.2f}"
            for c in every
        }
        lines += [
            "",
            f"Our kernels at every number of rows, K = {EVERY_ROW_WIDTH} (experts "
            f"{EXPERT_WIDTH}): weights and w+s+b by load, total.",
            "",
            f"| M | {' | '.join(ops)} |",
            f"| --: |{' --: |' * len(ops)}",
        ]
        for M in sorted({c.M for c in every}):
            lines.append(f"| {M} | {' | '.join(cells.get((op, M), '') for op in ops)} |")
    return "\n".join(lines)


def _checkout() -> Path:
    return Path(workbench.load().__file__).parents[1]
