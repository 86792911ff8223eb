"""Speculative text against plain text on real forward passes: the promise, end to end."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from scipy import stats as scipy_stats

from pyengine import ops
from pyengine import sampling as rules
from pyengine.pair import Pair, load
from pyengine.quantize import quantize_checkpoint
from pyengine.sampling import Sampling, filter_logits
from pyengine.speculate import Stats, decode

FIXTURES = Path(__file__).parent / "fixtures"
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
    pair: Pair, prompt: list[int], block_size: int, count: int, sampling: Sampling = GREEDY
) -> tuple[list[int], Stats]:
    stats = Stats()
    rounds = decode(
        pair.target,
        pair.assistant,
        prompt,
        sampling=sampling,
        block_size=block_size,
        max_tokens=count,
        stats=stats,
    )
    return [token for r in rounds for token in r.tokens], stats


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_greedy_speculative_text_is_greedy_plain_text(
    pairs: object, flavour: str, stored: str, dtype: str
) -> None:
    """Past eight windows of 8 positions, from all drafts refused to all accepted."""
    pair = pairs(flavour, stored, dtype)
    for length, block_sizes in ((5, (3, 17)), (21, (2, 4, 7, 16, 40))):
        prompt = prompt_of(flavour, length)
        plain, _ = text(pair, prompt, 1, 60)
        seen: set[int] = set()
        for block_size in block_sizes:
            got, stats = text(pair, prompt, block_size, 60)
            assert got == plain, f"block size {block_size}"
            seen |= {d for d, count in enumerate(stats.accepted_by_depth) if count}
        if length == 21 and stored == "dense":  # rounding leads away from the text it was fitted to
            assert seen, "the assistant was never right, so nothing was tested"


@pytest.mark.slow  # every block size; the one above samples them
def test_greedy_text_at_every_block_size(pairs: object) -> None:
    pair, prompt = pairs("dense31", "8-bit", "bfloat16"), prompt_of("dense31", 21)
    plain, _ = text(pair, prompt, 1, 60)
    for block_size in range(2, 41):
        assert text(pair, prompt, block_size, 60)[0] == plain, f"block size {block_size}"


@pytest.mark.parametrize("chunk", [1, 3, 8, 21, 500])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_prefill_chunks_do_not_change_the_text(pairs: object, flavour: str, chunk: int) -> None:
    pair, prompt = pairs(flavour, "dense", "float32"), prompt_of(flavour, 40)
    want, _ = text(pair, prompt, 4, 30)
    whole = pair.target.prefill
    try:
        pair.target.prefill = lambda ids, cache: whole(ids, cache, chunk)
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
            row = filter_logits(pair.logits([*prompt, *head])[-1:], NARROW)
            for token, p in zip(row.ids[0].tolist(), row.probs[0].tolist(), strict=True):
                if mass * p > 1e-3:  # the rest is one cell
                    longer[(*head, token)] = mass * p
        out = longer
    return out


def sampled_p_value(pair: Pair, prompt: list[int], runs: int) -> float:
    """Chi-square of texts sampled at block 4 against their law; rare texts are pooled."""
    want = law(pair, prompt)
    seen: dict[tuple, int] = {}
    for seed in range(runs):
        s = Sampling(NARROW.temperature, NARROW.top_p, NARROW.top_k, seed=seed)
        got = tuple(text(pair, prompt, 4, LENGTH, s)[0])
        seen[got] = seen.get(got, 0) + 1
    big = [t for t, p in want.items() if runs * p >= 5]
    assert len(big) >= 5
    expected = [runs * want[t] for t in big]
    observed = [float(seen.get(t, 0)) for t in big]
    expected.append(runs - sum(expected))
    observed.append(runs - sum(observed))
    return float(scipy_stats.chisquare(observed, expected).pvalue)


@pytest.mark.slow
def test_sampled_text_has_the_targets_law(pairs: object) -> None:
    pair, prompt = pairs("dense31", "8-bit", "float32"), prompt_of("dense31", 21)
    assert sampled_p_value(pair, prompt, 1200) > 0.001


@pytest.mark.slow
def test_accepting_every_draft_is_seen(pairs: object, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rules.accept
    monkeypatch.setattr(
        rules, "accept", lambda p, q, *rest: real(p, q._replace(probs=q.probs * 1e-6), *rest)
    )
    pair, prompt = pairs("dense31", "8-bit", "float32"), prompt_of("dense31", 21)
    assert sampled_p_value(pair, prompt, 400) < 1e-4


@pytest.mark.slow
def test_embedded_pair_samples_the_law_of_plain_decoding() -> None:
    """Two samples at the published settings, compared position by position."""
    pair = load()
    prompt = pair.tokenizer.encode("import os\nimport sys\n\n\nclass ", bos=True)
    count, runs = 8, 300
    # Other seeds for plain decoding: the two samples must be independent
    plain, spec = (
        np.array([text(pair, prompt, b, count, Sampling(seed=s))[0] for s in range(a, a + runs)])
        for b, a in ((1, 0), (4, 10_000))
    )
    for place in range(count):
        vocab = pair.target.config.vocab_size
        table = np.array([np.bincount(x[:, place], minlength=vocab) for x in (plain, spec)])
        rare = table.sum(axis=0) < 10
        cells = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)])
        cells = cells[:, cells.sum(axis=0) > 0]
        assert cells.shape[1] >= 3, "this place has too little choice to test"
        assert scipy_stats.chi2_contingency(cells).pvalue > 0.001 / count
