"""Drafts of a DFlash model: all of a block in one pass, before the first is drawn.

The rows do not see each other's drafts, so the distribution of a draft given those before it is the
one of its row, and every rule holds as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from pyengine.drafters.drafter import Asked
from pyengine.model.cache import Cache
from pyengine.model.config import DFlashConfig, LayerConfig
from pyengine.model.head import Logits
from pyengine.model.rows import apart, packed, picked
from pyengine.model.target import Processed
from pyengine.ops.filter_logits import Filtered

if TYPE_CHECKING:
    from typing import Self

MOST_GUIDED = 16  # rows of a block whose drafts a grammar guides: as many as every such round has


class DFlashLike(Protocol):
    """What is asked of the model (:class:`pyengine.model.dflash.DFlash`)."""

    @property
    def config(self) -> DFlashConfig: ...

    def read(self, tapped: Sequence[mx.array], caches: Sequence[Cache]) -> mx.array: ...

    def forward(self, blocks: Sequence[mx.array], caches: Sequence[Cache]) -> Logits: ...


class DFlashDrafter:
    """Drafts of a DFlash model. Its context is in the pages of the text.

    Within a round it carries the logits ``[k, V]`` of all drafts, for the head is read once for
    them; between rounds a number that depends on the writing of the context, int32 ``[1]``.
    """

    def __init__(self, model: DFlashLike) -> None:
        self._model = model
        self._carried: mx.array | None = None

    @property
    def taps(self) -> tuple[int, ...]:
        return self._model.config.taps

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return self._model.config.kept

    @property
    def arrays(self) -> list[mx.array]:
        assert self._carried is not None  # the prompt was read
        return [self._carried]

    def with_arrays(self, arrays: list[mx.array]) -> DFlashDrafter:
        other = copy.copy(self)
        other.take_results(arrays)
        return other

    def take_results(self, arrays: list[mx.array]) -> None:
        [self._carried] = arrays

    def _has(self, i: int) -> bool:
        """Whether it carries the logits of draft i."""
        [carried] = self.arrays
        return carried.ndim == 2 and i < carried.shape[0]

    def wants_to_draft(self, text: Sequence[int], k: int, forced: Sequence[int] = ()) -> bool:
        return True

    @classmethod
    def propose(cls, i: int, drafters: Sequence[Self], asked: Asked) -> list[Filtered]:
        # Each by itself: who drafts beside it may not change what a text drafts
        lacking = [n for n, own in enumerate(drafters) if not own._has(i)]
        if lacking:
            cls._draft(i, drafters, asked, lacking)
        return asked.filter(packed([own.arrays[0][i : i + 1] for own in drafters]))

    @classmethod
    def propose_all(cls, drafters: Sequence[Self], asked: Asked) -> list[Filtered]:
        """The distributions of all drafts, ``ks[n]`` rows of sequence n, behind one another: for
        trees, whose drafts follow several others."""
        cls._draft(0, drafters, asked, range(len(drafters)))
        return asked.filter(packed([own.arrays[0] for own in drafters]))

    @classmethod
    def _draft(cls, i: int, drafters: Sequence[Self], asked: Asked, places: Sequence[int]) -> None:
        """Make the logits of a block of those at these places."""
        model, ones = drafters[0]._model, [1] * len(places)
        if asked.block is None:
            known = apart(picked(asked.tokens, places), ones)
            counts = [asked.ks[n] + 1 for n in places]
        else:  # the host stands behind each draft, and how many come nobody has said
            known = [row.reshape(-1) for row in apart(picked(asked.block, places), ones)]
            counts = [max(i + 2, min(model.config.block_size, MOST_GUIDED))] * len(places)
        masks = [
            mx.full((count - ids.size,), model.config.mask_id, dtype=mx.int32)
            for ids, count in zip(known, counts, strict=True)
        ]
        blocks = [mx.concatenate([*both]) for both in zip(known, masks, strict=True)]
        logits = model.forward(blocks, [asked.caches[n] for n in places]).array
        for n, rows in zip(places, apart(logits, counts), strict=True):
            drafters[n]._carried = rows[1:]

    @classmethod
    def read(cls, readers: Sequence[Self], rows: Sequence[Processed]) -> None:
        model = readers[0]._model
        E = model.config.hidden_size
        done = model.read([own.hidden[:, E:] for own in rows], [own.cache for own in rows])
        for reader in readers:
            reader._carried = done
