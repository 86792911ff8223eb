"""Prefixes of many generations: one each while it runs, kept for those to come."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.engine.prefix import Prefix
from pyengine.model.cache import Arena


class Slots:
    """So many prefixes of one arena; an idle one is taken for the prompt that it serves best."""

    def __init__(self, count: int, arena: Arena) -> None:
        self._idle = [Prefix(arena) for _ in range(count)]  # the least recently used first

    @property
    def idle_nbytes(self) -> int:
        """Memory of those that nobody has taken."""
        return sum(prefix.nbytes for prefix in list(self._idle))

    def take(self, prompt: Sequence[int]) -> Prefix:
        """An idle prefix for a prompt.

        The one that spares most of it, if that is half or more; else an empty one, so that
        conversations by turns do not make each other forget; else the least recently used.
        """
        shared = [_shared(prefix.tokens, prompt) for prefix in self._idle]
        best = self._idle[shared.index(max(shared))]
        if 2 * max(shared) < len(prompt):
            empty = (prefix for prefix in self._idle if not prefix.tokens)
            best = next(empty, self._idle[0])
        self._idle.remove(best)
        return best

    def give_back(self, prefix: Prefix) -> None:
        self._idle.append(prefix)

    def shrink(self, nbytes: int, keep: int = 0) -> None:
        """Forget idle prefixes, the least recently used first, until all idle ones but the newest
        ``keep`` are within so many bytes together."""
        for prefix in self._idle[: len(self._idle) - keep]:
            if self.idle_nbytes <= nbytes:
                return
            prefix.forget()


def _shared(known: Sequence[int], prompt: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(known, prompt, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(known), len(prompt)))
