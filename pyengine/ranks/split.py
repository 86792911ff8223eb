"""Who multiplies what: the share of a rank in each matrix of a target.

Query heads with their keys and values, feed-forward columns (of each expert too), and rows of the
head are split; one sum follows the attention's last matrix and one the feed-forward's. All else is
small, and whole on every rank. A layer whose keys an assistant reads keeps all of them on every
rank, and splits the query heads of each: drafting is rank 0's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import lcm
from typing import NamedTuple

import mlx.core as mx

from pyengine.model.config import LayerConfig, TargetConfig
from pyengine.model.linear import Linear
from pyengine.ranks.group import Ranks

Range = tuple[int, int]
GATES = ("gate_proj", "up_proj")


class Cut(NamedTuple):
    """What is kept of a matrix: ranges of its rows (``outputs``) or of its columns."""

    outputs: bool
    ranges: tuple[Range, ...]
    whole: int  # of which these are parts

    @property
    def share(self) -> float:
        return sum(end - begin for begin, end in self.ranges) / self.whole


class Shares(NamedTuple):
    """The share of a rank in a target.

    Attributes:
        config: The target's, with as many key heads a layer as the rank keeps.
        cuts: By matrix; one that is not there is whole.
        summed: Matrices of which each rank has a part of the sum.
        head: Rows of the embedding table that are its part of the head.
    """

    config: TargetConfig
    cuts: Mapping[str, Cut]
    summed: frozenset[str]
    head: Range

    def part(self, path: str, matrix: Linear) -> Linear:
        """What the rank keeps of a matrix."""
        return cut(matrix, self.cuts[path]) if path in self.cuts else matrix


def shares(config: TargetConfig, rank: int, size: int) -> Shares:
    """The share of ``rank`` of ``size``."""
    cuts: dict[str, Cut] = {}
    summed: set[str] = set()
    layers = list(config.layers)
    unit = _unit(config)
    read = {config.last_source(kind) for kind in {layer.sliding for layer in config.layers}}
    for i, layer in enumerate(config.layers):
        at = f"layers.{i}"
        heads = _heads(config, layer, rank, size, layer.kv_source in read, unit)
        if heads is not None:
            ranges, keys = heads
            whole = config.num_heads * layer.head_dim
            cuts[f"{at}.self_attn.q_proj"] = Cut(True, ranges, whole)
            cuts[f"{at}.self_attn.o_proj"] = Cut(False, ranges, whole)
            summed.add(f"{at}.self_attn.o_proj")
            if keys is not None:
                own, D = keys[1] - keys[0], layer.head_dim
                cut = Cut(True, ((keys[0] * D, keys[1] * D),), layer.num_kv_heads * D)
                if layer.kv_source == i:
                    cuts[f"{at}.self_attn.k_proj"] = cuts[f"{at}.self_attn.v_proj"] = cut
                layers[i] = replace(layer, num_kv_heads=own)
        widths = [("mlp", layer.ffn_width)]
        if config.num_experts:
            widths.append(("experts", config.expert_width))
        for name, width in widths:
            if (columns := _part(width, unit, rank, size)) is not None:
                for gate in GATES:
                    cuts[f"{at}.{name}.{gate}"] = Cut(True, (columns,), width)
                cuts[f"{at}.{name}.down_proj"] = Cut(False, (columns,), width)
                summed.add(f"{at}.{name}.down_proj")
    V = config.vocab_size
    head = V * rank // size, V * (rank + 1) // size
    if rank:  # embeddings are made by rank 0
        cuts["embed_tokens"] = Cut(True, (head,), V)
        cuts["embed_tokens_per_layer"] = Cut(True, ((0, 0),), V)
    return Shares(replace(config, layers=tuple(layers)), cuts, frozenset(summed), head)


def _heads(
    config: TargetConfig, layer: LayerConfig, rank: int, size: int, whole_keys: bool, unit: int
) -> tuple[tuple[Range, ...], Range | None] | None:
    """Columns of the attention's result that a rank makes, and its key heads where these are split
    too; None where every rank makes all."""
    K, D = layer.num_kv_heads, layer.head_dim
    group = config.num_heads // K
    if not whole_keys and (keys := _part(K, 1, rank, size)) is not None:
        columns = keys[0] * group * D, keys[1] * group * D
        return None if columns[0] % unit or columns[1] % unit else ((columns,), keys)
    own = _part(group, 1, rank, size)  # of the query heads of each key head
    if own is None or D % unit:
        return None
    begins = [k * group * D for k in range(K)]
    return tuple([(begin + own[0] * D, begin + own[1] * D) for begin in begins]), None


def _part(count: int, unit: int, rank: int, size: int) -> Range | None:
    """A rank's part of so many, in whole units; None where some rank would have none."""
    units = count // unit
    if count % unit or units < size:
        return None
    return unit * (units * rank // size), unit * (units * (rank + 1) // size)


def _unit(config: TargetConfig) -> int:
    """Columns that a matrix may be cut between: whole groups."""
    stored = config.quantization
    if stored is None:
        return 1
    others = [x[1] for x in stored.overrides.values() if isinstance(x, tuple)]
    return lcm(stored.group_size, *others)


def cut(matrix: Linear, part: Cut) -> Linear:
    """What a cut keeps of a matrix, or of each of a stack."""

    def kept(a: mx.array | None, per_column: float) -> mx.array | None:
        if a is None:
            return None
        axis = -2 if part.outputs else -1
        scale = 1.0 if part.outputs else per_column
        slices = [
            _slice(a, axis, int(begin * scale), int(end * scale)) for begin, end in part.ranges
        ]
        return slices[0] if len(slices) == 1 else mx.concatenate(slices, axis=axis)

    packed = matrix.scales is not None
    weight = kept(matrix.weight, matrix.bits / 32 if packed else 1.0)
    group = 1 / matrix.group_size if packed else 1.0
    assert weight is not None
    scales, biases = kept(matrix.scales, group), kept(matrix.biases, group)
    return replace(matrix, weight=weight, scales=scales, biases=biases)


def _slice(a: mx.array, axis: int, begin: int, end: int) -> mx.array:
    part = a[..., begin:end, :] if axis == -2 else a[..., begin:end]
    # Rows of a matrix are a view; what is cut across is copied, or the whole would stay in memory
    return part if axis == -2 and a.ndim == 2 else mx.contiguous(part)


@dataclass(frozen=True)
class SummedLinear(Linear):
    """A matrix of which each rank has some columns: its product is the sum over ranks."""

    ranks: Ranks | None = None

    def __call__(self, x: mx.array, out_dtype: mx.Dtype | None = None) -> mx.array:
        assert self.ranks is not None
        total = self.ranks.total(super().__call__(x, mx.float32))
        return total.astype(out_dtype or x.dtype)


def with_sums(matrices: Mapping[str, Linear], shares: Shares, ranks: Ranks) -> dict[str, Linear]:
    """A rank's matrices, of which some add up what all ranks have. Experts are summed once they are
    weighed."""
    found = dict(matrices)
    for path in shares.summed:
        if ".experts." not in path:
            own = matrices[path]
            packed = own.weight, own.scales, own.biases, own.bits, own.group_size
            found[path] = SummedLinear(*packed, ranks=ranks)
    return found


def lengths(vocab: int, size: int) -> list[int]:
    """Rows of the head that each rank has."""
    return [vocab * (r + 1) // size - vocab * r // size for r in range(size)]
