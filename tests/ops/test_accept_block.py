"""accept_block: kernel against reference, every rule by exact enumeration, guards, errors."""

from __future__ import annotations

import itertools
import math
import sys
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from draw import INT32, Call, Draw, exact
from one_text import accept_alone, draw_rows
from test_draw_token import candidates

from pyengine.ops import accept_block, accept_block_reference
from pyengine.ops.accept_block import (
    RULES,
    Rows,
    Rule,
    accept,
    accept_coupled,
    acceptance,
    count_accepted,
)
from pyengine.ops.draw_token import race

Tree = dict[tuple[int, ...], np.ndarray]
SEED = mx.array(3, dtype=mx.uint32)


# Kernel against reference: the same decisions, always.


def random_case(rng: np.random.Generator) -> tuple[list[mx.array], int]:
    """A block with hard edges: few candidates, one-hot rows, equal rows, no common candidate."""
    k, n, m = (int(x) for x in rng.integers(1, (7, 20, 20)))
    m = n if rng.random() < 0.6 else m
    vocab = int(rng.choice([max(n, m), 40, 300]))

    def table(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.stack([rng.permutation(vocab)[:width] for _ in range(count)]).astype(np.int32)
        probs = rng.dirichlet(np.full(width, rng.choice([0.1, 1.0, 50.0])), count)
        probs[rng.random(probs.shape) < 0.2] = 0
        hot = (probs.sum(axis=1) == 0) | (rng.random(count) < 0.15)
        probs[hot] = np.eye(width)[rng.integers(0, width, hot.sum())]
        return ids, (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)

    (p_ids, p), (q_ids, q) = table(k + 1, n), table(k, m)
    if n == m:
        same = rng.random(k) < rng.choice([0.4, 0.95])
        q_ids[same], q[same] = p_ids[:k][same], p[:k][same]
    position = mx.array(int(rng.integers(0, 2**20)))
    seed = mx.array(int(rng.integers(0, 2**32)), dtype=mx.uint32)
    *rows, q_ids, q = (mx.array(x) for x in (p_ids, p, q_ids, q))
    if rng.random() < 0.5:
        drafts = draw_rows(q_ids, q, position, seed, index=1, shared=True)
    else:
        drafts = draw_rows(q_ids, q, position, seed, shared=False)
    return [*rows, q_ids, q, drafts, position, seed], vocab


def assert_kernel_decides_like_reference(cases: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(cases):
        args, vocab = random_case(rng)
        for rule in RULES:
            both = (
                accept_alone(*args, rule=rule, vocab=vocab, op=f)
                for f in (accept_block, accept_block_reference)
            )
            rows.append(mx.concatenate([x.reshape(1) for result in both for x in result]))
        if len(rows) % 60 == 0:
            mx.eval(rows)
    table = np.array(mx.stack(rows))
    assert np.array_equal(table[:, :2], table[:, 2:])
    for i in range(len(RULES)):  # the cases reach every outcome
        assert len(np.unique(table[i :: len(RULES), 0])) == 7


def test_kernel_decides_like_reference() -> None:
    assert_kernel_decides_like_reference(150, seed=1)


@pytest.mark.long
def test_kernel_decides_like_reference_ten_thousand_times() -> None:
    assert_kernel_decides_like_reference(10_000, seed=2)


@pytest.mark.parametrize("rule", RULES)
def test_long_rows(rule: str) -> None:
    """Rows of the whole vocabulary, as without top-k: partners are found through a table."""
    rng = np.random.default_rng(4)
    for seed in range(20):
        p = rng.dirichlet(np.full(3000, 0.05), 4).astype(np.float32)
        q = rng.dirichlet(np.full(3000, 0.05), 3).astype(np.float32) * 0.3 + p[:3] * 0.7
        ids = np.stack([rng.permutation(3000) for _ in range(7)]).astype(np.int32)
        p, q = (np.take_along_axis(x, i, 1) for x, i in ((p, ids[:4]), (q, ids[4:])))
        drafts = [int(rng.choice(ids[4 + i], p=q[i] / q[i].astype(float).sum())) for i in range(3)]
        args = [mx.array(x) for x in (ids[:4], p, ids[4:], q, np.array(drafts, np.int32))]
        args += [mx.array(seed), SEED]
        got = accept_alone(*args, rule=rule, vocab=3000)
        want = accept_alone(*args, rule=rule, vocab=3000, op=accept_block_reference)
        assert [a.tolist() for a in got] == [a.tolist() for a in want]


# The law of one round, by enumeration over every draft path and every outcome of the uniforms.


def random_tree(rng: np.random.Generator, vocab: int, depth: int) -> Tree:
    """A distribution for every prefix of fewer than ``depth`` tokens, some with empty cells."""
    tree = {}
    for n in range(depth):
        for prefix in itertools.product(range(vocab), repeat=n):
            p = rng.dirichlet(np.full(vocab, 0.7))
            if rng.random() < 0.3:
                p[rng.integers(vocab)] = 0
            if rng.random() < 0.1:
                p = np.eye(vocab)[rng.integers(vocab)]
            tree[prefix] = p / p.sum()
    return tree


def all_paths(p: Tree, q: Tree, vocab: int, k: int, dtype: mx.Dtype) -> tuple[Rows, Rows, Any]:
    """Rows of both models along every path of drafts: ``[paths, k + 1 or k, vocab]``."""
    paths = list(itertools.product(range(vocab), repeat=k))

    def rows(tree: Tree, count: int) -> Rows:
        table = np.array([[tree[path[:i]] for i in range(count)] for path in paths])
        ids = mx.broadcast_to(mx.arange(vocab), table.shape)
        return Rows(ids, mx.array(table, dtype=dtype))

    return rows(p, k + 1), rows(q, k), paths


def committed(rule: Rule, p: Tree, q: Tree, vocab: int, k: int, dtype: mx.Dtype) -> dict:
    """Probability of every committed token sequence of one round."""
    target, assistant, paths = all_paths(p, q, vocab, k, dtype)
    drafts = mx.array(paths, dtype=mx.int32)
    chances, weights = acceptance(rule, target, assistant, drafts, vocab)
    h, after = (np.array(x.astype(mx.float64)) for x in (chances, weights))
    assert (h >= 0).all() and (h <= 1).all()
    after /= after.sum(axis=-1, keepdims=True)
    out: dict[tuple, float] = {}
    for passed in itertools.product((False, True), repeat=k):
        kept = count_accepted(rule, mx.array(passed)).item()
        for path, chance, rows in zip(paths, h, after, strict=True):
            mass = math.prod(q[path[:i]][path[i]] for i in range(k))
            mass *= math.prod(c if ok else 1 - c for c, ok in zip(chance, passed, strict=True))
            for x in range(vocab):
                key = (*path[:kept], x)
                out[key] = out.get(key, 0.0) + mass * rows[kept][x]
    return out


def gap(got: dict, p: Tree, vocab: int, k: int) -> float:
    """Total variation of k + 1 tokens: a round's, continued by the target, from the target's."""
    whole = dict.fromkeys(itertools.product(range(vocab), repeat=k + 1), 0.0)
    for tokens, mass in got.items():
        for rest in itertools.product(range(vocab), repeat=k + 1 - len(tokens)):
            text = tokens + rest
            more = math.prod(p[text[:i]][text[i]] for i in range(len(tokens), k + 1))
            whole[text] += mass * more
    want = {s: math.prod(p[s[:i]][s[i]] for i in range(k + 1)) for s in whole}
    return 0.5 * sum(abs(whole[s] - want[s]) for s in whole)


def mean_accepted(got: dict) -> float:
    return sum((len(tokens) - 1) * mass for tokens, mass in got.items())


CASES = list(itertools.product((2, 3, 4), (1, 2, 3)))


@pytest.mark.parametrize(("vocab", "k"), CASES)
@pytest.mark.parametrize(("dtype", "bound"), [(mx.float64, 1e-12), (mx.float32, 1e-6)])
def test_rules_are_exact(vocab: int, k: int, dtype: mx.Dtype, bound: float) -> None:
    rng = np.random.default_rng(100 * vocab + k)
    with mx.stream(mx.cpu):
        for _ in range(4):
            p, q = random_tree(rng, vocab, k + 1), random_tree(rng, vocab, k + 1)
            one_hot = {s: np.eye(vocab)[int(row.argmax())] for s, row in q.items()}
            for law in (q, one_hot, p):
                got = {r: committed(r, p, law, vocab, k, dtype) for r in ("residual", "block")}
                assert max(gap(g, p, vocab, k) for g in got.values()) <= bound
                residual, block = (mean_accepted(got[r]) for r in ("residual", "block"))
                assert block >= residual - bound
                if law is p:
                    assert math.isclose(residual, k, rel_tol=1e-6)


def test_block_accepts_more() -> None:
    """Not only no fewer: on random trees of three drafts some percent more."""
    rng = np.random.default_rng(5)
    total = {"residual": 0.0, "block": 0.0}
    for _ in range(10):
        p, q = random_tree(rng, 3, 4), random_tree(rng, 3, 4)
        for rule in total:
            total[rule] += mean_accepted(committed(rule, p, q, 3, 3, mx.float32))
    assert total["block"] > 1.02 * total["residual"]


@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ("residual", "unfiltered q"),
        ("residual", "no correction"),
        ("residual", "always accept"),
        ("block", "unfiltered q"),
        ("block", "no correction"),
        ("block", "first failure"),
        ("block", "unscaled correction"),
    ],
)
def test_enumeration_sees_a_broken_rule(
    rule: Rule, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, count = acceptance, count_accepted

    def broken(rule: Rule, p: Rows, q: Rows, drafts: mx.array, vocab: int) -> Any:
        if fault == "unfiltered q":
            q = Rows(q.ids, 0.5 * q.probs + 0.5 / 3)
        chances, weights = real(rule, p, q, drafts, vocab)
        if fault == "no correction":
            return chances, p.probs
        if fault == "unscaled correction":
            return chances, real("residual", p, q, drafts, vocab)[1]
        return (mx.ones_like(chances) if fault == "always accept" else chances), weights

    here = sys.modules[__name__]
    monkeypatch.setattr(here, "acceptance", broken)
    if fault == "first failure":
        monkeypatch.setattr(here, "count_accepted", lambda rule, ok: count("residual", ok))
    rng = np.random.default_rng(9)
    p, q = random_tree(rng, 3, 4), random_tree(rng, 3, 4)
    assert gap(committed(rule, p, q, 3, 3, mx.float32), p, 3, 3) > 0.005


@pytest.mark.parametrize(("vocab", "k"), [(2, 1), (2, 2), (3, 1), (3, 2)])
def test_coupled_commits_what_plain_decoding_draws(vocab: int, k: int) -> None:
    """Every point of a grid of noise: the committed tokens are those of plain decoding."""
    rng = np.random.default_rng(vocab + k)
    values = rng.exponential(size=(k + 1, vocab, 3)).astype(np.float32)
    grid = np.array(
        [
            [[values[t, x, picks[t * vocab + x]] for x in range(vocab)] for t in range(k + 1)]
            for picks in itertools.product(range(3), repeat=(k + 1) * vocab)
        ]
    )
    seen: set[int] = set()
    for _ in range(4):
        p, q = random_tree(rng, vocab, k + 1), random_tree(rng, vocab, k + 1)

        def draw(tree: Tree, prefixes: list, t: int) -> list[int]:
            probs = mx.array(np.array([tree[prefix] for prefix in prefixes], np.float32))
            ids = mx.broadcast_to(mx.arange(vocab), probs.shape)
            return race(ids, probs, mx.array(grid[:, t])).tolist()

        plain: list[tuple] = [()] * len(grid)
        drafts: list[tuple] = [()] * len(grid)
        for t in range(k + 1):
            step = zip(plain, draw(p, plain, t), strict=True)
            plain = [(*text, x) for text, x in step]
        for t in range(k):
            drafts = [(*d, x) for d, x in zip(drafts, draw(q, drafts, t), strict=True)]
        rows = np.array([[p[d[:i]] for i in range(k + 1)] for d in drafts], np.float32)
        target = Rows(mx.broadcast_to(mx.arange(vocab), rows.shape), mx.array(rows))
        kept, token = accept_coupled(target, mx.array(drafts, dtype=mx.int32), mx.array(grid))
        kept, token = kept.tolist(), token.tolist()
        for text, d, n, x in zip(plain, drafts, kept, token, strict=True):
            assert (*d[:n], x) == text[: n + 1]
        seen.update(kept)
    assert seen == set(range(k + 1))


# Single decisions with given numbers, and the guards.


def one_row(table: list[list[float]]) -> Rows:
    probs = mx.array(table)
    return Rows(mx.broadcast_to(mx.arange(probs.shape[1]), probs.shape), probs)


def test_residual_follows_the_given_uniforms() -> None:
    p = one_row([[0.5, 0.5, 0.0], [0.2, 0.0, 0.8], [0.0, 1.0, 0.0]])
    q = one_row([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0]])
    drafts = mx.array([0, 0])

    def run(u_accept: list[float], u_next: list[float]) -> tuple[int, int]:
        accepted, token = accept(
            "residual", p, q, drafts, mx.array(u_accept), mx.array(u_next), vocab=3
        )
        return accepted.item(), token.item()

    assert run([0.5, 0.0], [0.9, 0.9, 0.9]) == (0, 1)  # u < h is strict; (p - q)+ is token 1
    assert run([0.49, 0.5], [0.9, 0.0, 0.9]) == (1, 2)  # (p - q)+ is token 2
    assert run([0.49, 0.49], [0.0, 0.0, 0.3]) == (2, 1)  # bonus
    assert run([0.5, 0.49], [0.0, 0.0, 0.0]) == (0, 1)  # a later pass does not count


