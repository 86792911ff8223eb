"""The assistant against transformers at both positions, and what it may and may not read."""

import copy
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from models import step, verify
from tiny_pairs import (
    FIXTURES,
    FLAVOURS,
    FORMS,
    WINDOW,
    bits,
    gap,
    greedy_text,
    quantized_fixtures,
    reference,
    tiny_pair,
)

from pyengine.checkpoint.weights import load_assistant_weights
from pyengine.model import assistant as assistant_module
from pyengine.model.assistant import POSITIONS, Assistant
from pyengine.model.head import whole
from pyengine.model.linear import Linear
from pyengine.ops.recorded import recorded

pytestmark = pytest.mark.engine

FLOAT32 = 5e-4
# Against the float32 reference, from bfloat16 keys: their error is the target's (test_target.py).
BFLOAT16 = 0.3
LENGTHS = (5, 21, 40)
NUM_DRAFTS = 4


def prefilled(flavour, length, form="float32"):
    model = tiny_pair(flavour, form).target
    cache = model.new_cache()
    _, hidden = model.prefill(reference(flavour)[f"{length}.ids"].tolist(), cache, chunk=9)
    return model, cache, hidden


@pytest.mark.short
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_steps_match_transformers(flavour, length, position):
    """Each step from the reference's own input, then the whole chain from ours."""
    wanted = reference(flavour)
    assistant = tiny_pair(flavour, position=position).assistant
    target, cache, own_hidden = prefilled(flavour, length)
    token = wanted[f"{length}.bonus"].astype(mx.int32)
    own_token = token
    for depth in range(NUM_DRAFTS):
        at = f"{length}.{position}.{depth}"
        embedding = target.embed(token)
        assert gap(embedding, wanted[f"{at}.embedding"]) == 0
        logits, hidden = step(assistant, embedding, wanted[f"{at}.hidden_in"], cache)
        seen = mx.isfinite(logits)
        theirs = wanted[f"{at}.logits"]
        assert gap(mx.where(seen, logits, 0), mx.where(seen, theirs, 0)) <= FLOAT32
        assert gap(hidden, wanted[f"{at}.hidden"]) <= FLOAT32
        own_logits, own_hidden = step(assistant, target.embed(own_token), own_hidden, cache)
        own_token = mx.argmax(own_logits, axis=-1).astype(mx.int32)
        token = wanted[f"{at}.token"].astype(mx.int32)
        assert own_token.tolist() == token.tolist()


@pytest.mark.short
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bfloat16_stays_near_float32(flavour):
    wanted = reference(flavour)
    assistant = tiny_pair(flavour, "bfloat16").assistant
    target, cache, _ = prefilled(flavour, 21, "bfloat16")
    at = "21.n-1.0"
    logits, _ = step(
        assistant,
        target.embed(wanted["21.bonus"].astype(mx.int32)),
        wanted[f"{at}.hidden_in"].astype(mx.bfloat16),
        cache,
    )
    assert logits.dtype == mx.float32
    seen = mx.isfinite(logits)
    theirs = mx.where(seen, wanted[f"{at}.logits"], 0)
    assert gap(mx.where(seen, logits, 0), theirs) <= BFLOAT16


