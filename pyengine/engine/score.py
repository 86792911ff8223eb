"""How likely the target finds given tokens: log-probabilities without a generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from pyengine import forked, ops
from pyengine.arguments import check_length, check_vocabulary, token_ids
from pyengine.arguments import whole as whole_number
from pyengine.checkpoint import memory
from pyengine.engine.prefill import prefill
from pyengine.engine.prefix import Prefix, check_prefix
from pyengine.engine.report import NonFinite
from pyengine.model.cache import Cache
from pyengine.model.head import Logits
from pyengine.model.plan import border, plan
from pyengine.model.target import Target
from pyengine.ops.dispatch import borrows
from pyengine.ops.filter_logits import MAX_TOP_K
from pyengine.sampling.sampler import Logprob
from pyengine.untrusted import shown

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

SCORE_BLOCK = 16  # rows of one call, each row [V] of logits

Progress = Callable[[int, int], None]


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
        ValueError: An argument is of another type, the context is empty, or both together do not
            fit the target's, or the memory.
        RuntimeError: The weights gave logits that are not finite.
    """
    before = token_ids("score", "context", context)
    whole = [*before, *token_ids("score", "continuation", continuation)]
    _check_ids(pair, whole)
    check_prefix("score", prefix)
    if not before:
        raise ValueError("[score] context must hold at least one token but got none.")
    logprobs: list[float] = []
    all_best = True
    prefix = Prefix() if prefix is None else prefix
    for rows, following in _rows(pair, whole, len(before), prefix):
        chosen = mx.take_along_axis(rows, following[:, None], axis=-1)[:, 0]
        logprobs += cast("list[float]", (chosen - mx.logsumexp(rows, axis=-1)).tolist())
        all_best = all_best and bool((mx.argmax(rows, axis=-1) == following).all())
    return logprobs, all_best


def prompt_logprobs(
    pair: Pair, ids: Sequence[int], count: int, progress: Progress | None = None
) -> list[Logprob]:
    """Log-probabilities of a prompt's tokens but the first, and of the ``count`` best ones there.

    Args:
        pair: From :func:`pyengine.load`.
        ids: Token ids, at least one.
        count: How many of the best, 0 to 256.
        progress: Called after each block of rows with the tokens that are done and how many there
            are; may raise to end it.

    Raises:
        ValueError: The prompt is empty, or does not fit the context or the memory.
        RuntimeError: The weights gave logits that are not finite.
    """
    found: list[Logprob] = []
    whole = token_ids("score", "ids", ids)
    _check_ids(pair, whole)
    if not 0 <= whole_number("score", "count", count) <= MAX_TOP_K:
        raise ValueError(f"[score] count must be 0 to {MAX_TOP_K} but got {count}.")
    if not (progress is None or callable(progress)):
        raise ValueError(f"[score] progress must be a function but got {shown(progress)}.")
    for rows, following in _rows(pair, whole, 1, Prefix()):
        parts = [following[:, None]]
        if count:
            parts.append(ops.filter_logits(rows, top_k=count).ids)
        named = mx.concatenate(parts, axis=-1)
        values = mx.take_along_axis(rows, named, axis=-1) - mx.logsumexp(rows, -1, keepdims=True)
        ids_of, logprobs_of = cast(Any, named.tolist()), cast(Any, values.tolist())
        for (token, *best), (own, *theirs) in zip(ids_of, logprobs_of, strict=True):
            found.append(Logprob(token, own, list(zip(best, theirs, strict=True))))
        if progress is not None:
            progress(len(found) + 1, len(whole))
    return found


def _check_ids(pair: Pair, ids: list[int]) -> None:
    check_vocabulary(ids, pair.target.config.vocab_size)
    check_length(ids, pair.target.context)


def _rows(
    pair: Pair, whole: list[int], first: int, prefix: Prefix
) -> Iterator[tuple[mx.array, mx.array]]:
    """The logits of the tokens from place ``first`` on, and those tokens, a block at a time."""
    forked.check("score")
    target = pair.target
    memory.check_prompt(target, len(whole), None, SCORE_BLOCK, prefix)
    stop = len(whole) - 1  # the last token has nothing after it
    with prefix.in_use():
        cache, known = prefix.open(target, whole[:first], stop)
        # The newest token of the context goes with the block: its logits are the first scored
        begin = border(first - 1, stop, borrows())
        for _ in prefill(target, whole[:begin], cache, known, prefix):
            pass
        for at, logits in _blocks(target, whole[:stop], begin, first - 1, cache):
            rows = logits.array
            following = mx.array(whole[at + 1 : at + 1 + rows.shape[0]], dtype=mx.int32)
            mx.eval(rows, cache.arrays)
            if not mx.isfinite(mx.logsumexp(rows, axis=-1)).all():
                raise NonFinite("score", target.dtype)
            yield rows, following
        prefix.keep(whole[:-1])


def _blocks(
    target: Target, ids: list[int], begin: int, first: int, cache: Cache
) -> Iterator[tuple[int, Logits]]:
    """Process ids from ``begin`` on; yields the rows from ``first`` on, a block at a time, each
    with its first position."""
    for start, count, kernel in plan(begin, len(ids), borrows()):
        end = start + count
        if kernel == "mlx":  # a whole chunk, though the context may end inside
            (chunk,) = target.rows(ids[start:end], cache)
            skipped = max(0, first - start)
            for i, logits in enumerate(chunk.parts(SCORE_BLOCK, skipped)):
                yield start + skipped + i * SCORE_BLOCK, logits
            continue
        for at in range(start, end, SCORE_BLOCK):
            block = mx.array(ids[at : min(at + SCORE_BLOCK, end)], dtype=mx.int32)
            logits = target.forward([block], [cache])[0]
            cache.settle(at + block.size)
            yield at, logits
