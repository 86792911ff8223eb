"""What the Metal kernels of block_attention move, at the head geometries of Gemma 4: no timing.

Bytes are counted as in ``kernel_counts``. Key heads are independent of each other, so one is
counted, with the query heads that share it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from pyengine import _ext, ops
from pyengine.kernel_counts import OnCount
from pyengine.ops import workbench

ROWS = (1, 6, 16)
BLOCK = 16  # positions that a ring has room for beside its window
_SECTOR = 32


@dataclass(frozen=True)
class Geometry:
    """Heads of a kind of layer: H / K query heads a key head, head width, sliding window."""

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
OFFSET = 1500


@dataclass(frozen=True)
class AttentionCount:
    """One geometry at one number of positions.

    Attributes:
        layer: The geometry's name.
        M: Positions of the block.
        rows: Rows that share a key head.
        keys: Positions that some row sees.
        launches: How many kernels run, one after the other.
        read_bytes, written_bytes: Device memory touched, by threadgroup, all launches together.
        compulsory_bytes: Visible keys and values, q and out, each once.
        kv_load_ratio: Bytes of keys and values by load, over those that are visible.
        q_load_ratio: Bytes of q by load, over the same.
        between_ratio: Written by one launch and read by the next, both counted, over the same.
        ratio: Bytes read and written over the compulsory ones.
        threadgroup_bytes: The largest threadgroup memory of a threadgroup.
    """

    op: str
    source: str
    layer: str
    M: int
    rows: int
    D: int
    keys: int
    dtype: str
    launches: int
    read_bytes: int
    written_bytes: int
    compulsory_bytes: int
    kv_load_ratio: float
    q_load_ratio: float
    between_ratio: float
    ratio: float
    threadgroup_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def count_attention(
    geometries: Sequence[Geometry] = GEOMETRIES,
    rows: Sequence[int] = ROWS,
    offset: int = OFFSET,
    *,
    on_count: OnCount = lambda done, total, label: None,
) -> Iterator[AttentionCount]:
    """Count each geometry for blocks of each number of positions, the first of them at `offset`.

    Raises:
        RuntimeError: There is no checkout, or no compiler.
    """
    steps = [(geometry, T) for geometry in geometries for T in rows]
    for done, (geometry, T) in enumerate(steps):
        on_count(done, len(steps), f"{geometry.name}, T = {T}")
        yield _count(geometry, T, offset)


def _count(geometry: Geometry, T: int, offset: int) -> AttentionCount:
    G, D, window = geometry.group, geometry.D, geometry.window
    C = offset + BLOCK if window is None else window - 1 + BLOCK
    keys = offset + T if window is None else min(offset, window - 1) + T
    draw = np.random.default_rng(T)
    shapes = {"q": (1, T, G, D), "k": (1, 1, C, D), "v": (1, 1, C, D)}
    given = {"offset": mx.array(offset)}
    for name, shape in shapes.items():
        given[name] = mx.array(draw.normal(size=shape).astype(np.float32)).astype(mx.bfloat16)
    launches, _ = _ext.launches_of(
        ops.block_attention(**given, scale=1.0, window=window, start=None)
    )
    arrays = {name: workbench.to_numpy(a) for name, a in given.items()}
    # Room for spans that this offset does not need stays as it is
    _, report = workbench.load().run(launches, arrays, mode="count", allow={"unwritten-output"})
    traffic = {name: entry for name, entry in report.traffic.items() if name != "params"}
    read = {name: _SECTOR * entry.group_read_sectors for name, entry in traffic.items()}
    written = {name: _SECTOR * entry.group_written_sectors for name, entry in traffic.items()}
    between = ("scores", "values", "states")
    visible = 2 * keys * D * 2
    compulsory = visible + traffic["q"].size + traffic["out"].size
    return AttentionCount(
        op="block_attention",
        source="ours",
        layer=geometry.name,
        M=T,
        rows=T * G,
        D=D,
        keys=keys,
        dtype="bfloat16",
        launches=report.launches,
        read_bytes=sum(read.values()),
        written_bytes=sum(written.values()),
        compulsory_bytes=compulsory,
        kv_load_ratio=sum(traffic[name].device_read_bytes for name in "kv") / visible,
        q_load_ratio=traffic["q"].device_read_bytes / visible,
        between_ratio=sum(read[name] + written[name] for name in between) / visible,
        ratio=(sum(read.values()) + sum(written.values())) / compulsory,
        threadgroup_bytes=report.threadgroup_bytes,
    )


_HEADING = """
## Attention

Blocks at position {offset} of a cache, bfloat16, one key head with the query heads that share it.
Keys + values, q: bytes by load over those of the visible keys and values. Between: bytes that one
launch leaves for the next, written and read, likewise. Total: as above, of visible keys and values.
"""


def markdown(counts: Sequence[AttentionCount]) -> str:
    """The table, to stand below those of ``kernel_counts``."""
    lines = [
        _HEADING.format(offset=OFFSET),
        "| layer | D | T | rows | keys | launches | keys + values | q | between | total "
        "| threadgroup memory |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for c in counts:
        lines.append(
            f"| {c.layer} | {c.D} | {c.M} | {c.rows} | {c.keys} | {c.launches} "
            f"| {c.kv_load_ratio:.3f} | {c.q_load_ratio:.2f} | {c.between_ratio:.2f} "
            f"| {c.ratio:.2f} | {c.threadgroup_bytes} |"
        )
    return "\n".join(lines)
