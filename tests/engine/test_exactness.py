"""Speculative text against plain text on real forward passes: the promise, end to end."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from assistants import Near
from models import decode
from one_text import filter_alone
from scipy import stats as scipy_stats

from pyengine import ops
from pyengine.checkpoint.pair import Pair, load
from pyengine.checkpoint.quantize import quantize_checkpoint
from pyengine.drafters import new_drafter
from pyengine.engine import loop
from pyengine.engine.stats import Stats
from pyengine.ops.accept_block import RULES, Rule
from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.sampler import Chooser, Sampler
from pyengine.sampling.settings import Sampling

FIXTURES = Path(__file__).parents[1] / "fixtures"
FLAVOURS = ("dense31", "e2b", "moe26", "uni12")
STORED = ("dense", "8-bit")
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> object:
    """pair(flavour, stored, dtype), each made once."""
    made: dict[tuple, Pair] = {}
    root = tmp_path_factory.mktemp("pairs")

    def pair(flavour: str, stored: str, dtype: str) -> Pair:
        key = (flavour, stored, dtype)
        if key not in made:
            folders = [FIXTURES / flavour / part for part in ("target", "assistant")]
            if stored == "8-bit":
                small = [root / flavour / folder.name for folder in folders]
                for src, dst in zip(folders, small, strict=True):
                    if not dst.exists():
                        dst.parent.mkdir(exist_ok=True)
                        quantize_checkpoint(src, dst)
                folders = small
            made[key] = load(*folders, dtype=DTYPES[dtype])
        return made[key]

    return pair


def prompt_of(flavour: str, length: int) -> list[int]:
    """A prompt of the fixtures; its assistant was fitted to what follows the one of 21 tokens."""
    return mx.load(str(FIXTURES / flavour / "ref.safetensors"))[f"{length}.ids"].tolist()


def text(
    pair: Pair,
    prompt: list[int],
    block_size: int,
    count: int,
    sampling: Sampling = GREEDY,
    near: float | None = None,
) -> tuple[list[int], Stats]:
    """With the pair's own assistant, or one near the target, of that weight."""
    stats = Stats()
    real = near is None or block_size == 1
    rounds = decode(
        pair.target,
        pair.assistant if real else Near(pair, block_size - 1, near),  # type: ignore[arg-type]
        prompt,
        sampling=sampling,
        block_size=block_size,
        max_tokens=count,
        stats=stats,
    )
    return [token for r in rounds for token in r.tokens], stats


@pytest.mark.engine
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_text_of_a_fitted_assistant_is_plain_text(
    pairs: object, flavour: str, dtype: str, implementation: str
) -> None:
    """Greedy, past eight windows of 8 positions (two in plain MLX). The assistants were fitted to
    this very text; other forms of the targets have their own in test_exactness_cells.py."""
    pair, prompt = pairs(flavour, "dense", dtype), prompt_of(flavour, 21)
    count = 60 if implementation == "native" else 12
    plain, _ = text(pair, prompt, 1, count)
    kept: set[int] = set()
    for block_size in (2, 4, 7, 16, 40):
        got, stats = text(pair, prompt, block_size, count)
        assert got == plain, f"block size {block_size}"
        kept |= {d for d, count in enumerate(stats.accepted_by_depth) if count}
    assert {0, 1, 2, 3} <= kept if (flavour, dtype) != ("dense31", "bfloat16") else kept


@pytest.mark.engine
@pytest.mark.short
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_first_tokens_at_a_few_block_sizes(pairs: object, flavour: str) -> None:
    """The test above, short enough for the workbench."""
    pair, prompt = pairs(flavour, "8-bit", "bfloat16"), prompt_of(flavour, 21)
    plain, _ = text(pair, prompt, 1, 7)
    for block_size in (2, 4, 17):
        assert text(pair, prompt, block_size, 7)[0] == plain, f"block size {block_size}"


@pytest.mark.parametrize("chunk", [1, 3, 8, 21, 500])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_prefill_chunks_do_not_change_the_text(pairs: object, flavour: str, chunk: int) -> None:
    pair, prompt = pairs(flavour, "dense", "float32"), prompt_of(flavour, 40)
    want, _ = text(pair, prompt, 4, 30)
    whole = pair.target.prefill
    try:
        pair.target.prefill = partial(whole, chunk=chunk)
        assert text(pair, prompt, 4, 30)[0] == want
    finally:
        del pair.target.prefill


