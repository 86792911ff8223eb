"""What the Metal kernels load and store, counted in the workbench beside MLX's own: no timing.

Prints bench/KERNELS.md, whose text says what each figure is; progress goes to standard error. A
whole run takes minutes.

Run: python bench/count.py [--ops rms_norm glu] [--json]
"""

import argparse
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mlx.core as mx
from sized_calls import (
    COLUMNS,
    DRAFTS,
    EVERY_ROW,
    EVERY_ROW_WIDTH,
    EXPERT_WIDTH,
    GEOMETRIES,
    LAYER_ROWS,
    LENGTH,
    ROWS,
    TOP_K,
    VOCAB,
    WIDTHS,
    Call,
    Geometry,
    MlxKernel,
    Result,
)

from pyengine import _ext, ops
from pyengine.drafters import new_drafter
from pyengine.engine import loop
from pyengine.engine import round as on_device
from pyengine.ops import workbench
from pyengine.ops.recorded import Recorded
from pyengine.sampling.settings import Sampling
from pyengine.task import embedded_pair

SECTOR = 32
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


def benches(table: str) -> Iterator[Any]:
    """The ops' benches that have calls for a table."""
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        bench = importlib.import_module(path.stem)
        if getattr(bench, "TABLE", None) == table:
            yield bench


def matrices() -> Iterator[Call]:
    for K in WIDTHS:
        for M in EVERY_ROW if K == EVERY_ROW_WIDTH else ROWS:
            yield from matmuls(M, COLUMNS, K)
    for M in EVERY_ROW:
        yield from experts(M, COLUMNS // 2, EXPERT_WIDTH)


def matmuls(M: int, N: int, K: int) -> Iterator[Call]:
    for bench in benches("matrices"):
        yield from bench.counted(M, N, K)


def experts(M: int, N: int, K: int) -> Iterator[Call]:
    for bench in benches("experts"):
        yield from bench.counted(M, N, K)


def attention(
    geometries: Sequence[Geometry] = GEOMETRIES,
    rows: Sequence[int] = ROWS,
    length: int = LENGTH,
) -> Iterator[Call]:
    for bench in benches("attention"):
        yield from bench.counted(geometries, rows, length)


def layers(rows: Sequence[int] = LAYER_ROWS) -> Iterator[Call]:
    for T in rows:
        for bench in benches("layers"):
            yield from bench.counted(T)


def rules(vocab: int = VOCAB, rows: Sequence[int] = ROWS) -> Iterator[Call]:
    for bench in benches("rules"):
        yield from bench.counted(rows, vocab)


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
    several = *attention(rows=(1,)), *rules(rows=(1,))  # all others are one launch
    each = {call.op: len(launches_of(call.result)[0]) for call in several}
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
