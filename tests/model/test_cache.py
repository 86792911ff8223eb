"""Append, commit, rollback, fork: the cache holds what plain decoding would, whatever comes."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import step, verify
from tiny_pairs import FLAVOURS, WINDOW, bits, greedy_text, steps, tiny_pair

from pyengine import ops
from pyengine.model import cache as cache_module
from pyengine.model.cache import Arena, Cache, window_pages
from pyengine.model.config import LayerConfig
from pyengine.ops.prepare_qkv import PAGE


def one(count: int) -> mx.array:
    return mx.array(count, dtype=mx.int32)


def block(*ids: int) -> mx.array:
    return mx.array(ids, dtype=mx.int32)


def follow_up(model: Any, cache: Cache) -> list[np.ndarray]:
    """Bits of what a block of three gives next."""
    logits, hidden = verify(model, block(11, 12, 13), cache)
    return [bits(logits), bits(hidden)]


def follow_up_single(model: Any, cache: Cache) -> list[np.ndarray]:
    return [bits(a) for a in steps(model, cache, [11, 12, 13])]


def assert_same(a: list[np.ndarray], b: list[np.ndarray]) -> None:
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def long_text(length: int) -> list[int]:
    return [5 + i * i * 37 % 250 for i in range(length)]


def assert_pages(arena: Arena, caches: list[Cache]) -> None:
    """Every page is free or in the table of somebody, as often as it is held."""
    for pages, own in (
        (arena.full, [page for c in caches for page in c.full]),
        (arena.sliding, [page for c in caches for page in c.sliding.values()]),
    ):
        assert pages.free + len(set(own)) == pages.count
        assert all(pages.is_shared(page) == (own.count(page) > 1) for page in set(own))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_any_accept_pattern_equals_plain_decoding(flavour: str, seed: int) -> None:
    """Blocks of random length, refused from a random place on, past ten windows.

    The cache's part of a round alone: what a round keeps is drawn here, not decided.
    """
    rng = np.random.default_rng(seed)
    form = ("float32", "bfloat16", "bfloat16-q8", "float32-q8")[seed]
    model = tiny_pair(flavour, form).target
    text = greedy_text(flavour)
    cache, plain = model.new_cache(), model.new_cache()
    known = int(rng.integers(1, 30))
    model.prefill(text[:known], cache, chunk=int(rng.integers(1, 33)))
    model.prefill(text[:known], plain)
    while known < 100:
        T = int(rng.integers(1, 18))
        kept = min(int(rng.integers(1, T + 1)), 100 - known)
        # The kept tokens are the text's; the refused ones are anything
        ids = text[known : known + kept] + rng.integers(0, 256, T - kept).tolist()
        logits, _ = verify(model, block(*ids), cache)
        cache.commit(one(kept), cache.length_limit + T)  # what the host knows before it reads
        single, _ = steps(model, plain, text[known : known + kept])
        assert np.array_equal(bits(logits[:kept]), bits(single))
        known += kept
        if rng.random() < 0.5:
            cache.settle(known)
    assert cache.length.item() == plain.length.item() == 100
    assert_same(follow_up(model, cache), follow_up_single(model, plain))


def test_unevaluated_calls_do_not_overtake_each_other() -> None:
    """Blocks with host-given tokens, all built before any is evaluated: each write waits."""
    model = tiny_pair("dense31").target
    text = greedy_text("dense31")[:60]
    lazy, eager = model.new_cache(), model.new_cache()
    results = {}
    for name, cache in (("lazy", lazy), ("eager", eager)):
        rows = []
        for i in range(0, 60, 3):
            logits, _ = verify(model, block(*text[i : i + 3], 9), cache)
            cache.commit(one(3), cache.length_limit + 3)
            if name == "eager":
                mx.eval(logits, cache.arrays)
            rows.append(logits)
        results[name] = bits(mx.concatenate(rows))
    assert np.array_equal(results["lazy"], results["eager"])


def test_an_unevaluated_draft_reads_before_the_next_write() -> None:
    pair = tiny_pair("dense31")
    text = greedy_text("dense31")
    drafts = []
    for evaluate in (False, True):
        cache = pair.target.new_cache()
        _, hidden = pair.target.prefill(text[:30], cache)
        logits, _ = step(pair.assistant, pair.target.embed(mx.array([3])), hidden, cache)
        if evaluate:
            mx.eval(logits)
        # Four positions back change under the draft's feet
        cache.length = cache.length - 4
        after, _ = verify(pair.target, block(9, 8, 7, 6), cache)
        mx.eval(after)
        drafts.append(bits(logits))
    assert np.array_equal(*drafts)


@pytest.mark.parametrize("chunk", [512, 100, 7])
def test_an_arena_grows_under_its_sequences(chunk: int) -> None:
    model, text = tiny_pair("uni12").target, long_text(602)
    cache, reference = model.new_cache(), model.new_cache()
    model.prefill(text, reference, chunk=len(text))
    counts = set()
    for begin in range(0, 602, 86):
        model.prefill(text[begin : begin + 86], cache, chunk=chunk)
        counts.add((cache.arena.full.count, cache.arena.sliding.count))
    assert len(counts) > 1
    full, sliding = model.config.last_source(False), model.config.last_source(True)
    for layer, pages in ((full, cache.arena.full), (sliding, cache.arena.sliding)):
        assert all(a.shape[0] == pages.count for a in cache.arena.slots(layer))
    assert len(cache.full) == 10 and list(cache.sliding) == [8, 9]
    assert_pages(cache.arena, [cache])
    assert_same(follow_up(model, cache), follow_up(model, reference))


def test_growth_inside_a_block() -> None:
    model, text = tiny_pair("uni12").target, long_text(511)
    blocks, plain = model.new_cache(), model.new_cache()
    model.prefill(text, blocks)
    model.prefill(text, plain)
    assert blocks.arena.full.free == 0
    assert_same(follow_up(model, blocks), follow_up_single(model, plain))


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_pages_behind_the_window_are_given_back_and_no_others(flavour: str) -> None:
    """By hand, for a window of 8: at 128 the next one sees the 121st, and 16 positions later the
    first page is not needed: until then a text may be taken up at 64."""
    model, text = tiny_pair(flavour).target, long_text(260)
    cache = model.new_cache()
    for length in range(1, 260):
        logits, _ = verify(model, block(text[length - 1], 7, 8, 9), cache)
        mx.eval(logits, cache.arrays)
        cache.settle(length)
        first = max(0, max(0, length - 16) // 64 * 64 - 7) // 64
        assert list(cache.sliding) == list(range(first, -(-(length + 3) // 64)))
        assert len(cache.full) == -(-(length + 3) // 64)
        assert_pages(cache.arena, [cache])
    cold = model.new_cache()
    model.prefill(text[:259], cold)
    assert_same(follow_up(model, cache), follow_up(model, cold))
    cache.release()
    cache.release()
    assert cache.nbytes == cache.arena.held_bytes == 0
    assert_pages(cache.arena, [])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_is_in_other_pages_and_behind_a_length_changes_nothing(
    flavour: str, seed: int
) -> None:
    """All that no row sees is NaN: free pages, others' pages, places from the length on."""
    rng = random.Random(seed)
    pair, text = tiny_pair(flavour, "bfloat16-q8"), long_text(300)
    model, length = pair.target, rng.choice([30, 63, 64, 65, 127, 135, 200])
    arena = model.new_arena()
    others = [arena.new_cache() for _ in range(3)]
    cache = arena.new_cache()
    for begin in range(0, length, 40):  # so that pages of all lie among each other
        for other in others:
            model.prefill(text[-40:], other)
        model.prefill(text[begin : min(length, begin + 40)], cache)
    others.pop().release()
    for sliding in (False, True):
        own = dict(cache.sliding if sliding else enumerate(cache.full))
        seen = np.zeros((arena.pages(sliding).count, PAGE), bool)
        for j, page in own.items():
            seen[page, : max(0, length - PAGE * j)] = True
            if sliding:
                seen[page, : max(0, length - WINDOW + 1 - PAGE * j)] = False
        poison(arena, sliding, seen)
    cold = model.new_cache()
    _, hidden = model.prefill(text[:length], cold)
    embedding = model.embed(block(5))
    assert pair.assistant is not None
    drafts = [bits(step(pair.assistant, embedding, hidden, c)[0]) for c in (cache, cold)]
    assert np.array_equal(*drafts)
    assert_same(follow_up(model, cache), follow_up(model, cold))