def test_reference_ops_run_the_whole_engine(pairs: object) -> None:
    pair, prompt = pairs("dense31", "8-bit", "float32"), prompt_of("dense31", 21)
    native, _ = text(pair, prompt, 4, 12)
    ops.use("reference")
    try:
        assert text(pair, prompt, 4, 12)[0] == native
        assert text(pair, prompt, 1, 12)[0] == native
    finally:
        ops.use("native")


LENGTH = 6
# Sharp enough for single texts to be likely: a random target's law is flat
NARROW = Sampling(temperature=0.25, top_p=1.0, top_k=4)


def law(pair: Pair, prompt: list[int]) -> dict[tuple, float]:
    """Exact probability of every text of LENGTH tokens, from the target's logits alone."""
    out: dict[tuple, float] = {(): 1.0}
    for _ in range(LENGTH):
        longer = {}
        for head, mass in out.items():
            logits = pair.logits([*prompt, *head])[-1:]
            row = filter_alone(Sampler(NARROW, [], logits.shape[-1]), logits)
            for token, p in zip(row.ids[0].tolist(), row.probs[0].tolist(), strict=True):
                if mass * p > 1e-3:  # the rest is one cell
                    longer[(*head, token)] = mass * p
        out = longer
    return out


def sampled_p_value(pair: Pair, prompt: list[int], runs: int) -> float:
    """Chi-square of texts sampled at block 4 against their law; rare texts are pooled. Of the
    drafts about half are kept."""
    want = law(pair, prompt)
    seen: dict[tuple, int] = {}
    drafted = accepted = 0
    for seed in range(runs):
        s = Sampling(NARROW.temperature, NARROW.top_p, NARROW.top_k, seed=seed)
        got, stats = text(pair, prompt, 4, LENGTH, s, near=0.2)
        seen[tuple(got)] = seen.get(tuple(got), 0) + 1
        drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
    assert accepted > 0.2 * drafted
    big = [t for t, p in want.items() if runs * p >= 5]
    assert len(big) >= 5
    expected = [runs * want[t] for t in big]
    observed = [float(seen.get(t, 0)) for t in big]
    expected.append(runs - sum(expected))
    observed.append(runs - sum(observed))
    return float(scipy_stats.chisquare(observed, expected).pvalue)


@pytest.mark.slow
def test_sampled_text_has_the_targets_law(pairs: object) -> None:
    """Half as many texts again as show a broken rule below."""
    pair, prompt = pairs("dense31", "8-bit", "float32"), prompt_of("dense31", 21)
    assert sampled_p_value(pair, prompt, 600) > 0.001