def test_block_follows_the_given_uniforms() -> None:
    p = one_row([[0.5, 0.5, 0.0], [0.8, 0.0, 0.2], [0.0, 1.0, 0.0]])
    q = one_row([[1.0, 0.0, 0.0], [0.4, 0.6, 0.0]])
    # a = 1, 0.5, 1; s[1] = (0.4 - 0.4)+ + 0.1, h = 0.1 / 0.6, 1
    drafts = mx.array([0, 0])

    def run(u_accept: list[float], u_next: list[float]) -> tuple[int, int]:
        accepted, token = accept(
            "block", p, q, drafts, mx.array(u_accept), mx.array(u_next), vocab=3
        )
        return accepted.item(), token.item()

    chances, _ = acceptance("block", p, q, drafts, 3)
    assert np.allclose(np.array(chances), [1 / 6, 1.0])
    assert run([0.99, 0.99], [0.0, 0.0, 0.0]) == (2, 1)  # the largest success counts
    p = Rows(p.ids, mx.array([[0.5, 0.5, 0.0], [0.2, 0.0, 0.8], [0.0, 1.0, 0.0]]))
    assert run([0.99, 0.26], [0.0, 0.0, 0.0]) == (0, 1)  # a[2] = 0.25
    assert run([0.1, 0.26], [0.0, 0.0, 0.0]) == (1, 2)  # (0.5 p - q)+ is token 2


