"""What the Metal kernels between the matmuls move: norms, heads, gates. Counted as in
``kernel_counts``, no timing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from pyengine import _ext, ops
from pyengine.kernel_counts import OnCount, launch_of
from pyengine.ops import workbench

# 31B: the stream's width; queries and keys, and their width, of sliding and of full layers
WIDTH = 5376
HEADS = ((32, 16, 256), (32, 4, 512))
ROWS = (1, 6)
EPS = 1e-6
_SECTOR = 32


@dataclass(frozen=True)
class LayerCount:
    """One op at one shape.

    Attributes:
        M: Rows, or positions.
        shape: Width, or heads and their width.
        read_bytes, written_bytes: Device memory touched, by threadgroup.
        compulsory_bytes: Every input and output once; of a cache what is written.
        ratio: Bytes read and written over the compulsory ones.
        row_ratio: Bytes that all loads of the rows bring, over the bytes of the rows: 1 if each is
            loaded once. Weights and frequencies, which all rows share, are no rows.
        threadgroup_bytes: Threadgroup memory of a threadgroup.
    """

    op: str
    kernel: str
    source: str
    M: int
    shape: str
    dtype: str
    launches: int
    read_bytes: int
    written_bytes: int
    compulsory_bytes: int
    ratio: float
    row_ratio: float
    threadgroup_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def count_layers(
    rows: Sequence[int] = ROWS, *, on_count: OnCount = lambda done, total, label: None
) -> Iterator[LayerCount]:
    """Count every op at each number of rows.

    Raises:
        RuntimeError: There is no checkout, or no compiler.
    """
    E = WIDTH
    shared = {name: _random(i, E) for i, name in enumerate(("weight", "next_weight"))}
    for done, T in enumerate(rows):
        on_count(done, len(rows), f"T = {T}")
        streams = {name: _random(i, T, E) for i, name in enumerate(("x", "h", "y"))}
        arrays = {**streams, **shared, "scalar": _random(5, 1)}
        launch = launch_of(ops.rms_norm(streams["x"], shared["weight"]))
        yield _count("rms_norm", launch, arrays, {"x"}, T, f"{E}")
        branch = {name: arrays[name] for name in ("h", "y", "weight", "scalar", "next_weight")}
        launch = launch_of(ops.residual_norm(**branch, eps=EPS)[0])
        yield _count("residual_norm", launch, arrays, {"h", "y"}, T, f"{E}")
        for H, K, D in HEADS:
            yield from _heads(T, H, K, D)
        gates = {"gate": _random(6, T * E), "up": _random(7, T * E)}
        launch = launch_of(ops.geglu(**gates))
        yield _count("geglu", launch, gates, set(gates), T, f"{E}")


def _heads(T: int, H: int, K: int, D: int) -> Iterator[LayerCount]:
    """The cache has as many slots as the call has positions: all of it is written."""
    parts = {"q": _random(1, T, H * D), "k": _random(2, T, K * D), "v": _random(3, T, K * D)}
    shared = {
        "q_norm": _random(4, D),
        "k_norm": _random(5, D),
        "inv_freq": mx.array((1e4 ** (-2 * np.arange(D // 2) / D)).astype(np.float32)),
        "offset": mx.array(4000),
    }
    cache = {name: _random(6, 1, K, T, D) for name in ("keys", "values")}
    arrays = {**parts, **shared, **cache}
    launch = launch_of(ops.prepare_qkv(**arrays, eps=EPS)[0])
    yield _count("prepare_qkv", launch, arrays, set(parts), T, f"{H} + 2 * {K} of {D}")
    arrays = {"x": parts["q"].reshape(1, T, H, D), "weight": shared["q_norm"], **shared}
    one = {name: arrays[name] for name in ("x", "weight", "offset", "inv_freq")}
    launch = launch_of(ops.norm_rope(**one, eps=EPS))
    yield _count("norm_rope", launch, arrays, {"x"}, T, f"{H} of {D}")
    arrays = {"new": _random(7, 1, T, K, D), "cache": cache["keys"], "offset": shared["offset"]}
    launch = launch_of(ops.write_cache(**arrays))
    yield _count("write_cache", launch, arrays, {"new"}, T, f"{K} of {D}")


def _count(
    op: str,
    launch: _ext.Launch,
    arrays: dict[str, mx.array],
    rows: set[str],
    M: int,
    shape: str,
) -> LayerCount:
    given = {name: workbench.to_numpy(a) for name, a in arrays.items()}
    _, report = workbench.load().run(launch, given, mode="count")
    touched = {b.name: report.traffic[b.name] for b in launch.buffers if b.role != "bytes"}
    read = _SECTOR * sum(entry.group_read_sectors for entry in touched.values())
    written = _SECTOR * sum(entry.group_written_sectors for entry in touched.values())
    compulsory = sum(entry.size for entry in touched.values())
    return LayerCount(
        op=op,
        kernel=launch.kernel,
        source="ours",
        M=M,
        shape=shape,
        dtype="bfloat16",
        launches=report.launches,
        read_bytes=read,
        written_bytes=written,
        compulsory_bytes=compulsory,
        ratio=(read + written) / compulsory,
        row_ratio=sum(touched[name].device_read_bytes for name in rows)
        / sum(touched[name].size for name in rows),
        threadgroup_bytes=report.threadgroup_bytes,
    )


def _random(seed: int, *shape: int) -> mx.array:
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return mx.array(values).astype(mx.bfloat16)


_HEADING = """
## Norms, heads and gates

Rows: bytes that all loads of the rows bring, over the bytes of the rows. Total: as above, and of
a cache only what is written; weights and frequencies are read by every threadgroup, which has one
row, or four heads.
"""


def markdown(counts: Sequence[LayerCount]) -> str:
    """The table, to stand below those of ``kernel_counts``."""
    lines = [
        _HEADING,
        "| op | M | shape | launches | read | written | rows | total | threadgroup memory |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for c in counts:
        lines.append(
            f"| {c.op} | {c.M} | {c.shape} | {c.launches} | {c.read_bytes} | {c.written_bytes} "
            f"| {c.row_ratio:.2f} | {c.ratio:.2f} | {c.threadgroup_bytes} |"
        )
    return "\n".join(lines)
