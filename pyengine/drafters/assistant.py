"""Drafts of Gemma's own assistant: k steps, each from the token and hidden vector before it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx

from pyengine.drafters.drafter import Asked, TargetLike
from pyengine.model.cache import Cache
from pyengine.model.config import LayerConfig
from pyengine.model.head import Logits
from pyengine.model.rows import apart, packed
from pyengine.model.target import Processed
from pyengine.ops.filter_logits import Filtered

if TYPE_CHECKING:
    from typing import Self


class AssistantLike(Protocol):
    """What is asked of the assistant (:class:`pyengine.model.assistant.Assistant`)."""

    def forward(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[Cache]
    ) -> tuple[mx.array | Logits, mx.array]: ...


class AssistantDrafter:
    """Drafts of an assistant; carries the target's hidden vector ``[1, E]`` that gave the primary
    token."""

    def __init__(self, target: TargetLike, assistant: AssistantLike) -> None:
        self._target = target
        self._assistant = assistant
        self._hidden: mx.array | None = None

    @property
    def taps(self) -> tuple[int, ...]:
        return ()

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        return ()

    @property
    def hidden(self) -> mx.array:
        assert self._hidden is not None  # the prompt was read
        return self._hidden

    @property
    def arrays(self) -> list[mx.array]:
        return [self.hidden]

    def with_arrays(self, arrays: list[mx.array]) -> AssistantDrafter:
        other = copy.copy(self)
        other.take_results(arrays)
        return other

    def take_results(self, arrays: list[mx.array]) -> None:
        [self._hidden] = arrays

    def wants_to_draft(self, text: Sequence[int], k: int, forced: Sequence[int] = ()) -> bool:
        return True

    @classmethod
    def propose(cls, i: int, drafters: Sequence[Self], asked: Asked) -> list[Filtered]:
        target, assistant = drafters[0]._target, drafters[0]._assistant
        hidden = packed([drafter.hidden for drafter in drafters])
        logits, hidden = assistant.forward(target.embed(asked.tokens), hidden, asked.caches)
        for drafter, row in zip(drafters, apart(hidden, [1] * len(drafters)), strict=True):
            drafter._hidden = row
        return asked.filter(logits)

    @classmethod
    def read(cls, readers: Sequence[Self], rows: Sequence[Processed]) -> None:
        for reader, own in zip(readers, rows, strict=True):
            reader._hidden = mx.take(own.hidden, own.accepted[None], axis=0)
