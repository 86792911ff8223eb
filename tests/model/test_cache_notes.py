"""What a cache notes between calls: its readers, its newest position, its length and limit."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from models import step, verify
from tiny_pairs import FLAVOURS, bits, greedy_text, steps, tiny_pair

from pyengine.model.cache import Cache
from pyengine.model.target import Target


def one(count: int) -> mx.array:
    return mx.array(count, dtype=mx.int32)


def block(*ids: int) -> mx.array:
    return mx.array(ids, dtype=mx.int32)


def begun(target: Target, text: list[int], max_block: int = 4) -> Cache:
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


def test_reads_are_waited_for_once_and_not_by_copies() -> None:
    """What is evaluated is not held any longer than until the next call."""
    target, text = tiny_pair("dense31").target, greedy_text("dense31")
    cache, x = begun(target, text[:25]), block(5)
    assert cache.after_reads(x) is not x and cache.after_reads(x) is x
    for _ in range(3):
        cache.note_read(mx.ones(3) * 2)
    ordered = cache.after_reads(x)
    assert ordered is not x and ordered.tolist() == [5]
    assert cache.after_reads(x) is x
    verify(target, block(5), cache)
    for copy in (cache.snapshot(), cache.with_arrays(cache.arrays)):
        assert copy.after_reads(x) is x
    assert cache.after_reads(x) is not x
    verify(target, block(5), cache)
    cache.take_results([cache.length], cache.length_limit)
    assert cache.after_reads(x) is x
    verify(target, block(5), cache)
    cache.restart(20)
    assert cache.after_reads(x) is x


def test_newest_follows_every_change_of_the_length() -> None:
    target, text = tiny_pair("uni12").target, greedy_text("uni12")
    cache = target.new_cache()
    assert cache.newest.item() == -1
    target.prefill(text[:21], cache)
    assert cache.newest.item() == 20
    assert cache.newest is cache.newest  # made once
    verify(target, block(1, 2, 3), cache)
    assert cache.newest.item() == 20  # nothing is committed yet
    for count, newest in ((2, 22), (0, 22), (1, 23)):
        cache.commit(one(count), cache.length_limit + 3)
        assert cache.newest.item() == newest
    copies = [cache.snapshot(), cache.with_arrays([*cache.arrays[:-1], one(9)])]
    assert [copy.newest.item() for copy in copies] == [23, 8]
    cache.take_results([one(25)], 27)
    assert (cache.newest.item(), cache.length.item(), cache.length_limit) == (24, 25, 27)
    cache.restart(22)
    assert (cache.newest.item(), cache.length.item(), cache.length_limit) == (21, 22, 22)
    assert [copy.newest.item() for copy in copies] == [23, 8]


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
    cache, known, written = begun(target, text[:21], max_block=6), 21, 21
    while known < 90:
        T = int(rng.integers(1, 7))
        kept = int(rng.integers(0, T + 1))
        ids = [*text[known : known + kept], *rng.integers(0, 256, T - kept).tolist()]
        verify(target, mx.array(ids, dtype=mx.int32), cache)
        written = max(written, cache.length_limit + T)
        cache.commit(one(kept), cache.length_limit + T)
        known += kept
        assert cache.length.item() == known <= cache.length_limit
        # The rings have 7 + 6 slots, and hold what nobody wrote over
        assert (cache.written, cache.kept_from) == (written, max(0, written - 13))
        if rng.random() < 0.5:  # the host has read how many were kept
            cache.length_limit = known
    assert cache.written > known
    rows, _ = verify(target, block(11, 12), cache)
    single, _ = steps(target, begun(target, text[:known]), [11, 12])
    assert np.array_equal(bits(rows), bits(single))


def test_growth_is_what_making_room_adds() -> None:
    """Nothing up to the 512th position, then 512 slots of each full layer at once."""
    target = tiny_pair("dense31").target
    layers = [n for i, n in enumerate(target.config.layers) if n.kv_source == i and not n.sliding]
    step = sum(2 * n.num_kv_heads * n.head_dim * 512 * 4 for n in layers)
    cache = target.new_cache()
    for bound, count, steps_more in ((0, 512, 0), (500, 12, 0), (500, 13, 1), (1020, 600, 3)):
        cache = target.new_cache()
        cache.length_limit = bound
        before = cache.nbytes
        assert cache.growth(count) == steps_more * step
        cache.reserve(count)
        mx.eval(cache.arrays)
        assert cache.nbytes - before == steps_more * step
        assert cache.growth(count) == 0 and cache.written == bound + count
