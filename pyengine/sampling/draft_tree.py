"""Trees of drafts: built from what a drafter thinks of each position, and walked by what the target
draws.

Positions are judged apart, so a path's score is the sum of its tokens' scores, and the best
tree of N drafts is made of the N best paths. Which paths can be among those is known before any
score is: a path comes behind all that follow it with no rank higher and no more tokens. So the tree
is chosen from a fixed list at once, without a heap, and nothing is read by the host.

Source: DDTree, arXiv:2604.12989; its heap finds the same tree.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from pyengine.ops.draw_token import exponential, uniforms
from pyengine.ops.filter_logits import Filtered
from pyengine.ops.random_uniform import Purpose

LEAST_TIME = 1e-30  # whose logarithm is finite


class DraftTree(NamedTuple):
    """Trees of Q texts, of as many rows each: row 0 the primary token, the others drafts, none
    before its parent.

    Attributes:
        tokens: int32 ``[Q, T]``.
        depths: int32 ``[Q, T]``.
        ancestors: int32 ``[Q, T, A]``, as :func:`pyengine.ops.block_attention` takes them: a row's
            ancestor at each depth, itself at its own and behind it.
    """

    tokens: mx.array
    depths: mx.array
    ancestors: mx.array


class Kept(NamedTuple):
    """What the target makes of trees."""

    rows: mx.array  # int32 [Q, A]: those of the path that it went, by depth; the last one again
    accepted: mx.array  # int32 [Q]: the drafts of it
    token: mx.array  # int32 [Q]: what follows them


class _Paths(NamedTuple):
    """All paths that may be among the N best, C of them, in the order of equal scores."""

    ranks: np.ndarray  # [C, D]: rank at each depth; K where the path has ended
    depths: np.ndarray  # [C], from 1
    ancestors: np.ndarray  # [C, D]: places of its beginnings, by depth; then its own


@cache
def _paths(depth: int, width: int, nodes: int) -> _Paths:
    found: list[tuple[int, ...]] = []
    places: dict[tuple[int, ...], int] = {}
    level: list[tuple[tuple[int, ...], int, int]]
    level = [((r,), r + 1, r + 1) for r in range(min(width, nodes))]
    while level:
        # Of equal scores the lower depth comes first, then the lower rank, then the earlier parent
        level.sort(key=lambda own: (own[0][-1], places.get(own[0][:-1], 0)))
        for path, _, _ in level:
            places[path] = len(found)
            found.append(path)
        # A path follows so many others: those with no rank higher and no more tokens
        level = [
            ((*path, r), before + part * (r + 1), part * (r + 1))
            for path, before, part in level
            for r in range(width)
            if len(path) < depth and before + part * (r + 1) <= nodes
        ]
    longest = max(map(len, found))
    ranks = np.full((len(found), longest), width)
    ancestors = np.zeros((len(found), longest), np.int32)
    for place, path in enumerate(found):
        ranks[place, : len(path)] = path
        own = [places[path[: n + 1]] for n in range(len(path))]
        ancestors[place] = own + [place] * (longest - len(path))
    return _Paths(ranks, np.array([len(path) for path in found]), ancestors)


def build(primary: mx.array, ids: mx.array, scores: mx.array, nodes: int) -> DraftTree:
    """The best trees of at most ``nodes`` drafts.

    Of equal paths the shorter comes first, then the one whose last token has the lower rank, then
    the one with the earlier parent: one tree for the same scores.

    Args:
        primary: int32 ``[Q]``.
        ids: Candidates for each of D positions, best first, int32 ``[Q, D, K]``.
        scores: Their log-probabilities, or what stands for them, at most 0, float32.
        nodes: 1 to 15.
    """
    Q, D, K = ids.shape
    paths = _paths(D, K, nodes)
    C, A = paths.ranks.shape
    N = min(nodes, C)
    # A path's score, of its tokens in their order; those behind its end count nothing
    ended = mx.zeros((Q, D, 1), scores.dtype)
    own = mx.concatenate([scores, ended], axis=-1)
    total = own[:, 0, mx.array(paths.ranks[:, 0])]
    for d in range(1, A):
        total = total + own[:, d, mx.array(paths.ranks[:, d])]  # [Q, C]
    # How many come before each: its row is the next
    one, other = total[:, :, None], total[:, None, :]
    earlier = mx.array(np.tri(C, k=-1, dtype=bool))
    place = ((other > one) | ((other == one) & earlier)).sum(axis=-1)
    rows = (place + 1).astype(mx.int32)  # [Q, C]
    chosen = mx.argmax(rows[:, None, :] == mx.arange(1, N + 1)[:, None], axis=-1)  # [Q, N]
    depths = mx.array(paths.depths.astype(np.int32))[chosen]
    last = np.take_along_axis(paths.ranks, paths.depths[:, None] - 1, axis=1)[:, 0]
    at = mx.array(((paths.depths - 1) * K + last).astype(np.int32))[chosen]
    # Where a row has fewer candidates any token may stand: its row is that token's
    tokens = mx.maximum(mx.take_along_axis(ids.reshape(Q, D * K), at, axis=1), 0)
    lines = mx.array(paths.ancestors)[chosen].reshape(Q, N * A)
    lines = mx.take_along_axis(rows, lines, axis=1).reshape(Q, N, A)
    root = mx.zeros((Q, 1), mx.int32)
    return DraftTree(
        mx.concatenate([primary[:, None], tokens], axis=1),
        mx.concatenate([root, depths], axis=1),
        mx.pad(lines, [(0, 0), (1, 0), (1, 0)]),
    )


def walk(tree: DraftTree, drawn: mx.array) -> Kept:
    """Go from the primary token to the child that is what the target drew there, and on.

    Every token is the target's own draw behind its true prefix, whatever the tree: no rule with
    probabilities of drafts would be right where those are chosen by rank.

    Args:
        tree: T rows of each text.
        drawn: What the target draws behind each row, int32 ``[Q, T]``.
    """
    Q, T, A = tree.ancestors.shape
    parents = mx.take_along_axis(
        tree.ancestors, mx.maximum(tree.depths - 1, 0)[:, :, None], axis=2
    )[:, :, 0]
    match = (mx.take_along_axis(drawn, parents, axis=1) == tree.tokens) | (tree.depths == 0)
    lines = tree.ancestors.reshape(Q, T * A)
    reached = mx.take_along_axis(match, lines, axis=1).reshape(Q, T, A).all(axis=-1)
    # The rows that are reached are one path
    last = mx.argmax(mx.where(reached, tree.depths, -1), axis=1)[:, None]
    rows = mx.take_along_axis(tree.ancestors, last[:, :, None], axis=1)[:, 0]
    accepted = mx.take_along_axis(tree.depths, last, axis=1)[:, 0]
    return Kept(rows, accepted, mx.take_along_axis(drawn, last, axis=1)[:, 0])


def ranked(rows: Filtered, width: int) -> tuple[mx.array, mx.array]:
    """The best candidates of rows of drafts as they are, and log-probabilities: ``[R, K]`` each."""
    return rows.ids[:, :width], mx.log(rows.probs[:, :width])


def raced(
    rows: Filtered, width: int, position: mx.array, seed: mx.array
) -> tuple[mx.array, mx.array]:
    """The candidates that win the race for each row's position, which decides the target's token
    there too (:func:`pyengine.ops.draw_token`): first what coupled drafts are, then what the target
    would draw if it thought a little otherwise.

    Args:
        rows: R rows of drafts, filtered.
        width: K.
        position: Of the tokens that they stand for, int32 ``[R]``.
        seed: uint32 ``[R]``.

    Returns:
        Ids and scores, ``[R, K]`` each, best first: the scores are the log-softmax of the perturbed
        log-probabilities.
    """
    u = uniforms(position[:, None], rows.ids, seed[:, None], Purpose.PLAIN)
    finish = mx.where(rows.probs > 0, exponential(u) / rows.probs, mx.inf)
    finish = mx.maximum(finish, LEAST_TIME)
    order = mx.argsort(finish, axis=-1)[:, :width]
    scores = -mx.log(finish)
    scores = scores - mx.logsumexp(scores, axis=-1, keepdims=True)
    return mx.take_along_axis(rows.ids, order, axis=-1), mx.take_along_axis(scores, order, axis=-1)
