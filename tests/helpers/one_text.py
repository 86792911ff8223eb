"""The ops that take several texts at once, as tests of one text call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from pyengine import ops
from pyengine.model.head import Logits
from pyengine.ops.accept_block import RULES
from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.sampler import Chooser, Sampler


def draw_rows(
    ids: mx.array,
    probs: mx.array,
    position: mx.array,
    seed: mx.array,
    *,
    index: int = 0,
    shared: bool,
    op: Callable[..., mx.array] | None = None,
) -> mx.array:
    """``draw_token`` with row t at index ``index + t`` of one position."""
    rows = ids.shape[0]
    op = ops.draw_token if op is None else op
    at = (mx.broadcast_to(a, (rows,)) for a in (position, seed))
    position, seed = at
    indices = mx.arange(index, index + rows, dtype=mx.int32)
    return op(ids, probs, position, indices, seed, mx.full((rows,), shared))


def accept_alone(
    p_ids: mx.array,
    p_probs: mx.array,
    q_ids: mx.array,
    q_probs: mx.array,
    drafts: mx.array,
    position: mx.array,
    seed: mx.array,
    *,
    rule: str,
    vocab: int,
    op: Callable[..., Any] | None = None,
) -> tuple[mx.array, mx.array]:
    """``accept_block`` of one block: drafts kept and the next token, ``[1]`` each."""
    state = (drafts, position[None], seed[None], mx.array([RULES.index(rule)], dtype=mx.int32))
    op = ops.accept_block if op is None else op
    rows = (p_ids, p_probs, q_ids, q_probs)
    accepted, token = op(*rows, *state, counts=(p_ids.shape[0],), vocab=vocab)
    return accepted, token


def filter_alone(
    sampler: Sampler,
    logits: mx.array | Logits,
    drafts: mx.array | None = None,
    first: int = 0,
) -> Filtered:
    """The distributions of rows ``first`` on of one text's block with these drafts."""
    rows = logits.shape[0]
    before = range(first, first + rows) if drafts is not None else [0] * rows
    table = None if drafts is None or not drafts.size else drafts[None]
    return Chooser.of([sampler]).filter(logits, [0] * rows, table, list(before))
