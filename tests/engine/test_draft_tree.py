"""Trees of drafts: the builder against a heap and against all paths, the walk against a loop."""

import heapq
import itertools
import math

import mlx.core as mx
import numpy as np
import pytest

from pyengine import ops
from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.draft_tree import build, raced, ranked, walk
from pyengine.sampling.settings import MOST_NODES


def by_heap(scores: np.ndarray, nodes: int) -> list[tuple[int, int, int]]:
    """Depth, rank and parent row of each node, best first: DDTree's own way."""
    D, K = scores.shape
    # Negated score, depth, rank, parent row, and the parent's score
    heap = [(-scores[0, 0], 1, 0, 0, np.float32(0))]
    found = []
    while heap and len(found) < nodes:
        cost, depth, rank, parent, base = heapq.heappop(heap)
        found.append((depth, rank, parent))
        if rank + 1 < K:
            score = base + scores[depth - 1, rank + 1]
            heapq.heappush(heap, (-score, depth, rank + 1, parent, base))
        if depth < D:
            heapq.heappush(heap, (-(-cost + scores[depth, 0]), depth + 1, 0, len(found), -cost))
    return found


def best_paths(scores: np.ndarray, nodes: int) -> list[tuple[int, ...]]:
    """Of all paths there are, by their scores."""
    D, K = scores.shape
    all_paths = [p for d in range(1, D + 1) for p in itertools.product(range(K), repeat=d)]
    total = {p: math.fsum(float(scores[d, r]) for d, r in enumerate(p)) for p in all_paths}
    return sorted(all_paths, key=lambda p: -total[p])[:nodes]


def random_scores(rng: np.random.Generator, D: int, K: int, step: float | None) -> np.ndarray:
    scores = np.log(np.clip(rng.dirichlet(np.full(K, 0.5), D), 1e-6, 1))
    if step:  # sums of these are exact, and often equal
        scores = np.floor(scores / step) * step
    return -np.sort(-scores, axis=1).astype(np.float32)


def built(scores: np.ndarray, nodes: int, seed: int = 0):
    """The tree of one text as lists: tokens, depths, paths; and the ids it was made of."""
    D, K = scores.shape
    ids = np.random.default_rng(seed).permutation(1000)[: D * K].reshape(1, D, K).astype(np.int32)
    tree = build(mx.array([7]), mx.array(ids), mx.array(scores[None]), nodes)
    tokens, depths, lines = (a[0].tolist() for a in tree)
    paths = [line[: depth + 1] for line, depth in zip(lines, depths, strict=True)]
    return tokens, depths, paths, ids[0]


@pytest.mark.parametrize("step", [None, 0.5, 2.0])
def test_the_heaps_tree(step):
    """With the same choice among equal scores."""
    rng = np.random.default_rng(1)
    for seed in range(150):
        D, K = int(rng.integers(1, 8)), int(rng.integers(1, 8))
        scores, nodes = random_scores(rng, D, K, step), int(rng.integers(1, MOST_NODES + 1))
        tokens, depths, paths, ids = built(scores, nodes, seed)
        want = by_heap(scores, nodes)
        assert len(tokens) == 1 + len(want) and tokens[0] == 7 and depths[0] == 0
        assert paths[0] == [0]
        for row, (depth, rank, parent) in enumerate(want, 1):
            assert (tokens[row], depths[row]) == (ids[depth - 1, rank], depth)
            assert paths[row] == [*paths[parent], row]


def test_the_best_of_all_paths():
    rng = np.random.default_rng(2)
    for seed in range(60):
        scores = random_scores(rng, 3, 4, None)
        tokens, _, paths, ids = built(scores, 7, seed)
        found = {tuple(tokens[row] for row in path[1:]) for path in paths[1:]}
        want = {tuple(ids[d, r] for d, r in enumerate(p)) for p in best_paths(scores, 7)}
        assert found == want


