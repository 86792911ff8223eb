from typing import Literal, NamedTuple, cast

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .draw_token import exponential, invert, race, uniforms
from .random_uniform import Purpose

Rule = Literal["residual", "block", "coupled"]
RULES: tuple[Rule, ...] = ("residual", "block", "coupled")


def accept_block(
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
) -> tuple[mx.array, mx.array]:
    """Decide how many drafts of a block are kept, and draw the token that follows them.

    * ``residual``: draft i is kept iff those before it were and ``u < p(d) / q(d)``; the next token
      is drawn from ``(p - q)+``.
    * ``block``: with ``a[0] = 1``, ``a[i] = min(1, a[i - 1] p(d) / q(d))``, ``s[i]`` the mass of
      ``(a[i] p - q)+`` in row i and ``h[i] = s[i] / (s[i] + 1 - a[i])``, ``h[k] = a[k]``: the
      largest i with ``u[i] < h[i]`` drafts are kept; the next token is drawn from
      ``(a[i] p - q)+``. It keeps at least as many as ``residual`` on average.
    * ``coupled``: row t draws the token that :func:`draw_token` gives with shared noise at
      ``position + 1 + t``; drafts are kept while they are that token, and the first that differs is
      replaced by it. The text is that of plain decoding.

    After k kept drafts the next token is drawn from p's last row. Where a correction has no mass
    (p = q), the row of p stands in. Uniforms come from the counter (position, index). On a GPU
    plain MLX serves more than 128 drafts or 256 candidates, with an order of addition of its own.

    Args:
        p_ids: The target's candidates, int32 ``[k + 1, n]``; row i follows i drafts.
        p_probs: float32 ``[k + 1, n]``.
        q_ids: The assistant's candidates, int32 ``[k, m]``; draft i was drawn from row i. k is at
            least 1.
        q_probs: float32 ``[k, m]``.
        drafts: int32 ``[k]``.
        position: Absolute position of the block's first token, int32 ``[]``.
        seed: uint32 ``[]``.
        rule: One of the three above.
        vocab: V, at most 2097152. Ids lie below it; a correction is drawn as if q had none of those
            that do not.

    Returns:
        The number of drafts kept, int32 ``[]``, which is also the row whose hidden vector the next
        draft starts from; and the next token, int32 ``[1]``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.

    Source: arXiv:2211.17192 and arXiv:2302.01318 (residual), arXiv:2403.10444 (block).
    """
    args = (p_ids, p_probs, q_ids, q_probs, drafts, position, seed)
    out = _ext.accept_block(*args, rule, vocab)
    accepted, token = run(out, accept_block_reference, *args, rule=rule, vocab=vocab)
    return accepted, token


def accept_block_reference(
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
) -> tuple[mx.array, mx.array]:
    """The same in plain MLX, equal bit for bit; all arrays may have leading dimensions."""
    p, q = Rows(p_ids, p_probs), Rows(q_ids, q_probs)
    index = mx.arange(p_ids.shape[-2], dtype=mx.uint32)
    position, seed = position[..., None].astype(mx.uint32), seed[..., None]
    if rule == "coupled":
        at = (position + 1 + index)[..., None]
        times = exponential(uniforms(at, p_ids, seed[..., None], Purpose.PLAIN))
        accepted, token = accept_coupled(p, drafts, times)
    else:
        u_accept, u_next = (
            uniforms(position, index, seed, use) for use in (Purpose.ACCEPT, Purpose.CORRECT)
        )
        accepted, token = accept(cast(Rule, rule), p, q, drafts, u_accept[..., :-1], u_next, vocab)
    return accepted, token[..., None]


class Rows(NamedTuple):
    """Candidates and their probabilities, ``[..., T, n]`` each."""

    ids: mx.array
    probs: mx.array


