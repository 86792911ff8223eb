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
from pyengine.model.target import Reader


class Prefilled(NamedTuple):
    """What a chunk of the prefill gave, and how much of the prompt is done."""

    done: int
    logits: mx.array  # [V]
    hidden: mx.array  # [1, E]


def prefill(
    target: TargetLike,
    prompt: list[int],
    cache: Cache,
    known: int,
    prefix: Prefix | None = None,
    reader: Reader | None = None,
) -> Iterator[Prefilled]:
    """Process a prompt from place ``known`` on, a chunk at a time. Evaluates once per chunk.

    A prefix gets its marks: where prompts part, where no more than a chunk is left, at the end.
    """
    parting, done = 0 if prefix is None else prefix.parting, known
    last = last_chunk(known, len(prompt))
    while done < len(prompt):
        forked.check("generate")
        end = chunk_end(done, len(prompt))
        if done < parting < end:
            end = parting
        if prefix is not None and done in (parting, last):
            prefix.mark(done)
        logits, hidden = target.prefill(prompt[done:end], cache, reader=reader)
        done = end
        if prefix is not None and done == len(prompt):
            prefix.mark(done)
        yield Prefilled(done, logits, hidden)


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