@pytest.mark.parametrize("rule", ["residual", "block"])
def test_equal_rows_keep_every_draft(rule: str) -> None:
    """p = q: no correction has mass, h is 1, and nothing is ever refused."""
    rng = np.random.default_rng(7)
    for seed in range(200):
        p = rng.dirichlet(np.full(5, 0.5), 4).astype(np.float32)
        ids = mx.broadcast_to(mx.arange(5), (4, 5))
        at, key = mx.array(seed), mx.array(seed, dtype=mx.uint32)
        drafts = [int(rng.choice(5, p=row / row.astype(float).sum())) for row in p[:3]]
        args = (ids, mx.array(p), ids[:3], mx.array(p[:3]), mx.array(drafts), at, key)
        accepted, token = accept_alone(*args, rule=rule, vocab=5)
        assert accepted.item() == 3 and p[3][token.item()] > 0


@pytest.mark.parametrize("rule", RULES)
def test_greedy_rows_accept_only_the_argmax(rule: str) -> None:
    p_ids, q_ids = mx.array([[7], [3], [5]]), mx.array([[7], [4]])
    for drafts, want in (([7, 4], (1, 3)), ([7, 3], (2, 5)), ([1, 3], (0, 7))):
        q = mx.array(drafts)[:, None] if rule != "coupled" else q_ids
        for seed in range(20):
            accepted, token = accept_alone(
                *(p_ids, mx.ones((3, 1)), q, mx.ones((2, 1)), mx.array(drafts)),
                mx.array(seed),
                SEED,
                rule=rule,
                vocab=9,
            )
            assert (accepted.item(), token.item()) == want


