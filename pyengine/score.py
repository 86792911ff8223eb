"""How likely the target finds given tokens: log-probabilities without a generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import mlx.core as mx

from pyengine.messages import prompt_ids
from pyengine.prefix import Prefix
from pyengine.speculate import NonFinite

if TYPE_CHECKING:
    from pyengine.pair import Pair

SCORE_BLOCK = 16  # rows of one call, each row [V] of logits


def score(
    pair: Pair,
    context: Sequence[int],
    continuation: Sequence[int],
    *,
    prefix: Prefix | None = None,
) -> tuple[list[float], bool]:
    """How likely the target finds given tokens after a context, before any sampling filter.

    Args:
        pair: From :func:`pyengine.load`.
        context: Token ids, at least one.
        continuation: Token ids to be scored.
        prefix: Keys and values of earlier calls on this pair, and for later ones.

    Returns:
        The natural logarithm of each token's probability, and whether greedy decoding would write
        these very tokens.

    Raises:
        ValueError: The context is empty, or both together do not fit the target's.
        RuntimeError: The weights gave logits that are not finite.
    """
    prefix = Prefix() if prefix is None else prefix
    whole = prompt_ids(pair, [*context, *continuation])
    if not context:
        raise ValueError("[score] context must hold at least one token but got none.")
    target, logprobs, greedy = pair.target, [], True
    cache, known = prefix.open(target, context, SCORE_BLOCK)
    # The newest token of the context goes with the continuation: its logits are the first scored
    begin = len(context) - 1
    if known < begin:
        target.prefill(whole[known:begin], cache)
    prefix.mark(begin)
    for at in range(begin, len(whole) - 1, SCORE_BLOCK):
        block = mx.array(whole[at : at + SCORE_BLOCK][: len(whole) - 1 - at], dtype=mx.int32)
        following = mx.array(whole[at + 1 : at + 1 + block.size], dtype=mx.int32)
        rows, _ = target.verify(block, cache)
        cache.commit(mx.array(block.size, dtype=mx.int32), cache.bound + block.size)
        chosen = mx.take_along_axis(rows, following[:, None], axis=-1)[:, 0]
        found = chosen - mx.logsumexp(rows, axis=-1)
        best = mx.argmax(rows, axis=-1) == following
        mx.eval(found, best, cache.length)
        if not mx.isfinite(found).all():
            raise NonFinite("[score] logits must be finite but got NaN or infinity.")
        logprobs += cast("list[float]", found.tolist())
        greedy = greedy and bool(best.all())
    prefix.keep(whole[:-1])
    return logprobs, greedy