def poison(arena: Arena, sliding: bool, seen: np.ndarray) -> None:
    """NaN in all places of the kind but those that are seen."""
    at = mx.array(seen)[:, None, :, None]
    for i, layer in enumerate(arena.config.layers):
        if layer.sliding == sliding and layer.kv_source == i:
            arena.store(i, *(mx.where(at, a, mx.nan).astype(a.dtype) for a in arena.slots(i)))
    mx.eval(arena.arrays)


def test_rollback_moves_nothing() -> None:
    """A refused block costs a length that did not move."""
    model = tiny_pair("dense31").target
    cache = model.new_cache()
    model.prefill(greedy_text("dense31")[:33], cache)
    expected = follow_up(model, cache.fork(33))
    for junk in range(6):
        logits, _ = verify(model, mx.full((5,), junk, dtype=mx.int32), cache)
        cache.commit(one(0), cache.length_limit)
        mx.eval(logits)
    assert cache.length.item() == cache.length_limit == 33
    assert_same(follow_up(model, cache), expected)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 100, 127, 128, 130])
@pytest.mark.parametrize("flavour", ["dense31", "e2b"])
def test_a_fork_and_its_origin_do_not_see_each_other(flavour: str, length: int) -> None:
    """Both go on, the fork first or last, each as if it were alone."""
    model, text = tiny_pair(flavour).target, greedy_text(flavour) + long_text(60)
    ends = [text[length:][:25], [9, 8, 7] * 8]
    want = []
    for end in ends:
        cold = model.new_cache()
        model.prefill(text[:length], cold)
        want.append([bits(a) for a in steps(model, cold, end)] + follow_up(model, cold))
    for order in ((0, 1), (1, 0)):
        origin = model.new_cache()
        model.prefill(text[:length], origin)
        both = [origin, origin.fork(length)]
        assert (both[1].length.item(), both[1].committed, both[1].length_limit) == (length,) * 3
        assert_pages(origin.arena, both)
        shared = [page for page in origin.full if origin.arena.full.is_shared(page)]
        assert shared == origin.full[: length // PAGE] == both[1].full[: length // PAGE]
        for n in order:
            got = [bits(a) for a in steps(model, both[n], ends[n])] + follow_up(model, both[n])
            assert_same(got, want[n])
        assert_pages(origin.arena, both)
        both[order[0]].release()
        assert_same(follow_up(model, both[order[1]]), want[order[1]][-2:])
        both[order[1]].release()
        assert origin.arena.held_bytes == 0


def test_a_fork_may_begin_before_the_end_as_far_as_the_window_is_kept() -> None:
    model, text = tiny_pair("moe26").target, long_text(160)
    cache = model.new_cache()
    model.prefill(text[:150], cache)
    assert list(cache.sliding) == [1, 2]  # positions from 64 on
    assert [n for n in range(1, 152) if cache.can_fork(n)] == list(range(71, 151))
    for length in (70, 151):
        with pytest.raises(ValueError, match=rf"\[cache\] a fork's length .* but got {length}\."):
            cache.fork(length)
    fork, cold = cache.fork(136), model.new_cache()
    model.prefill(text[:136], cold)
    assert_same(follow_up(model, fork), follow_up(model, cold))
    assert_pages(cache.arena, [cache, fork])


def test_sequences_of_one_arena_take_turns() -> None:
    """Random calls of four; each has the bits that it has alone, and pages never mix."""
    rng, model, text = random.Random(3), tiny_pair("e2b").target, long_text(150)
    arena = model.new_arena()
    caches = [arena.new_cache() for _ in range(4)]
    texts, done = [text[n:] + text[:n] for n in range(4)], [0] * 4
    for _ in range(40):
        going = sorted(rng.sample(range(4), rng.randint(1, 4)))
        if len(going) == 1:
            [n] = going
            count = rng.randint(1, 20)
            model.prefill(texts[n][done[n] : done[n] + count], caches[n])
            done[n] += count
        else:
            ids = [block(*texts[n][done[n] : done[n] + rng.randint(1, 3)]) for n in going]
            logits, _ = model.forward(ids, [caches[n] for n in going])
            mx.eval(logits.array, arena.arrays)
            for own, n in zip(ids, going, strict=True):
                done[n] += own.size
                caches[n].settle(done[n])
        assert_pages(arena, caches)
        done = [min(n, 120) for n in done]
        for n in range(4):
            if caches[n].committed > 100:
                caches[n].release()
                caches[n], done[n] = arena.new_cache(), 0
    for n in range(4):
        cold = model.new_cache()
        if done[n]:
            model.prefill(texts[n][: done[n]], cold)
            assert_same(follow_up(model, caches[n]), follow_up(model, cold))


def test_sharing_layers_hold_nothing() -> None:
    model = tiny_pair("e2b").target
    arena = Arena(model.config, mx.bfloat16)
    own = [i for i, layer in enumerate(model.config.layers) if layer.kv_source == i]
    assert [i for i, keys in enumerate(arena.keys) if keys is not None] == own == [0, 1, 2]
    assert [i for i, values in enumerate(arena.values) if values is not None] == own
    assert (arena.page_bytes(True), arena.page_bytes(False)) == (
        2 * 2 * 2 * 16 * 64,
        2 * 2 * 32 * 64,
    )
    assert arena.nbytes == arena.held_bytes == 0
    cache = arena.new_cache()
    cache.reserve(65)
    assert (
        cache.nbytes == arena.held_bytes == 2 * (arena.page_bytes(True) + arena.page_bytes(False))
    )


def steps_of_growth(arena: Arena, sliding: bool) -> list[int]:
    """Pages that it has each time one more is asked for than there are."""
    found = []
    for _ in range(12):
        while arena.pages(sliding).free:
            arena.pages(sliding).take()
        arena.make_room(int(not sliding), int(sliding))
        found.append(arena.pages(sliding).count)
    return found


def test_it_grows_by_half_in_some_pages_or_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding layers have what one sequence may need; then what is asked for."""
    arena = tiny_pair("dense31").target.new_arena()
    assert steps_of_growth(arena, False) == [8, 16, 24, 36, 54, 81, 121, 181, 245, 309, 373, 437]
    assert window_pages(WINDOW, 512) == 11
    assert steps_of_growth(arena, True)[:4] == [8, 11, 12, 13]
    monkeypatch.setattr(cache_module, "STEP", 3 * arena.page_bytes(False))
    arena = tiny_pair("dense31").target.new_arena()
    assert steps_of_growth(arena, False)[:3] == [3, 6, 9]


def test_one_for_many_begins_with_room_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of each, in a few large steps, if that is little; of sliding layers their windows."""
    arena = tiny_pair("dense31").target.new_arena(sequences=4)
    assert steps_of_growth(arena, False)[:5] == [32, 64, 96, 144, 208]
    assert window_pages(WINDOW, 1) == 3
    assert steps_of_growth(arena, True)[:3] == [11 + 3 * 3, 21, 22]
    monkeypatch.setattr(cache_module, "SMALL", 12 * arena.page_bytes(False))
    arena = tiny_pair("dense31").target.new_arena(sequences=4)
    assert steps_of_growth(arena, False)[:4] == [12, 24, 36, 54]


def test_growth_is_what_making_room_adds() -> None:
    model = tiny_pair("dense31").target
    arena = model.new_arena()
    caches = [arena.new_cache() for _ in range(3)]
    for count in (1, 64, 65, 512, 700):
        for cache in caches:
            before, said = arena.nbytes, cache.growth(count)
            cache.reserve(count)
            assert arena.nbytes - before == said and cache.growth(count) == 0
            assert sum(a.nbytes for a in arena.arrays) == arena.nbytes
            assert_pages(arena, caches)


def test_an_arena_has_no_more_than_it_may() -> None:
    """What is refused has taken nothing."""
    model = tiny_pair("uni12").target
    size = model.new_arena().page_bytes(False) + model.new_arena().page_bytes(True)
    arena = model.new_arena(3 * size)
    cache, other = arena.new_cache(), arena.new_cache()
    cache.reserve(120)
    other.reserve(64)
    assert arena.nbytes <= 3 * size
    for call in (cache.reserve, cache.growth):
        with pytest.raises(
            RuntimeError, match=r"\[cache\] pages must fit the 0\.00 GB of the arena"
        ):
            call(150)
        assert_pages(arena, [cache, other])
    other.release()
    cache.reserve(150)
    cache.settle(1)
    with pytest.raises(RuntimeError, match=r"\[cache\] pages must fit"):
        cache.fork(1)
    assert_pages(arena, [cache])


@pytest.mark.parametrize("flavour", ["uni12", "e2b"])
def test_an_arena_gives_spare_pages_back(flavour: str) -> None:
    """Half of it is not spare yet; what is held moves, and keeps its bits."""
    model, text = tiny_pair(flavour).target, long_text(700)
    arena = model.new_arena()
    first, other, cache = (arena.new_cache() for _ in range(3))
    model.prefill(text, first)
    model.prefill(text[50:], other)
    model.prefill(text[100:250], cache)
    fork = cache.fork(150)
    want, counts = follow_up(model, fork), (arena.full.count, arena.sliding.count)
    fork.release()
    first.release()
    assert (arena.spare(False), arena.spare(True)) == (0, 0)
    other.release()
    assert counts == (36, 11)
    # Of full layers the 3 that are held and one growth by 8; of the sliding, up to a sequence's 11
    assert (arena.spare(False), arena.spare(True)) == (36 - 3 - 8, 0)
    assert cache.full == [22, 23, 24]
    active = mx.get_active_memory()
    moved = arena.trim(False)
    assert moved == {22: 0, 23: 1, 24: 2} and arena.full.count == 11 and arena.full.free == 8
    assert sum(a.nbytes for a in arena.arrays) == arena.nbytes
    assert active - mx.get_active_memory() > 24 * arena.page_bytes(False)
    cache.full = [moved[page] for page in cache.full]
    cache.settle(150)
    assert_same(follow_up(model, cache), want)
    assert_pages(arena, [cache])
    cache.release()
    for kind in (False, True):
        assert arena.spare(kind) == arena.pages(kind).count
        assert arena.trim(kind) == {}
    assert arena.nbytes == sum(a.nbytes for a in arena.arrays) == 0
    cache = arena.new_cache()
    model.prefill(text[100:250], cache)
    assert_same(follow_up(model, cache), want)
    arena.clear()
    assert arena.nbytes == sum(a.nbytes for a in arena.arrays) == 0


def test_of_31b_a_short_chat_takes_a_few_pages() -> None:
    """Of its layers, whose windows are 0.84 GB; none of it is ever written."""
    layers = [
        LayerConfig(i % 6 != 5, 256 << i % 6 // 5, 16 if i % 6 != 5 else 4, 1, i, i % 6 == 5)
        for i in range(60)
    ]
    config: Any = type("Config", (), {"layers": layers, "window": 1024})
    arena = Arena(config, mx.bfloat16)
    assert arena.page_bytes(True) == 50 * 2**20 and arena.page_bytes(False) == 5 * 2**20
    cache = arena.new_cache()
    assert cache.growth(10) < 0.31e9
    assert arena.growth(*(2 * [window_pages(1024, 8)])) < 1.1e9


def test_a_call_that_fails_leaves_the_pages_of_others_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, text = tiny_pair("dense31").target, greedy_text("dense31")
    arena = model.new_arena()
    cache, other = arena.new_cache(), arena.new_cache()
    model.prefill(text[:30], other)
    want = follow_up(model, other.fork(30))
    real = mx.eval

    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("the machine")

    for name, owner in (("eval", mx), ("block_attention", ops)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(RuntimeError, match="the machine"):
                model.prefill(text[:20], cache)
        cache.release()
        cache = arena.new_cache()
        real(arena.arrays)
        assert_same(follow_up(model, other.fork(30)), want)


def test_whoever_comes_next_ends_a_growth_that_was_broken_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By Ctrl-C, say; also one that has all the pages it needs."""
    model = tiny_pair("dense31").target
    arena = model.new_arena()
    cache, other = arena.new_cache(), arena.new_cache()
    model.prefill(long_text(30), cache)
    real, left = mx.eval, [1]

    def broken_off(*args: Any) -> None:
        if not left:
            raise KeyboardInterrupt
        left.pop()
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(mx, "eval", broken_off)
        with pytest.raises(KeyboardInterrupt):
            other.reserve(PAGE * arena.full.count)
    assert arena.is_growing
    cache.reserve(1)
    for arrays in (arena.keys, arena.values):
        for a, layer in zip(arrays, arena.layers, strict=True):
            assert a is None or a.shape[0] == arena.pages(layer.sliding).count
    assert not arena.is_growing


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_round_gets_lengths_and_tables_of_all(count: int) -> None:
    model, arena = tiny_pair("dense31").target, tiny_pair("dense31").target.new_arena()
    caches = [arena.new_cache() for _ in range(count)]
    for n, cache in enumerate(caches):
        model.prefill(long_text(40 + 150 * n), cache)
        cache.reserve(4)
    placed = arena.place(caches)
    assert placed.lengths.tolist() == [40 + 150 * n for n in range(count)]
    N = 16 if count > 3 else 8  # a power of two
    for table, own in ((placed.full, [dict(enumerate(c.full)) for c in caches]),
                       (placed.sliding, [c.sliding for c in caches])):  # fmt: skip
        assert table.shape[0] == count and table.dtype == mx.int32
        for row, pages in zip(np.array(table), own, strict=True):
            assert {j % table.shape[1]: page for j, page in pages.items()} == {
                at: page for at, page in enumerate(row.tolist()) if page >= 0
            }
    assert placed.full.shape[1] == N and placed.sliding.shape[1] == 8
    # Made anew where a page was added, else the same
    assert arena.place(caches).full is placed.full
    caches[-1].reserve(70)
    assert arena.place(caches).full is not placed.full
