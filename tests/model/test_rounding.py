"""bfloat16's rounding points: each of them, of target and assistant, on widths with inexact roots.

tests/helpers/roundings.py says in float64 what is computed and where it is rounded. With
transformers' points it must give transformers' bfloat16, stored in tests/fixtures/rounding; with
ours, the bits of pyengine; and pyengine stays within some units in the last place of transformers.
Each layer begins from a given stream, so that errors do not pile up and no tolerance has to allow
for that.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import models
import numpy as np
import pytest
import roundings
from in_pages import in_a_row, put_in_a_row
from models import verify
from odd_pairs import (
    ASSISTANTS,
    FLAVOURS,
    FULL,
    NUM_CENTROIDS,
    REFERENCES,
    SLIDING,
    TARGETS,
    WINDOW,
    Array,
    P,
    T,
    V,
    Weights,
    assistant_weights,
    target_weights,
    write_pair,
)

from pyengine import _ext, ops
from pyengine.checkpoint.pair import Pair, load
from pyengine.checkpoint.quantize import quantize_checkpoint
from pyengine.model.cache import Cache
from pyengine.model.target import Target
from pyengine.ops import dispatch
from pyengine.ops.quantized_matmul import PLANES

pytestmark = pytest.mark.engine
FORMS = ("bfloat16", "bfloat16-q8")
PAIRS = [(flavour, form) for flavour in FLAVOURS for form in FORMS]
# How the prompt goes through the target: one block, blocks of so few rows that routed experts are
# fetched row by row, and a prefill chunk longer than the ring of the sliding layers.
WAYS = ("block", "rows", "chunk")
STEPS = 2

# Share of a layer's numbers that may differ from roundings.py. A sum in float32 and in float64
# lies on two sides of a tie once in some thousand times, and such a number moves its row a little.
# A rounding left out or added moves all rows: a tenth of the numbers or more.
SAME = 0.08
# Units in the last place between ours and transformers, which rounds twice as often.
UNITS = 8
LOGITS = 2e-6  # in float32, of numbers up to 30


def values(a: mx.array) -> Array:
    return np.array(a.astype(mx.float32)).astype(np.float64)


def given(a: Array) -> mx.array:
    return mx.array(a.astype(np.float32)).astype(mx.bfloat16)


def share(ours: Array, wanted: Array) -> float:
    assert ours.shape == wanted.shape
    return float((ours != wanted).mean())


def units(ours: Array, wanted: Array) -> float:
    """The largest gap in units in the last place of the wanted number or, where that is near zero,
    of its row's root mean square."""
    assert ours.shape == wanted.shape and np.isfinite(ours).all()
    size = np.maximum(np.abs(wanted), np.sqrt((wanted * wanted).mean(axis=-1, keepdims=True)))
    return float((np.abs(ours - wanted) / 2.0 ** (np.floor(np.log2(size)) - 7)).max())


def our_points(form: str) -> frozenset[str]:
    """Our points, and that of a processor whose quantised matmuls take whole numbers."""
    whole = (
        form == "bfloat16-q8"
        and dispatch.runs("quantized_matmul") == "native"
        and _ext.instruction_set() in PLANES
    )
    return roundings.OURS | {roundings.WHOLE} if whole else roundings.OURS


@functools.cache
def reference(flavour: str) -> dict[str, Array]:
    loaded = mx.load(str(REFERENCES / f"{flavour}.safetensors"))
    assert isinstance(loaded, dict)
    return {name: values(tensor) for name, tensor in loaded.items()}