def centroid_head(form):
    """An e2b assistant with a random table, order and centroids, some of them alike; the table."""
    pair = tiny_pair("e2b", form)
    dtype, quantized = FORMS[form]
    config, draw = pair.assistant.config, np.random.default_rng(4)

    def matrix(rows):
        values = mx.array(rows.astype(np.float32)).astype(dtype)
        return Linear(*mx.quantize(values, 64, 8), 8, 64) if quantized else Linear(values)

    width, count = config.hidden_size, config.num_centroids
    table = matrix(draw.normal(size=(config.vocab_size, width)))
    kinds = draw.normal(size=(count // 3, width))
    centroids = matrix(kinds[draw.integers(len(kinds), size=count)])
    order = mx.array(draw.permutation(config.vocab_size).astype(np.int32))
    folder = (quantized_fixtures() if quantized else FIXTURES) / "e2b" / "assistant"
    weights = load_assistant_weights(folder, config, dtype)
    matrices = {"embed_tokens": table, "masked_embedding.centroids": centroids}
    weights = replace(
        weights,
        matrices={**weights.matrices, **matrices},
        vectors={**weights.vectors, "masked_embedding.token_ordering": order},
    )
    return Assistant(config, pair.target.config, weights), table, np.array(order)


@pytest.mark.short
@pytest.mark.parametrize("form", FORMS)
def test_centroid_head_looks_at_the_best_clusters_only(form):
    """Each row as alone; of centroids with the same score the lower ones."""
    assistant, table, order = centroid_head(form)
    config = assistant.config
    rows = mx.random.normal((17, config.hidden_size), key=mx.random.key(3))
    rows = rows.astype(assistant.dtype)
    dense = np.array(bits(table(rows, mx.float32)))
    scores = np.array(assistant.centroids(rows, mx.float32))
    best = np.argsort(-scores, axis=-1, kind="stable")[:, : config.num_centroids_used]
    left_out = np.take_along_axis(scores, best[:, -1:], axis=-1) == scores
    assert (left_out.sum(axis=-1) > 1).any()  # a tie at the border
    want = np.full_like(dense, bits(mx.array([-mx.inf]))[0])
    for row, clusters in enumerate(best):
        ids = order.reshape(config.num_centroids, -1)[clusters].reshape(-1)
        want[row, ids] = dense[row, ids]
    for count in (1, 2, 5, 17):
        for first in range(0, 17, count):
            logits = assistant._head(rows[first : first + count])
            assert logits.dtype == mx.float32
            assert np.array_equal(bits(logits), want[first : first + count])


@pytest.mark.parametrize("form", FORMS)
def test_a_centroid_head_may_use_more_centroids_than_a_filter_keeps(form, monkeypatch):
    monkeypatch.setattr(assistant_module, "MAX_TOP_K", 3)
    assistant, _, _ = centroid_head(form)
    x = mx.random.normal((2, assistant.config.hidden_size), key=mx.random.key(3))
    x = x.astype(assistant.dtype)
    got = assistant._head(x)
    monkeypatch.undo()
    assert np.array_equal(bits(got), bits(assistant._head(x)))


@pytest.mark.native("counts nodes of the native ops")
@pytest.mark.parametrize("count", [1, 4])
def test_a_quantised_centroid_head_runs_once_for_all_rows(count):
    """Its two ops, the tokens of the centroids, and where the logits go."""
    assistant, _, _ = centroid_head("bfloat16-q8")
    head = recorded(lambda arrays: [assistant._head(arrays[0])])
    head([mx.ones((count, assistant.config.hidden_size), mx.bfloat16)])
    assert sorted(set(head.nodes) - {"Reshape", "Squeeze"}) == [
        "Gather",
        "ScatterAxis",
        "quantized_expert_matmul",
        "quantized_filter_logits",
    ]
    assert len(head.nodes) == 7


@pytest.mark.parametrize("turn", range(8))
def test_centroids_are_ranked_by_scores_that_are_not_rounded(turn):
    """1 and some thousandths, which bfloat16 cannot tell apart."""
    assistant = copy.copy(tiny_pair("e2b", "bfloat16").assistant)
    count, used = assistant.config.num_centroids, assistant.config.num_centroids_used
    order = np.roll(np.arange(count), turn)
    rows = np.zeros((count, 64), np.float32)
    rows[:, 0], rows[:, 1] = 1, order * 2.0**-11
    assistant.centroids = Linear(mx.array(rows).astype(mx.bfloat16))
    logits = np.array(assistant._head(mx.ones((1, 64), mx.bfloat16))[0])
    best = np.argsort(-order)[:used]
    ids = np.array(assistant.token_ordering)[best].reshape(-1)
    assert sorted(ids) == np.flatnonzero(np.isfinite(logits)).tolist()


@pytest.mark.short
def test_plain_head_looks_at_every_token():
    pair = tiny_pair("dense31")
    logits = whole(pair.assistant._head(mx.ones((1, 64))))
    assert bool(mx.isfinite(logits).all())


@pytest.mark.short
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_refused_positions_are_not_read(flavour):
    """What a refused block leaves behind the committed length changes no bit of a draft."""
    pair = tiny_pair(flavour)
    text = greedy_text(flavour)
    model, cache, hidden = pair.target, pair.target.new_cache(), None
    _, hidden = model.prefill(text[:40], cache)
    embedding = model.embed(mx.array(text[40:41]))
    clean, _ = step(pair.assistant, embedding, hidden, cache)
    mx.eval(clean)
    verify(model, mx.array([9, 8, 7, 6, 5], dtype=mx.int32), cache)
    stale, _ = step(pair.assistant, embedding, hidden, cache)
    assert np.array_equal(bits(clean), bits(stale))


@pytest.mark.parametrize("age, is_read", [(0, True), (WINDOW - 2, True), (WINDOW - 1, False)])
def test_sliding_layers_read_the_newest_window_less_one(age, is_read):
    """Spoil the key of one position in the sliding layer the assistant reads."""
    pair = tiny_pair("dense31")
    model, cache = pair.target, pair.target.new_cache()
    _, hidden = model.prefill(greedy_text("dense31")[:40], cache)
    embedding = model.embed(mx.array([3]))
    before, _ = step(pair.assistant, embedding, hidden, cache)
    mx.eval(before)
    source = model.config.last_source(True)
    keys, values = cache.arena.slots(source)
    spoiled = mx.arange(64) == 39 - age
    cache.arena.store(source, mx.where(spoiled[None, None, :, None], 3.0, keys), values)
    after, _ = step(pair.assistant, embedding, hidden, cache)
    assert (gap(before, after) > 0) == is_read


def test_full_layer_reads_the_first_position():
    pair = tiny_pair("dense31")
    model, cache = pair.target, pair.target.new_cache()
    _, hidden = model.prefill(greedy_text("dense31")[:40], cache)
    embedding = model.embed(mx.array([3]))
    before, _ = step(pair.assistant, embedding, hidden, cache)
    source = model.config.last_source(False)
    keys, values = cache.arena.slots(source)
    first = (mx.arange(64) == 0)[None, None, :, None]
    mx.eval(before)
    cache.arena.store(source, keys, mx.where(first, 30.0, values))
    after, _ = step(pair.assistant, embedding, hidden, cache)
    assert gap(before, after) > 0


def test_embedding_comes_before_hidden():
    """The two halves of the input are not interchangeable."""
    pair = tiny_pair("uni12")
    _, cache, hidden = prefilled("uni12", 21)
    embedding = pair.target.embed(mx.array([3]))
    one, _ = step(pair.assistant, embedding, hidden, cache)
    other, _ = step(pair.assistant, hidden, embedding, cache)
    assert gap(one, other) > 0.1


def test_gathered_rows_of_a_quantised_table_are_its_rows():
    table = Linear(*mx.quantize(mx.random.normal((32, 64), key=mx.random.key(1)), 64, 8), 8, 64)
    ids = mx.array([31, 0, 7])
    assert np.array_equal(bits(table.take(ids).values()), bits(table.values()[ids]))


def test_an_unknown_position_is_refused():
    pair = tiny_pair("uni12")
    with pytest.raises(ValueError, match=r"\[assistant\] position must be n-1 or n-2 but got 'n'"):
        Assistant(pair.assistant.config, pair.target.config, None, "n")
