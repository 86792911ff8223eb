"""Append, commit, rollback: whatever the pattern, the cache holds what plain decoding would."""

import io

import mlx.core as mx
import numpy as np
import pytest
from models import step, verify
from tiny_pairs import FLAVOURS, WINDOW, bits, greedy_text, steps, tiny_pair

from pyengine.model.cache import CAPACITY_STEP, Cache


def one(count: int) -> mx.array:
    return mx.array(count, dtype=mx.int32)


def follow_up(model, cache) -> list[np.ndarray]:
    """Bits of what a block of three gives next."""
    logits, hidden = verify(model, mx.array([11, 12, 13], dtype=mx.int32), cache)
    return [bits(logits), bits(hidden)]


def assert_same(a, b):
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_any_accept_pattern_equals_plain_decoding(flavour, seed):
    """Blocks of random length, refused from a random place on, past ten windows.

    The cache's part of a round alone: what a round keeps is drawn here, not decided.
    """
    rng = np.random.default_rng(seed)
    form = ("float32", "bfloat16", "bfloat16-q8", "float32-q8")[seed]
    model = tiny_pair(flavour, form).target
    text = greedy_text(flavour)
    max_block = int(rng.integers(2, 18))
    cache, plain = model.new_cache(max_block), model.new_cache(1)
    known = int(rng.integers(1, 30))
    model.prefill(text[:known], cache, chunk=int(rng.integers(1, 33)))
    model.prefill(text[:known], plain)
    while known < 100:
        T = int(rng.integers(1, max_block + 1))
        kept = min(int(rng.integers(1, T + 1)), 100 - known)
        # The kept tokens are the text's; the refused ones are anything
        block = text[known : known + kept] + rng.integers(0, 256, T - kept).tolist()
        logits, _ = verify(model, mx.array(block, dtype=mx.int32), cache)
        cache.commit(one(kept), cache.length_limit + T)  # what the host knows before it reads
        single, _ = steps(model, plain, text[known : known + kept])
        assert np.array_equal(bits(logits[:kept]), bits(single))
        known += kept
    assert cache.length.item() == plain.length.item() == 100
    wide = plain.snapshot()
    wide.max_block = max_block
    assert_same(follow_up(model, cache), follow_up_single(model, wide))


def follow_up_single(model, cache) -> list[np.ndarray]:
    return [bits(a) for a in steps(model, cache, [11, 12, 13])]


def test_unevaluated_calls_do_not_overtake_each_other():
    """Blocks with host-given tokens, all built before any is evaluated: each write waits."""
    model = tiny_pair("dense31").target
    text = greedy_text("dense31")[:60]
    lazy, eager = model.new_cache(4), model.new_cache(4)
    results = {}
    for name, cache in (("lazy", lazy), ("eager", eager)):
        rows = []
        for i in range(0, 60, 3):
            logits, _ = verify(model, mx.array([*text[i : i + 3], 9], dtype=mx.int32), cache)
            cache.commit(one(3), cache.length_limit + 3)
            if name == "eager":
                mx.eval(logits, cache.arrays)
            rows.append(logits)
        results[name] = bits(mx.concatenate(rows))
    assert np.array_equal(results["lazy"], results["eager"])


def test_an_unevaluated_draft_reads_before_the_next_write():
    pair = tiny_pair("dense31")
    text = greedy_text("dense31")
    drafts = []
    for evaluate in (False, True):
        cache = pair.target.new_cache(4)
        _, hidden = pair.target.prefill(text[:30], cache)
        logits, _ = step(pair.assistant, pair.target.embed(mx.array([3])), hidden, cache)
        if evaluate:
            mx.eval(logits)
        # Four positions back in the ring, and the block behind it, change under the draft's feet
        cache.length, cache.length_limit = cache.length - 4, cache.length_limit - 4
        after, _ = verify(pair.target, mx.array([9, 8, 7, 6], dtype=mx.int32), cache)
        mx.eval(after)
        drafts.append(bits(logits))
    assert np.array_equal(*drafts)


