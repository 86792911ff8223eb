"""Prompts of several texts that one call of the target processes."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pyengine.engine.sequence import Round, TokenSequence
from pyengine.model.target import Part


def process(sequences: Sequence[TokenSequence]) -> list[Round | Exception]:
    """The next part of each prompt, in one call of the target; by sequence what it came to, or why
    it failed: a sequence that fails takes no other with it. Evaluates.

    They are of one target and arena, and have no more rows together than one call may have.
    """
    start = time.perf_counter()
    parts: dict[TokenSequence, Part | None] = {}
    done: dict[TokenSequence, Round | Exception] = {}
    for sequence in sequences:
        try:
            part = sequence.next_part()
            if part is not None and len(sequences) > 1:  # who finds no room must not fail in a call
                part.cache.reserve(len(part.ids))
            parts[sequence] = part
        except Exception as error:
            done[sequence] = error.with_traceback(None)  # which would hold the caches
    going = {sequence: part for sequence, part in parts.items() if part is not None}
    made = sequences[0].target.prefill_together([*going.values()]) if going else []
    found = dict(zip(going, made, strict=True))
    for sequence in parts:
        try:
            done[sequence] = sequence.take_part(found.get(sequence), start)
        except Exception as error:
            done[sequence] = error.with_traceback(None)
    return [done[sequence] for sequence in sequences]
