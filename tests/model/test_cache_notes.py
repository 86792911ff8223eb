"""What a cache notes between calls: its readers, its newest position, its length and limit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from models import step, verify
from tiny_pairs import FLAVOURS, bits, greedy_text, steps, tiny_pair

from pyengine.model.cache import Cache
from pyengine.model.head import whole
from pyengine.model.target import Target


def one(count: int) -> mx.array:
    return mx.array(count, dtype=mx.int32)


def block(*ids: int) -> mx.array:
    return mx.array(ids, dtype=mx.int32)


def begun(target: Target, text: list[int]) -> Cache:
    """A cache that holds a text, of which the last tokens came one by one."""
    cache = target.new_cache()
    target.prefill(text[:20], cache)
    steps(target, cache, text[20:])
    return cache


def some_hidden(target: Target) -> mx.array:
    """A hidden vector that depends on no cache."""
    return mx.random.normal((1, target.config.hidden_size), key=mx.random.key(3))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_targets_reads_are_noted(flavour: str) -> None:
    """The second block overwrites positions that rows of the first attend to. Evaluated first, it
    has to have waited for those rows, which nothing but the note tells it."""
    target, text = tiny_pair(flavour).target, greedy_text(flavour)
    eager, lazy = begun(target, text[:30]), begun(target, text[:30])
    want = []
    for cache in (eager, lazy):
        first, _ = verify(target, block(9, 8, 7, 6), cache)
        if cache is eager:
            mx.eval(first)
        cache.commit(one(1), cache.length_limit + 4)
        second, _ = verify(target, block(3, 4, 5, 6), cache)
        mx.eval(second)
        want.append((bits(first), bits(second)))
    for a, b in zip(*want, strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_an_assistants_reads_are_noted(flavour: str) -> None:
    """The block behind two drafts is evaluated before them; refused, it is overwritten too."""
    pair, text = tiny_pair(flavour), greedy_text(flavour)
    target, drafts = pair.target, []
    for evaluate in (True, False):
        cache = begun(target, text[:30])
        hidden, rows = some_hidden(target), []
        for token in (9, 8):  # neither made from the other
            logits, _ = step(pair.assistant, target.embed(block(token)), hidden, cache)
            rows.append(logits)
            if evaluate:
                mx.eval(logits)
        # Some positions back, so that the block is written over what was read
        cache.length = cache.length - 4
        after, _ = verify(target, block(6, 5, 4, 3), cache)
        mx.eval(after)
        drafts.append([bits(row) for row in rows])
    for a, b in zip(*drafts, strict=True):
        assert np.array_equal(a, b)


def test_reads_are_waited_for_once_and_not_by_others() -> None:
    """What is evaluated is not held any longer than until the next call."""
    target, text = tiny_pair("dense31").target, greedy_text("dense31")
    cache, x = begun(target, text[:25]), block(5)
    arena = cache.arena
    assert arena.after_reads(x) is not x and arena.after_reads(x) is x
    for _ in range(3):
        arena.note_read(mx.ones(3) * 2)
    ordered = arena.after_reads(x)
    assert ordered is not x and ordered.tolist() == [5]
    assert arena.after_reads(x) is x
    verify(target, block(5), cache)
    # A round begins when all before it was evaluated, and the host knows the lengths
    cache.settle(25)
    recorded = arena.with_placed(arena.place([cache]))
    assert recorded.after_reads(x) is x and arena.after_reads(x) is not x


def test_newest_follows_every_change_of_the_length() -> None:
    target, text = tiny_pair("uni12").target, greedy_text("uni12")
    cache = target.new_cache()

    def newest() -> int:
        batch = cache.arena.batch([cache])
        assert batch.newest is batch.newest  # made once
        [position] = batch.newest.tolist()
        return int(position)

    assert newest() == -1
    target.prefill(text[:21], cache)
    assert newest() == 20
    verify(target, block(1, 2, 3), cache)
    assert newest() == 20  # nothing is committed yet
    for count, position in ((2, 22), (0, 22), (1, 23)):
        cache.commit(one(count), cache.length_limit + 3)
        assert newest() == position
    cache.take_results([one(25)], 27)
    assert (newest(), cache.length.item(), cache.length_limit) == (24, 25, 27)
    cache.settle(26)
    assert (newest(), cache.length.item(), cache.length_limit) == (25, 26, 26)


@pytest.mark.parametrize("position", ["n-1", "n-2"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_drafts_after_commits_on_one_cache_are_those_on_a_new_one(
    flavour: str, position: str
) -> None:
    """The assistant asks a cache for its newest position; that moves with every commit."""
    pair, text = tiny_pair(flavour, position=position), greedy_text(flavour)
    cache, known, hidden = begun(pair.target, text[:21]), 21, some_hidden(pair.target)
    for kept in (1, 3, 2, 4, 1):
        embedded = pair.target.embed(block(text[known]))
        got, want = (
            bits(step(pair.assistant, embedded, hidden, used)[0])
            for used in (cache, begun(pair.target, text[:known]))
        )
        assert np.array_equal(got, want), known
        refused = [1, 2, 3, 4][kept:]
        verify(pair.target, mx.array([*text[known : known + kept], *refused]), cache)
        cache.commit(one(kept), cache.length_limit + 4)
        known += kept


@pytest.mark.parametrize("flavour", ["dense31", "e2b"])
def test_length_and_bound_after_rollback(flavour: str) -> None:
    """A refused tail moves nothing: what is written next goes on from the length."""
    target, text = tiny_pair(flavour).target, greedy_text(flavour)
    rng = np.random.default_rng(5)
    cache, known = begun(target, text[:21]), 21
    while known < 90:
        T = int(rng.integers(1, 7))
        kept = int(rng.integers(0, T + 1))
        ids = [*text[known : known + kept], *rng.integers(0, 256, T - kept).tolist()]
        verify(target, mx.array(ids, dtype=mx.int32), cache)
        cache.commit(one(kept), cache.length_limit + T)
        known += kept
        assert cache.committed <= cache.length.item() == known <= cache.length_limit
        assert 64 * len(cache.full) >= cache.length_limit
        if rng.random() < 0.5:  # the host has read how many were kept
            cache.settle(known)
            assert cache.committed == cache.length_limit == known
    rows, _ = verify(target, block(11, 12), cache)
    single, _ = steps(target, begun(target, text[:known]), [11, 12])
    assert np.array_equal(bits(rows), bits(single))


@pytest.mark.parametrize("flavour", ["dense31", "moe26"])
def test_drafts_of_some_of_a_batch_are_those_alone(flavour: str) -> None:
    """Sequences that draft no more are left out, wherever they stand."""
    pair, text = tiny_pair(flavour), greedy_text(flavour)
    target, hidden = pair.target, some_hidden(pair.target)
    arena = target.new_arena()
    caches = [arena.new_cache() for _ in range(4)]
    for n, cache in enumerate(caches):
        target.prefill(text[: 20 + 19 * n], cache)
    placed = arena.with_placed(arena.place(caches))
    views = [c.with_state(c.state, placed, n) for n, c in enumerate(caches)]
    embedded = target.embed(block(9))
    assert pair.assistant is not None
    alone = [bits(step(pair.assistant, embedded, hidden, cache)[0])[0] for cache in caches]
    for places in ([0, 1, 2, 3], [0, 1, 2], [0], [3], [1, 3], [0, 3]):
        rows = [mx.repeat(a, len(places), axis=0) for a in (embedded, hidden)]
        logits, _ = pair.assistant.forward(*rows, [views[n] for n in places])
        for row, n in zip(bits(whole(logits)), places, strict=True):
            assert np.array_equal(row, alone[n]), places
