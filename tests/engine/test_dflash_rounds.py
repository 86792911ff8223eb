"""Drafts of a DFlash model in rounds: no text depends on them, and the laws of sampled texts hold;
several texts, prefixes, forks and grammars."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from guides import Toy
from knowing import tiny
from scipy import stats as scipy_stats
from tiny_dflash import dflash_pair
from tiny_pairs import FLAVOURS, greedy_text

from pyengine import Engine, generate
from pyengine.drafters import new_drafter
from pyengine.engine import round as on_device
from pyengine.engine.known import known_of
from pyengine.engine.loop import decode
from pyengine.engine.prefix import Prefix
from pyengine.engine.report import Report
from pyengine.engine.rounds import Rounds
from pyengine.engine.sequence import TokenSequence
from pyengine.engine.stats import Stats
from pyengine.sampling.sampler import Choices
from pyengine.sampling.settings import Sampling

PROMPT = [2, 30, 41, 52, 63, 74, 85, 96, 107, 118, 129, 3, 9]
# Few tokens for target and drafter alike, so that a drafter that nobody has trained is often right
FEW = {31: 40.0, 90: 40.0, 200: 40.0, 17: 40.0}
FEW_COUPLED = Sampling(temperature=3.0, seed=4, verify="coupled", logit_bias=FEW)


def drafter_of(pair: Any, name: str | None = "dflash") -> Any:
    return None if name is None else new_drafter(name, pair.target, pair.assistant, pair.dflash)


def text(
    pair: Any,
    name: str | None,
    sampling: Sampling,
    block: int,
    count: int = 40,
    prompt: list[int] = PROMPT,
    **more: Any,
) -> tuple[list[int], Stats]:
    stats = Stats()
    rounds = decode(
        pair.target,
        drafter_of(pair, name),
        prompt,
        sampling=sampling,
        block_size=block,
        max_tokens=count,
        stats=stats,
        **more,
    )
    return [token for done in rounds for token in done.tokens], stats


@pytest.mark.engine
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_text_is_plain_text(flavour: str, implementation: str) -> None:
    pair = dflash_pair(flavour, "bfloat16-q8")
    settings = [
        Sampling(temperature=0.0),
        FEW_COUPLED,
        Sampling(temperature=1.3, seed=4, verify="coupled", repetition_penalty=1.2, logit_bias=FEW),
        Sampling(temperature=0.7, top_k=0, seed=5, verify="coupled", logprobs=2),
    ]
    native, kept = implementation == "native", 0
    count = 40 if native else 8
    for sampling in settings if native else settings[:2]:
        plain, _ = text(pair, None, sampling, 1, count)
        for block in (2, 8, 17) if native else (4,):
            got, stats = text(pair, "dflash", sampling, block, count)
            assert got == plain, (sampling, block)
            assert stats.drafted == stats.rounds * (block - 1)
            kept += stats.accepted
    assert kept > 0


def test_the_longest_block() -> None:
    pair = dflash_pair("dense31")
    plain, _ = text(pair, None, FEW_COUPLED, 1, 30)
    got, stats = text(pair, "dflash", FEW_COUPLED, 128, 30)
    assert got == plain and stats.drafted == 127 * stats.rounds and stats.accepted > 0


def test_drafts_are_the_models_rows() -> None:
    """Greedily, draft i is the best token of row i + 1 of a block over the context so far: in the
    first round, and behind accepted and refused drafts."""
    pair, accepted = dflash_pair("dense31"), set[int]()
    model, target = pair.dflash, pair.target
    for known, drafts, kept in rounds_of(pair, 5):
        arena = target.new_arena()
        arena.extend(model.config.kept)
        cache = arena.new_cache()
        target.prefill(known[:-1], cache, reader=drafter_of(pair))  # all of it in one piece
        cache.reserve(5)
        block = mx.array([known[-1], *[model.config.mask_id] * 4], dtype=mx.int32)
        rows = np.array(model.forward([block], [cache]).array)
        for token, bias in FEW.items():
            rows[:, token] += bias
        assert drafts == rows[1:].argmax(axis=1).tolist()
        accepted.add(kept)
    assert len(accepted) > 1


def rounds_of(pair: Any, block_size: int) -> Iterator[tuple[list[int], list[int], int]]:
    """A greedy text, round by round: what was known before, the drafts, how many were kept."""
    sequence = TokenSequence(
        pair.target,
        drafter_of(pair),
        PROMPT,
        sampling=Sampling(temperature=0.0, logit_bias=FEW),
        block_size=block_size,
        max_tokens=30,
    )
    list(sequence.prefill())
    while sequence.finish_reason is None:
        known = list(sequence._text)
        sequence.prepare()
        groups = on_device.groups_of([sequence.sampler])
        recorded = on_device.RecordedRound([sequence.parts], [sequence.k], groups)
        choices = tuple([Choices.of([sequence.sampler], form) for _, form in groups])
        placed = sequence.parts.cache.arena.place([sequence.parts.cache])
        start = on_device.Start(placed, (sequence.state,), choices)
        block = recorded.draft(start)
        played = recorded.verify(start, block)
        sequence.take_results(played.outcomes[0])
        [report] = Report.unpack(on_device.read(pair.target, played), [sequence.k], [None])
        sequence.count(report.accepted, 0.0)
        sequence.commit(report)
        yield known, block.ids.tolist()[1:], report.accepted


@pytest.mark.native("plain MLX takes minutes")
@pytest.mark.parametrize("rule", ["residual", "block"])
def test_sampled_text_has_the_targets_law(rule: Any) -> None:
    """Of three tokens, the later two often accepted drafts: their joint law, by enumeration."""
    pair, runs = dflash_pair("dense31"), 600
    narrow = Sampling(temperature=4.0, top_p=1.0, top_k=4, verify=rule, logit_bias=FEW)

    def weights(logits: mx.array) -> dict[int, float]:
        z = np.array(logits).astype(np.float64)
        for token, bias in FEW.items():
            z[token] += bias
        best = np.argsort(-z, kind="stable")[: narrow.top_k]
        mass = np.exp((z[best] - z[best[0]]) / narrow.temperature)
        return dict(zip(best.tolist(), (mass / mass.sum()).tolist(), strict=True))

    want: dict[tuple[int, ...], float] = {}
    for a, p in weights(pair.target.logits(PROMPT)[-1]).items():
        for b, q in weights(pair.target.logits([*PROMPT, a])[-1]).items():
            for c, r in weights(pair.target.logits([*PROMPT, a, b])[-1]).items():
                want[a, b, c] = p * q * r
    seen, kept = Counter[tuple[int, ...]](), 0
    for seed in range(runs):
        got, stats = text(pair, "dflash", replace(narrow, seed=seed), 3, 3)
        seen[tuple(got)] += 1
        kept += stats.accepted
    assert set(seen) <= set(want)
    assert runs / 5 < kept < 2 * runs
    often = [t for t, mass in want.items() if mass * runs >= 5]
    expected = [want[t] * runs for t in often]
    observed = [seen[t] for t in often]
    if (rest := runs - sum(expected)) > 1:
        expected, observed = [*expected, rest], [*observed, runs - sum(observed)]
    assert scipy_stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize("rule", ["coupled", "residual", "block"])
def test_a_text_is_what_it_is_alone(rule: Any) -> None:
    """Blocks of unlike lengths, beside texts of other drafters and of none, in one engine: text and
    accepted drafts."""
    pair = with_ids("dense31")
    prompts = [greedy_text("dense31")[:n] for n in (70, 9, 21, 66, 64)]
    names = ["dflash", "assistant", "dflash", "dflash", None]

    def ask(n: int) -> dict[str, Any]:
        own = Sampling(temperature=3.0, seed=n, verify=rule, top_k=20, logit_bias=FEW)
        block = 1 if names[n] is None else 3 + 2 * (n % 3)
        return {"sampling": own, "drafter": names[n], "block_size": block, "max_tokens": 25 + 5 * n}

    alone = [generate(p, pair=pair, **ask(n)) for n, p in enumerate(prompts)]
    with Engine(pair, sequences=5) as engine:
        for order in ([0, 1, 2, 3, 4], [4, 3, 1, 2, 0]):
            requests = {n: engine.submit(prompts[n], **ask(n)) for n in order}
            while engine.step():
                pass
            for n, request in requests.items():
                assert request.result.tokens == alone[n].tokens, n
                assert request.result.stats.accepted == alone[n].stats.accepted, n
    assert all(alone[n].stats.accepted for n in (0, 2, 3))


def with_ids(flavour: str) -> Any:
    """A tiny pair that takes ids, with a DFlash drafter."""
    pair = tiny(flavour)
    own = dflash_pair(flavour)
    pair.target, pair.assistant, pair.dflash = own.target, own.assistant, own.dflash
    return pair


@pytest.mark.parametrize("rule", ["coupled", "residual"])
def test_a_prefix_has_the_context(rule: Any) -> None:
    """What is reused gives the text and the drafts that would be there without. Texts whose pages
    have no context are not taken for such as do, nor are those taken for others'."""
    pair, whole = dflash_pair("dense31"), greedy_text("dense31")
    sampling = Sampling(temperature=3.0, seed=5, verify=rule, logit_bias=FEW, top_k=20)
    fresh = {n: text(pair, "dflash", sampling, 6, 30, whole[:n]) for n in (66, 80, 100)}
    prefix, reused = Prefix(), []
    for name, n in (
        ("assistant", 80),
        ("dflash", 66),
        ("dflash", 80),
        ("assistant", 100),
        ("dflash", 100),
        ("dflash", 66),
    ):
        with prefix.in_use():
            got, stats = text(pair, name, sampling, 6, 30, whole[:n], prefix=prefix)
        reused.append(stats.reused_tokens)
        if name == "dflash":
            assert got == fresh[n][0], n
            assert stats.accepted == fresh[n][1].accepted, n
        assert prefix.tokens[:n] == whole[:n]
    assert reused[:2] == [0, 0]
    assert reused[2] == 66 and reused[4] == 80 and reused[5] == 65
    assert reused[3] == 80
    assert sum(stats.accepted for _, stats in fresh.values()) > 10


