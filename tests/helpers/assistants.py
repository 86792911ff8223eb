"""Assistants of known rightness for real targets: one by script, one equal to the target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import mlx.core as mx
import numpy as np
from models import step, verify

from pyengine.checkpoint.pair import Pair
from pyengine.model.cache import Cache, Placed
from pyengine.model.head import whole
from pyengine.model.target import Target

# How many drafts a script has right in a row, again and again: rounds of any block size up to 41
# keep none, some and all
STRETCHES = (3, 0, 1, 0, 0, 7, 2, 0, 42, 1, 0, 5)


class Scripted:
    """Drafts the token that a text has at each position, and the id above at the ``wrong`` ones.

    It counts its own calls, k of them a round: a block size of its own takes a new one.
    """

    def __init__(self, text: Sequence[int], wrong: Iterable[int], vocab: int, k: int) -> None:
        said = list(text)
        for at in wrong:
            said[at] = (said[at] + 1) % vocab
        self.said = mx.array(said, dtype=mx.int32)
        self.ids = mx.arange(vocab, dtype=mx.int32)
        self.k, self.calls = k, 0

    def forward(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[Cache]
    ) -> tuple[mx.array, mx.array]:
        [cache] = caches
        depth, self.calls = self.calls % self.k, self.calls + 1
        # The block's first token stands at `length`
        token = self.said[mx.minimum(cache.length + 1 + depth, self.said.size - 1)]
        return mx.where(self.ids == token, 90.0, 0.0)[None], hidden


def wrong_places(start: int, end: int) -> list[int]:
    """Where the script of ``STRETCHES`` errs, from position ``start`` on."""
    out, at, turn = [], start, 0
    while (at := at + STRETCHES[turn % len(STRETCHES)]) < end:
        out.append(at)
        at, turn = at + 1, turn + 1
    return out


def script_accepts(first: int, end: int, wrong: Iterable[int], k: int) -> Iterator[int]:
    """Drafts kept by each round whose text of right tokens has its first at ``first``.

    A round starts behind the token at ``first``; rounds that reach past ``end`` are left out.
    """
    errs, at = set(wrong), first
    while at + k < end:
        n = next((i for i in range(k) if at + 1 + i in errs), k)
        yield n
        at += n + 1


class Equal:
    """The target itself, on a copy of the cache: the logits of its drafts are the target's own."""

    def __init__(self, target: Target, k: int) -> None:
        self.target, self.k, self.calls = target, k, 0
        vocab = target.config.vocab_size
        self.embeddings = target.embed(mx.arange(vocab, dtype=mx.int32))

    def forward(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[Cache]
    ) -> tuple[mx.array, mx.array]:
        [cache] = caches
        if self.calls % self.k == 0:
            # A product by one is a copy; what is written to it the target never sees
            self._go_on(cache, [a * 1 for a in cache.arena.arrays], 0)
        self.calls += 1
        token = mx.argmax((self.embeddings == embedding).all(axis=-1)).astype(mx.int32)
        logits, hidden = self.target.forward([token[None]], [self.own])
        self._go_on(self.own, self.own.arena.arrays, 1)
        cache.arena.note_read(hidden)
        return logits, hidden

    def _go_on(self, cache: Cache, arrays: list[mx.array], count: int) -> None:
        """So many positions further, over these arrays."""
        batch = cache.arena.batch([cache])
        tables = batch.tables[False], batch.tables[True]
        placed = Placed(arrays, batch.lengths + count, *tables, cache.arena.identity)
        arena = cache.arena.with_placed(placed)
        self.own = cache.with_state([cache.length + count], arena, 0)


class Near:
    """The target's own logits, disturbed by the pair's assistant, which does all that it does."""

    def __init__(self, pair: Pair, k: int, weight: float) -> None:
        assert pair.assistant is not None
        self.equal, self.real, self.weight = Equal(pair.target, k), pair.assistant, weight

    def forward(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[Cache]
    ) -> tuple[mx.array, mx.array]:
        [cache] = caches
        own, _ = self.equal.forward(embedding, hidden, caches)
        other, hidden = step(self.real, embedding, hidden, cache)
        # A centroid head leaves most tokens out, which would leave next to nothing to accept
        return whole(own) + self.weight * mx.where(other == -mx.inf, 0, other), hidden


class Walk:
    """Plain steps of a target behind a prefill of the prompt, on a cache that holds nothing else:
    where a text parts from the one before, it starts again."""

    def __init__(self, target: Target, prompt: list[int]) -> None:
        self.target, self.prompt = target, tuple(prompt)
        self.logits: dict[tuple[int, ...], np.ndarray] = {}
        self._prefill()

    def _prefill(self) -> None:
        self.cache = self.target.new_cache()
        logits, self.hidden = self.target.prefill(list(self.prompt), self.cache)
        self.done, self.logits[self.prompt] = self.prompt, np.array(logits)

    def to(self, ids: tuple[int, ...]) -> None:
        """Have exactly these ids in the cache."""
        if self.done != ids[: len(self.done)]:
            self._prefill()
        for token in ids[len(self.done) :]:
            logits, self.hidden = verify(self.target, mx.array([token]), self.cache)
            self.cache.commit(mx.array(1), self.cache.length_limit + 1)
            mx.eval(logits, self.hidden, self.cache.arrays)
            self.done = (*self.done, token)
            self.logits[self.done] = np.array(logits[0])


class ColdLogits:
    """What a target and :class:`Near` say behind any text, with no round and no block before it."""

    def __init__(self, pair: Pair, prompt: list[int], weight: float) -> None:
        self.pair, self.weight = pair, weight
        self.drafts, self.text = (Walk(pair.target, prompt) for _ in range(2))

    def of_target(self, ids: list[int]) -> np.ndarray:
        if tuple(ids) not in self.drafts.logits:
            self.drafts.to(tuple(ids))
        return self.drafts.logits[tuple(ids)]

    def of_assistant(self, text: list[int], drafts: list[int]) -> np.ndarray:
        """Of the next draft: the newest token of the text is not in the cache yet."""
        self.text.to(tuple(text[:-1]))
        assert self.pair.assistant is not None
        hidden = self.text.hidden
        for token in [text[-1], *drafts]:
            embedding = self.pair.target.embed(mx.array([token]))
            logits, hidden = step(self.pair.assistant, embedding, hidden, self.text.cache)
        other = np.array(logits[0])
        return self.of_target(text + drafts) + self.weight * np.where(other == -np.inf, 0, other)
