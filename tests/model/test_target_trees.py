"""A target's rows as nodes of trees: bits of plain steps, in every kind of layer, before and after
the path that is kept is moved."""

import mlx.core as mx
import numpy as np
import pytest
from tiny_pairs import FLAVOURS, FORMS, bits, steps, tiny_pair
from trees import Lines, arrays

from pyengine.model.head import whole
from pyengine.model.target import Branches

pytestmark = pytest.mark.engine


def branches(trees: list[Lines], rng: np.random.Generator) -> Branches:
    return Branches(**arrays(trees, rng))


def known(target, prompt: list[int], arena=None):
    cache = target.new_cache() if arena is None else arena.new_cache()
    target.prefill(prompt, cache)
    return cache


def content(cache, positions: range) -> list[np.ndarray]:
    """Bits of the keys and values at these positions, of every layer that has its own."""
    found, arena = [], cache.arena
    for i, layer in enumerate(arena.config.layers):
        if layer.kv_source == i:
            pages = cache.sliding if layer.sliding else dict(enumerate(cache.full))
            for a in arena.slots(i):
                found.append(bits(mx.stack([a[pages[p // 64], :, p % 64] for p in positions])))
    return found


# Prompts about a page's end and shorter than the window of 8
CASES = [
    pytest.param(flavour, form, length, marks=[pytest.mark.short] if length == 3 else [])
    for flavour in FLAVOURS
    for form, length in zip(FORMS, (57, 3, 63, 60), strict=True)
]


@pytest.mark.parametrize("flavour, form, length", CASES)
def test_nodes_are_plain_steps_and_so_is_what_follows(flavour, form, length):
    rng = np.random.default_rng(length)
    target = tiny_pair(flavour, form).target
    texts = [rng.integers(0, 256, n).tolist() for n in (length, 21)]
    trees = [Lines.random(rng, 16), Lines.random(rng, 5)]
    tokens = [rng.integers(0, 256, len(tree.depths)).tolist() for tree in trees]
    arena = target.new_arena()
    caches = [known(target, text, arena) for text in texts]
    ids = [mx.array(own, dtype=mx.int32) for own in tokens]
    logits, hidden = target.forward(ids, caches, branches=branches(trees, rng))
    rows = bits(whole(logits))
    paths = [max(tree.paths, key=len) for tree in trees]
    plain = []
    for text, tree, own, first in zip(texts, trees, tokens, (0, 16), strict=True):
        leaves = [p for p in tree.paths if not any(q[: len(p)] == p != q for q in tree.paths)]
        for path in leaves:
            cache = known(target, text)
            stepped, vectors = steps(target, cache, [own[row] for row in path])
            at = [first + row for row in path]
            assert np.array_equal(rows[at], bits(stepped)), path
            assert np.array_equal(bits(hidden)[at], bits(vectors))
            if path == max(tree.paths, key=len):
                plain.append(cache)
    # Keep the longest path of each
    kept = mx.array([len(path) for path in paths], dtype=mx.int32)
    wide = max(len(path) for path in paths)
    lines = mx.array([path + [path[-1]] * (wide - len(path)) for path in paths], dtype=mx.int32)
    arena.keep_path(caches, lines, kept)
    for cache, path, other, text in zip(caches, paths, plain, texts, strict=True):
        cache.commit(mx.array(len(path), dtype=mx.int32), cache.length_limit + len(path))
        first = max(0, len(text) - target.config.window + 1)
        seen = range(first, len(text) + len(path))
        for a, b in zip(content(cache, seen), content(other, seen), strict=True):
            assert np.array_equal(a, b)
        more = rng.integers(0, 256, 3).tolist()
        pairs = zip(steps(target, cache, more), steps(target, other, more), strict=True)
        assert all(np.array_equal(bits(a), bits(b)) for a, b in pairs)


@pytest.mark.short
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_chain_is_the_call_without_branches(flavour):
    rng = np.random.default_rng(1)
    target = tiny_pair(flavour, "bfloat16").target
    prompt, own = (rng.integers(0, 256, n).tolist() for n in (60, 9))
    found = []
    for more in ({}, {"branches": branches([Lines.chain(9)], rng)}):
        cache = known(target, prompt)
        logits, hidden = target.forward([mx.array(own, dtype=mx.int32)], [cache], **more)
        mx.eval(hidden)
        found.append([bits(whole(logits)), bits(hidden), *content(cache, range(60, 69))])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_committed_depends_on_the_move():
    """A round returns lengths, not the arena's arrays, where writes are in place."""
    rng = np.random.default_rng(2)
    target = tiny_pair("dense31").target
    prompt, own = (rng.integers(0, 256, n).tolist() for n in (20, 3))
    tree, caches = Lines.of([0, 0]), [known(target, prompt) for _ in range(2)]
    target.forward([mx.array(own)], caches[:1], branches=branches([tree], rng))
    cache = caches[0]
    cache.arena.keep_path([cache], mx.array([[0, 2]]), mx.array([2]))
    cache.commit(mx.array(2, dtype=mx.int32), 22)
    mx.eval(cache.length)
    steps(target, caches[1], [own[0], own[2]])
    pairs = zip(content(cache, range(12, 22)), content(caches[1], range(12, 22)), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
