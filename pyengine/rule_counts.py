"""What the Metal kernels of the sampling rules move, and the launches of one round: no timing.

Bytes are counted as in ``kernel_counts``. Launches are those of a real round of the embedded pair,
read off its recorded graph.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np

from pyengine import _ext, ops
from pyengine.drafters import new_drafter
from pyengine.engine import loop
from pyengine.engine import round as on_device
from pyengine.engine.recorded import Recorded
from pyengine.generation import embedded_pair
from pyengine.kernel_counts import OnCount
from pyengine.ops import dispatch, workbench
from pyengine.sampling.settings import Sampling

VOCAB, TOP_K = 262144, 64
WIDTH = 1536  # of E2B
ROWS = (1, 6, 16)
DRAFTS = 5
_SECTOR = 32

# Nodes of MLX's graph that give an array another shape, or none at all, without work
_VIEWS = {"Broadcast", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze"}
_VIEWS |= {"Transpose", "Unflatten", "View"}


@dataclass(frozen=True)
class RuleCount:
    """One op at one shape.

    Attributes:
        kernel: That of the first launch.
        M: Rows.
        N: Logits of a row, or candidates.
        K: Width of a fused head; None elsewhere.
        launches: How many kernels run, one after the other.
        read_bytes, written_bytes: Device memory touched, by threadgroup, lists in between too.
        compulsory_bytes: Every input and output once.
        weight_ratio: As in ``kernel_counts``; None where there are no weights.
        logits_ratio: Bytes of logits read over those there are; None where there are none.
        between_bytes: Written by one launch and read by the next, both counted.
        ratio: Bytes read and written over the compulsory ones.
        threadgroup_bytes: The largest threadgroup memory of a threadgroup.
    """

    op: str
    kernel: str
    source: str
    M: int
    N: int
    K: int | None
    dtype: str
    launches: int
    read_bytes: int
    written_bytes: int
    compulsory_bytes: int
    weight_ratio: float | None
    logits_ratio: float | None
    between_bytes: int
    ratio: float
    threadgroup_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class RoundCount:
    """One op of a round.

    Attributes:
        op: One of ours, or "MLX" for all operations of MLX's own that do work.
        calls: How often the round has it.
        launches: Launches of our Metal kernels; None for MLX's own.
    """

    op: str
    calls: int
    launches: int | None

    def to_dict(self) -> dict[str, Any]:
        return {"source": "round", **asdict(self)}


def count_rules(
    vocab: int = VOCAB,
    rows: Sequence[int] = ROWS,
    *,
    on_count: OnCount = lambda done, total, label: None,
) -> Iterator[RuleCount]:
    """Count filter_logits at each number of rows, then quantized_filter_logits, of a vocabulary
    scaled down, then draw_token and accept_block.

    Raises:
        RuntimeError: There is no checkout, or no compiler.
    """
    draw, total = np.random.default_rng(0), 2 * len(rows)
    for done, T in enumerate(rows):
        on_count(done, total, f"logits, T = {T}")
        logits = draw.normal(0, 4, (T, vocab)).astype(np.float32)
        launches = _launches(ops.filter_logits(mx.array(logits), top_k=TOP_K, top_p=0.95))
        yield _count("filter_logits", launches, {"logits": logits}, T, vocab)

    V = vocab // 32
    values = mx.array(draw.normal(size=(V, WIDTH)).astype(np.float32)).astype(mx.bfloat16)
    head = dict(zip(("w", "scales", "biases"), mx.quantize(values, 64, 8), strict=True))
    for done, T in enumerate(rows, len(rows)):
        on_count(done, total, f"head, T = {T}")
        x = mx.array(draw.normal(size=(T, WIDTH)).astype(np.float32)).astype(mx.bfloat16)
        arrays = {name: workbench.to_numpy(a) for name, a in {"x": x, **head}.items()}
        yield _count("quantized_filter_logits", _head_launches(T, V), arrays, T, V)

    k = DRAFTS
    ids = np.stack([draw.permutation(vocab)[:TOP_K] for _ in range(k + 1)]).astype(np.int32)
    probs = draw.dirichlet(np.full(TOP_K, 0.5), k + 1).astype(np.float32)
    at = {"position": np.array(7, np.int32), "seed": np.array(3, np.uint32)}
    row = {"ids": ids[:1], "probs": probs[:1], **at}
    launches = _launches([ops.draw_token(*map(mx.array, row.values()), shared=False)])
    yield _count("draw_token", launches, row, 1, TOP_K)
    tables = {"p_ids": ids, "p_probs": probs, "q_ids": ids[:k], "q_probs": probs[:k]}
    block = {**tables, "drafts": ids[:k, 0].copy(), **at}
    drawn = ops.accept_block(*map(mx.array, block.values()), rule="block", vocab=VOCAB)
    yield _count("accept_block", _launches(drawn), block, k + 1, TOP_K)


def _launches(results: Sequence[mx.array]) -> list[_ext.Launch]:
    launches, _ = _ext.launches_of(results)
    assert launches is not None
    return launches


def _head_launches(T: int, V: int) -> list[_ext.Launch]:
    x, w = (mx.zeros((rows, WIDTH), mx.bfloat16) for rows in (T, V))
    q = mx.quantize(w, 64, 8)
    return _launches(ops.quantized_filter_logits(x, *q, softcap=30.0, top_k=TOP_K, top_p=0.95))


def _count(
    op: str, launches: list[_ext.Launch], arrays: dict[str, np.ndarray], M: int, N: int
) -> RuleCount:
    _, report = workbench.load().run(launches, arrays, mode="count")
    outer = {buffer.name for part in _ext.launch_arguments(launches) for buffer in part}
    constants = {b.name for launch in launches for b in launch.buffers if b.role == "bytes"}
    moved = {
        name: _SECTOR * (entry.group_read_sectors + entry.group_written_sectors)
        for name, entry in report.traffic.items()
        if name not in constants
    }
    touched = [report.traffic[name] for name in moved]
    read = _SECTOR * sum(entry.group_read_sectors for entry in touched)
    compulsory = sum(report.traffic[name].size for name in outer)

    def ratio(name: str) -> float | None:
        if name not in arrays:
            return None
        entry = report.traffic[name]
        return float(_SECTOR * entry.group_read_sectors / entry.size)

    return RuleCount(
        op=op,
        kernel=launches[0].kernel,
        source="ours",
        M=M,
        N=N,
        K=WIDTH if "w" in arrays else None,
        dtype="bfloat16" if "w" in arrays else "float32",
        launches=report.launches,
        read_bytes=read,
        written_bytes=sum(moved.values()) - read,
        compulsory_bytes=compulsory,
        weight_ratio=ratio("w"),
        logits_ratio=ratio("logits"),
        between_bytes=sum(size for name, size in moved.items() if name not in outer),
        ratio=sum(moved.values()) / compulsory,
        threadgroup_bytes=report.threadgroup_bytes,
    )


def count_round(drafts: int = DRAFTS, sampling: Sampling | None = None) -> list[RoundCount]:
    """Count the launches of one round of the embedded pair, sampled by the rule ``block``."""
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
    names = Counter(name.split()[0] for name in played[0].nodes)
    calls: Counter[str] = Counter()
    for name, number in names.items():
        if name in dispatch.OPS:
            calls[name] += number
        elif name not in _VIEWS:
            calls["MLX"] += number
    one = mx.zeros((1, 1, 1, 16))
    several = {
        "block_attention": len(_launches([ops.block_attention(one, one, one, mx.array(0))])),
        "filter_logits": len(_launches(ops.filter_logits(mx.zeros((1, VOCAB)), top_k=TOP_K))),
        "quantized_filter_logits": len(_head_launches(1, VOCAB)),
    }
    return [
        RoundCount(op, number, number * several.get(op, 1) if op in dispatch.OPS else None)
        for op, number in sorted(calls.items(), key=lambda item: (item[0] == "MLX", item[0]))
    ]


_RULES_HEADING = f"""
## Sampling rules

{TOP_K} candidates a row. Logits: bytes of logits read over those there are. Between: bytes that one
launch leaves for the next, written and read. Total: as above.
"""

_ROUND_HEADING = f"""
## Launches of a round

A round of the embedded pair with {DRAFTS} drafts, sampled, rule `block`: how often each op is
called, and how many launches that is; operations of MLX's own are mostly one launch each.
"""


def markdown(rules: Sequence[RuleCount], round_: Sequence[RoundCount]) -> str:
    """The two tables, to stand below those of ``kernel_counts``."""
    lines = [
        _RULES_HEADING,
        "| op | rows | n | launches | logits | between | total | threadgroup memory |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for c in rules:
        logits = "" if c.logits_ratio is None else f"{c.logits_ratio:.2f}"
        lines.append(
            f"| {c.op} | {c.M} | {c.N} | {c.launches} | {logits} | {c.between_bytes} "
            f"| {c.ratio:.2f} | {c.threadgroup_bytes} |"
        )
    lines += [_ROUND_HEADING, "| op | calls | launches |", "| --- | --: | --: |"]
    for row in round_:
        launches = "MLX" if row.launches is None else row.launches
        lines.append(f"| {row.op} | {row.calls} | {launches} |")
    return "\n".join(lines)
