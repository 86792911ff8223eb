"""Models and generations as most tests ask them: an assistant's drafts, and all logits made."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from pyengine.drafters import new_drafter
from pyengine.engine import loop
from pyengine.engine.sequence import Round
from pyengine.model.cache import Cache
from pyengine.model.head import whole


def decode(target: Any, assistant: Any, prompt: list[int], **settings: Any) -> Iterator[Round]:
    """A generation with the drafts of an assistant, real or not; without one where it is None."""
    drafter = new_drafter("assistant", target, assistant)
    return loop.decode(target, drafter, prompt, **settings)


def broken(forward: Any) -> Any:
    """A target's ``forward`` whose logits are not finite."""

    def call(*args: Any) -> tuple[Any, mx.array]:
        logits, hidden = forward(*args)
        return replace(logits, hidden=logits.hidden * mx.nan), hidden

    return call


def verify(target: Any, ids: mx.array, cache: Any) -> tuple[mx.array, mx.array]:
    """A target's logits ``[T, V]`` and hidden vectors."""
    logits, hidden = target.forward([ids], [cache])
    return whole(logits), hidden


def step(
    assistant: Any, embedding: mx.array, hidden: mx.array, cache: Any
) -> tuple[mx.array, mx.array]:
    """An assistant's logits ``[1, V]`` and hidden vector."""
    logits, hidden = assistant.forward(embedding, hidden, [cache])
    return whole(logits), hidden


def spoil(cache: Cache) -> None:
    """NaN in all its pages of the first layer."""
    arena, layer = cache.arena, cache.arena.config.layers[0]
    keys = np.array(arena.slots(0)[0])
    keys[list(cache.sliding.values()) if layer.sliding else cache.full] = np.nan
    arena.store(0, mx.array(keys), arena.slots(0)[1])
