"""The target against transformers, and its rows against each other, bit for bit."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from models import decode, verify
from tiny_pairs import (
    FLAVOURS,
    FORMS,
    WINDOW,
    bits,
    gap,
    greedy_text,
    reference,
    steps,
    tiny_pair,
)

from pyengine import ops
from pyengine.model import experts as routed
from pyengine.model import target
from pyengine.model.linear import Linear
from pyengine.model.target import Target
from pyengine.sampling.settings import Sampling

pytestmark = pytest.mark.engine

# float32 logits of a random model of some layers; transformers sums in other orders.
FLOAT32 = 5e-4
# bfloat16 keeps 8 bits, so each of a layer's dozen roundings moves a value by up to 0.4 %, and
# random layers amplify that. Against the float32 reference the logits (within +-30) stay this near;
# the 26B's jump where rounding changes an expert. Each rounding point is test_rounding.py's, and
# tests/parity holds us to transformers' own error.
BFLOAT16 = {"dense31": 0.5, "e2b": 0.8, "moe26": 2.0, "uni12": 0.6}
LENGTHS = (5, 21, 40)
# Every flavour in every form; two of them are enough for the workbench
PAIRS = [
    pytest.param(
        *(flavour, form),
        marks=[pytest.mark.short] if form == "bfloat16-q8" and flavour in ("e2b", "uni12") else [],
    )
    for flavour in FLAVOURS
    for form in FORMS
]


@pytest.mark.short
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("length", LENGTHS)
def test_logits_match_transformers(flavour, length):
    wanted = reference(flavour)
    model = tiny_pair(flavour).target
    logits = model.logits(wanted[f"{length}.ids"].tolist())
    assert logits.dtype == mx.float32
    assert gap(logits, wanted[f"{length}.logits"]) <= FLOAT32


@pytest.mark.short
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_matches_transformers(flavour, length):
    wanted = reference(flavour)
    model = tiny_pair(flavour).target
    cache = model.new_cache()
    logits, hidden = model.prefill(wanted[f"{length}.ids"].tolist(), cache, chunk=6)
    assert gap(logits, wanted[f"{length}.logits"][-1]) <= FLOAT32
    assert gap(hidden, wanted[f"{length}.hidden"][-1:]) <= FLOAT32
    assert cache.length.item() == cache.length_limit == length


@pytest.mark.short
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_layer_matches_transformers(flavour, monkeypatch):
    """The stream after each layer, and the keys and values the assistant reads."""
    wanted, model = reference(flavour), tiny_pair(flavour).target
    streams = []

    def spy(*args, **kwargs):
        out = residual_norm(*args, **kwargs)
        if kwargs.get("scalar") is not None:  # the last step of a layer
            streams.append(out[0])
        return out

    residual_norm = ops.residual_norm
    monkeypatch.setattr(ops, "residual_norm", spy)
    ids = wanted["21.ids"].tolist()
    cache = model.new_cache()
    _, hidden = verify(model, mx.array(ids, dtype=mx.int32), cache)
    assert len(streams) == len(model.layers)
    assert gap(model.embed(mx.array(ids)), wanted["21.layer.0"]) <= FLOAT32
    for i, stream in enumerate(streams[:-1], 1):
        assert gap(stream, wanted[f"21.layer.{i}"]) <= FLOAT32, f"layer {i}"
    assert gap(hidden, wanted["21.hidden"]) <= FLOAT32
    for kind, sliding in (("sliding_attention", True), ("full_attention", False)):
        source = model.config.last_source(sliding)
        for own, theirs in zip(cache.arena.slots(source), "kv", strict=True):
            page = cache.sliding[0] if sliding else cache.full[0]
            found = own[page : page + 1, :, :21]
            assert gap(found, wanted[f"21.kv.{kind}.{theirs}"]) <= FLOAT32


@pytest.mark.short
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("length", LENGTHS)
def test_bfloat16_stays_near_float32(flavour, length):
    wanted = reference(flavour)
    model = tiny_pair(flavour, "bfloat16").target
    logits = model.logits(wanted[f"{length}.ids"].tolist())
    assert logits.dtype == mx.float32 and model.dtype == mx.bfloat16
    assert gap(logits, wanted[f"{length}.logits"]) <= BFLOAT16[flavour]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_greedy_text_matches_transformers(flavour):
    """The target's own steps; the engine's rounds are the next test's."""
    text = greedy_text(flavour)
    model = tiny_pair(flavour).target
    cache = model.new_cache()
    logits, _ = model.prefill(text[:21], cache)
    written = [int(mx.argmax(logits).item())]
    while len(written) < 40:
        row, _ = verify(model, mx.array(written[-1:], dtype=mx.int32), cache)
        cache.commit(mx.array(1, dtype=mx.int32), cache.length_limit + 1)
        written.append(int(mx.argmax(row).item()))
    assert written == text[21:61]


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_rounds_write_transformers_greedy_text(flavour, block_size):
    text, pair = greedy_text(flavour), tiny_pair(flavour)
    rounds = decode(
        pair.target,
        pair.assistant,
        text[:21],
        sampling=Sampling(temperature=0.0),
        block_size=block_size,
        max_tokens=40,
    )
    assert [token for r in rounds for token in r.tokens] == text[21:61]


