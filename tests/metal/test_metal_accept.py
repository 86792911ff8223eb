"""accept_block on Metal, in the workbench: the same drafts kept, the same token after them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launched import launched
from one_text import accept_alone, draw_rows
from test_accept_block import random_case

from pyengine import ops
from pyengine.ops.accept_block import RULES


def metal(args: list[mx.array], rule: str, **options: Any) -> tuple[int, int]:
    (accepted, token), _ = launched(accept_alone(*args, rule=rule, vocab=1 << 21), **options)
    return int(accepted.item()), int(token.item())


def result(out: tuple[mx.array, mx.array]) -> tuple[int, int]:
    return int(out[0].item()), int(out[1].item())


def wide_case(seed: int, k: int, n: int, m: int, near: float) -> tuple[list[mx.array], int]:
    """p and q over the same ids, `near` each other, so that many drafts are kept."""
    rng = np.random.default_rng(seed)
    vocab = max(n, m) + 9
    ids = np.stack([rng.permutation(vocab) for _ in range(k + 1)]).astype(np.int32)
    p = rng.dirichlet(np.full(n, 0.5), k + 1)
    q = np.zeros((k, m))
    q[:, : min(n, m)] = near * p[:k, :m]
    q += (1 - near) * rng.dirichlet(np.full(m, 0.5), k)
    drafts = [rng.choice(ids[i, :m], p=q[i] / q[i].sum()) for i in range(k)]
    arrays = [ids[:, :n], p.astype(np.float32), ids[:k, :m], q.astype(np.float32)]
    args = [mx.array(a) for a in arrays] + [mx.array(np.array(drafts, np.int32))]
    return [*args, mx.array(900 + seed), mx.array(seed, dtype=mx.uint32)], vocab


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "k, n, m", [(1, 1, 1), (5, 64, 64), (3, 256, 200), (16, 64, 64), (40, 33, 31)]
)
def test_no_fault_and_the_processors_decision(rule, k, n, m):
    args, vocab = wide_case(k, k, n, m, 0.9)
    expected = result(accept_alone(*args, rule=rule, vocab=vocab))
    for options in (
        {"mode": "check"},
        {"mode": "check", "order": "reverse"},
        {"mode": "check", "order": "random"},
        {"contract": "fast"},
    ):
        assert metal(args, rule, **options) == expected, options


@pytest.mark.parametrize("rule", RULES)
def test_the_longest_block(rule):
    """127 drafts of 256 candidates: all kept where p = q, and else as the others decide."""
    kept = set()
    for seed, near in ((1, 1.0), (2, 0.99), (3, 0.5)):
        args, vocab = wide_case(seed, 127, 256, 256, near)
        if rule == "coupled":  # drafts that share the noise
            shared = draw_rows(*args[2:4], *args[5:], index=1, shared=True)
            args[4] = shared
        out = metal(args, rule, mode="check" if seed == 2 else "fast")
        assert out == result(accept_alone(*args, rule=rule, vocab=vocab))
        assert out == result(
            accept_alone(*args, rule=rule, vocab=vocab, op=ops.accept_block_reference)
        )
        kept.add(out[0])
    assert max(kept) == 127 and len(kept) > 1


def test_where_there_is_no_mass():
    """p = q: residual and block keep all (h is 1 where nothing is left over); a draft of no
    probability is never kept, and the row of p stands in where p lies below q everywhere."""
    ids = mx.array([[4, 2, 9]] * 3, dtype=mx.int32)
    p = mx.array([[0.5, 0.5, 0.0]] * 3)
    position, seed = mx.array(11), mx.array(5, dtype=mx.uint32)
    for rule in ("residual", "block"):
        args = [ids, p, ids[:2], p[:2], mx.array([4, 2], dtype=mx.int32), position, seed]
        assert metal(args, rule)[0] == 2
        args[4] = mx.array([4, 9], dtype=mx.int32)
        kept, token = metal(args, rule)
        assert kept == 1 and token in (4, 2)
        args[3] = 2 * p[:2]  # no row of a distribution, but nothing may divide by 0
        assert metal(args, rule) == result(accept_alone(*args, rule=rule, vocab=10))


def test_greedy_keeps_what_agrees():
    ids = mx.array([[3], [1], [4], [1]], dtype=mx.int32)
    ones, position, seed = mx.ones((4, 1)), mx.array(7), mx.array(1, dtype=mx.uint32)
    for drafts, kept, token in (([3, 1, 4], 3, 1), ([3, 5, 4], 1, 1), ([2, 1, 4], 0, 3)):
        d = mx.array(drafts, dtype=mx.int32)
        for rule in RULES:
            assert metal([ids, ones, d[:, None], ones[:3], d, position, seed], rule) == (
                kept,
                token,
            )


def fuzz(cases: int, seed: int) -> None:
    """So many blocks, each under a rule of its own turn, in all three implementations."""
    rng = np.random.default_rng(seed)
    kept: dict[str, set[int]] = {rule: set() for rule in RULES}
    for i in range(cases):
        rule = RULES[i % 3]
        args, vocab = random_case(rng)
        out = metal(args, rule)
        assert out == result(accept_alone(*args, rule=rule, vocab=vocab)), (i, rule)
        assert out == result(
            accept_alone(*args, rule=rule, vocab=vocab, op=ops.accept_block_reference)
        ), (i, rule)
        kept[rule].add(out[0])
    assert all(seen == set(range(7)) for seen in kept.values())  # the cases reach every outcome


def test_fuzzed():
    fuzz(450, seed=1)


@pytest.mark.long
def test_fuzzed_ten_thousand_times():
    fuzz(10_000, seed=2)


def test_switch_runs_it_within_its_limits(monkeypatch):
    ran = []
    run = ops.workbench.run
    monkeypatch.setattr(
        ops.workbench, "run", lambda made, *rest: ran.append(made[0].kernel) or run(made, *rest)
    )
    args, vocab = wide_case(4, 3, 20, 20, 0.9)
    wide, wide_vocab = wide_case(4, 3, 300, 20, 0.9)
    ops.use("workbench")
    try:
        out = [result(accept_alone(*args, rule=rule, vocab=vocab)) for rule in RULES]
        accept_alone(*wide, rule="block", vocab=wide_vocab)
    finally:
        ops.use("native")
    assert ran == ["accept_block"] * 3
    assert out == [result(accept_alone(*args, rule=rule, vocab=vocab)) for rule in RULES]
