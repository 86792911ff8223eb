"""Keys and values kept from one generation for the next: a known prompt prefix is processed once.

Full layers keep every position, so going back is a shorter length. A sliding layer's ring has
overwritten what lies a window behind, so going back further needs a mark: a copy of the rings, a
window long whatever the context. Marks are made at a prompt's end and where no more than a chunk
of it is left, for another answer and for another last turn; and where two prompts were seen to
part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any, NamedTuple

import mlx.core as mx

from pyengine.drafters.drafter import TargetLike
from pyengine.model.cache import Cache
from pyengine.model.plan import border, reusable, whole
from pyengine.ops.dispatch import borrows
from pyengine.untrusted import shown

MAX_MARKS = 3
WORTH_A_MARK = 16  # tokens


class _Mark(NamedTuple):
    """The rings when ``written`` positions were in them. The first ``length`` are those of the text
    that is known; a cache with these rings can have ``least`` to ``length`` positions."""

    least: int
    length: int
    written: int
    keys: list[mx.array | None]
    values: list[mx.array | None]


class Prefix:
    """A cache kept between generations on one pair; it serves one generation at a time.

    If a prompt is repeated, or continues where the last answer ended, all but its last known token
    are reused, whatever the context. A prompt that differs in its last turn is reused up to the
    beginning of that turn (a first prompt and a long turn: up to the last multiple of 512 tokens).
    One that differs earlier is reused up to where earlier prompts were seen to differ.

    On a GPU, where whole chunks of 512 run other kernels than what is shorter, only what the new
    prompt's own calls would have made alike is reused, so that no bit goes with what was asked
    before: whole chunks, and what lies behind them while the new prompt completes no further one.

    It holds the cache and at most three marks, each as large as a full window of the sliding
    layers: in bfloat16 0.84 GB for the 31B, 0.21 GB for the 26B, 0.34 GB for the 12B, 20 MB for E4B
    and 6 MB for E2B. ``tokens`` are the ids whose keys and values the cache holds; ``reused`` is
    how many of the last prompt's were found there.
    """

    def __init__(self) -> None:
        self.reused = 0
        self.parting = 0
        self._busy = False
        self._ids: list[int] = []
        self._whole = 0  # positions of the newest prompt in calls of MLX's kernels
        self._target: TargetLike | None = None
        self._cache: Cache | None = None
        self._marks: list[_Mark] = []

    @property
    def tokens(self) -> list[int]:
        """The ids whose keys and values are held; of an abandoned prompt, those processed."""
        return [] if self._cache is None else self._ids[: self._cache.length_limit]

    @property
    def nbytes(self) -> int:
        """Memory of the cache and its marks."""
        arrays = [a for m in self._marks for a in [*m.keys, *m.values] if a is not None]
        cache = self._cache  # another thread may forget it meanwhile
        return sum(a.nbytes for a in arrays) + (cache.nbytes if cache else 0)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Reserve the prefix for one generation. If that fails, everything is forgotten.

        Raises:
            ValueError: Another generation is under way.
        """
        if self._busy:
            raise ValueError("[generate] prefix must serve one generation at a time.")
        self._busy = True
        try:
            yield
        except Exception:
            self.forget()
            raise
        finally:
            self._busy = False

    @property
    def marks(self) -> int:
        """The most marks it keeps."""
        return MAX_MARKS

    def max_block(self, block_size: int) -> int:
        """Twice the block: the last round's tail can be taken back without a mark."""
        return 2 * block_size

    def open(
        self,
        target: TargetLike,
        prompt: Sequence[int],
        block_size: int,
        stop: int | None = None,
    ) -> tuple[Cache, int]:
        """A cache that holds the first n tokens of a prompt, and n. Evaluates.

        At least one token is left to process, for its logits. The prompt counts as known as far as
        it gets into the cache, until :meth:`keep` tells more. ``parting`` is where this
        prompt and the one before part if that is worth a mark, else 0. Only what this prompt's
        calls would have made alike is reused (:mod:`pyengine.model.plan`); ``stop`` is where those
        calls end, if not with the prompt.
        """
        mlx, end = borrows(), len(prompt) if stop is None else stop

        def alike(length: int) -> int:
            return reusable(length, self._whole, end, mlx)

        max_block = self.max_block(block_size)
        cache, shared = self._cache, self._shared(prompt)
        if target is not self._target or cache is None or cache.max_block < max_block:
            cache, shared = None, 0
        self._ids = []  # nothing is known if Ctrl-C comes in here
        marks = [m._replace(length=alike(min(m.length, shared))) for m in self._marks]
        self._marks = [m for m in marks if m.least <= m.length]
        self.reused = 0 if cache is None else self._rewind(cache, alike(shared))
        if cache is None or not self.reused:
            cache = self._cache = target.new_cache(max_block)
            self._marks = []
        self._target, self._ids, self._whole = target, list(prompt), whole(end, mlx)
        parting = border(shared, end, mlx)
        self.parting = parting if parting - self.reused >= WORTH_A_MARK else 0
        return cache, self.reused

    def mark(self, length: int) -> None:
        """Note the rings as they are, after ``length`` positions: so that a later prompt can begin
        there. Evaluates."""
        assert self._cache is not None
        rings = [layer.sliding for layer in self._cache.config.layers]
        if not length or not any(rings) or any(m.least <= length <= m.length for m in self._marks):
            return
        least = self._least(self._cache)
        marks = [m for m in self._marks if m.length < least]
        # The shortest stays: it is likeliest to be what other conversations begin with
        self._marks = marks[:1] + marks[1:][-(MAX_MARKS - 2) :]
        keys, values = (
            [_copy(a) if ring else None for a, ring in zip(arrays, rings, strict=True)]
            for arrays in (self._cache.keys, self._cache.values)
        )
        mx.eval([a for a in [*keys, *values] if a is not None])
        self._marks.append(_Mark(least, length, self._cache.written, keys, values))

    def keep(self, tokens: Sequence[int]) -> None:
        """The cache holds these tokens, and perhaps more behind them."""
        self._ids = list(tokens)

    def forget(self) -> None:
        """Nothing is known any more."""
        self._ids, self._cache, self._marks = [], None, []

    def _shared(self, prompt: Sequence[int]) -> int:
        """Length of the common beginning, short of the whole prompt."""
        known = self.tokens
        longest = min(len(known), len(prompt) - 1)
        pairs = zip(known[:longest], prompt, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), longest)

    def _rewind(self, cache: Cache, length: int) -> int:
        """Take the cache back to at most this many positions; returns how many it holds then."""
        if length < self._least(cache):
            if not self._marks:
                return 0
            mark = self._marks[-1]  # each was made behind the one before
            for i, keys in enumerate(mark.keys):
                if keys is not None:
                    cache.keys[i], cache.values[i] = _copy(keys), _copy(mark.values[i])
            cache.written, length = mark.written, mark.length
        cache.restart(length)
        return length

    @staticmethod
    def _least(cache: Cache) -> int:
        """The fewest positions that the rings can be taken back to."""
        return cache.kept_from + cache.window - 1 if cache.kept_from else 0


def check_prefix(op: str, prefix: Any) -> None:
    """Refuse what is no prefix.

    Raises:
        ValueError: It is neither a Prefix nor None.
    """
    if not isinstance(prefix, (Prefix, NoneType)):
        raise ValueError(f"[{op}] prefix must be a Prefix or None but got {shown(prefix)}.")


def _copy(a: mx.array | None) -> mx.array | None:
    """An independent copy; a plain handle would see later writes."""
    return None if a is None else a * 1
