"""Drafts of Gemma's own assistant: k steps, each from the token and hidden vector before it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from pyengine.drafters.drafter import Filter, TargetLike
from pyengine.model.cache import Cache
from pyengine.model.head import Logits
from pyengine.ops.filter_logits import Filtered


class AssistantLike(Protocol):
    """What is asked of the assistant (:class:`pyengine.model.assistant.Assistant`)."""

    def forward(
        self, embedding: mx.array, hidden: mx.array, cache: Cache
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
    def arrays(self) -> list[mx.array]:
        assert self._hidden is not None  # the prompt was read
        return [self._hidden]

    def with_arrays(self, arrays: list[mx.array]) -> AssistantDrafter:
        other = copy.copy(self)
        other.take_results(arrays)
        return other

    def take_results(self, arrays: list[mx.array]) -> None:
        [self._hidden] = arrays

    def wants_to_draft(self, text: Sequence[int], k: int) -> bool:
        return True

    def propose(self, i: int, token: mx.array, cache: Cache, filter: Filter) -> Filtered:
        assert self._hidden is not None
        embedding = self._target.embed(token)
        logits, self._hidden = self._assistant.forward(embedding, self._hidden, cache)
        return filter(logits)

    def read(self, hidden: mx.array, accepted: mx.array) -> None:
        self._hidden = mx.take(hidden, accepted[None], axis=0)