def test_texts_do_not_depend_on_each_other():
    rng = np.random.default_rng(3)
    scores = np.stack([random_scores(rng, 5, 6, 0.5) for _ in range(4)])
    ids = rng.integers(0, 50, (4, 5, 6)).astype(np.int32)
    together = build(mx.arange(4), mx.array(ids), mx.array(scores), 12)
    for n in range(4):
        own = slice(n, n + 1)
        alone = build(mx.array([n]), mx.array(ids[own]), mx.array(scores[own]), 12)
        assert all(mx.array_equal(a[own], b) for a, b in zip(together, alone, strict=True))


def test_a_row_without_enough_candidates_has_tokens_all_the_same():
    ids = mx.array([[[4, -1], [5, -1]]])
    scores = mx.log(mx.array([[[1.0, 0.0], [1.0, 0.0]]]))
    tree = build(mx.array([9]), ids, scores, 5)
    assert tree.tokens.tolist()[0][:3] == [9, 4, 5] and min(tree.tokens.tolist()[0]) == 0


def by_hand(tokens: list[int], paths: list[list[int]], drawn: list[int]) -> tuple[list[int], int]:
    """The rows that a walk meets, and the token that follows."""
    at, rows = 0, [0]
    while True:
        children = [r for r, path in enumerate(paths) if len(path) > 1 and path[-2] == at]
        taken = [r for r in children if tokens[r] == drawn[at]]
        if not taken:
            return rows, drawn[at]
        at = taken[0]
        rows.append(at)


def test_the_walk():
    rng, lengths = np.random.default_rng(4), set()
    for seed in range(150):
        D, K = int(rng.integers(1, 7)), int(rng.integers(1, 5))
        scores = random_scores(rng, D, K, None)
        ids = np.stack([rng.permutation(4)[:K] for _ in range(D)])[None].astype(np.int32)
        tree = build(mx.array([1]), mx.array(ids), mx.array(scores[None]), 1 + seed % 15)
        tokens, depths, lines = (a[0].tolist() for a in tree)
        paths = [line[: depth + 1] for line, depth in zip(lines, depths, strict=True)]
        drawn = rng.integers(0, 4, len(tokens)).tolist()
        kept = walk(tree, mx.array([drawn]))
        rows, token = by_hand(tokens, paths, drawn)
        count = kept.accepted.item() + 1
        assert kept.rows[0].tolist()[:count] == rows and kept.token.item() == token
        assert set(kept.rows[0].tolist()[count:]) <= {rows[-1]}
        lengths.add(count)
    assert lengths >= {1, 2, 3, 4}


def test_ranks_and_races():
    """Raced candidates are in the order of the race; the first is what is drawn there."""
    rng = np.random.default_rng(5)
    probs = -np.sort(-rng.dirichlet(np.full(20, 0.3), 50).astype(np.float32), axis=1)
    probs[:, 15:] = 0
    ids = np.stack([rng.permutation(1000)[:20] for _ in range(50)]).astype(np.int32)
    rows = Filtered(mx.array(ids), mx.array(probs), mx.zeros(50, mx.int32))
    where = mx.arange(50) + 7, mx.full(50, 11, mx.uint32)
    best, scores = raced(rows, 5, *where)
    zero, plain, gone = mx.zeros(50, mx.int32), mx.full(50, True), mx.array(probs)
    for place in range(5):
        drawn = ops.draw_token(rows.ids, gone, where[0], zero, where[1], plain)
        assert mx.array_equal(best[:, place], drawn)
        gone = mx.where(rows.ids == drawn[:, None], 0, gone)
    values = np.array(scores)
    assert (np.diff(values, axis=1) <= 0).all() and np.isfinite(values).all() and values.max() <= 0
    assert not mx.array_equal(best[:, 0], rows.ids[:, 0])
    same, logs = ranked(rows, 5)
    assert mx.array_equal(same, rows.ids[:, :5])
    np.testing.assert_allclose(np.array(logs), np.log(probs[:, :5]), rtol=1e-6)