@functools.cache
def folder() -> Path:
    root = Path(tempfile.mkdtemp(prefix="pyengine-odd-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    for flavour in FLAVOURS:
        write_pair(flavour, root / "bfloat16" / flavour)
        (root / "bfloat16-q8" / flavour).mkdir(parents=True)
        for part in ("target", "assistant"):
            src, dst = (root / form / flavour / part for form in FORMS)
            quantize_checkpoint(src, dst, group_size=32)
    return root


@functools.cache
def odd_pair(flavour: str, form: str) -> Pair:
    at = folder() / form / flavour
    return load(at / "target", at / "assistant")


@functools.cache
def weights(flavour: str, form: str, part: str) -> Weights:
    """Those drawn; of a quantised checkpoint what its file holds, under the published names."""
    drawn = target_weights(flavour) if part == "target" else assistant_weights(flavour)
    if form == "bfloat16":
        return drawn
    stored = mx.load(str(folder() / form / flavour / part / "model.safetensors"))

    def read(name: str) -> Array:
        path = name.removesuffix(".weight")
        if f"{path}.scales" not in stored:
            return values(stored[name])
        scales, biases = (stored[f"{path}.{k}"].astype(mx.float32) for k in ("scales", "biases"))
        return values(mx.dequantize(stored[f"{path}.weight"], scales, biases, 32, 8))

    found: Weights = {}
    for name, tensor in drawn.items():
        at, experts, rest = name.partition("experts.")
        stack = f"{at}experts.switch_glu"
        if rest == "gate_up_proj":
            both = [read(f"{stack}.{k}_proj.weight") for k in ("gate", "up")]
            found[name] = np.concatenate(both, axis=1)
        elif experts:
            found[name] = read(f"{stack}.{rest}.weight")
        else:
            found[name] = tensor if name.endswith("ordering") else read(name)
        assert found[name].shape == tensor.shape
    return found


def target_of(flavour: str, form: str, points: frozenset[str]) -> roundings.Target:
    return roundings.Target(TARGETS[flavour], weights(flavour, form, "target"), points)


def assistant_of(flavour: str, form: str, points: frozenset[str]) -> roundings.Assistant:
    config = ASSISTANTS[flavour]["text_config"]
    return roundings.Assistant(config, weights(flavour, form, "assistant"), points)


def cache_of(flavour: str, model: Target) -> Cache:
    """A cache that holds transformers' keys and values where the assistant reads."""
    wanted, cache = reference(flavour), model.new_cache()
    model.prefill(ids_of(flavour), cache)
    for kind in (SLIDING, FULL):
        source = model.config.last_source(kind == SLIDING)
        changed = []
        for name, kept in zip("kv", in_a_row(cache, source), strict=True):
            stored, whole = wanted[f"{name}.{kind}"], values(kept)
            whole[0, :, T - stored.shape[1] : T] = stored
            changed.append(given(whole))
        put_in_a_row(cache, source, *changed)
    return cache


def ids_of(flavour: str) -> list[int]:
    return [int(i) for i in reference(flavour)["ids"]]


class Forced:
    """Notes the stream that each layer gives, and lets the next one begin from a given stream."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: list[Array] = []
        self.follow: list[Array] = []
        residual_norm = ops.residual_norm

        def noted(*args: Any, **kwargs: Any) -> Any:
            out = residual_norm(*args, **kwargs)
            if kwargs.get("scalar") is None:  # not the last step of a layer
                return out
            self.found.append(values(out[0]))
            stream = given(self.follow[len(self.found) - 1])
            return stream, ops.rms_norm(stream, kwargs["next_weight"], kwargs["eps"])

        patch.setattr(ops, "residual_norm", noted)

    def run(self, streams: list[Array], call: Callable[[], Any]) -> tuple[list[Array], Any]:
        self.found, self.follow = [], streams
        out = call()
        mx.eval(out)
        assert len(self.found) == len(streams)
        return self.found, out


def through(
    model: Target, way: str, ids: list[int], streams: list[Array], forced: Forced
) -> tuple[list[Array], Array, Array, Cache]:
    """What each layer gives from ``streams``, hidden vectors, logits (of the positions they are
    given for), and the cache."""
    if way == "chunk":
        cache = model.new_cache()
        found, (logits, hidden) = forced.run(streams, lambda: model.prefill(ids, cache, chunk=T))
        return found, values(hidden), values(logits)[None], cache
    cache, parts = model.new_cache(), []
    size = T if way == "block" else T // 2
    for at in range(0, T, size):
        block, rows = mx.array(ids[at : at + size], dtype=mx.int32), slice(at, at + size)
        cut = [stream[rows] for stream in streams]
        layers, out = forced.run(cut, lambda block=block: verify(model, block, cache))
        cache.settle(at + size)
        parts.append([*layers, *map(values, reversed(out))])
    *found, hidden, logits = map(np.concatenate, zip(*parts, strict=True))
    return found, hidden, logits, cache


def drafted(
    flavour: str, pair: Pair, step: int, streams: list[Array], patch: pytest.MonkeyPatch
) -> tuple[list[Array], Array, Array]:
    """What each layer of the assistant gives from ``streams``, logits, hidden vector."""
    stored, cache = reference(flavour), cache_of(flavour, pair.target)
    inputs = [given(stored[f"{step}.{name}"]) for name in ("embedding", "hidden_in")]
    found, out = Forced(patch).run(streams, lambda: models.step(pair.assistant, *inputs, cache))
    return found, *map(values, out)


# transformers


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_model_of_roundings_is_transformers_in_bfloat16(flavour: str) -> None:
    """Number by number, so what is said with it of our own points is said of Gemma 4."""
    wanted, ids = reference(flavour), ids_of(flavour)
    model = target_of(flavour, "bfloat16", roundings.TRANSFORMERS)
    h = model.embed(ids)
    assert share(h, wanted["embedding"]) == 0
    per_layer = model.per_layer_inputs(ids, h) if flavour == "e2b" else None
    kinds = TARGETS[flavour]["layer_types"]
    for i in range(len(kinds)):
        mine = None if per_layer is None else wanted[f"per_layer.{i}"]
        if per_layer is not None:
            assert share(per_layer[i], mine) <= 0.002
        h = model.layer(i, h, mine)
        assert share(h, wanted[f"layer.{i}"]) <= SAME, f"layer {i}"
        h = wanted[f"layer.{i}"]
    for kind, kv in model.keys.items():
        for name, a in zip("kv", kv, strict=True):
            stored = wanted[f"{name}.{kind}"]
            assert share(a[:, -stored.shape[1] :], stored) <= 0.002
    assert share(model.norm(h, "norm"), wanted["hidden"]) <= 0.002
    assert share(model.head(wanted["hidden"]), wanted["logits"]) <= 0.002

    drafts = assistant_of(flavour, "bfloat16", roundings.TRANSFORMERS)
    for step in range(STEPS):
        h = drafts.enter(wanted[f"{step}.embedding"], wanted[f"{step}.hidden_in"])
        for i, kind in enumerate(drafts.config["layer_types"]):
            h = drafts.layer(i, h, wanted[f"k.{kind}"], wanted[f"v.{kind}"], T)
            assert share(h, wanted[f"{step}.layer.{i}"]) <= SAME, f"step {step} layer {i}"
            h = wanted[f"{step}.layer.{i}"]
        logits, hidden = drafts.leave(drafts.norm(h, "norm"), 3)
        seen = np.isfinite(logits)
        assert share(hidden, wanted[f"{step}.hidden"]) <= 0.02
        assert share(logits[seen], wanted[f"{step}.logits"][seen]) <= 0.02


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_each_layer_is_within_units_of_transformers_in_bfloat16(
    flavour: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, ids = reference(flavour), ids_of(flavour)
    model = odd_pair(flavour, "bfloat16").target
    assert share(values(model.embed(mx.array(ids))), wanted["embedding"]) == 0
    streams = [wanted[f"layer.{i}"] for i in range(len(model.layers))]
    found, hidden, logits, cache = through(model, way, ids, streams, Forced(monkeypatch))
    for i, (ours, theirs) in enumerate(zip(found, streams, strict=True)):
        assert units(ours, theirs) <= UNITS, f"layer {i}"
    assert units(hidden, wanted["hidden"][-len(hidden) :]) <= 1
    assert units(logits, wanted["logits"][-len(logits) :]) <= 3
    for kind in (SLIDING, FULL):
        source = model.config.last_source(kind == SLIDING)
        for name, kept in zip("kv", in_a_row(cache, source), strict=True):
            theirs = wanted[f"{name}.{kind}"]
            assert units(values(kept)[0][:, T - theirs.shape[1] : T], theirs) <= UNITS


# Ours


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("flavour", "form"), PAIRS)
def test_the_target_rounds_at_its_points_and_nowhere_else(
    flavour: str, form: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, pair = ids_of(flavour), odd_pair(flavour, form)
    want = target_of(flavour, form, our_points(form))
    h = embedding = want.embed(ids)
    assert share(values(pair.target.embed(mx.array(ids))), embedding) == 0
    per_layer = want.per_layer_inputs(ids, h) if flavour == "e2b" else None
    streams = []
    for i in range(len(pair.target.layers)):
        streams.append(h := want.layer(i, h, None if per_layer is None else per_layer[i]))
    found, hidden, logits, cache = through(pair.target, way, ids, streams, Forced(monkeypatch))
    for i, (ours, wanted) in enumerate(zip(found, streams, strict=True)):
        assert share(ours, wanted) <= SAME, f"layer {i}: {share(ours, wanted)}"
    last = len(hidden)
    assert share(hidden, want.norm(h, "norm")[-last:]) <= 0.005
    assert np.abs(logits - want.head(hidden)[-len(logits) :]).max() <= LOGITS
    for kind, kv in want.keys.items():
        source = pair.target.config.last_source(kind == SLIDING)
        newest = np.arange(T - (WINDOW - 1 if kind == SLIDING else T), T)
        for kept, wanted in zip(in_a_row(cache, source), kv, strict=True):
            assert share(values(kept)[0][:, newest], wanted[:, newest]) <= 0.005


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_the_per_layer_inputs_are_rounded_once(
    form: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors near a rounding of theirs move an input by less than a layer shows."""
    ids, model = ids_of("e2b"), odd_pair("e2b", form).target
    want, glu, seen = target_of("e2b", form, our_points(form)), ops.glu, []
    embedding = want.embed(ids)

    def noted(gate: mx.array, up: mx.array, *activation: Any) -> mx.array:
        if up.shape[-1] == P:  # not that of an MLP
            seen.append(values(up))
        return glu(gate, up, *activation)

    monkeypatch.setattr(ops, "glu", noted)
    layers = len(model.layers)
    through(model, way, ids, [embedding] * layers, Forced(monkeypatch))
    parts = np.array(seen).reshape(-1, layers, seen[0].shape[0], P)
    ours = np.concatenate(list(parts), axis=1)
    assert share(ours, want.per_layer_inputs(ids, embedding)) <= 0.001


@pytest.mark.parametrize("form", FORMS)
def test_the_router_is_float32_throughout(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scale and root too, which move a weight by less than bfloat16 shows in a layer."""
    ids, model = ids_of("moe26"), odd_pair("moe26", form).target
    want, logits, route = target_of("moe26", form, our_points(form)), [], ops.route_experts
    h, streams, wanted = want.embed(ids), [], []
    for i in range(len(model.layers)):
        streams.append(h := want.layer(i, h, None))
        wanted.append(want.router_logits)
    spy = lambda *args: logits.append(values(args[0])) or route(*args)  # noqa: E731
    monkeypatch.setattr(ops, "route_experts", spy)
    through(model, "block", ids, streams, Forced(monkeypatch))
    assert len(logits) == len(wanted)
    for i, (ours, theirs) in enumerate(zip(logits, wanted, strict=True)):
        # A stream on the other side of a tie moves the logits of its row
        near = np.abs(ours - theirs).max(axis=-1) <= 1e-5
        assert near.mean() >= 0.75, f"layer {i}"


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize(("flavour", "form"), PAIRS)
def test_the_assistant_rounds_at_its_points_and_nowhere_else(
    flavour: str, form: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair, from_theirs = odd_pair(flavour, form), reference(flavour)
    want, streams = assistant_of(flavour, form, our_points(form)), []
    embedding, before = (from_theirs[f"{step}.{name}"] for name in ("embedding", "hidden_in"))
    h = want.enter(embedding, before)
    for i, kind in enumerate(want.config["layer_types"]):
        h = want.layer(i, h, from_theirs[f"k.{kind}"], from_theirs[f"v.{kind}"], T)
        streams.append(h)
    found, logits, hidden = drafted(flavour, pair, step, streams, monkeypatch)
    for i, (ours, wanted) in enumerate(zip(found, streams, strict=True)):
        assert share(ours, wanted) <= SAME, f"layer {i}: {share(ours, wanted)}"
    want_logits, want_hidden = want.leave(want.norm(h, "norm"), 3)
    assert share(hidden, want_hidden) <= 0.02
    seen = np.isfinite(want_logits)
    assert np.array_equal(np.isfinite(logits), seen)
    assert np.abs(logits[seen] - want_logits[seen]).max() <= LOGITS


@pytest.mark.parametrize("step", range(STEPS))
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_each_draft_is_within_units_of_transformers_in_bfloat16(
    flavour: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, pair = reference(flavour), odd_pair(flavour, "bfloat16")
    streams = [wanted[f"{step}.layer.{i}"] for i in range(len(pair.assistant.layers))]
    found, logits, hidden = drafted(flavour, pair, step, streams, monkeypatch)
    for i, (ours, theirs) in enumerate(zip(found, streams, strict=True)):
        assert units(ours, theirs) <= UNITS, f"layer {i}"
    assert units(hidden, wanted[f"{step}.hidden"]) <= 2
    seen = np.isfinite(logits)
    assert seen.sum() >= 3 * V // NUM_CENTROIDS
    assert units(logits[seen][None], wanted[f"{step}.logits"][seen][None]) <= 2
