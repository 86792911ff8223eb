"""Keys and values kept from one generation for the next: a prompt's known beginning is not read
again.

Full layers keep every position, so going back is a shorter length. A sliding layer's ring has
overwritten what lies a window behind, so going back further needs a mark: a copy of the rings, a
window long whatever the context. Marks are made where a prompt ends, and where two prompts were
seen to part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from pyengine.cache import Cache

if TYPE_CHECKING:
    from pyengine.speculate import TargetLike

MAX_MARKS = 2
WORTH_A_MARK = 16  # tokens


class _Mark(NamedTuple):
    """The rings when ``length`` positions were committed."""

    length: int
    keys: list[mx.array | None]
    values: list[mx.array | None]


class Prefix:
    """What is known of a cache between generations on one pair; for one generation at a time.

    ``tokens`` are the ids whose keys and values the cache holds; ``reused`` is how many of the last
    prompt's were found there.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.reused = 0
        self.busy = False
        self._target: TargetLike | None = None
        self._cache: Cache | None = None
        self._marks: list[_Mark] = []

    def open(self, target: TargetLike, prompt: Sequence[int], block_size: int) -> tuple[Cache, int]:
        """A cache that holds the first n tokens of a prompt, and n. Evaluates.

        At least one token is left to process, for its logits. Until :meth:`keep` is called the
        prefix counts as empty, so that a failed generation leaves nothing wrong behind.
        """
        # Room for twice the block: the last round's tail can be taken back without a mark
        max_block = 2 * block_size
        cache, shared = self._cache, self._shared(prompt)
        if target is not self._target or cache is None or cache.max_block < max_block:
            cache, shared = None, 0
        self.tokens = []
        self._marks = [mark for mark in self._marks if mark.length <= shared]
        self.reused = 0 if cache is None else self._rewind(cache, shared)
        if cache is None or not self.reused:
            cache = self._cache = target.new_cache(max_block)
            self._marks = []
        self._target = target
        if shared - self.reused >= WORTH_A_MARK:
            # Two prompts part here, and a third may too
            target.prefill(list(prompt[self.reused : shared]), cache)
            self._mark(cache, shared)
            return cache, shared
        return cache, self.reused

    def mark(self, length: int) -> None:
        """Note the state after a prompt of this length, so that another answer can begin there."""
        assert self._cache is not None
        self._mark(self._cache, length)

    def keep(self, tokens: Sequence[int]) -> None:
        """The cache holds these tokens, and perhaps more behind them."""
        self.tokens = list(tokens)

    def forget(self) -> None:
        """Nothing is known any more."""
        self.tokens, self._cache, self._marks = [], None, []

    def _shared(self, prompt: Sequence[int]) -> int:
        """Length of the common beginning, short of the whole prompt."""
        longest = min(len(self.tokens), len(prompt) - 1)
        pairs = zip(self.tokens[:longest], prompt, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), longest)

    def _rewind(self, cache: Cache, length: int) -> int:
        """Take the cache back to at most this many positions; returns how many it holds then."""
        slots = cache.window - 1 + cache.max_block
        written = cache.bound + cache.max_block // 2  # a refused tail lies behind the bound
        lost = max(0, written - slots)  # positions before this one are gone from the rings
        if length - (cache.window - 1) < lost and lost > 0:
            mark = max(self._marks, key=lambda m: m.length, default=None)
            if mark is None:
                return 0
            for i, keys in enumerate(mark.keys):
                if keys is not None:
                    cache.keys[i], cache.values[i] = _copy(keys), _copy(mark.values[i])
            length = mark.length
        cache.restart(length)
        return length

    def _mark(self, cache: Cache, length: int) -> None:
        rings = [layer.sliding for layer in cache.config.layers]
        if any(mark.length == length for mark in self._marks) or not any(rings):
            return
        keys, values = (
            [_copy(a) if ring else None for a, ring in zip(arrays, rings, strict=True)]
            for arrays in (cache.keys, cache.values)
        )
        mx.eval([a for a in [*keys, *values] if a is not None])
        self._marks = [*self._marks[-(MAX_MARKS - 1) :], _Mark(length, keys, values)]


def _copy(a: mx.array | None) -> mx.array | None:
    """An independent copy; a plain handle would see later writes."""
    return None if a is None else a * 1
