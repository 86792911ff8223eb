"""The loop over the rounds of a generation. Token ids only.

The prefill gives the first token; each round (:mod:`pyengine.engine.round`) commits one or more,
until a stop id comes up or the room ends.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import mlx.core as mx

from pyengine import forked
from pyengine.drafters.drafter import Drafter, TargetLike
from pyengine.engine.prefix import Prefix
from pyengine.engine.rounds import Rounds
from pyengine.engine.sequence import Round, TokenSequence
from pyengine.engine.stats import Stats
from pyengine.model.cache import Arena
from pyengine.sampling.settings import Sampling

if TYPE_CHECKING:  # what brings NumPy is imported where it is needed
    from pyengine.engine.guided import Matcher


def decode(
    target: TargetLike,
    drafter: Drafter | None,
    prompt: list[int],
    *,
    sampling: Sampling,
    block_size: int,
    auto: bool = False,
    max_tokens: int | None = None,
    stop_ids: frozenset[int] = frozenset(),
    stats: Stats | None = None,
    prefix: Prefix | None = None,
    matcher: Matcher | None = None,
    rounds: Rounds | None = None,
    arena: Arena | None = None,
    tree: int | None = None,
) -> Generator[Round, None, None]:
    """Generate tokens after ``prompt``, a round at a time. Evaluates once per round; with a matcher
    once more per draft that is drawn.

    Args:
        target: The target.
        drafter: Where drafts come from, made for this generation; may be None when ``block_size``
            is 1.
        prompt: Token ids, at least one.
        sampling: How tokens are chosen.
        block_size: Primary token and its drafts, 2 to 128; 1 is plain decoding.
        auto: Each round takes as many drafts as pay, up to ``block_size``. For greedy decoding and
            the rule ``coupled``, where no text can tell.
        max_tokens: At most this many new tokens; None: as many as the context holds.
        stop_ids: Ids that end the text.
        stats: Filled as rounds end.
        prefix: What earlier generations left; what this one leaves. After an error forget it.
        matcher: Says which tokens may come next; it has seen none.
        rounds: What plays the rounds, if it is to be others than the exact ones, or earlier texts'.
        arena: Where keys and values go if no prefix has them; None for one of its own.
        tree: Each round's drafts are a tree of so many, 1 to 15, at most ``block_size - 1`` behind
            one another. For DFlash drafters, greedy decoding and the rule ``coupled``.

    Yields:
        How far the prefill is, between its chunks; the first token after it; then what each round
        committed. Closed between two chunks, what is processed is in the prefix.

    Raises:
        ValueError: A setting is impossible or the prompt does not fit the context.
        RuntimeError: The target's logits are not finite, the cache outgrows the memory, the grammar
            cannot be followed, or the process was forked from one that had used MLX.
    """
    forked.check("generate")
    sequence = TokenSequence(
        target,
        drafter,
        prompt,
        sampling=sampling,
        block_size=block_size,
        auto=auto,
        max_tokens=max_tokens,
        stop_ids=stop_ids,
        stats=stats,
        prefix=prefix,
        matcher=matcher,
        arena=arena,
        tree=tree,
    )
    mx.reset_peak_memory()
    rounds = Rounds() if rounds is None else rounds
    try:
        yield from sequence.prefill()
        while sequence.finish_reason is None:
            rounds.choose([sequence])
            [done] = rounds.play([sequence])
            if isinstance(done, Exception):
                try:
                    raise done
                finally:
                    del done  # its trace holds this frame: a cycle would keep the cache
            yield done
    finally:
        sequence.release()
