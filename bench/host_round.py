"""What a round costs the host on a Mac, measured on any machine: graphs of the published pairs.

Every op is encoded as for a GPU, by an encoder that has no device (csrc/encode.h): the launches,
their pipelines' names and the calls of the encoder are those of a Mac, but Metal itself is not
called and nothing is computed. What MLX's own operations do here is done by the processor, in place
of their launches. The graphs have the layers, heads and drafts of the pairs but narrow matrices,
for the host's work does not depend on widths. The time is that of the thread that encodes, so that
other processes do not count. No timing of a GPU: a floor of what its host does.

Run: python bench/host_round.py [--pairs 31B 26B-A4B E2B] [--block 6] [--rounds 40] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import bounds
import mlx.core as mx

from pyengine import _ext
from pyengine.checkpoint.weights import Layout, assistant_layout, target_layout
from pyengine.drafters import new_drafter
from pyengine.engine import loop
from pyengine.engine import round as on_device
from pyengine.model.assistant import Assistant
from pyengine.model.config import LayerConfig, Rope
from pyengine.model.linear import Linear, Weights
from pyengine.model.target import Target
from pyengine.ops.recorded import Recorded
from pyengine.sampling.settings import Sampling

PAIRS = ("31B", "26B-A4B", "E2B")
WIDTH, BITS, GROUP = 128, 8, 64
ROPE = Rope(10000.0, 1.0, 1.0)


class Measured(NamedTuple):
    """A round of one pair: nodes of its graph, launches, and the host's milliseconds."""

    pair: str
    nodes: int
    contiguous: int  # of the nodes, those that only make sure of an array's strides
    launches: int
    ms: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", default=PAIRS, choices=bounds.PAIRS)
    parser.add_argument("--block", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [measured(name, options.block, options.rounds) for name in options.pairs]
    if options.json:
        print(json.dumps({"mlx": mx.__version__, "rows": [row._asdict() for row in rows]}))
        return
    print(
        f"block size {options.block}; ms of the calling thread per round, median; no GPU involved"
    )
    print(*Measured._fields, sep="  ")
    for row in rows:
        print(*row[:-1], f"{row.ms:.2f}", sep="  ")


def measured(name: str, block_size: int, rounds: int) -> Measured:
    """Rounds of a pair of this shape, encoded for no device."""
    target, assistant = narrow_pair(name)
    played: list[Recorded[..., Any]] = []

    def record(function: Callable[..., Any]) -> Recorded[..., Any]:
        played.append(Recorded(function))
        return played[-1]

    _ext.rehearse(True)
    try:
        with mock.patch.object(on_device, "recorded", record):
            generation = loop.decode(
                target,
                new_drafter("assistant", target, assistant),
                [5, 6, 7, 8],
                sampling=Sampling(seed=0),
                block_size=block_size,
                max_tokens=(rounds + 4) * block_size,
            )
            for _ in range(3):  # the prefill, the round that is recorded, one more
                next(generation)
            times, before = [], _ext.rehearsed_launches()
            for _ in range(rounds):
                start = time.thread_time()
                next(generation)
                times.append((time.thread_time() - start) * 1e3)
            launches = (_ext.rehearsed_launches() - before) // rounds
            generation.close()
    finally:
        _ext.rehearse(False)
    nodes = Counter(node for graph in played for node in graph.nodes)
    return Measured(name, nodes.total(), nodes["Contiguous"], launches, statistics.median(times))


def narrow_pair(name: str) -> tuple[Target, Assistant]:
    """A published pair's layers and heads in narrow matrices of zeros, 8 bits."""
    target, assistant = bounds.published(name)

    def narrow(layer: LayerConfig) -> LayerConfig:
        return replace(layer, head_dim=layer.head_dim // 8, ffn_width=WIDTH)

    same: dict[str, Any] = {"hidden_size": WIDTH, "rope_sliding": ROPE, "rope_full": ROPE}
    same |= {"eps": 1e-6, "context_limit": 8192}
    target = replace(
        target,
        layers=tuple(map(narrow, target.layers)),
        per_layer_width=GROUP * bool(target.per_layer_width),
        expert_width=GROUP * bool(target.num_experts),
        softcap=30.0,
        **same,
    )
    assistant = replace(
        assistant, layers=tuple(map(narrow, assistant.layers)), backbone_size=WIDTH, **same
    )
    of_target, of_assistant = zeros(target_layout(target)), zeros(assistant_layout(assistant))
    return Target(target, of_target), Assistant(assistant, target, of_assistant)


def zeros(layout: Layout) -> Weights:
    matrices = {}
    for path, (*rows, width) in layout.matrices.items():
        factors = mx.zeros((*rows, width // GROUP), mx.bfloat16)
        packed = mx.zeros((*rows, width * BITS // 32), mx.uint32)
        matrices[path] = Linear(packed, factors, factors, BITS, GROUP)
    vectors = {
        name: mx.zeros(shape, mx.int32 if name in layout.integers else mx.bfloat16)
        for name, shape in layout.vectors.items()
    }
    arrays = [a for matrix in matrices.values() for a in matrix.arrays]
    mx.eval(arrays, list(vectors.values()))
    return Weights(matrices, vectors, mx.bfloat16)


if __name__ == "__main__":
    main()
