"""Rounds whose drafts are a tree: no text depends on one, and the drafts are those of the best
paths of the drafter's rows; ends within a path, prefixes, several texts, what is refused."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from guides import Toy
from scipy import stats as scipy_stats
from test_dflash_rounds import FEW, FEW_COUPLED, PROMPT, drafter_of, text, with_ids
from tiny_dflash import dflash_pair
from tiny_pairs import FLAVOURS, greedy_text

from pyengine import Engine, generate
from pyengine.engine.loop import decode
from pyengine.engine.prefix import Prefix
from pyengine.engine.stats import Stats
from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.draft_tree import raced
from pyengine.sampling.settings import Sampling

GREEDY = Sampling(temperature=0.0, logit_bias=FEW)
DENSE = Sampling(temperature=0.7, top_k=0, seed=5, verify="coupled", logprobs=2)


@pytest.mark.engine
@pytest.mark.parametrize("form", ["float32", "bfloat16-q8"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_text_is_plain_text(flavour: str, form: str, implementation: str) -> None:
    """Past five windows of 8 positions; log-probabilities too."""
    pair, native = dflash_pair(flavour, form), implementation == "native"
    count, kept, shared = 40 if native else 8, 0, 0
    for sampling in (GREEDY, FEW_COUPLED, DENSE) if native else (GREEDY, FEW_COUPLED):
        plain, _ = text(pair, None, sampling, 1, count)
        for nodes, block in ((1, 8), (6, 4), (7, 8), (15, 8), (15, 17)) if native else ((7, 4),):
            got, stats = text(pair, "dflash", sampling, block, count, tree=nodes)
            assert got == plain, (sampling, nodes, block)
            assert stats.tree == nodes and stats.block_size == min(block, nodes + 1)
            assert stats.drafted == nodes * stats.rounds == sum(stats.drafted_by_depth)
            assert sum(stats.accepted_by_depth) == stats.accepted
            kept += stats.accepted
            shared += stats.drafted_by_depth[0] > stats.rounds
    assert kept > 0 and shared > 0


@pytest.mark.engine
@pytest.mark.short
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_first_tokens(flavour: str) -> None:
    """The test above, short enough for the workbench."""
    pair = dflash_pair(flavour, "bfloat16-q8")
    for sampling in (GREEDY, FEW_COUPLED):
        plain, _ = text(pair, None, sampling, 1, 7)
        assert text(pair, "dflash", sampling, 4, 7, tree=7)[0] == plain


def test_many_seeds() -> None:
    """Among kept drafts are some that are no coupled draft of a chain."""
    kept, of_chains = 0, 0
    for seed, flavour in zip(range(24), itertools.cycle(FLAVOURS)):
        pair = dflash_pair(flavour, "bfloat16")
        sampling = replace(FEW_COUPLED, seed=seed)
        plain, _ = text(pair, None, sampling, 1, 30)
        got, stats = text(pair, "dflash", sampling, 8, 30, tree=12)
        assert got == plain, seed
        chain, told = text(pair, "dflash", sampling, 8, 30)
        assert chain == plain
        kept, of_chains = kept + stats.rounds, of_chains + told.rounds
    assert kept < 0.9 * of_chains


def rounds(pair: Any, sampling: Sampling, block: int, count: int, **more: Any) -> list[Any]:
    return list(
        decode(
            pair.target,
            drafter_of(pair),
            PROMPT,
            sampling=sampling,
            block_size=block,
            max_tokens=count,
            **more,
        )
    )


def test_a_chain_as_a_tree_is_the_chain() -> None:
    """Round by round: a tree of one draft, and a tree where each place has one candidate."""
    narrow = replace(FEW_COUPLED, top_k=1)
    for sampling, block in ((GREEDY, 2), (FEW_COUPLED, 2), (narrow, 6)):
        kept, sampling = 0, replace(sampling, logprobs=1)
        for flavour in FLAVOURS:
            pair = dflash_pair(flavour, "bfloat16")
            chain = rounds(pair, sampling, block, 40)
            assert rounds(pair, sampling, block, 40, tree=block - 1) == chain
            kept += sum(done.num_accepted for done in chain)
        assert kept > 0


def best_trees(rows: np.ndarray, ids: np.ndarray, nodes: int) -> set[tuple[int, ...]]:
    """The token paths of the best tree, of scores ``[D, K]`` of these ids."""
    D, K = rows.shape
    paths = [p for d in range(1, D + 1) for p in itertools.product(range(K), repeat=d)]
    paths.sort(key=lambda p: -sum(float(rows[d, r]) for d, r in enumerate(p)))
    return {tuple(int(ids[d, r]) for d, r in enumerate(p)) for p in paths[:nodes]}


@pytest.mark.parametrize("sampling", [GREEDY, FEW_COUPLED], ids=["greedy", "coupled"])
def test_drafts_are_the_best_paths_of_the_models_rows(sampling: Sampling) -> None:
    """Over a context that is made anew for every round: what is kept is the longest beginning of
    plain text in the tree, and the drafts at each depth are that tree's."""
    pair, nodes, D = dflash_pair("dense31"), 5, 3
    model, target = pair.dflash, pair.target
    plain, _ = text(pair, None, sampling, 1, 45)
    whole, stats, lengths = [*PROMPT, *plain], Stats(), set[int]()
    length, counted = len(PROMPT) + 1, np.zeros(D, int)
    for done in rounds(pair, sampling, D + 1, 45, tree=nodes, stats=stats)[1:]:
        known = whole[:length]
        arena = target.new_arena()
        arena.extend(model.config.kept)
        cache = arena.new_cache()
        target.prefill(known[:-1], cache, reader=drafter_of(pair))
        cache.reserve(D + 1)
        block = mx.array([known[-1], *[model.config.mask_id] * D], dtype=mx.int32)
        z = np.array(model.forward([block], [cache]).array)[1:].astype(np.float64)
        for token, bias in FEW.items():
            z[:, token] += bias
        z /= 1 if sampling.greedy else sampling.temperature
        ids = np.argsort(-z, axis=1, kind="stable")[:, : 15 if sampling.greedy else 64]
        mass = np.exp(np.take_along_axis(z, ids, 1) - z.max(axis=1, keepdims=True))
        if sampling.greedy:
            scores = np.log(mass / mass.sum(axis=1, keepdims=True))
        else:
            mass /= mass.sum(axis=1, keepdims=True)
            mass = np.where(mass.cumsum(axis=1) - mass < sampling.top_p, mass, 0)
            mass /= mass.sum(axis=1, keepdims=True)
            rows = Filtered(mx.array(ids), mx.array(mass.astype(np.float32)), mx.zeros(D))
            place = mx.arange(D, dtype=mx.int32) + len(known)
            seed = mx.full(D, sampling.seed, mx.uint32)
            found = raced(rows._replace(ids=rows.ids.astype(mx.int32)), nodes, place, seed)
            ids, scores = (np.array(a) for a in found)
        tree = best_trees(scores[:, :nodes], ids[:, :nodes], nodes)
        rest = whole[length : length + D]
        kept = max(n for n in range(len(rest) + 1) if n == 0 or tuple(rest[:n]) in tree)
        assert done.num_accepted == kept or len(rest) < D, known
        lengths.add(kept)
        counted += [sum(len(path) == d for path in tree) for d in range(1, D + 1)]
        length += done.num_accepted + 1
    assert len(lengths) > 1
    assert stats.drafted_by_depth == counted.tolist()


