"""The last product of a model, over the vocabulary: all logits, or the candidates alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import mlx.core as mx

from pyengine import ops
from pyengine.model.linear import Linear
from pyengine.model.rows import picked
from pyengine.ops.filter_logits import Filtered


@dataclass(frozen=True)
class Logits:
    """Logits ``[T, V]`` of hidden vectors, float32, after the softcap; made only when asked for.

    A row of a large vocabulary is a megabyte, and a round wants 64 numbers of it.
    """

    hidden: mx.array  # [T, E]
    table: Linear  # [V, E]
    softcap: float | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.hidden.shape[0], self.table.outputs

    @cached_property
    def array(self) -> mx.array:
        """All of them."""
        logits = self.table(self.hidden, mx.float32)
        return logits if self.softcap is None else ops.softcap(logits, self.softcap)

    def parts(self, rows: int, first: int = 0) -> Iterator[Logits]:
        """The same from row ``first`` on, so many rows at a time."""
        for at in range(first, self.shape[0], rows):
            yield replace(self, hidden=self.hidden[at : at + rows])

    def filter(self, **settings: Any) -> Filtered:
        """What :func:`pyengine.ops.filter_logits` makes of them with these settings.

        In one op with the product, where the matrix is quantised and the width is not V.
        """
        packed = self.table.packed
        if packed is None or settings.get("width", settings["top_k"]) == 0:
            return ops.filter_logits(self.array, **settings)
        packing = (self.table.group_size, self.table.bits)
        return ops.quantized_filter_logits(
            self.hidden, *packed, *packing, softcap=self.softcap, **settings
        )


def candidates(logits: mx.array | Logits, **settings: Any) -> Filtered:
    """:func:`pyengine.ops.filter_logits` of logits that are made or wait."""
    filter = logits.filter if isinstance(logits, Logits) else partial(ops.filter_logits, logits)
    return filter(**settings)


def whole(logits: mx.array | Logits) -> mx.array:
    """All logits, from a model that makes them or from one that waits."""
    return logits.array if isinstance(logits, Logits) else logits


def rows_at(logits: mx.array | Logits, places: Sequence[int]) -> mx.array | Logits:
    """Rows at places that the host knows; none of them is made for it."""
    if not isinstance(logits, Logits):
        return picked(logits, places)
    hidden = picked(logits.hidden, places)
    return logits if hidden is logits.hidden else replace(logits, hidden=hidden)