@pytest.mark.parametrize("flavour, form", PAIRS)
def test_a_block_gives_the_bits_of_single_steps(flavour, form):
    """The promise that makes greedy speculative text equal greedy text; past five windows."""
    text = greedy_text(flavour)
    model = tiny_pair(flavour, form).target
    cache = model.new_cache()
    model.prefill(text[:21], cache)
    start = cache.fork(21)
    single_logits, single_hidden = steps(model, cache, text[21:61])
    for T in (2, 3, 7, 16, 17, 40):
        block = start.fork(21)
        logits, hidden = verify(model, mx.array(text[21 : 21 + T], dtype=mx.int32), block)
        assert np.array_equal(bits(logits), bits(single_logits[:T])), T
        assert np.array_equal(bits(hidden), bits(single_hidden[:T])), T


@pytest.mark.native("bits do not depend on the number of rows, which plain MLX does not promise")
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_prefill_chunks_change_nothing(flavour):
    """Chunks below, at and above the window and a block, from the first position on."""
    text = greedy_text(flavour)[:57]
    model = tiny_pair(flavour, "bfloat16").target
    results = []
    for chunk in (1, 3, WINDOW, 10, 11, 20, 512):
        cache = model.new_cache()
        logits, hidden = model.prefill(text, cache, chunk=chunk)
        follow, _ = verify(model, mx.array([7, 8, 9], dtype=mx.int32), cache)
        results.append([bits(a) for a in (logits, hidden, follow)])
    for other in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.native("bits do not depend on the number of rows, which plain MLX does not promise")
def test_prefill_continues_where_it_stopped():
    text = greedy_text("e2b")[:50]
    model = tiny_pair("e2b").target
    whole, parts = model.new_cache(), model.new_cache()
    expected, _ = model.prefill(text, whole)
    model.prefill(text[:23], parts)
    verify(model, mx.array([1, 2, 3, 4], dtype=mx.int32), parts)  # refused altogether
    parts.commit(mx.array(0, dtype=mx.int32), parts.length_limit + 4)  # a bound may be loose
    logits, _ = model.prefill(text[23:], parts, chunk=13)
    assert np.array_equal(bits(logits), bits(expected))


@pytest.mark.short
def test_quantised_model_is_its_dequantised_self():
    """The same model with 8-bit weights written out in float32 differs by summation order only."""
    for flavour in FLAVOURS:
        quantised = tiny_pair(flavour, "float32-q8").target
        assert quantised.table.scales is not None
        ids = greedy_text(flavour)[:30]
        assert gap(quantised.logits(ids), _dense(quantised).logits(ids)) <= FLOAT32