def test_a_path_may_end_anywhere() -> None:
    """A stop id or the last token amid the drafts that were kept."""
    pair = dflash_pair("dense31", "bfloat16")
    plain, _ = text(pair, None, FEW_COUPLED, 1, 40)
    cut = set[bool]()
    for count in range(1, 30):
        got, stats = text(pair, "dflash", FEW_COUPLED, 8, count, tree=9)
        assert got == plain[:count] and stats.generated_tokens == count
        cut.add(stats.rounds + stats.accepted + 1 > count)
    assert cut == {True, False}
    for stop in set(plain):
        ends = frozenset({stop})
        got, _ = text(pair, "dflash", FEW_COUPLED, 8, 40, tree=9, stop_ids=ends)
        assert got == plain[: plain.index(stop) + 1]


def test_a_prefix_has_what_was_moved() -> None:
    """Keys, values and context of kept paths lie where the next turn looks for them."""
    for flavour in FLAVOURS:
        pair, prefix = dflash_pair(flavour, "bfloat16"), Prefix()
        with prefix.in_use():
            got, first = text(pair, "dflash", FEW_COUPLED, 8, 90, prefix=prefix, tree=15)
        plain, _ = text(pair, None, FEW_COUPLED, 1, 90)  # past the end of a page
        assert got == plain and first.accepted > 0
        prompt = [*PROMPT, *got, 7, 8]
        fresh, alone = text(pair, "dflash", FEW_COUPLED, 8, 40, prompt, tree=15)
        for tree in (15, None):
            with prefix.in_use():
                again, stats = text(
                    pair, "dflash", FEW_COUPLED, 8, 40, prompt, prefix=prefix, tree=tree
                )
            assert again == fresh
            assert tree is None or stats.accepted == alone.accepted
            assert stats.reused_tokens >= len(PROMPT) + len(got) - 1