def test_an_answer_is_gone_on_from() -> None:
    """Context of committed drafts and of corrections lies in the pages that the next turn takes."""
    pair = dflash_pair("dense31")
    prefix = Prefix()
    with prefix.in_use():
        got, first = text(pair, "dflash", FEW_COUPLED, 6, 60, prefix=prefix)
    assert 0 < first.accepted < first.drafted
    prompt = [*PROMPT, *got, 7, 8]
    with prefix.in_use():
        again, stats = text(pair, "dflash", FEW_COUPLED, 6, 40, prompt, prefix=prefix)
    fresh, alone = text(pair, "dflash", FEW_COUPLED, 6, 40, prompt)
    assert again == fresh and stats.accepted == alone.accepted
    assert stats.reused_tokens == len(PROMPT) + len(got) - 1


def test_pages_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of texts with context and without, for engines to come: each finds its own."""
    monkeypatch.setattr("pyengine.streams.fingerprint", lambda *_: "ab" * 32)
    pair = with_ids("dense31")
    whole = greedy_text("dense31")
    ask: dict[str, Any] = {"sampling": FEW_COUPLED, "block_size": 5, "max_tokens": 5}
    accepted = set()
    for first in (True, False):
        for name in ("assistant", "dflash"):
            with Engine(pair, cache_dir=tmp_path) as engine:
                request = engine.submit(whole, drafter=name, **ask)
                for _ in request:
                    pass
                stats = request.result.stats
                assert stats.reused_tokens == (0 if first else 64), name
                if name == "dflash":
                    accepted.add((tuple(request.result.tokens), stats.accepted))
    assert len(accepted) == 1
    sizes = {path.stat().st_size for path in tmp_path.glob("*/*.full.page")}
    arena = pair.target.new_arena()
    arena.extend(pair.dflash.config.kept)
    assert sizes == {32 + arena.page_bytes(False), 32 + arena.page_bytes(False, own=True)}


def test_several_texts_of_one_prompt() -> None:
    pair = with_ids("dense31")
    prompt = greedy_text("dense31")[:70]
    ask: dict[str, Any] = {"drafter": "dflash", "block_size": 5, "max_tokens": 30, "pair": pair}
    rule = Sampling(temperature=3.0, seed=7, verify="residual", top_k=20, logit_bias=FEW)
    together = generate(prompt, n=4, sampling=rule, **ask)
    for n, result in enumerate(together):
        alone = generate(prompt, sampling=replace(rule, seed=7 + n), **ask)
        assert result.tokens == alone.tokens and result.stats.accepted == alone.stats.accepted
    assert together[1].stats.reused_tokens == 70


def phrases(so_far: tuple[int, ...]) -> Collection[int]:
    """Four tokens; behind 31 a run that is forced."""
    forced = {31: 11, 11: 12, 12: 33}
    if so_far and so_far[-1] in forced:
        return {forced[so_far[-1]]}
    return [*FEW, 40 + len(so_far) % 3]


@pytest.mark.parametrize("block", [2, 5, 17, 30])
def test_under_a_grammar(block: int) -> None:
    """Forced tokens stand in the block where they are known; the text is plain text."""
    pair = dflash_pair("dense31")
    for rule in ("coupled", "residual"):
        sampling = Sampling(temperature=3.0, seed=9, verify=rule)
        plain, _ = text(pair, None, sampling, 1, 60, matcher=Toy(phrases))
        got, stats = text(pair, "dflash", sampling, block, 60, matcher=Toy(phrases))
        again, same = text(pair, "dflash", sampling, block, 60, matcher=Toy(phrases))
        assert got == plain or rule == "residual"
        assert got == again and (same.drafted, same.accepted) == (stats.drafted, stats.accepted)
        assert stats.forced > 0 and stats.accepted > 0
        assert all(t in phrases(tuple(got[:n])) for n, t in enumerate(got))


def test_guided_texts_are_those_alone() -> None:
    """Whoever drafts beside them, and at whatever place of its block."""
    pair = dflash_pair("dense31")
    rule = Sampling(temperature=3.0, verify="residual")
    each = [replace(rule, seed=n) for n in range(4)]
    alone = [text(pair, "dflash", own, 6, 50, matcher=Toy(phrases)) for own in each]
    arena, rounds = pair.target.new_arena(), Rounds()
    sequences = [
        TokenSequence(
            pair.target,
            drafter_of(pair),
            PROMPT,
            sampling=own,
            block_size=6,
            max_tokens=50,
            arena=arena,
            matcher=Toy(phrases),
        )
        for own in each
    ]
    for sequence in sequences:
        list(sequence.prefill())
    while going := [s for s in sequences if s.finish_reason is None]:
        rounds.play(going)
    for sequence, (tokens, stats) in zip(sequences, alone, strict=True):
        assert sequence._text[len(PROMPT) :] == tokens
        assert sequence.stats.accepted == stats.accepted


def test_the_block_is_chosen_round_by_round() -> None:
    pair = dflash_pair("dense31")
    plain, _ = text(pair, None, FEW_COUPLED, 1, 60)
    got, stats = text(pair, "dflash", FEW_COUPLED, 8, 60, auto=True)
    assert got == plain and stats.block_size == "auto" and stats.drafted > 0
    known = known_of(pair.target, type(drafter_of(pair)))
    assert known is not known_of(pair.target, type(drafter_of(pair, "assistant")))
    assert known.costs.shapes
