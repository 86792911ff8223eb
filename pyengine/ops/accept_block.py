from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .draw_token import draw_token_reference, exponential, invert, race, uniforms
from .example import MOST, Call, Results, candidates
from .random_uniform import Purpose
from .sizes import Shape, Sizes

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
    rule: mx.array,
    *,
    counts: Sequence[int],
    vocab: int,
) -> tuple[mx.array, mx.array]:
    """Decide how many drafts of each of Q blocks are kept, and draw the token that follows them.

    Rows of all blocks stand behind one another. Of a block with k drafts:

    * ``residual`` (0): draft i is kept iff those before it were and ``u < p(d) / q(d)``; the next
      token is drawn from ``(p - q)+``.
    * ``block`` (1): with ``a[0] = 1``, ``a[i] = min(1, a[i - 1] p(d) / q(d))``, ``s[i]`` the mass
      of ``(a[i] p - q)+`` in row i and ``h[i] = s[i] / (s[i] + 1 - a[i])``, ``h[k] = a[k]``: the
      largest i with ``u[i] < h[i]`` drafts are kept; the next token is drawn from
      ``(a[i] p - q)+``. It keeps at least as many as ``residual`` on average.
    * ``coupled`` (2): row t draws the token that :func:`draw_token` gives with shared noise at
      ``position + 1 + t``; drafts are kept while they are that token, and the first that differs is
      replaced by it. The text is that of plain decoding.

    After k kept drafts the next token is drawn from p's last row; a block without drafts draws its
    own as ``coupled`` does, whatever its rule. Where a correction has no mass (p = q), the row of p
    stands in. Uniforms come from the counter (position, index). On a GPU plain MLX serves more than
    128 drafts in a block, 256 candidates or 1000 blocks, with an order of addition of its own, and
    calls without drafts.

    Args:
        p_ids: The target's candidates, int32 ``[R, n]``: k + 1 rows per block; its row i follows i
            drafts. Rows may be padded with ids below 0 of probability 0.
        p_probs: float32 ``[R, n]``.
        q_ids: The assistant's candidates, int32 ``[R - Q, m]``: k rows per block; draft i was drawn
            from row i. Padded likewise.
        q_probs: float32 ``[R - Q, m]``.
        drafts: int32 ``[R - Q]``.
        position: Absolute position of each block's first token, int32 ``[Q]``.
        seed: uint32 ``[Q]``.
        rule: Place in :data:`RULES`, int32 ``[Q]``.
        counts: k + 1 of each of the Q blocks.
        vocab: V, at most 2097152. Ids lie below it; a correction is drawn as if q had none of those
            that do not.

    Returns:
        The number of drafts kept, int32 ``[Q]``, which is also the block's row whose hidden vector
        the next draft starts from; and the next tokens, int32 ``[Q]``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.

    Source: arXiv:2211.17192 and arXiv:2302.01318 (residual), arXiv:2403.10444 (block).
    """
    args = (p_ids, p_probs, q_ids, q_probs, drafts, position, seed, rule)
    out = _ext.accept_block(*args, counts, vocab)
    accepted, token = run(out, accept_block_reference, *args, counts=counts, vocab=vocab)
    return accepted, token


def accept_block_reference(
    p_ids: mx.array,
    p_probs: mx.array,
    q_ids: mx.array,
    q_probs: mx.array,
    drafts: mx.array,
    position: mx.array,
    seed: mx.array,
    rule: mx.array,
    *,
    counts: Sequence[int],
    vocab: int,
) -> tuple[mx.array, mx.array]:
    """The same in plain MLX, equal bit for bit."""
    each, row = [], 0
    for n, count in enumerate(counts):
        of_p, of_q = slice(row, row + count), slice(row - n, row - n + count - 1)
        p, q = Rows(p_ids[of_p], p_probs[of_p]), Rows(q_ids[of_q], q_probs[of_q])
        each.append(_accept_any(rule[n], p, q, drafts[of_q], position[n], seed[n], vocab))
        row += count
    accepted, tokens = zip(*each, strict=True)
    return mx.stack(list(accepted)), mx.stack(list(tokens))