def test_a_text_is_what_it_is_alone() -> None:
    """Beside texts with other trees, with chains, other drafters and none, in one engine."""
    pair = with_ids("dense31")
    prompts = [greedy_text("dense31")[:n] for n in (70, 9, 21, 66, 64, 30, 12, 17)]
    asked: list[dict[str, Any]] = [
        {"drafter": "dflash", "tree": 15},
        {"drafter": "dflash", "tree": 15},
        {"drafter": "dflash", "block_size": 5},
        {"drafter": "dflash", "tree": 7, "block_size": 4},
        {"block_size": 1},
        {"drafter": "dflash", "tree": 15},
        {"drafter": "dflash", "tree": 15},
        {"drafter": "dflash", "tree": 15},
    ]
    for n, ask in enumerate(asked):
        own = replace(FEW_COUPLED, seed=n, top_k=20 if n != 1 else 0)
        ask["sampling"] = own if n < 6 else GREEDY
        ask["max_tokens"] = 25 + 5 * (n % 5)
    alone = [generate(p, pair=pair, **ask) for p, ask in zip(prompts, asked, strict=True)]
    for n, ask in enumerate(asked):
        plain = {"sampling": ask["sampling"], "max_tokens": ask["max_tokens"], "block_size": 1}
        assert generate(prompts[n], pair=pair, **plain).tokens == alone[n].tokens
    with Engine(pair, sequences=8) as engine:
        for order in ([0, 1, 2, 3, 4, 5, 6, 7], [4, 3, 5, 7, 1, 6, 2, 0]):
            requests = {n: engine.submit(prompts[n], **asked[n]) for n in order}
            while engine.step():
                pass
            for n, request in requests.items():
                assert request.result.tokens == alone[n].tokens, n
                assert request.result.stats.accepted == alone[n].stats.accepted, n
    assert all(alone[n].stats.accepted for n in (0, 1, 2, 3, 5, 6, 7))
    for n, result in enumerate(generate(prompts[0], pair=pair, n=3, **asked[0])):
        own = replace(FEW_COUPLED, seed=n, top_k=20)
        one = generate(prompts[0], pair=pair, **(asked[0] | {"sampling": own}))
        assert result.tokens == one.tokens and result.stats.accepted == one.stats.accepted


