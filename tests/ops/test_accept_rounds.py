"""The joint law of several rounds: every rule, tens of thousands of runs at once.

Tables stand for target and assistant, so a run is array arithmetic and the law of the text is known
exactly. The rules and their counters are the ops' own references, which take leading dimensions;
only the generator behind them is replaced by the kernel of the same numbers, for speed.

The loop over rounds is a copy, so this proves that rules and counters together leave the law alone.
That the engine's own round uses them so is shown by test_rounds_by_hand.py and, on real models,
test_exactness_cells.py, which play decode() itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from scipy import stats as scipy_stats

from pyengine.ops import draw_token_reference, random_uniform
from pyengine.ops.accept_block import RULES, Rows, accept_one

draw_module = sys.modules["pyengine.ops.draw_token"]
accept_module = sys.modules["pyengine.ops.accept_block"]
real_uniforms, real_acceptance = accept_module.uniforms, accept_module.acceptance
real_count, real_invert = accept_module.count_accepted, accept_module.invert

LENGTH = 7


@pytest.fixture(autouse=True)
def fast_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's seed becomes the third word of the counter: still one stream of its own."""

    def uniforms(counters: mx.array, seed: mx.array, purpose: int) -> mx.array:
        c0, c1 = counters[..., 0], counters[..., 1]
        words = mx.stack([c0, c1, seed, mx.zeros_like(c0)], axis=-1)
        return random_uniform(words, (11, purpose))

    monkeypatch.setattr(draw_module, "philox_uniform", uniforms)


class Setting(NamedTuple):
    """Probabilities ``[V, V]`` of the next token after each token, and the block size."""

    p: np.ndarray
    q: np.ndarray
    block_size: int


def setting(vocab: int, block_size: int, markov: bool, seed: int) -> Setting:
    """Rows with a hole here and there; the assistant is a blurred and disturbed target."""
    rng = np.random.default_rng(seed)

    def rows() -> np.ndarray:
        table = rng.dirichlet(np.full(vocab, 0.8), vocab if markov else 1)
        if vocab > 2:
            table[0, rng.integers(vocab)] = 0
        table /= table.sum(axis=1, keepdims=True)
        return np.broadcast_to(table, (vocab, vocab))

    p = rows()
    q = 0.6 * p + 0.4 * rows()
    return Setting(p, q, block_size)