@pytest.mark.parametrize("rule", ["residual", "block"])
def test_impossible_drafts_are_refused_and_certain_ones_kept(rule: Rule) -> None:
    """Probability exactly 0 in p; exactly 0 in q, which rounding can give; 1 in both."""
    p = one_row([[0.0, 1.0], [0.5, 0.5]])
    for q, draft, want in (([[1.0, 0.0]], 0, 0), ([[1.0, 0.0]], 1, 1), ([[0.0, 1.0]], 1, 1)):
        chances, weights = acceptance(rule, p, one_row(q), mx.array([draft]), 2)
        assert chances.tolist() == [want]
        assert weights[0].tolist() == [0, 1]
        assert np.isfinite(np.array(weights)).all()


def test_block_goes_on_after_an_impossible_draft() -> None:
    """a = 0 stays 0, whatever follows: no 0 times infinity."""
    p = one_row([[0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    q = one_row([[1.0, 0.0], [0.0, 1.0]])
    chances, _ = acceptance("block", p, q, mx.array([0, 0]), 2)
    assert chances.tolist() == [0, 0]


def good_args() -> dict[str, Any]:
    return {
        "p_ids": mx.zeros((3, 4), mx.int32),
        "p_probs": mx.zeros((3, 4)),
        "q_ids": mx.zeros((2, 5), mx.int32),
        "q_probs": mx.zeros((2, 5)),
        "drafts": mx.zeros(2, mx.int32),
        "position": mx.zeros(1, mx.int32),
        "seed": SEED[None],
        "rule": mx.zeros(1, mx.int32),
        "counts": (3,),
        "vocab": 9,
    }


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"p_ids": mx.zeros((3, 4))}, "p_ids must be int32 but got float32."),
        ({"p_ids": mx.zeros(3, mx.int32)}, "p_ids must have shape [R, n] but got [3]."),
        ({"p_probs": mx.zeros((3, 5))}, "p_probs must have shape [3, 4] but got [3, 5]."),
        ({"q_ids": mx.zeros((2, 0), mx.int32)}, "q_ids must have shape [R - Q, m] but got [2, 0]."),
        ({"q_probs": mx.zeros((2, 5), mx.float16)}, "q_probs must be float32 but got float16."),
        (
            {"q_ids": mx.zeros((3, 5), mx.int32), "q_probs": mx.zeros((3, 5))},
            "q_ids must have the rows that counts name but got [3, 5].",
        ),
        ({"drafts": mx.zeros(3, mx.int32)}, "drafts must have shape [2] but got [3]."),
        ({"counts": (2, 2)}, "p_ids must have the rows that counts name but got [3, 4]."),
        ({"counts": (4,)}, "q_ids must have the rows that counts name but got [2, 5]."),
        ({"counts": (3, 0)}, "counts must be 1 or more and below 2**30 but got 0."),
        ({"counts": ()}, "counts must name at least 1 block but got none."),
        ({"position": mx.zeros(1)}, "position must be int32 but got float32."),
        ({"position": mx.array(0)}, "position must have shape [1] but got []."),
        ({"seed": mx.zeros(1, mx.int32)}, "seed must be uint32 but got int32."),
        ({"rule": mx.zeros(2, mx.int32)}, "rule must have shape [1] but got [2]."),
        ({"rule": mx.array([3])}, "rule must be 0, 1 or 2 but got 3."),
        ({"vocab": 0}, "vocab must be positive and at most 2097152 but got 0."),
    ],
)
def test_errors(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:
        accept_block(**{**good_args(), **change})
    assert str(error.value) == f"[accept_block] {text}"


def random_call(d: Draw) -> Call:
    counts = [1 + d.size(1, 2, 7) for _ in range(int(d.pick((1, 1, 2, 5))))]
    R, Q = sum(counts), len(counts)
    k = R - Q
    n, m = (d.size(1, 3, 33, 256, 300) for _ in range(2))
    vocab = max(n, m) + int(d.pick((0, 1, 50)))
    p, q = candidates(d, R, n, vocab), candidates(d, k, m, vocab)
    drafts = d.ids((k,), vocab)
    if m and k and d.chance(0.7):
        drafts = mx.contiguous(q[0][:, d.rng.integers(m)])
    position = d.laid_out(mx.array([int(d.pick((*INT32, 0, 5))) for _ in counts], dtype=mx.int32))
    seed = d.laid_out(mx.array([int(d.pick((0, 7, 2**32 - 1))) for _ in counts], dtype=mx.uint32))
    rule = d.laid_out(mx.array(d.rng.integers(0, 3, Q).astype(np.int32)))
    options = {"counts": counts, "vocab": d.integer(vocab, vocab, vocab, 1)}
    return Call((*p, *q, drafts, position, seed, rule), options, exact)


def of_candidates(k: int, n: int) -> tuple[mx.array, mx.array]:
    """k drafts, each the first of n candidates."""
    ids = mx.broadcast_to(mx.arange(n, dtype=mx.int32), (k + 1, n))
    probs = mx.full((k + 1, n), 1 / n)
    position, seed = mx.array(5), mx.array(1, dtype=mx.uint32)
    drafted = (ids[1:], probs[1:], ids[1:, 0])
    return accept_alone(ids, probs, *drafted, position, seed, rule="block", vocab=300)


# The largest call of a kind that the Metal kernel takes
LIMITS = {
    "drafts": (128, lambda k: of_candidates(k, 1)),
    "candidates": (256, lambda n: of_candidates(1, n)),
}

# What bench/bench_accept_block.py has to say that its SMALL call moves: 6 rows of 64 candidates and
# 5, 8 bytes each; 5 drafts; position, seed, rule; two results
BENCH_BYTES = 11 * 64 * 8 + 5 * 4 + 3 * 4 + 2 * 4