@pytest.mark.parametrize("chunk", [512, 100, 7])
def test_full_layers_grow(chunk):
    """Past one capacity step, which reallocates; the sliding ring has turned many times."""
    model = tiny_pair("uni12").target
    text = [5 + i * 37 % 250 for i in range(CAPACITY_STEP + 90)]
    cache, reference = model.new_cache(3), model.new_cache(3)
    model.prefill(text, reference, chunk=len(text))
    model.prefill(text, cache, chunk=chunk)
    full = model.config.last_source(False)
    assert cache.keys[full].shape[2] == 2 * CAPACITY_STEP
    sliding = model.config.last_source(True)
    assert cache.keys[sliding].shape[2] == WINDOW - 1 + 3
    assert_same(follow_up(model, cache), follow_up(model, reference))


def test_growth_inside_a_block():
    model = tiny_pair("uni12").target
    text = [5 + i * 37 % 250 for i in range(CAPACITY_STEP - 1)]
    blocks, plain = model.new_cache(3), model.new_cache(3)
    model.prefill(text, blocks)
    model.prefill(text, plain)
    assert_same(follow_up(model, blocks), follow_up_single(model, plain))


def test_rollback_moves_nothing():
    """A refused block costs a length that did not move: no array is replaced but by its write."""
    model = tiny_pair("dense31").target
    cache = model.new_cache(5)
    model.prefill(greedy_text("dense31")[:33], cache)
    expected = follow_up(model, cache.snapshot())
    for junk in range(6):
        logits, _ = verify(model, mx.full((5,), junk, dtype=mx.int32), cache)
        cache.commit(one(0), cache.length_limit)
        mx.eval(logits)
    assert cache.length.item() == cache.length_limit == 33
    assert_same(follow_up(model, cache), expected)


def test_a_snapshot_is_independent():
    model = tiny_pair("e2b").target
    cache = model.new_cache(3)
    text = greedy_text("e2b")
    model.prefill(text[:25], cache)
    arrays = [bits(a) for a in cache.arrays[:-1]]
    snapshot = cache.snapshot()
    steps(model, cache, text[25:60])
    # It was made before, not when it is looked at
    assert_same([bits(a) for a in snapshot.arrays[:-1]], arrays)
    expected = follow_up(model, snapshot.snapshot())
    steps(model, snapshot.snapshot(), text[25:60])
    assert snapshot.length.item() == 25
    assert_same(follow_up(model, snapshot), expected)


def test_sharing_layers_hold_nothing():
    model = tiny_pair("e2b").target
    cache = Cache(model.config, 4, mx.bfloat16)
    own = [i for i, layer in enumerate(model.config.layers) if layer.kv_source == i]
    assert [i for i, keys in enumerate(cache.keys) if keys is not None] == own == [0, 1, 2]
    assert [i for i, values in enumerate(cache.values) if values is not None] == own
    sliding, full = 2 * (WINDOW - 1 + 4) * 16, CAPACITY_STEP * 32
    assert cache.nbytes == 2 * 2 * (sliding + full) + 4


def test_errors():
    with pytest.raises(ValueError, match=r"\[cache\] max_block must be at least 1 but got 0"):
        Cache(tiny_pair("uni12").target.config, 0, mx.float32)


def test_a_chunk_is_written_out_of_what_was_read() -> None:
    """Only data orders a write behind a read on a GPU: the write takes the rows that are read."""
    pair = tiny_pair("dense31")
    layers = pair.target.config.layers
    cache = pair.target.new_cache(2)
    i = next(i for i, layer in enumerate(layers) if layer.sliding and layer.kv_source == i)
    new = mx.ones((1, 5, layers[i].num_kv_heads, layers[i].head_dim))
    cache.append_chunk(i, new, new)
    graph = io.StringIO()
    mx.export_to_dot(graph, cache.keys[i])
    assert "write_cache" in graph.getvalue() and "Concatenate" in graph.getvalue()
    assert "Depends" not in graph.getvalue()
