"""Tokens that leave early: the parts of a step, what is left for skipped layers, and the texts."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import broken
from tiny_pairs import FLAVOURS, FORMS, bits, tiny_pair

from pyengine.engine import early_exit
from pyengine.engine.early_exit import EarlyRounds, Exit, Graphs, confidence
from pyengine.engine.loop import decode
from pyengine.engine.rounds import Rounds
from pyengine.engine.sequence import TokenSequence
from pyengine.engine.stats import Stats
from pyengine.model.cache import Cache
from pyengine.model.target import Target
from pyengine.ops.norm_rope import norm_rope_reference
from pyengine.ops.prepare_qkv import PAGE
from pyengine.ops.rms_norm import rms_norm_reference
from pyengine.sampling.settings import Sampling
from pyengine.task import embedded_pair

PROMPT = [2, 30, 41, 52, 63, 74, 85, 96, 107, 118, 129, 3, 9]
NEVER, ALWAYS = math.inf, 0.0
GREEDY = Sampling(temperature=0.0)
SETTINGS = (
    GREEDY,
    Sampling(temperature=1.3, seed=4, repetition_penalty=1.2, logit_bias={7: 1.0}),
    Sampling(temperature=0.7, top_k=0, seed=5),
)


def an_exit(layer: int, threshold: float, length: int = 40) -> Exit:
    return Exit(layer, threshold, 4.0, length)


def text(
    target: Any,
    exit: Exit | None,
    sampling: Sampling,
    count: int = 40,
    prompt: list[int] = PROMPT,
) -> tuple[list[int], Stats]:
    stats = Stats()
    rounds = None if exit is None else EarlyRounds(exit)
    ask: dict[str, Any] = {"sampling": sampling, "block_size": 1, "max_tokens": count}
    played = decode(target, None, prompt, **ask, stats=stats, rounds=rounds)
    return [token for done in played for token in done.tokens], stats


def prefilled(target: Target) -> Cache:
    cache = target.new_cache()
    target.prefill(PROMPT, cache)
    return cache


def slot(target: Target, cache: Cache, i: int, position: int) -> tuple[mx.array, mx.array]:
    """Key and value ``[K, D]`` of a position in layer i."""
    pages = cache.sliding if target.config.layers[i].sliding else dict(enumerate(cache.full))
    page, place = pages[position // PAGE], position % PAGE
    keys, values = cache.arena.slots(i)
    return keys[page, :, place], values[page, :, place]


@pytest.mark.engine
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_parts_are_the_whole(flavour: str, implementation: str) -> None:
    """Going on behind any layer gives the bits of one call, and the same keys and values."""
    for form in FORMS if implementation == "native" else ("bfloat16-q8",):
        target = tiny_pair(flavour, form).target
        ids = [mx.array([77], dtype=mx.int32)]
        whole_cache = prefilled(target)
        want = target.forward(ids, [whole_cache])[0].array
        for depth in (1, len(target.layers) - 1):
            cache = prefilled(target)
            lens, stream = target.leave(depth, ids, [cache])
            assert (
                bits(lens.array) == bits(target.exit(depth, ids, [prefilled(target)]).array)
            ).all()
            got = target.go_on(depth, stream, ids, [cache]).array
            assert (bits(got) == bits(want)).all(), (form, depth)
            for i, layer in enumerate(target.config.layers):
                if layer.kv_source == i:
                    for a, b in zip(
                        slot(target, cache, i, len(PROMPT)),
                        slot(target, whole_cache, i, len(PROMPT)),
                        strict=True,
                    ):
                        assert (bits(a) == bits(b)).all()
            assert cache.committed == len(PROMPT)


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_skipped_layers_get_keys_and_values_of_what_left(flavour: str, form: str) -> None:
    """By the formula in plain MLX: of the stream normed as the layer would norm it, keys normed and
    turned, values normed; the keys themselves where there is no v."""
    target = tiny_pair(flavour, form).target
    config, dtype = target.config, target.dtype
    ids, doubled = [mx.array([77], dtype=mx.int32)], 0
    tolerance = 1e-5 if form == "float32" else 0.03  # of sums in another order, of one rounding
    for depth in range(1, len(target.layers)):
        cache = prefilled(target)
        _, stream = target.leave(depth, ids, [cache])
        written = target.skip(depth, stream, [cache])
        mx.eval(written)
        own = [i for i in range(depth, len(config.layers)) if config.layers[i].kv_source == i]
        assert len(written) == len(own) and target.writes_behind(depth) == bool(own)
        for i in own:
            layer, geometry = target.layers[i], config.layers[i]
            attention, K, D = layer.attention, geometry.num_kv_heads, geometry.head_dim
            assert attention.k is not None and attention.k_norm is not None
            x = rms_norm_reference(stream, layer.input_norm, config.eps)
            rows = [
                (x.astype(mx.float32) @ m.values().T).astype(dtype).reshape(1, K, D)
                for m in (attention.k, attention.v or attention.k)
            ]
            doubled += attention.v is None
            at = mx.array([len(PROMPT)], dtype=mx.int32)
            k = norm_rope_reference(rows[0], attention.k_norm, at, attention.inv_freq, config.eps)
            v = rms_norm_reference(rows[1], None, config.eps)
            got = slot(target, cache, i, len(PROMPT))
            for a, b in zip(got, (k[0], v[0]), strict=True):
                gap = mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()
                assert gap <= tolerance, (depth, i)
                assert mx.abs(b).max().item() > 0.1
    assert bool(doubled) == any(layer.key_is_value for layer in config.layers)


def test_a_skipped_layer_gets_the_bits_it_writes_itself() -> None:
    """With the stream of its own input, which the first skipped layer has."""
    for flavour in FLAVOURS:
        target = tiny_pair(flavour, "bfloat16-q8").target
        ids = [mx.array([77], dtype=mx.int32)]
        for depth in range(1, len(target.layers)):
            if target.config.layers[depth].kv_source != depth:
                continue
            one, other = prefilled(target), prefilled(target)
            target.forward(ids, [one])
            _, stream = target.leave(depth, ids, [other])
            target.skip(depth, stream, [other])
            for a, b in zip(
                slot(target, one, depth, len(PROMPT)),
                slot(target, other, depth, len(PROMPT)),
                strict=True,
            ):
                assert (bits(a) == bits(b)).all(), (flavour, depth)


@pytest.mark.engine
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_where_none_leaves_the_text_is_plain_text(flavour: str, implementation: str) -> None:
    target = tiny_pair(flavour, "bfloat16-q8").target
    layers, count = len(target.layers), 40 if implementation == "native" else 6
    for sampling in SETTINGS if implementation == "native" else SETTINGS[:2]:
        plain, _ = text(target, None, sampling, count)
        for layer in (1, layers - 1):
            got, stats = text(target, an_exit(layer, NEVER), sampling, count)
            assert got == plain, (sampling, layer)
            assert stats.exits == {layers: count - 1} and stats.mean_layers == layers


def by_hand(
    target: Target, exit: Exit, count: int, prompt: list[int] = PROMPT
) -> tuple[list[int], dict[int, int], Cache]:
    """Greedy text of single calls, with no graph recorded and nothing shared with the engine."""
    cache = target.new_cache()
    logits, _ = target.prefill(prompt, cache)
    tokens, exits = [int(mx.argmax(logits).item())], {exit.layer: 0, len(target.layers): 0}
    while len(tokens) < count:
        ids = [mx.array(tokens[-1:], dtype=mx.int32)]
        lens, stream = target.leave(exit.layer, ids, [cache])
        row = np.array(lens.array[0]).astype(np.float64)
        mass = np.sort(np.exp(row - row.max()) / np.exp(row - row.max()).sum())
        falling = np.clip(0.9 * exit.threshold + 0.1 * np.exp(-4.0 * len(tokens) / 40), 0, 1)
        leaves = mass[-1] - mass[-2] >= falling
        if leaves:
            mx.eval(target.skip(exit.layer, stream, [cache]))
            token = int(row.argmax())
        else:
            token = int(mx.argmax(target.go_on(exit.layer, stream, ids, [cache]).array[0]).item())
        exits[exit.layer if leaves else len(target.layers)] += 1
        cache.settle(len(prompt) + len(tokens))
        mx.eval(cache.arrays)
        tokens.append(token)
    return tokens, {layer: n for layer, n in exits.items() if n}, cache


@pytest.mark.engine
@pytest.mark.parametrize(
    "flavour", [pytest.param(f, marks=[pytest.mark.short] * (f == "uni12")) for f in FLAVOURS]
)
def test_texts_with_exits_are_those_by_hand(flavour: str, implementation: str) -> None:
    target = tiny_pair(flavour, "bfloat16-q8").target
    layer, count = len(target.layers) // 2, 40 if implementation == "native" else 6
    seen: set[tuple[int, ...]] = set()
    for threshold in (0.9, 0.3, 0.1, 0.03, ALWAYS) if implementation == "native" else (0.03,):
        exit = an_exit(layer, threshold)
        got, stats = text(target, exit, GREEDY, count)
        want, exits, _ = by_hand(target, exit, count)
        assert (got, stats.exits) == (want, exits), threshold
        again, _ = text(target, exit, GREEDY, count)
        assert again == got
        seen |= {tuple(exits)}
    if implementation == "native":
        assert (layer, len(target.layers)) in seen or (len(target.layers), layer) in seen


def test_what_is_skipped_is_there_when_the_arena_grows() -> None:
    """Where a text passes 512 positions all pages move to another array, and with them what the
    newest token left."""
    target = embedded_pair().target
    prompt = [(7 * i) % 900 + 300 for i in range(500)]
    exit, last = an_exit(6, ALWAYS), len(target.layers) - 1
    tokens, exits, by_single_calls = by_hand(target, exit, 24, prompt)
    ask: dict[str, Any] = {"sampling": GREEDY, "block_size": 1, "max_tokens": 24}
    sequence, rounds = TokenSequence(target, None, prompt, **ask), EarlyRounds(exit)
    got = [token for done in sequence.prefill() for token in done.tokens]
    arena = sequence.parts.cache.arena
    sizes = {arena.full.count}
    while sequence.finish_reason is None:
        [done] = rounds.play([sequence])
        assert not isinstance(done, Exception)
        got += done.tokens
        sizes.add(arena.full.count)
    assert len(sizes) == 2 and exits[6] > 10
    assert (got, sequence.stats.exits) == (tokens, exits)
    for position in range(500, 500 + 23):
        for i in (6, last):
            for a, b in zip(
                slot(target, sequence.parts.cache, i, position),
                slot(target, by_single_calls, i, position),
                strict=True,
            ):
                assert (bits(a) == bits(b)).all(), (position, i)


def test_a_seed_gives_one_text_and_the_noise_of_plain_decoding() -> None:
    """Where an exit's distribution is the model's own, so is the token."""
    target = tiny_pair("uni12", "bfloat16-q8").target
    layers = len(target.layers)
    sampling = Sampling(temperature=1.1, seed=9)
    exit = an_exit(layers - 1, 0.02)
    got, stats = text(target, exit, sampling)
    assert stats.exits.get(layers - 1, 0) > 0
    assert text(target, exit, sampling)[0] == got
    assert text(target, exit, Sampling(temperature=1.1, seed=10))[0] != got

    class Sure(Target):
        """Whose lens behind any layer is that of all of them."""

        def leave(self, depth: int, ids: Any, caches: Any) -> Any:
            _, stream = super().leave(depth, ids, caches)
            return super().go_on(depth, stream, ids, caches), stream

    sure = object.__new__(Sure)
    sure.__dict__.update(target.__dict__)
    for own in SETTINGS[1:]:
        plain, _ = text(target, None, own, 20)
        # What is skipped is overwritten with worse: the first token that leaves is the same
        same, stats = text(sure, an_exit(layers - 1, ALWAYS), own, 2)
        assert same == plain[:2]


def test_confidence_is_the_lead_of_the_best() -> None:
    logits = mx.random.normal((3, 300), key=mx.random.key(4)) * 4
    mass = np.sort(np.array(mx.softmax(logits, axis=-1)), axis=-1)
    want = mass[:, -1] - mass[:, -2]
    np.testing.assert_allclose(np.array(confidence(logits)), want, rtol=1e-5, atol=1e-6)
    assert confidence(mx.zeros((1, 5))).item() == 0
    assert confidence(mx.array([[0.0, 500.0, 1.0]])).item() == 1


def test_the_threshold_falls_along_an_answer() -> None:
    exit = Exit(6, 0.8, 4.0, 100)
    assert exit.least(0) == pytest.approx(0.82)
    assert exit.least(50) == pytest.approx(0.72 + 0.1 * math.exp(-2))
    assert exit.least(100) == pytest.approx(0.72 + 0.1 * math.exp(-4))
    assert Exit(6, 1.0, 0.0, 10).least(7) == 1.0 == Exit(6, 3.0, 4.0, 10).least(1)
    assert exit.lets(50, 0.74) and not exit.lets(50, 0.73) and not exit.lets(50, math.nan)
    assert Exit(6, 1.0, 0.0, 10).lets(10, 1.0) and not Exit(6, 1.0001, 4.0, 10).lets(10, 1.0)


@pytest.mark.parametrize("where", ["leave", "go_on"])
def test_what_is_not_finite_is_no_text(where: str) -> None:
    """A lens that is not finite lets nothing leave; of the whole model it is an error."""
    target = tiny_pair("dense31", "bfloat16-q8").target
    other = object.__new__(Target)
    other.__dict__.update(target.__dict__)
    if where == "leave":
        other.leave = broken(target.leave)  # type: ignore[method-assign]
        got, stats = text(other, an_exit(1, ALWAYS), GREEDY, 8)
        assert stats.exits == {len(target.layers): 7} and got == text(target, None, GREEDY, 8)[0]
    else:
        other.go_on = lambda *args: broken(lambda *a: (target.go_on(*a), None))(*args)[0]  # type: ignore[method-assign]
        with pytest.raises(RuntimeError, match=r"^\[decode\] logits must be finite but got NaN"):
            text(other, an_exit(1, NEVER), GREEDY, 8)


@pytest.mark.engine
@pytest.mark.parametrize(
    "flavour", [pytest.param(f, marks=[pytest.mark.short] * (f == "uni12")) for f in FLAVOURS]
)
def test_texts_that_take_turns_are_those_alone(
    flavour: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one arena, of unlike settings and lengths; a graph of each make is recorded once."""
    target, native = tiny_pair(flavour, "bfloat16-q8").target, implementation == "native"
    exit, count = an_exit(len(target.layers) // 2, 0.03), 40 if native else 5
    prompts = [PROMPT[n:] + PROMPT[:n] * 3 for n in range(4 if native else 2)]
    cases = [(p, SETTINGS[n % 3], count - 2 * n) for n, p in enumerate(prompts)]
    want = [text(target, exit, sampling, most, p) for p, sampling, most in cases]
    made: list[Any] = []
    monkeypatch.setattr(
        early_exit, "Graphs", lambda *args, own=Graphs: made.append(args) or own(*args)
    )
    arena, rounds = target.new_arena(sequences=len(cases)), EarlyRounds(exit, waits=True)
    sequences, got = [], [list[int]() for _ in cases]
    for n, (prompt, sampling, most) in enumerate(cases):
        ask: dict[str, Any] = {"sampling": sampling, "block_size": 1, "max_tokens": most}
        sequences.append(TokenSequence(target, None, prompt, **ask, arena=arena))
        got[n] += [token for done in sequences[n].prefill() for token in done.tokens]
    while going := [n for n, s in enumerate(sequences) if s.finish_reason is None]:
        for n in going:
            [done] = rounds.play([sequences[n]])
            assert not isinstance(done, Exception)
            got[n] += done.tokens
    assert got == [tokens for tokens, _ in want]
    assert [s.stats.exits for s in sequences] == [stats.exits for _, stats in want]
    assert len(made) == min(3, len(cases))
    if native:
        assert len({layer for s in sequences for layer in s.stats.exits}) == 2


def test_several_texts_in_one_round_are_refused() -> None:
    target = tiny_pair("dense31", "bfloat16-q8").target
    arena = target.new_arena(sequences=2)
    ask: dict[str, Any] = {"sampling": GREEDY, "block_size": 1, "max_tokens": 9, "arena": arena}
    sequences = [TokenSequence(target, None, PROMPT, **ask) for _ in range(2)]
    for sequence in sequences:
        list(sequence.prefill())
    rounds: Rounds = EarlyRounds(an_exit(1, 0.5))
    with pytest.raises(RuntimeError, match=r"a plain step of one text but got 2 texts with 0 d"):
        rounds.play(sequences)