def _accept_any(
    rule: mx.array,
    p: Rows,
    q: Rows,
    drafts: mx.array,
    position: mx.array,
    seed: mx.array,
    vocab: int,
) -> tuple[mx.array, mx.array]:
    """:func:`accept_one` by a rule that the device alone may know."""
    if drafts.size == 0:
        return accept_one("coupled", p, q, drafts, position, seed, vocab)
    each = [accept_one(name, p, q, drafts, position, seed, vocab) for name in RULES]

    def by_rule(residual: mx.array, block: mx.array, coupled: mx.array) -> mx.array:
        return mx.where(rule == 0, residual, mx.where(rule == 1, block, coupled))

    accepted, tokens = zip(*each, strict=True)
    return by_rule(*accepted), by_rule(*tokens)


def accept_one(
    rule: Rule,
    p: Rows,
    q: Rows,
    drafts: mx.array,
    position: mx.array,
    seed: mx.array,
    vocab: int,
) -> tuple[mx.array, mx.array]:
    """The drafts kept of one block, ``[]``, and the token behind them, ``[]``; all arrays may have
    leading dimensions."""
    index = mx.arange(p.ids.shape[-2], dtype=mx.uint32)
    position, seed = position[..., None].astype(mx.uint32), seed[..., None]
    if rule == "coupled":
        at = (position + 1 + index)[..., None]
        times = exponential(uniforms(at, p.ids, seed[..., None], Purpose.PLAIN))
        return accept_coupled(p, drafts, times)
    u_accept, u_next = (
        uniforms(position, index, seed, use) for use in (Purpose.ACCEPT, Purpose.CORRECT)
    )
    return accept(rule, p, q, drafts, u_accept[..., :-1], u_next, vocab)


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


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for V, _ in sizes.vocabularies:
        for n, rule in ((64, "residual"), (64, "block"), (64, "coupled"), (256, "block")):
            yield {"n": n, "rule": rule, "vocab": V}, {}


def example(n: int, rule: Rule, vocab: int) -> Call:
    """Blocks whose third draft the target cannot have: what follows does not matter. Before each a
    block of another sequence, without drafts."""
    ids, p = candidates(1, n, vocab)
    _, other = candidates(1, n, vocab)
    q = 0.5 * p + 0.5 * other
    refused = mx.arange(MOST)[:, None] == 2
    drafts = ids[:, 0]
    p = mx.where(refused & (mx.arange(n) == 0), 0.0, p) if n > 1 else p
    position, seed = mx.array([77, 1021], mx.int32), mx.array([5, 3], mx.uint32)
    number = mx.array([0, RULES.index(rule)], mx.int32)

    def run(b: int, e: int) -> Results:
        own, k = drafts[: e - 1], e - 1
        if rule == "coupled":  # what is drawn, up to the third
            at = mx.full((k,), 1021, mx.int32), mx.arange(1, k + 1, dtype=mx.int32)
            key = mx.full((k,), 3, mx.uint32), mx.full((k,), True)
            drawn = draw_token_reference(ids[:k], p[:k], *at, *key)
            own = mx.where(mx.arange(k) < 2, drawn, own)
        of_p = (mx.concatenate([a[-1:], a[:e]]) for a in (ids, p))
        p_ids, p_probs = of_p
        rows = (p_ids, p_probs, ids[:k], q[:k], own)
        return list(accept_block(*rows, position, seed, number, counts=(1, e), vocab=vocab))

    # The rule block may look further than the first draft that is refused
    row = None if rule == "block" else lambda results, i, t: list(results)
    return Call(run, row, rows=(4, 6, MOST), alone=False, exact_definition=True)
