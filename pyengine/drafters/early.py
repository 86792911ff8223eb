"""Drafts of the target's own first layers: its last norm and head behind layer N instead of all.

Exact, as any drafter is: the full model verifies. It needs no other model, and a draft costs N
layers and the head. Pays on a target whose inner layers speak the head's language: the embedded
one, which was grown from six layers. Nothing is known of the published models, whose inner layers
were not trained to.

Source: self-speculative decoding by early exit, LayerSkip, https://arxiv.org/abs/2404.16710,
section 4.3; without its training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from pyengine.drafters.drafter import Asked
from pyengine.model.cache import Cache
from pyengine.model.config import LayerConfig
from pyengine.model.head import Logits
from pyengine.model.rows import apart
from pyengine.model.target import Processed
from pyengine.ops.filter_logits import Filtered

if TYPE_CHECKING:
    from typing import Self


class ExitLike(Protocol):
    """What is asked of the target (:class:`pyengine.model.target.Target`)."""

    def exit(
        self, depth: int, ids: Sequence[mx.array], caches: Sequence[Cache], ahead: int = 0
    ) -> Logits: ...


class EarlyDrafter:
    """Drafts of the target's first ``depth`` layers. Carries nothing: keys and values of the drafts
    go where the verifying call writes them again, with the same bits.

    Of each depth there is a class, see :func:`early_drafter`: those of one class propose together.
    """

    depth: int

    def __init__(self, target: ExitLike) -> None:
        self._target = target

    @property
    def taps(self) -> tuple[int, ...]:
        return ()

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return ()

    @property
    def arrays(self) -> list[mx.array]:
        return []

    def with_arrays(self, arrays: list[mx.array]) -> EarlyDrafter:
        return self

    def take_results(self, arrays: list[mx.array]) -> None:
        pass

    def wants_to_draft(self, text: Sequence[int], k: int, forced: Sequence[int] = ()) -> bool:
        return True

    @classmethod
    def propose(cls, i: int, drafters: Sequence[Self], asked: Asked) -> list[Filtered]:
        target, ones = drafters[0]._target, [1] * len(drafters)
        if asked.block is None:
            ids, ahead = apart(asked.tokens, ones), i
        else:  # some of its tokens these layers may not have seen
            ids, ahead = [row.reshape(-1) for row in apart(asked.block, ones)], 0
        return asked.filter(target.exit(cls.depth, ids, asked.caches, ahead))

    @classmethod
    def read(cls, readers: Sequence[Self], rows: Sequence[Processed]) -> None:
        pass


@cache
def early_drafter(depth: int) -> type[EarlyDrafter]:
    """The drafters of so many layers."""
    return type(f"EarlyDrafter{depth}", (EarlyDrafter,), {"depth": depth})