@pytest.mark.slow
def test_accepting_every_draft_is_seen(pairs: object, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Chooser.accept

    def accept(self: Chooser, p: Filtered, q: Filtered, *rest: mx.array) -> tuple:
        return real(self, p, q._replace(probs=q.probs * 1e-6), *rest)

    monkeypatch.setattr(Chooser, "accept", accept)
    pair, prompt = pairs("dense31", "8-bit", "float32"), prompt_of("dense31", 21)
    assert sampled_p_value(pair, prompt, 400) < 1e-4


# Coupled text is plain text.


def assert_coupled_is_plain(
    pair: Pair, prompts: list[list[int]], seeds: range, count: int, near: float | None = None
) -> int:
    """Compare texts over seeds, prompts, temperatures and block sizes; returns the cases. At block
    size 2 at least a tenth of the drafts is kept."""
    cases, drafted, accepted = 0, 0, 0
    for prompt, seed, temperature in itertools.product(prompts, seeds, (0.6, 1.0, 1.3)):
        top_k = 0 if seed % 2 else 64
        s = Sampling(temperature, top_k=top_k, seed=seed, verify="coupled")
        plain, _ = text(pair, prompt, 1, count, s)
        for block_size in (2, 5, 17):
            got, stats = text(pair, prompt, block_size, count, s, near)
            assert got == plain, (seed, temperature, block_size)
            cases += 1
            if block_size == 2:
                drafted, accepted = drafted + stats.drafted, accepted + stats.accepted
    print(accepted, drafted)
    assert accepted > 0.1 * drafted
    return cases


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_coupled_text_is_plain_text(pairs: object, flavour: str) -> None:
    pair = pairs(flavour, "dense", "bfloat16")
    assert_coupled_is_plain(pair, [prompt_of(flavour, 21)], range(1), 24, near=0.2)


@pytest.mark.long
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_coupled_text_is_plain_text_two_hundred_times(
    pairs: object, flavour: str, stored: str
) -> None:
    pair = pairs(flavour, stored, "bfloat16")
    prompts = [prompt_of(flavour, 5), prompt_of(flavour, 21)]
    assert assert_coupled_is_plain(pair, prompts, range(12), 30, near=0.2) >= 200


STARTS = ("import os\nimport sys\n\n\nclass ", "<!DOCTYPE html>\n<html>\n")


@pytest.fixture(scope="module")
def embedded() -> Pair:
    return load()


def test_coupled_text_of_the_embedded_pair_is_plain_text(embedded: Pair) -> None:
    prompts = [embedded.tokenizer.encode(STARTS[0], bos=True)]
    assert_coupled_is_plain(embedded, prompts, range(1), 24)


@pytest.mark.long
def test_coupled_text_of_the_embedded_pair_two_hundred_times(embedded: Pair) -> None:
    prompts = [embedded.tokenizer.encode(start, bos=True) for start in STARTS]
    assert assert_coupled_is_plain(embedded, prompts, range(12), 40) >= 200


# Every other drafter, on weights that were trained.

OTHERS = ("dflash", "early:6", "lookup", "assistant+lookup", "dflash+lookup", "early:6+lookup")
FIRST = OTHERS[:4]  # the other mixes by request


def drafted_text(
    pair: Pair, drafter: str, prompt: list[int], block_size: int, count: int, sampling: Sampling
) -> tuple[list[int], Stats]:
    stats = Stats()
    rounds = loop.decode(
        pair.target,
        new_drafter(drafter, pair.target, pair.assistant, pair.dflash),
        prompt,
        sampling=sampling,
        block_size=block_size,
        max_tokens=count,
        stats=stats,
    )
    return [token for r in rounds for token in r.tokens], stats


def assert_drafted_is_plain(pair: Pair, drafter: str, seeds: range, count: int) -> None:
    """Greedily, and coupled by seed and temperature. What follows comes back to the prompt, so that
    lookup has its rounds; of a mix both draft."""
    start = pair.tokenizer.encode(STARTS[0], bos=True)
    once, _ = text(pair, start, 1, count)
    prompt, names, accepted = [*start, *once, *start], set[str](), 0
    coupled = [
        Sampling(temperature, top_k=0 if seed % 2 else 64, seed=seed, verify="coupled")
        for seed in seeds
        for temperature in (0.6, 1.0, 1.3)
    ]
    for s in (GREEDY, *coupled):
        plain, _ = text(pair, prompt, 1, count, s)
        for block_size in (2, 5, 17):
            got, stats = drafted_text(pair, drafter, prompt, block_size, count, s)
            assert got == plain, (s, block_size)
            names |= set(stats.by_drafter)
            accepted += stats.accepted
    assert accepted > 0 and names == ({*drafter.split("+")} if "+" in drafter else set())


@pytest.mark.parametrize("drafter", FIRST)
def test_text_of_every_drafter_is_plain_text(embedded: Pair, drafter: str) -> None:
    assert_drafted_is_plain(embedded, drafter, range(1), 24)


@pytest.mark.long
@pytest.mark.parametrize("drafter", OTHERS)
def test_text_of_every_drafter_is_plain_text_often(embedded: Pair, drafter: str) -> None:
    assert_drafted_is_plain(embedded, drafter, range(12), 60)


# The law of sampled text, token by token: where a token falls in the target's own distribution,
# best candidate first, is uniform whatever the text before it was.

PUBLISHED = Sampling(1.0, 0.95, 64)
LAWS = {
    "published": PUBLISHED,
    "0.6": replace(PUBLISHED, temperature=0.6),
    "1.3": replace(PUBLISHED, temperature=1.3),
    "top-k off": replace(PUBLISHED, top_k=0),
    "top-p off": replace(PUBLISHED, top_p=1.0),
    "penalties": replace(
        PUBLISHED,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias={10: 0.5},
        min_p=0.02,
    ),
}


def places(
    pair: Pair, s: Sampling, runs: int, count: int = 12, drafter: str = "assistant"
) -> np.ndarray:
    """Place in [0, 1) of every sampled token in the target's distribution: ``[runs, count]``.

    A token's own mass is filled with noise of its own, so that places are uniform exactly. A token
    that the filter had cut has no place: NaN.
    """
    prompt = pair.tokenizer.encode(STARTS[0], bos=True)
    noise = np.random.default_rng(1).random((runs, count))
    out = np.zeros((runs, count))
    for seed in range(runs):
        s = replace(s, seed=seed)
        tokens, _ = drafted_text(pair, drafter, prompt, 4, count, s)
        logits = pair.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        # All tokens of the text as drafts of one block: row t follows t of them
        drafts = mx.array(tokens[:-1], dtype=mx.int32)
        rows = filter_alone(Sampler(s, prompt, logits.shape[-1]), logits, drafts)
        ids, probs = np.array(rows.ids), np.array(rows.probs).astype(np.float64)
        for t, token in enumerate(tokens):
            at = np.flatnonzero(ids[t] == token)
            possible = at.size == 1 and probs[t, at[0]] > 0
            below = probs[t, : at[0]].sum() if possible else math.nan
            out[seed, t] = below + (noise[seed, t] * probs[t, at[0]] if possible else 0)
    return out


def uniform_p_value(u: np.ndarray) -> float:
    """The least of three, thrice: places as they lie, pairs of neighbours on a grid, tails."""
    if np.isnan(u).any():
        return 0.0
    grid = np.histogram2d(u[:, :-1].ravel(), u[:, 1:].ravel(), bins=4, range=[[0, 1], [0, 1]])[0]
    cells = np.histogram(u, bins=[0, 0.05, 0.2, 0.5, 0.8, 0.95, 1])[0]
    want = np.diff([0, 0.05, 0.2, 0.5, 0.8, 0.95, 1]) * u.size
    tests = (
        scipy_stats.kstest(u.ravel(), "uniform").pvalue,
        scipy_stats.chisquare(grid.ravel()).pvalue,
        scipy_stats.chisquare(cells, want).pvalue,
    )
    return 3 * float(min(tests))


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["residual", "block"])
def test_embedded_pair_samples_the_targets_law(embedded: Pair, rule: Rule) -> None:
    """480 places: a distribution function off by 0.12 somewhere is found nine times in ten."""
    assert uniform_p_value(places(embedded, replace(PUBLISHED, verify=rule), 40)) > 0.001


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAWS)
def test_embedded_pair_samples_every_law(embedded: Pair, name: str, rule: Rule) -> None:
    """3600 places: 0.04 is found nine times in ten."""
    assert uniform_p_value(places(embedded, replace(LAWS[name], verify=rule), 300)) > 0.001


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["residual", "block"])
@pytest.mark.parametrize("drafter", ["dflash", "early:6"])
def test_drafts_of_others_leave_the_targets_law(embedded: Pair, drafter: str, rule: Rule) -> None:
    assert (
        uniform_p_value(places(embedded, replace(PUBLISHED, verify=rule), 40, 12, drafter)) > 1e-3
    )


@pytest.mark.long
@pytest.mark.parametrize("rule", ["residual", "block"])
@pytest.mark.parametrize("drafter", OTHERS)
def test_every_drafter_leaves_the_targets_law(embedded: Pair, drafter: str, rule: Rule) -> None:
    """3600 places, as above."""
    s = replace(PUBLISHED, verify=rule)
    assert uniform_p_value(places(embedded, s, 300, 12, drafter)) > 0.001


@pytest.mark.slow
def test_a_broken_rule_is_seen_on_the_embedded_pair(
    embedded: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draft is kept, and p's best candidate follows them."""

    def accept(_: Chooser, p: Filtered, q: Filtered, drafts: mx.array, *rest: mx.array) -> tuple:
        return mx.array([drafts.shape[0]]), p.ids[-1, :1]

    monkeypatch.setattr(Chooser, "accept", accept)
    assert uniform_p_value(places(embedded, PUBLISHED, 30)) < 1e-4
