"""A round whose drafts are a tree: several tokens may follow each, and the target's own draws say
which path is kept.

A drafter that judges all places of a block at once gives candidates for each; the best tree of
them is verified by one call, whose rows have the bits of plain steps behind their paths. What the
target draws at a row, by the noise of its position, is the token of plain decoding there: so greedy
and coupled texts are plain texts whatever the tree is. The kept path's keys and values are moved to
where plain steps would have written them; from there on it is a block like any other.

Source: DDTree, arXiv:2604.12989.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import mlx.core as mx

from pyengine.drafters.dflash import DFlashDrafter
from pyengine.drafters.drafter import Asked
from pyengine.engine import round as on_device
from pyengine.model.head import Logits
from pyengine.model.rows import packed, picked
from pyengine.model.target import Branches
from pyengine.ops.filter_logits import Filtered
from pyengine.ops.recorded import recorded
from pyengine.sampling.draft_tree import DraftTree, Kept, build, raced, ranked, walk
from pyengine.sampling.settings import MOST_NODES


class RecordedTree:
    """A round with a tree of ``nodes`` drafts in each sequence, at most k behind one another,
    recorded. All sequences are greedy, or all coupled."""

    def __init__(
        self,
        each: Sequence[on_device.Parts],
        k: int,
        nodes: int,
        group: on_device.Group,
        greedy: bool,
    ) -> None:
        opened = on_device.RecordedRound(each, [k] * len(each), [group]).open_texts
        self.play = recorded(partial(_play, opened, nodes, greedy))


def _play(
    open_texts: Callable[[on_device.Start], on_device.Texts],
    nodes: int,
    greedy: bool,
    start: on_device.Start,
) -> on_device.Played:
    texts = open_texts(start)
    tree, q = plant(texts, packed([state.primary for state in start.states]), nodes, greedy)
    Q, T, A = tree.ancestors.shape
    rows = texts._replace(ks=[T - 1] * Q)
    block = on_device.Block(tree.tokens.reshape(-1), (None,))
    branches = Branches(tree.depths.reshape(-1), tree.ancestors.reshape(Q * T, A))
    logits, hidden = on_device.run_target(rows, block, branches)
    [p] = on_device.target_rows(rows, block, logits)
    [chooser], [position] = texts.choosers, texts.positions
    places = (position[:, None] + tree.depths).reshape(-1)
    drawn = chooser.draw(p, places, 1, [n for n in range(Q) for _ in range(T)])
    kept = walk(tree, drawn.reshape(Q, T))
    caches = [parts.cache for parts in texts.each]
    caches[0].arena.keep_path(caches, kept.rows, kept.accepted + 1)
    # From here on it is the block of the path that was kept
    path = (kept.rows + T * mx.arange(Q, dtype=mx.int32)[:, None]).reshape(-1)
    played = on_device.finish(
        texts,
        on_device.Block(mx.take(block.ids, path), (q,)),
        mx.take(logits, path, axis=0) if isinstance(logits, mx.array) else logits,
        [mx.take(own, line, axis=0) for own, line in zip(hidden, kept.rows, strict=True)],
        [mx.take(p.flags, path)],
        kept.accepted,
        kept.token,
    )
    return played._replace(report=mx.concatenate([played.report, _nodes(tree, kept)]))


def plant(
    texts: on_device.Texts, primary: mx.array, nodes: int, greedy: bool
) -> tuple[DraftTree, Filtered]:
    """Each text's tree, and what it was made of: k rows of each.

    Greedy texts have one candidate of each row, so their drafts are ranked by distributions of
    temperature 1; coupled ones by the race that decides the target's token."""
    [chooser], [position] = texts.choosers, texts.positions
    Q, D = len(texts.each), texts.ks[0]
    if greedy:
        chooser = chooser.ranking(min(MOST_NODES, chooser.vocab))
    owner = [n for n in range(Q) for _ in range(D)]

    def filter(logits: mx.array | Logits) -> list[Filtered]:
        return [chooser.filter(logits, owner)]

    drafters = [d for parts in texts.each if isinstance(d := parts.drafter, DFlashDrafter)]
    caches = [parts.cache for parts in texts.each]
    [rows] = DFlashDrafter.propose_all(drafters, Asked(primary, caches, filter, texts.ks))
    if greedy:
        ids, scores = ranked(rows, nodes)
    else:
        places = (position[:, None] + mx.arange(1, D + 1, dtype=mx.int32)).reshape(-1)
        seeds = picked(chooser.choices.settings.seed, owner)
        ids, scores = raced(rows, nodes, places, seeds)
    return build(primary, ids.reshape(Q, D, -1), scores.reshape(Q, D, -1), nodes), rows


def _nodes(tree: DraftTree, kept: Kept) -> mx.array:
    """What the host hears of each tree: int32, of Q trees the drafts at each depth from 1, and
    whether none followed the last that was kept."""
    A = tree.ancestors.shape[2]
    each = [(tree.depths == depth).sum(axis=1) for depth in range(1, A)]
    # Of drafts that follow the last of the path, it is the ancestor at its own depth
    last = mx.take_along_axis(kept.rows, kept.accepted[:, None], axis=1)
    at = mx.broadcast_to(kept.accepted[:, None, None], (*tree.depths.shape, 1))
    behind = mx.take_along_axis(tree.ancestors, at, axis=2)[:, :, 0] == last
    ended = ~(behind & (tree.depths > kept.accepted[:, None])).any(axis=1)
    return mx.stack([*each, ended], axis=1).astype(mx.int32).reshape(-1)