def accept(
    rule: Rule,
    p: Rows,
    q: Rows,
    drafts: mx.array,
    u_accept: mx.array,
    u_next: mx.array,
    vocab: int,
) -> tuple[mx.array, mx.array]:
    """``residual`` and ``block`` with given uniforms, ``[..., k]`` and ``[..., k + 1]``."""
    chances, weights = acceptance(rule, p, q, drafts, vocab)
    accepted = count_accepted(rule, u_accept < chances)
    tokens = invert(p.ids, weights, u_next)  # what would follow, at every row
    return accepted, mx.take_along_axis(tokens, accepted[..., None], axis=-1)[..., 0]


def accept_coupled(p: Rows, drafts: mx.array, times: mx.array) -> tuple[mx.array, mx.array]:
    """``coupled`` with given exponential times ``[..., k + 1, n]`` of p's candidates."""
    tokens = race(p.ids, p.probs, times)
    accepted = count_accepted("coupled", tokens[..., :-1] == drafts)
    return accepted, mx.take_along_axis(tokens, accepted[..., None], axis=-1)[..., 0]


def acceptance(
    rule: Rule, p: Rows, q: Rows, drafts: mx.array, vocab: int
) -> tuple[mx.array, mx.array]:
    """What uniforms are compared with, ``[..., k]``, and what is drawn from, ``[..., k + 1, n]``.

    Row i of the second, not normalised, is what follows if i drafts are kept.
    """
    k = drafts.shape[-1]
    own = Rows(p.ids[..., :k, :], p.probs[..., :k, :])  # the rows that have a draft
    target, assistant = probability_of(own, drafts), probability_of(q, drafts)
    if rule == "residual":
        scale = mx.ones_like(target)
    else:
        running = [mx.ones_like(target[..., :1])]  # a[0]
        for i in range(k):
            running.append(_ratio(running[i] * target[..., i : i + 1], assistant[..., i : i + 1]))
        scale = mx.concatenate(running[:k], axis=-1)
    # One place more takes the ids outside of the vocabulary, which have no q
    at, known = _places(q.ids, vocab)
    by_id = mx.zeros((*q.ids.shape[:-1], vocab + 1), dtype=q.probs.dtype)
    by_id = mx.put_along_axis(by_id, at, mx.where(known, q.probs, 0), axis=-1)
    at, _ = _places(own.ids, vocab)
    excess = scale[..., None] * own.probs - mx.take_along_axis(by_id, at, axis=-1)
    excess = mx.maximum(excess, 0)
    mass = mx.cumsum(excess, axis=-1)[..., -1:]
    weights = mx.where(mass > 0, excess, own.probs)
    weights = mx.concatenate([weights, p.probs[..., k:, :]], axis=-2)
    if rule == "residual":
        return _ratio(target, assistant), weights
    left = mass[..., 1:, 0]  # s[1] to s[k - 1]
    whole = left + (1 - scale[..., 1:])
    inner = mx.where(whole > 0, left / mx.where(whole > 0, whole, 1), 1)
    return mx.concatenate([inner, running[k]], axis=-1), weights


def count_accepted(rule: Rule, passed: mx.array) -> mx.array:
    """Drafts kept: all before the first failure, or for ``block`` up to the last success."""
    if rule == "block":
        index = mx.arange(1, passed.shape[-1] + 1, dtype=mx.int32)
        return mx.max(mx.where(passed, index, 0), axis=-1)
    return mx.cumprod(passed.astype(mx.int32), axis=-1).sum(axis=-1).astype(mx.int32)


def probability_of(rows: Rows, tokens: mx.array) -> mx.array:
    """Probability of one token per row, ``[..., T]``; 0 for a token that is no candidate."""
    return mx.where(rows.ids == tokens[..., None], rows.probs, 0).sum(axis=-1)


def _places(ids: mx.array, vocab: int) -> tuple[mx.array, mx.array]:
    """Where ids stand among V + 1 places, the last for all that are outside; which are inside."""
    known = (ids >= 0) & (ids < vocab)
    return mx.where(known, ids, vocab), known


def _ratio(target: mx.array, assistant: mx.array) -> mx.array:
    return mx.where(target > 0, mx.minimum(target / assistant, 1), 0)