@pytest.mark.parametrize("broken", ["target", "dflash"])
def test_logits_that_are_not_finite(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the target on the path that was kept, or of the drafter."""
    pair = dflash_pair("dense31")
    running = decode(
        pair.target,
        drafter_of(pair),
        PROMPT,
        sampling=GREEDY,
        block_size=8,
        max_tokens=20,
        tree=7,
    )
    next(running)
    model = getattr(pair, broken)
    monkeypatch.setattr(model, "norm", model.norm * float("nan"))
    with pytest.raises(RuntimeError, match=r"logits must be finite but got NaN or infinity"):
        list(running)


@pytest.mark.native("plain MLX takes minutes")
def test_texts_have_the_targets_law() -> None:
    """Of three tokens, the later two often drafts of a tree: their joint law over seeds, by
    enumeration."""
    pair, runs = dflash_pair("dense31"), 300
    narrow = Sampling(temperature=4.0, top_p=1.0, top_k=4, verify="coupled", logit_bias=FEW)

    def weights(ids: list[int]) -> dict[int, float]:
        z = np.array(pair.target.logits(ids)[-1]).astype(np.float64)
        for token, bias in FEW.items():
            z[token] += bias
        best = np.argsort(-z, kind="stable")[: narrow.top_k]
        mass = np.exp((z[best] - z[best[0]]) / narrow.temperature)
        return dict(zip(best.tolist(), (mass / mass.sum()).tolist(), strict=True))

    want: dict[tuple[int, ...], float] = {}
    for a, p in weights(PROMPT).items():
        for b, q in weights([*PROMPT, a]).items():
            for c, r in weights([*PROMPT, a, b]).items():
                want[a, b, c] = p * q * r
    seen, kept = Counter[tuple[int, ...]](), 0
    for seed in range(runs):
        got, stats = text(pair, "dflash", replace(narrow, seed=seed), 4, 3, tree=7)
        seen[tuple(got)] += 1
        kept += stats.accepted
    assert set(seen) <= set(want) and kept > runs
    often = [t for t, mass in want.items() if mass * runs >= 5]
    expected = [want[t] * runs for t in often]
    observed = [seen[t] for t in often]
    if (rest := runs - sum(expected)) > 1:
        expected, observed = [*expected, rest], [*observed, runs - sum(observed)]
    assert scipy_stats.chisquare(observed, expected, sum_check=False).pvalue > 1e-4


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"tree": 0}, r"\[generate\] tree must be 1 to 15 but got 0\."),
        ({"tree": 16}, r"\[generate\] tree must be 1 to 15 but got 16\."),
        ({"tree": "7"}, r"\[generate\] tree must be a whole number but got '7'\."),
        ({"drafter": None}, r"\[generate\] drafter must be dflash with a tree, .* got assistant\."),
        ({"drafter": "lookup"}, r"drafter must be dflash with a tree, .* but got lookup\."),
        ({"drafter": "early:1"}, r"drafter must be dflash with a tree, .* but got early:1\."),
        ({"drafter": "dflash+lookup"}, r"must be dflash with a tree, .* but got dflash\+lookup\."),
        ({"block_size": 1}, r"\[generate\] block_size must be at least 2 with a tree but got 1\."),
        ({"sampling": {"verify": "residual"}}, r"verify must be coupled, .* but got residual\."),
        ({"sampling": {"verify": "block"}}, r"verify must be coupled, .* but got block\."),
        (
            {"sampling": {"temperature": 0, "frequency_penalty": 0.5}},
            r"\[generate\] penalties must be off with a tree, .* but are on\.",
        ),
        ({"regex": "[1-5]"}, r"\[generate\] the answer's form must be free with a tree but one is"),
        ({"early_exit": "exit.json"}, r"\[early-exit\] an early exit must go without drafts"),
    ],
)
def test_what_a_tree_does_not_go_with(more: dict[str, Any], told: str) -> None:
    pair = with_ids("dense31")
    ask: dict[str, Any] = {"tree": 7, "drafter": "dflash", "sampling": {"verify": "coupled"}}
    with pytest.raises(ValueError, match=told):
        generate(PROMPT, pair=pair, max_tokens=3, **(ask | more))


@pytest.mark.parametrize(
    ("name", "block", "more", "told"),
    [
        ("dflash", 4, {"tree": 16}, r"\[decode\] a tree must be of 1 to 15 drafts but got 16\."),
        ("assistant", 4, {}, r"a tree's drafter must judge all places .* got AssistantDrafter\."),
        ("lookup", 4, {}, r"a tree's drafter must judge all places .* but got LookupDrafter\."),
        ("dflash+lookup", 4, {}, r"a tree's drafter must judge .* but got MixedDrafter\."),
        ("dflash", 1, {}, r"\[decode\] a tree must have blocks of one size, 2 or more, .* has not"),
        ("dflash", 4, {"auto": True}, r"\[decode\] a tree must have blocks of one size"),
        ("dflash", 4, {"matcher": Toy(lambda so_far: [])}, r"no grammar but has not\."),
    ],
)
def test_what_no_round_plays(name: str, block: int, more: dict[str, Any], told: str) -> None:
    pair = dflash_pair("dense31")
    with pytest.raises(ValueError, match=told):
        text(pair, name, FEW_COUPLED, block, **{"tree": 7, **more})


def test_ranks_take_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = with_ids("dense31")

    def refuse(setting: str) -> None:
        raise ValueError(f"[ranks] {setting} must not be given where ranks share the target.")

    monkeypatch.setattr(pair.target, "check_alone", refuse)
    with pytest.raises(ValueError, match=r"\[ranks\] tree must not be given where ranks share"):
        generate(PROMPT, pair=pair, tree=7, drafter="dflash", sampling={"verify": "coupled"})
