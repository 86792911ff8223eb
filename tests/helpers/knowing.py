"""The tiny pairs as `generate` takes them, with assistants that know the text.

A tiny pair has no tokenizer of its own: here each token is spelled as its number and a space.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from tiny_pairs import greedy_text, tiny_pair


class Numbers:
    """A tokenizer without a vocabulary; a token is text at once."""

    has_chat_template = False

    def detokenizer(self) -> Numbers:
        return self

    def add(self, token: int) -> str:
        return f"{token} "

    def finish(self) -> str:
        return ""

    def channel_ids(self) -> tuple[int, ...]:
        return ()

    turn_ids = call_ids = answer_ends = channel_ids


class Knowing:
    """Drafts k tokens a round of a text that it knows by position; right until draft ``right``."""

    def __init__(self, text: list[int], k: int, right: int) -> None:
        self.text, self.k, self.right, self.calls = mx.array(text, mx.int32), k, right, 0

    def forward(self, embedding: mx.array, hidden: mx.array, caches: Any) -> Any:
        [cache] = caches
        depth, self.calls = self.calls % self.k, self.calls + 1
        token = mx.take(self.text, mx.minimum(cache.length + 1 + depth, self.text.size - 1))
        token = token if depth < self.right else (token + 1) % 256
        return mx.where(mx.arange(256) == token, 20.0, 0.0)[None], hidden


def tiny(flavour: str, form: str = "float32", *, knows: tuple[int, int] | None = None) -> Any:
    """A tiny pair; ``knows`` is a block size and how many drafts of each block are right."""
    pair = tiny_pair(flavour, form)
    fields = {**pair.__dict__, "tokenizer": Numbers(), "manifest": {}}
    fields["generation"] = SimpleNamespace(**{**pair.generation.__dict__, "stop_ids": ()})
    if knows is not None:
        block_size, right = knows
        fields["assistant"] = Knowing(greedy_text(flavour), block_size - 1, right)
    return SimpleNamespace(**fields)
