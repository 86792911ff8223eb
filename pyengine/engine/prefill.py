"""A prompt on its way into a cache, and one that several texts begin with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from pyengine import forked
from pyengine.drafters.drafter import TargetLike
from pyengine.engine.prefix import Prefix
from pyengine.model.cache import Cache
from pyengine.model.plan import chunk_end, last_chunk
from pyengine.model.target import Part, Reader


class Reading:
    """A prompt on its way into a cache, a part at a time. A part ends with a chunk or the prompt.

    A prefix gets its marks: where prompts part, where no more than a chunk is left, at the end.

    Args:
        ids: Its tokens.
        cache: Holds the first ``known`` of them.
        known: How many.
        prefix: Whose cache that is, if it is one's.
        reader: Is told of every row.
    """

    def __init__(
        self,
        ids: list[int],
        cache: Cache,
        known: int,
        prefix: Prefix | None = None,
        reader: Reader | None = None,
    ) -> None:
        self.ids, self.cache, self.done = ids, cache, known
        self._prefix, self._reader = prefix, reader
        self._parting = 0 if prefix is None else prefix.parting
        self._last = last_chunk(known, len(ids))

    @property
    def next_end(self) -> int:
        """Where the next part ends."""
        end = chunk_end(self.done, len(self.ids))
        return self._parting if self.done < self._parting < end else end

    def part(self) -> Part:
        """The next part.

        Raises:
            RuntimeError: The process was forked from one that had used MLX.
        """
        forked.check("generate")
        if self._prefix is not None and self.done in (self._parting, self._last):
            self._prefix.mark(self.done)
        return Part(self.ids[self.done : self.next_end], self.cache, self._reader)

    def note(self) -> bool:
        """Note that the next part was processed; whether it was the last one."""
        self.done = self.next_end
        is_whole = self.done == len(self.ids)
        if self._prefix is not None and is_whole:
            self._prefix.mark(self.done)
        return is_whole


class Prefilled(NamedTuple):
    """What a chunk of the prefill gave, and how much of the prompt is done."""

    done: int
    logits: mx.array  # [V]
    hidden: mx.array  # [1, E]


def prefill(
    target: TargetLike,
    ids: list[int],
    cache: Cache,
    known: int,
    prefix: Prefix | None = None,
    reader: Reader | None = None,
) -> Iterator[Prefilled]:
    """Process a prompt by itself, a part at a time; arguments as :class:`Reading`. Evaluates once
    per part."""
    reading = Reading(ids, cache, known, prefix, reader)
    while reading.done < len(ids):
        part = reading.part()
        made = target.prefill(part.ids, part.cache, reader=part.reader)
        reading.note()
        yield Prefilled(reading.done, *made)


class Begun(NamedTuple):
    """A prompt that was processed: what several texts may start from."""

    cache: Cache
    logits: mx.array
    hidden: mx.array
    drafter: list[mx.array]


class Shared:
    """A prompt that several texts begin with; the first that comes to it processes it.

    ``texts`` is how many they are. They share the pages of its keys and values but the last one,
    of which each gets a copy; the last text gets what was left for all.
    """

    def __init__(self, texts: int) -> None:
        self._left, self._running = texts - 1, texts
        self._begun: Begun | None = None

    def take(self) -> Begun | None:
        """What the first one left; None where nobody has been there. Evaluates."""
        begun = self._begun
        if begun is None:
            return None
        self._left -= 1
        if not self._left:
            self._begun = None
            return begun
        return _copied(begun)

    def leave(self, begun: Begun) -> None:
        """Leave a copy for the others. Evaluates."""
        if self._begun is None and self._left:
            self._begun = _copied(begun)

    def end(self) -> None:
        """One of the texts has ended, or never began."""
        self._running -= 1
        if not self._running and self._begun is not None:
            self._begun.cache.release()
            self._begun = None


def _copied(begun: Begun) -> Begun:
    """What a text may write to, apart."""
    carried = [a * 1 for a in begun.drafter]
    return begun._replace(cache=begun.cache.fork(begun.cache.committed), drafter=carried)
