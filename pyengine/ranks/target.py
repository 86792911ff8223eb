"""The target of rank 0, and what the other ranks do when it is called.

A call is a header, and what it needs in the order in which it is read:

| kind | numbers | then |
| --- | --- | --- |
| RUN | rows, sequences, tables' widths, layers | identity, counts, lengths, tables; stream |
| HEAD | rows | hidden vectors |
| COPY | kind of pages, how many | identity, sources, targets |
| TRIM | kind of pages, how many stay, of how many after | identity before, those that stay |
| FORGET | how many | arenas |
| END | | |

Rank 0 makes embeddings and tells them, so that no other rank keeps the tables.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import count as count_from
from typing import Any

import mlx.core as mx

from pyengine.model.cache import Arena, Batch
from pyengine.model.config import TargetConfig
from pyengine.model.head import Logits
from pyengine.model.linear import Linear, Weights
from pyengine.model.target import Layer, Rows, Target
from pyengine.ops.recorded import recorded
from pyengine.ranks.group import Ranks
from pyengine.ranks.split import Cut, Shares, cut, lengths, with_sums

RUN, HEAD, COPY, TRIM, FORGET, END = range(1, 7)


class SharedTarget(Target):
    """A target of which this rank has a share."""

    def __init__(
        self, config: TargetConfig, weights: Weights, shares: Shares, ranks: Ranks
    ) -> None:
        matrices = with_sums(weights.matrices, shares, ranks)
        super().__init__(shares.config, replace(weights, matrices=matrices))
        self.ranks = ranks
        if any(".experts." in path for path in shares.summed):
            self.layers = [_with_total(layer, ranks) for layer in self.layers]
        V = config.vocab_size
        whole_table = self.table.outputs == V  # on rank 0, which makes embeddings
        own = cut(self.table, Cut(True, (shares.head,), V)) if whole_table else self.table
        packed = own.weight, own.scales, own.biases, own.bits, own.group_size
        self.head = SplitHead(*packed, ranks=ranks, vocab=V)


def _with_total(layer: Layer, ranks: Ranks) -> Layer:
    assert layer.experts is not None
    return replace(layer, experts=replace(layer.experts, total=ranks.total))


@dataclass(frozen=True)
class SplitHead(Linear):
    """The table as the head: each rank makes the logits of some tokens."""

    ranks: Ranks | None = None
    vocab: int = 0

    @property
    def outputs(self) -> int:
        return self.vocab

    @property
    def packed(self) -> None:
        return None

    def __call__(self, x: mx.array, out_dtype: mx.Dtype | None = None) -> mx.array:
        """On rank 0: tells the others of x first."""
        assert self.ranks is not None and out_dtype == mx.float32
        [x] = self.ranks.tell(HEAD, [x.shape[0]], x)
        return self.part(x)

    def part(self, x: mx.array) -> mx.array:
        """On every rank: this one's logits, and from them all, float32 ``[R, V]``."""
        assert self.ranks is not None
        counts = lengths(self.vocab, self.ranks.size)
        own = super().__call__(x, mx.float32)
        own = mx.pad(own, [(0, 0), (0, max(counts) - own.shape[1])])
        every = self.ranks.gathered(own)
        return mx.concatenate(
            [part[:, :count] for part, count in zip(every, counts, strict=True)], axis=-1
        )


class LeaderTarget(SharedTarget):
    """Rank 0's: tells the others of every call."""

    def new_arena(self, most_bytes: int | None = None, sequences: int = 1) -> Arena:
        return LeaderArena(self.ranks, self.config, self.dtype, most_bytes, sequences)

    def waiting(self) -> AbstractContextManager[None]:
        return self.ranks.waiting()

    def check_alone(self, setting: str) -> None:
        raise ValueError(f"[ranks] {setting} must not be given where ranks share the target.")

    def logits(self, ids: list[int]) -> mx.array:
        found = super().logits(ids)
        with self.waiting():
            mx.eval(found)
        return found

    def _head(self, x: mx.array) -> Logits:
        return Logits(x, self.head, self.config.softcap)

    def _layers(
        self,
        first: int,
        end: int,
        h: mx.array,
        per_layer: list[mx.array] | None,
        rows: Rows,
        left: list[mx.array],
    ) -> mx.array:
        assert rows.branches is None  # trees are refused where ranks share the target
        batch = rows.batch
        full, sliding = batch.tables[False], batch.tables[True]
        parts = [batch.arena.identity, mx.array(list(rows.counts), dtype=mx.int32), batch.lengths]
        parts += [full.reshape(-1), sliding.reshape(-1)]
        stream = h if per_layer is None else mx.concatenate([h, *per_layer], axis=-1)
        numbers = [h.shape[0], len(rows.counts), full.shape[1], sliding.shape[1], first, end]
        _, stream = self.ranks.tell(RUN, numbers, mx.concatenate(parts), stream)
        h, per_layer = parted(self.config, stream)
        return super()._layers(first, end, h, per_layer, rows, left)


def parted(config: TargetConfig, stream: mx.array) -> tuple[mx.array, list[mx.array] | None]:
    """What a RUN tells of its rows: embeddings, and the second ones by layer."""
    if not config.per_layer_width:
        return stream, None
    h, rest = stream[:, : config.hidden_size], stream[:, config.hidden_size :]
    return h, list(mx.split(rest, len(config.layers), axis=-1))


_made = count_from(1)  # numbers of arenas
_gone: list[int] = []  # those that nobody has any more