def _dense(model: Target) -> Target:
    def plain(value):
        if isinstance(value, Linear):
            return Linear(value.values())
        if dataclasses.is_dataclass(value):
            fields = {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return type(value)(**fields)
        return value

    copy = object.__new__(Target)
    copy.__dict__.update({name: plain(value) for name, value in model.__dict__.items()})
    copy.config = model.config
    copy.layers = [dataclasses.replace(plain(layer), config=layer.config) for layer in model.layers]
    return copy


def test_embedding_scale_is_rounded_to_the_storage_dtype():
    table = mx.ones((4, 5376), dtype=mx.bfloat16)
    scale = target._rounded(5376**0.5, mx.bfloat16)
    assert scale == 73.5
    out = Linear(table).rows(mx.array([1]), scale)
    assert out.dtype == mx.bfloat16 and out[0, 0].item() == 73.5
    assert target._rounded(2816**0.5, mx.bfloat16) == 53.0


def test_a_quantised_row_is_looked_up_unrounded():
    table = mx.random.normal((8, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    linear = Linear(*mx.quantize(table, 64, 8), 8, 64)
    rows = linear.rows(mx.array([3, 5]), 8.0, mx.float32)
    q = (linear.weight[3][:, None] >> mx.array([0, 8, 16, 24], dtype=mx.uint32)) & 255
    exact = np.array(q.reshape(-1)).astype(np.float64) * linear.scales[3].item()
    exact = (exact + linear.biases[3].item()) * 8.0
    assert rows.dtype == mx.float32
    np.testing.assert_allclose(np.array(rows[0]), exact, rtol=1e-6, atol=1e-6)


def experts_of(num_experts: int, *, quantised: bool, scale_sign: float = 1.0) -> routed.Experts:
    def stack(seed, *shape):
        w = mx.random.normal(shape, key=mx.random.key(seed)) * shape[-1] ** -0.5
        return Linear(*mx.quantize(w, 64, 8), 8, 64) if quantised else Linear(w)

    E, m = 64, 128
    return routed.Experts(
        router=Linear(mx.random.normal((num_experts, E), key=mx.random.key(9))),
        router_norm=mx.ones(E) * E**-0.5,
        scales=scale_sign * mx.arange(1, num_experts + 1, dtype=mx.float32) / num_experts,
        gate=stack(1, num_experts, m, E),
        up=stack(2, num_experts, m, E),
        down=stack(3, num_experts, E, m),
        pre_norm=mx.ones(E),
        dense_norm=mx.ones(E),
        routed_norm=mx.ones(E),
    )


@pytest.mark.parametrize("quantised", [False, True])
def test_experts_by_slot_and_by_expert_agree_bit_for_bit(quantised):
    experts = experts_of(8, quantised=quantised, scale_sign=-1.0)
    h = mx.random.normal((5, 64), key=mx.random.key(4))
    ids, weights = routed._route(experts, h, 3, 1e-6)
    by_slot = routed._by_slot(experts, h, ids, weights)
    by_expert = routed._by_expert(experts, h, ids, weights)
    assert np.array_equal(bits(by_slot), bits(by_expert))

    # And both are the sum the router asks for, in float64
    def rows(linear):
        return np.array(linear.values(), dtype=np.float64)

    gate, up, down = rows(experts.gate), rows(experts.up), rows(experts.down)
    for t in range(5):
        x, total = np.array(h[t], dtype=np.float64), 0.0
        for expert, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            g, u = gate[expert] @ x, up[expert] @ x
            inner = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u
            total = total + weight * (down[expert] @ inner)
        np.testing.assert_allclose(np.array(by_slot[t]), total, rtol=1e-4, atol=1e-5)


@pytest.mark.short
def test_router_weights_sum_to_one_before_the_expert_scale():
    experts = dataclasses.replace(experts_of(8, quantised=False), scales=mx.ones(8))
    h = mx.random.normal((6, 64), key=mx.random.key(4))
    ids, weights = routed._route(experts, h, 3, 1e-6)
    np.testing.assert_allclose(np.array(weights.sum(axis=-1)), 1.0, rtol=1e-6)
    logits = np.array(experts.router(ops.rms_norm(h, experts.router_norm, 1e-6)))
    for t in range(6):
        assert ids[t].tolist() == sorted(np.argsort(-logits[t])[:3].tolist())
        probabilities = np.exp(logits[t] - logits[t].max())
        chosen = probabilities[ids[t].tolist()]
        np.testing.assert_allclose(np.array(weights[t]), chosen / chosen.sum(), rtol=1e-5)


def test_router_ties_go_to_the_lower_expert():
    experts = experts_of(8, quantised=False)
    tied = dataclasses.replace(experts, router=Linear(mx.ones((8, 64))))
    ids, _ = routed._route(tied, mx.ones((3, 64)), 3, 1e-6)
    assert ids.tolist() == [[0, 1, 2]] * 3


def test_verify_neither_evaluates_nor_commits(monkeypatch):
    model = tiny_pair("dense31").target
    cache = model.new_cache()
    model.prefill([5, 6, 7], cache)

    def refuse(*_):
        raise AssertionError("a forward pass must not evaluate")

    monkeypatch.setattr(mx, "eval", refuse)
    monkeypatch.setattr(mx, "async_eval", refuse)
    verify(model, mx.array([1, 2, 3], dtype=mx.int32), cache)
    assert cache.length_limit == 3
    assert cache.length.item() == 3


def test_errors():
    model = tiny_pair("uni12").target
    cache = model.new_cache()
    with pytest.raises(ValueError, match=r"\[prefill\] ids must not be empty"):
        model.prefill([], cache)
    for bad in (-1, 256):
        with pytest.raises(
            ValueError, match=rf"\[prefill\] ids must be from 0 to 255 but got {bad}"
        ):
            model.prefill([1, bad], cache)
        with pytest.raises(ValueError, match=r"\[logits\] ids must be from 0 to 255"):
            model.logits([bad])
    with pytest.raises(ValueError, match=r"\[prefill\] chunk must be at least 1 but got 0"):
        model.prefill([1], cache, chunk=0)
