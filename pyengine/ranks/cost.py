"""What a call of a shared target costs: messages and bytes on the link, weights kept and read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pyengine.model.config import TargetConfig
from pyengine.ranks.group import HEADER
from pyengine.ranks.split import shares

TOLD = 5  # messages of rank 0: a call's header, its place and its rows; the head's header and rows


class Messages(NamedTuple):
    """Of one target call and its logits.

    Attributes:
        gathers: What every rank sends to all: parts of sums, and its logits.
        told: What rank 0 says.
        nbytes: That a rank sends, or passes on, in all.
    """

    gathers: int
    told: int
    nbytes: int


def messages(config: TargetConfig, size: int, rows: int, number: int = 2) -> Messages:
    """Those of a call with so many rows; ``number`` is the bytes of the storage dtype's."""
    E, V = config.hidden_size, config.vocab_size
    sums = len(shares(config, 0, size).summed)
    stream = rows * (E + len(config.layers) * config.per_layer_width) * number
    # Header and place of the call, its rows; header and rows of the head; then what is gathered
    told = 2 * 4 * HEADER + 4 * (3 + 2 + 256) + stream + rows * E * number
    gathered = (size - 1) * (sums * rows * E * 4 + rows * V * 4 // size)
    return Messages(sums + 1, TOLD, gathered + told)


class Kept(NamedTuple):
    """Bytes of weights that a rank holds, and of them those that a step of one row reads."""

    held: int
    read: int


def kept(config: TargetConfig, rank: int, size: int, nbytes: Mapping[str, int], other: int) -> Kept:
    """Of the target; ``nbytes`` are those of its matrices, and ``other`` all else."""
    own = shares(config, rank, size)
    used = config.num_experts_used / config.num_experts if config.num_experts else 1.0
    held = read = float(other)
    for path, count in nbytes.items():
        part = count * (own.cuts[path].share if path in own.cuts else 1.0)
        held += part
        if path == "embed_tokens":  # as the head
            read += count * (own.head[1] - own.head[0]) / config.vocab_size
        elif path != "embed_tokens_per_layer":  # of which a step reads a row
            read += part * (used if ".experts." in path else 1.0)
    return Kept(round(held), round(read))