class LeaderArena(Arena):
    """Rank 0's: what it does to pages the others do to theirs."""

    def __init__(self, ranks: Ranks, config: TargetConfig, *rest: Any) -> None:
        super().__init__(config, *rest)
        self.ranks, self.number = ranks, next(_made)
        weakref.finalize(self, _gone.append, self.number)
        gone = [_gone.pop() for _ in range(len(_gone))]
        if gone:
            self._tell(FORGET, [len(gone)], gone)

    @property
    def identity(self) -> mx.array:
        if self._batch is not None:  # of a recorded round
            return self._identity
        return mx.array(self._numbers, dtype=mx.int32)

    @property
    def _numbers(self) -> list[int]:
        return [self.number, self.full.count, self.sliding.count]

    def copy(self, sliding: bool, sources: Sequence[int], targets: Sequence[int]) -> None:
        self._tell(COPY, [sliding, len(sources)], [*self._numbers, *sources, *targets])
        super().copy(sliding, sources, targets)

    def trim(self, sliding: bool) -> dict[int, int]:
        before = self._numbers
        moved = super().trim(sliding)
        count = self.pages(sliding).count
        self._tell(TRIM, [sliding, len(moved), count], [*before, *moved])
        return moved

    def _tell(self, kind: int, numbers: list[int], rest: list[int]) -> None:
        with self.ranks.waiting():
            mx.eval(self.ranks.tell(kind, numbers, mx.array(rest, dtype=mx.int32)))


class Follower:
    """A rank that does as it is told."""

    def __init__(self, target: SharedTarget) -> None:
        self._target, self._ranks = target, target.ranks
        self._arenas: dict[int, Arena] = {}
        self._recorded: dict[Any, Callable[..., Any]] = {}

    def follow(self) -> None:
        """Take part in calls until rank 0 ends.

        Raises:
            RuntimeError: Another rank is gone.
        """
        while True:
            kind, *numbers = self._ranks.heard()
            if kind == END:
                self._ranks.numbers(1)
                return
            with self._ranks.waiting():
                self._take_part(kind, numbers)

    def _take_part(self, kind: int, numbers: list[int]) -> None:
        target, ranks = self._target, self._ranks
        if kind == RUN:
            self._run(*numbers)
        elif kind == HEAD:
            x = ranks.told(mx.zeros((numbers[0], target.config.hidden_size), target.dtype))
            mx.eval(target.head.part(x))
        elif kind == COPY:
            count = numbers[1]
            own = ranks.numbers(3 + 2 * count)
            arena, pages = self._arena(own[:3]), own[3:]
            arena.copy(bool(numbers[0]), pages[:count], pages[count:])
        elif kind == TRIM:
            own = ranks.numbers(3 + numbers[1])
            self._pack(self._arena(own[:3]), bool(numbers[0]), own[3:], numbers[2])
        elif kind == FORGET:
            for number in ranks.numbers(numbers[0]):
                self._arenas.pop(number, None)
        else:
            raise RuntimeError(f"[ranks] a call must be one of six kinds but got {kind}.")

    def _arena(self, identity: Sequence[int]) -> Arena:
        """The arena of that number, with as many pages as rank 0's."""
        number, *pages = identity
        if number not in self._arenas:
            self._arenas[number] = Arena(self._target.config, self._target.dtype)
        arena = self._arenas[number]
        for kind, count in zip((False, True), pages, strict=True):
            if count > arena.pages(kind).count:
                arena.grow(kind, count)
            elif count < arena.pages(kind).count:  # rank 0 began anew
                self._pack(arena, kind, [], count)
        return arena

    def _pack(self, arena: Arena, sliding: bool, kept: Sequence[int], count: int) -> None:
        arena.pack(sliding, kept, count)
        arena.pages(sliding).clear()
        arena.pages(sliding).add(count)

    def _run(self, R: int, Q: int, full: int, sliding: int, first: int, end: int) -> None:
        target = self._target
        config = target.config
        own = self._ranks.numbers(3 + 2 * Q + Q * (full + sliding))
        counts, lengths, tables = own[3 : 3 + Q], own[3 + Q : 3 + 2 * Q], own[3 + 2 * Q :]
        arena = self._arena(own[:3])
        width = config.hidden_size + len(config.layers) * config.per_layer_width
        key = tuple(counts), first, end
        if key not in self._recorded:
            if len(self._recorded) > 32:
                self._recorded.clear()
            self._recorded[key] = recorded(_Call(target, counts, first, end))
        stream = mx.zeros((R, width), target.dtype)
        found = self._recorded[key](
            arena.arrays,
            mx.array(lengths, dtype=mx.int32),
            mx.array(tables[: Q * full], dtype=mx.int32).reshape(Q, full),
            mx.array(tables[Q * full :], dtype=mx.int32).reshape(Q, sliding),
            stream,
        )
        mx.eval(found)
        arena.take_results(found[1])


class _Call:
    """Layers of one call, as a recorded function takes them."""

    def __init__(self, target: SharedTarget, counts: Sequence[int], first: int, end: int) -> None:
        self._target, self._counts, self._layers = target, list(counts), (first, end)
        self._bare = Arena(target.config, target.dtype)

    def __call__(
        self,
        arrays: list[mx.array],
        lengths: mx.array,
        full: mx.array,
        sliding: mx.array,
        stream: mx.array,
    ) -> tuple[mx.array, list[mx.array]]:
        target = self._target
        arena = self._bare.with_arrays(arrays)
        batch = Batch(arena, lengths, {False: full, True: sliding})
        rows = Rows(batch, self._counts, *batch.rows(self._counts))
        h, per_layer = parted(target.config, target.ranks.told(stream))
        x = target._layers(*self._layers, h, per_layer, rows, [])
        return x, arena.arrays