def texts(s: Setting, rule: str, runs: int, size: Callable | None = None) -> np.ndarray:
    """The first LENGTH tokens of every run, ``[runs, LENGTH]``.

    Args:
        s: The tables.
        rule: The rule.
        runs: How many runs; the run's number is its seed.
        size: Drafts of the next round ``[runs]`` from (drafts, accepted); all of them when None.
    """
    vocab, k = s.p.shape[0], s.block_size - 1
    p, q = (mx.array(x.astype(np.float32)) for x in (s.p, s.q))
    seed = mx.arange(runs, dtype=mx.uint32)
    each = mx.broadcast_to(mx.arange(vocab), (runs, 1, vocab))

    def rows(table: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        probs = table[tokens]
        return mx.broadcast_to(each, probs.shape), probs

    position = mx.zeros(runs, mx.int32)
    first = (a[:, 0] for a in rows(p, mx.zeros((runs, 1), mx.int32)))
    token = draw_token_reference(*first, position, position, seed, mx.full((runs,), True))
    out = np.zeros((runs, LENGTH + s.block_size), np.int32)
    out[:, 0], length = np.array(token), np.ones(runs, int)
    sizes = np.full(runs, k)
    shared = rule == "coupled"
    while length.min() < LENGTH:
        drafts = token[:, None]
        for i in range(k):
            own = (a[:, 0] for a in rows(q, drafts[:, -1:]))
            index = mx.full((runs,), i + shared, mx.int32)
            draft = draw_token_reference(*own, position, index, seed, mx.full((runs,), shared))
            drafts = mx.concatenate([drafts, draft[:, None]], axis=1)
        accepted, following = np.zeros(runs, int), np.array(token)
        for n in np.unique(sizes):  # a round of each size on all; each run keeps its own
            of_p, of_q = rows(p, drafts[:, : n + 1]), rows(q, drafts[:, :n])
            own = (Rows(*of_p), Rows(*of_q), drafts[:, 1 : n + 1])
            got = accept_one(rule, *own, position, seed, vocab)
            mine = sizes == n
            accepted[mine] = np.array(got[0])[mine]
            following[mine] = np.array(got[1])[mine]
        block = np.array(drafts)[:, 1:]
        open_ = length < LENGTH
        for i in range(k):
            some = open_ & (i < accepted)
            out[some, length[some] + i] = block[some, i]
        out[open_, (length + accepted)[open_]] = following[open_]
        length = length + np.where(open_, accepted + 1, 0)
        if size is not None:
            sizes = size(block, accepted)
        position, token = mx.array(np.array(position) + accepted + 1), mx.array(following)
    return out[:, :LENGTH]


def p_value(s: Setting, got: np.ndarray) -> float:
    """Chi-square of whole texts against their law; cells under 10 are pooled, impossible give 0."""
    vocab, runs = s.p.shape[0], len(got)
    law = s.p[0]
    for _ in range(LENGTH - 1):
        law = (law.reshape(-1, vocab)[:, :, None] * s.p[None]).reshape(-1)
    law = law / law.sum()
    counts = np.bincount(got @ vocab ** np.arange(LENGTH)[::-1], minlength=law.size)
    if counts[law == 0].any():
        return 0.0
    big = law * runs >= 10
    want = np.append(law[big], law[~big].sum()) * runs
    seen = np.append(counts[big], counts[~big].sum())
    keep = want > 0
    return float(scipy_stats.chisquare(seen[keep], want[keep] * seen.sum() / want.sum()).pvalue)


SETTINGS = [
    setting(2, 3, False, 1),
    setting(3, 4, True, 2),
    setting(4, 3, True, 3),
    setting(3, 5, False, 4),
    setting(4, 5, True, 5),
]
LEAST = 1e-4  # seeds are fixed; were they drawn, one suite in five hundred would fail
RUNS = 50_000


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("s", SETTINGS, ids=lambda s: f"V{s.p.shape[0]}-block{s.block_size}")
def test_joint_law(s: Setting, rule: str) -> None:
    assert p_value(s, texts(s, rule, RUNS)) > LEAST


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("s", SETTINGS, ids=lambda s: f"V{s.p.shape[0]}-block{s.block_size}")
def test_joint_law_of_a_million_runs(s: Setting, rule: str) -> None:
    assert p_value(s, texts(s, rule, 1_000_000)) > LEAST


def by_accepted(drafts: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    return np.where(accepted == drafts.shape[1], drafts.shape[1], 1 + accepted // 2)


def by_refused_draft(drafts: np.ndarray, accepted: np.ndarray) -> np.ndarray:
    """One draft after a round whose last one was a refused 0."""
    k = drafts.shape[1]
    return np.where((accepted < k) & (drafts[:, -1] == 0), 1, k)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [by_accepted, by_refused_draft])
def test_block_size_may_change(size: Callable, rule: str) -> None:
    """Counters begin with the round's own position, so refused drafts say nothing of the next."""
    assert p_value(SETTINGS[3], texts(SETTINGS[3], rule, RUNS, size)) > LEAST


def by_position(position: mx.array, lane: mx.array, seed: mx.array, use: object) -> mx.array:
    """Counters of the token's own position in place of (round's position, index)."""
    if lane.ndim > 1:  # shared noise
        return real_uniforms(position, lane, seed, use)
    return real_uniforms(position + lane, 0 * lane, seed, use)


def broken(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put one fault into the rules."""

    def patch(name: str, value: object) -> None:
        monkeypatch.setattr(accept_module, name, value)

    if fault.startswith("position-keyed"):
        patch("uniforms", by_position)
        monkeypatch.setattr(draw_module, "uniforms", by_position)
    elif fault == "first failure":
        patch("count_accepted", lambda rule, passed: real_count("residual", passed))
    elif fault == "unfiltered q":
        Rows = accept_module.Rows
        patch(
            "acceptance",
            lambda rule, p, q, *rest: real_acceptance(
                rule, p, Rows(q.ids, 0.7 * q.probs + 0.3 / q.probs.shape[-1]), *rest
            ),
        )
    elif fault == "residual not renormalised":

        def invert(ids: mx.array, weights: mx.array, u: mx.array) -> mx.array:
            rest = mx.maximum(1 - weights.sum(axis=-1, keepdims=True), 0)
            more = mx.concatenate([weights, rest], axis=-1)
            return real_invert(mx.concatenate([ids, ids[..., :1]], axis=-1), more, u)

        patch("invert", invert)
    else:  # every round draws the same numbers
        patch(
            "uniforms",
            lambda position, lane, seed, use: real_uniforms(0 * position, lane, seed, use),
        )


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ("block", "position-keyed counters"),
        ("residual", "position-keyed counters, block size by a refused draft"),
        ("block", "first failure"),
        ("block", "unfiltered q"),
        ("block", "residual not renormalised"),
        ("block", "one round's counters"),
        ("residual", "unfiltered q"),
        ("residual", "residual not renormalised"),
        ("residual", "one round's counters"),
    ],
)
def test_faults_are_seen(rule: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(fault, monkeypatch)
    looks = "size" in fault
    s, size = (SETTINGS[3], by_refused_draft) if looks else (SETTINGS[4], None)
    assert p_value(s, texts(s, rule, 2 * RUNS, size)) < 1e-6
