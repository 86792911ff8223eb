"""Keys and values kept from one generation for the next: a known prompt prefix is processed once.

Full layers keep every position, so going back means to begin with fewer of their pages. The pages
of sliding layers are given back behind the window, so going back further needs a mark: a fork,
which holds a window of them, whatever the context. Marks are made at a prompt's end and where no
more than a chunk of it is left, for another answer and for another last turn; and where two prompts
were seen to part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import NoneType
from typing import Any, NamedTuple

from pyengine.drafters.drafter import TargetLike
from pyengine.model.cache import Arena, Cache
from pyengine.model.plan import border, reusable, whole
from pyengine.ops.dispatch import borrows
from pyengine.untrusted import shown

MAX_MARKS = 3
WORTH_A_MARK = 16  # tokens


class _Mark(NamedTuple):
    """A fork, whose first ``length`` positions are those of the text that is known."""

    cache: Cache
    length: int


class Prefix:
    """A cache kept between generations on one pair; it serves one generation at a time.

    If a prompt is repeated, or continues where the last answer ended, all but its last known token
    are reused, whatever the context. A prompt that differs in its last turn is reused up to the
    beginning of that turn (a first prompt and a long turn: up to the last multiple of 512 tokens).
    One that differs earlier is reused up to where earlier prompts were seen to differ.

    On a GPU, where whole chunks of 512 run other kernels than what is shorter, only what the new
    prompt's own calls would have made alike is reused, so that no bit goes with what was asked
    before: whole chunks, and what lies behind them while the new prompt completes no further one.

    It holds the cache and at most three marks, each at most a window's pages of the sliding layers
    (in bfloat16 0.94 GB for the 31B, 0.24 GB for the 26B, 0.38 GB for the 12B, 26 MB for E4B and
    8 MB for E2B) and a page of the full ones; what it has in common with the cache is there once.
    ``tokens`` are the ids whose keys and values the cache holds; ``reused`` is how many of the last
    prompt's were found there.
    """

    def __init__(self, arena: Arena | None = None) -> None:
        self._shared_arena = arena  # with others; else it makes one of its own
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
        """Memory of the pages of the cache and its marks."""
        caches = [mark.cache for mark in self._marks]
        cache = self._cache  # another thread may forget it meanwhile
        if cache is None:
            return 0
        caches.append(cache)
        full = {page for each in caches for page in each.full}
        sliding = {page for each in caches for page in list(each.sliding.values())}
        sizes = (cache.arena.page_bytes(kind) for kind in (False, True))
        return sum(n * size for n, size in zip((len(full), len(sliding)), sizes, strict=True))

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

    def open(
        self, target: TargetLike, prompt: Sequence[int], stop: int | None = None
    ) -> tuple[Cache, int]:
        """A cache that holds the first n tokens of a prompt, and n. Evaluates.

        At least one token is left to process, for its logits. The prompt counts as known as far as
        it gets into the cache, until :meth:`keep` tells more. ``parting`` is where this
        prompt and the one before part if that is worth a mark, else 0. Only what this prompt's
        calls would have made alike is reused (:mod:`pyengine.model.plan`); ``stop`` is where those
        calls end, if not with the prompt.
        """
        mlx, end = borrows(), len(prompt) if stop is None else stop
        if target is not self._target:
            self.forget()
        old, shared = self._cache, self._shared(prompt)

        def alike(length: int) -> int:
            return reusable(length, self._whole, end, mlx)

        self._ids = []  # nothing is known if Ctrl-C comes in here
        marks = [mark._replace(length=alike(min(mark.length, shared))) for mark in self._marks]
        self._keep_marks([mark for mark in marks if mark.cache.can_fork(mark.length)])
        ends = [] if old is None else [_Mark(old, alike(shared)), *reversed(self._marks)]
        best = next((each for each in ends if each.cache.can_fork(each.length)), None)
        if best is None or not best.length:
            self.reused = 0
            self._cache = self._new_cache(target)
            self._keep_marks([])
        else:
            self.reused = best.length
            self._cache = best.cache.fork(best.length)
        if old is not None:
            old.release()
        self._target, self._ids, self._whole = target, list(prompt), whole(end, mlx)
        parting = border(shared, end, mlx)
        self.parting = parting if parting - self.reused >= WORTH_A_MARK else 0
        return self._cache, self.reused

    def _new_cache(self, target: TargetLike) -> Cache:
        if self._shared_arena is not None:
            return self._shared_arena.new_cache()
        return target.new_cache() if self._cache is None else self._cache.arena.new_cache()

    def mark(self, length: int) -> None:
        """Fork the cache, which has ``length`` positions, so that a later prompt can begin there.
        Evaluates."""
        cache = self._cache
        assert cache is not None
        if any(m.length >= length and m.cache.can_fork(length) for m in self._marks):
            return
        # The shortest stays: it is likeliest to be what other conversations begin with
        marks = [m for m in self._marks if not cache.can_fork(m.length)]
        marks = marks[:1] + marks[1:][-(MAX_MARKS - 2) :]
        self._keep_marks([*marks, _Mark(cache.fork(length), length)])

    def _keep_marks(self, marks: list[_Mark]) -> None:
        """Have these marks, and release the others."""
        kept = [mark.cache for mark in marks]
        for mark in self._marks:
            if mark.cache not in kept:
                mark.cache.release()
        self._marks = marks

    def keep(self, tokens: Sequence[int]) -> None:
        """The cache holds these tokens, and perhaps more behind them."""
        self._ids = list(tokens)

    def forget(self) -> None:
        """Nothing is known any more."""
        cache, self._ids, self._cache = self._cache, [], None
        self._keep_marks([])
        if cache is not None:
            cache.release()

    def _shared(self, prompt: Sequence[int]) -> int:
        """Length of the common beginning, short of the whole prompt."""
        known = self.tokens
        longest = min(len(known), len(prompt) - 1)
        pairs = zip(known[:longest], prompt, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), longest)


def check_prefix(op: str, prefix: Any) -> None:
    """Refuse what is no prefix.

    Raises:
        ValueError: It is neither a Prefix nor None.
    """
    if not isinstance(prefix, (Prefix, NoneType)):
        raise ValueError(f"[{op}] prefix must be a Prefix or None but got {shown(prefix)}.")
