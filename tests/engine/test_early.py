"""Drafts of the target's own first layers: their bits, and that no text depends on them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from models import verify
from scipy import stats as scipy_stats
from tiny_pairs import FLAVOURS, FORMS, tiny_pair

import pyengine
from pyengine.drafters import exit_depth, is_name, new_drafter
from pyengine.engine.loop import decode
from pyengine.engine.stats import Stats
from pyengine.model.target import Target
from pyengine.sampling.settings import Sampling

PROMPT = [2, 30, 41, 52, 63, 74, 85, 96, 107, 118, 129, 3, 9]
DRAFTS = [7, 200, 31, 5]


def same(a: mx.array, b: mx.array) -> bool:
    return np.array_equal(np.array(a.view(mx.uint32)), np.array(b.view(mx.uint32)))


def first_layers(target: Target, depth: int) -> Target:
    """A target that has no others."""
    other = object.__new__(Target)
    other.__dict__.update(target.__dict__)
    other.layers = target.layers[:depth]
    other._per_layer_inputs = target._per_layer_inputs  # type: ignore[method-assign]
    return other


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_logits_are_those_of_a_target_of_so_many_layers(flavour: str, form: str) -> None:
    """Draft by draft or all at once; past the window of 8."""
    target = tiny_pair(flavour, form).target
    for depth in (1, len(target.layers) - 1):
        small = first_layers(target, depth)
        want = small.logits([*PROMPT, *DRAFTS])[len(PROMPT) :]
        cache, again = target.new_cache(), target.new_cache()
        for each in (cache, again):
            target.prefill(PROMPT, each)
        for i, token in enumerate(DRAFTS):
            one = target.exit(depth, [mx.array([token])], [cache], ahead=i).array
            all_of_them = target.exit(depth, [mx.array(DRAFTS[: i + 1])], [again]).array
            assert same(one[0], want[i]), (depth, i)
            assert same(all_of_them[0], want[i]), (depth, i)
        # What they wrote are the bits that the target writes, and no length has changed
        logits, hidden = verify(target, mx.array(DRAFTS), cache)
        fresh = target.new_cache()
        target.prefill(PROMPT, fresh)
        alone, without = verify(target, mx.array(DRAFTS), fresh)
        assert same(logits, alone)
        assert np.array_equal(
            np.array(hidden.astype(mx.float32)), np.array(without.astype(mx.float32))
        )
        assert cache.committed == len(PROMPT)


def text(
    target: Any, name: str | None, sampling: Sampling, block: int, count: int = 40
) -> tuple[list[int], Stats]:
    stats = Stats()
    drafter = None if name is None else new_drafter(name, target, None)
    rounds = decode(
        target,
        drafter,
        PROMPT,
        sampling=sampling,
        block_size=block,
        max_tokens=count,
        stats=stats,
    )
    return [token for done in rounds for token in done.tokens], stats


@pytest.mark.engine
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_text_is_plain_text(flavour: str, implementation: str) -> None:
    target = tiny_pair(flavour, "bfloat16-q8").target
    settings = [
        Sampling(temperature=0.0),
        Sampling(temperature=1.3, seed=4, verify="coupled", repetition_penalty=1.2),
        Sampling(temperature=0.7, top_k=0, seed=5, verify="coupled", logprobs=2),
    ]
    count = 40 if implementation == "native" else 8
    kept = 0
    for sampling in settings if implementation == "native" else settings[:2]:
        plain, _ = text(target, None, sampling, 1, count)
        for name in ("early:1", f"early:{len(target.layers) - 1}"):
            for block in (2, 5, 17) if implementation == "native" else (4,):
                got, stats = text(target, name, sampling, block, count)
                assert got == plain, (sampling, name, block)
                kept += stats.accepted
    assert kept > 0


@pytest.mark.native("plain MLX takes minutes")
@pytest.mark.parametrize("rule", ["residual", "block"])
def test_sampled_text_has_the_targets_law(rule: Any) -> None:
    """Of two tokens, the second mostly an accepted draft: their joint law, by enumeration."""
    target, runs = tiny_pair("dense31").target, 1500
    narrow = Sampling(temperature=0.3, top_p=1.0, top_k=3, verify=rule)

    def weights(logits: mx.array) -> dict[int, float]:
        z = np.array(logits).astype(np.float64) / narrow.temperature
        best = np.argsort(-z, kind="stable")[: narrow.top_k]
        mass = np.exp(z[best] - z[best[0]])
        return dict(zip(best.tolist(), (mass / mass.sum()).tolist(), strict=True))

    want: dict[tuple[int, ...], float] = {}
    first = weights(target.logits(PROMPT)[-1])
    for a, p in first.items():
        for b, q in weights(target.logits([*PROMPT, a])[-1]).items():
            for c, r in weights(target.logits([*PROMPT, a, b])[-1]).items():
                want[a, b, c] = p * q * r
    seen, kept = Counter[tuple[int, ...]](), 0
    for seed in range(runs):
        own = Sampling(**{**narrow.to_dict(), "seed": seed, "logit_bias": {}})
        got, stats = text(target, f"early:{len(target.layers) - 1}", own, 3, 3)
        seen[tuple(got)] += 1
        kept += stats.accepted
    assert set(seen) <= set(want)
    assert runs / 5 < kept
    often = [t for t, mass in want.items() if mass * runs >= 5]
    expected = [want[t] * runs for t in often]
    observed = [seen[t] for t in often]
    if (rest := runs - sum(expected)) > 1:
        expected, observed = [*expected, rest], [*observed, runs - sum(observed)]
    assert scipy_stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-4


def test_under_a_grammar() -> None:
    """Where tokens are forced these layers have not seen all drafts: they see them then."""
    pytest.importorskip("llguidance", reason="the extra grammar is not installed")
    for sampling in ({"temperature": 0}, {"seed": 3, "verify": "coupled"}):
        ask: dict[str, Any] = {
            "sampling": sampling,
            "regex": r"player = [a-z]{1,12};( // yes){2,9}",
        }
        plain = pyengine.generate("x", block_size=1, **ask)
        for block in (3, 6):
            got = pyengine.generate("x", block_size=block, drafter="early:6", **ask)
            assert got.tokens == plain.tokens
            assert got.stats.forced > 0
        again = pyengine.generate("x", block_size=6, drafter="early:6", **ask)
        assert (again.tokens, again.stats.drafted) == (got.tokens, got.stats.drafted)


def test_streams_are_those_alone() -> None:
    prompts = ["import os\n", "Create a single-file HTML5 canvas Snake game.", "def f"]
    ask: dict[str, Any] = {"max_tokens": 40, "drafter": "early:6", "block_size": 4}
    sampling = {"seed": 7, "verify": "coupled"}
    alone = [pyengine.generate(prompt, sampling=sampling, **ask).tokens for prompt in prompts]
    together = pyengine.generate(prompts, sampling=sampling, **ask)
    assert [result.tokens for result in together] == alone
    # Of other depths too, where a text tells which drafts it had
    rule = {"seed": 7, "temperature": 2.0, "verify": "residual"}
    each = {"early:1": 0, "early:5": 0, "early:12": 0}
    ask = {"max_tokens": 30, "sampling": rule, "block_size": 4}
    with pyengine.Engine(sequences=4) as engine:
        requests = [engine.submit(prompts[1], drafter=name, **ask) for name in each]
        for name, request in zip(each, requests, strict=True):
            for _ in request.steps():
                pass
            own = pyengine.generate(prompts[1], drafter=name, **ask)
            assert request.result.tokens == own.tokens
            each[name] = own.stats.accepted
    assert len({*each.values()}) == 3
    assert sum(result.stats.accepted for result in together) > 30


def test_names() -> None:
    assert [exit_depth(name) for name in ("early:6", "early:1", "early:123")] == [6, 1, 123]
    for name in ("early", "early:", "early:0", "early:06", "early:-1", "early:6 ", "early:٣", None):
        assert not is_name(name)
        with pytest.raises(
            ValueError,
            match=r"drafter must be assistant, dflash, lookup, early:N or NAME\+lookup but",
        ):
            pyengine.generate("x", drafter=name or "early:x")
    for name in ("early:24", "early:9999"):
        with pytest.raises(ValueError, match=r"a layer of the target's 24 out but got early:") as e:
            pyengine.generate("x", drafter=name)
        assert str(e.value).endswith(f"{name}.")
    assert pyengine.generate("x", drafter="early:23", max_tokens=2).stats.rounds == 1
