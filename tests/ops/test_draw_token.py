"""draw_token: kernel against reference bit for bit, laws, edges, errors."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from draw import INT32, Call, Draw, exact
from one_text import draw_rows

from pyengine.ops import draw_token, draw_token_reference
from pyengine.ops.draw_token import exponential, invert

SEED = mx.array(5, dtype=mx.uint32)


def rows(seed: int, count: int, n: int) -> tuple[mx.array, mx.array]:
    """Candidates with some impossible ones among them; the first is always possible."""
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.permutation(4 * n)[:n] for _ in range(count)]).astype(np.int32)
    probs = rng.dirichlet(np.full(n, 0.3), count).astype(np.float32)
    probs[rng.random(probs.shape) < 0.2] = 0
    probs[:, 0] += 0.05
    return mx.array(ids), mx.array(probs)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 64, 256, 3000])
def test_equals_reference(n: int, shared: bool) -> None:
    for seed in range(20):
        ids, probs = rows(seed, 3, n)
        args = (ids, probs, mx.array(1000 * seed), mx.array(2**32 - 1 - seed, dtype=mx.uint32))
        got = draw_rows(*args, index=seed, shared=shared)
        want = draw_rows(*args, index=seed, shared=shared, op=draw_token_reference)
        assert got.dtype == mx.int32 and got.tolist() == want.tolist()


def test_exponential_is_minus_the_logarithm() -> None:
    """Within one unit in the last place everywhere on the grid, both ends included."""
    rng = np.random.default_rng(0)
    words = np.concatenate([rng.integers(0, 2**24, 200_000), [0, 1, 2, 2**24 - 2, 2**24 - 1]])
    u = (words * 2.0**-24).astype(np.float32)
    got = np.array(exponential(mx.array(u))).astype(np.float64)
    want = -np.log1p(-u.astype(np.float64))
    assert got[words == 0].tolist() == [0.0] * int((words == 0).sum())
    assert np.abs(got - want).max() <= 1.2 * 2.0**-20  # one unit at 16
    units = np.abs(got - want)[words > 0] / np.spacing(want[words > 0].astype(np.float32))
    assert units.max() < 1.0


@pytest.mark.parametrize("shared", [True, False])
def test_follows_the_distribution(shared: bool) -> None:
    """100000 draws at different positions; chi-square with 4 degrees of freedom, p = 1e-4."""
    probs = np.array([0.5, 0.3, 0.15, 0.04, 0.01])
    runs = 100_000
    ids = mx.broadcast_to(mx.array([3, 0, 2, 1, 4], dtype=mx.int32), (runs, 5))
    table = mx.broadcast_to(mx.array(probs.astype(np.float32)), (runs, 5))
    tokens = draw_rows(ids, table, mx.array(7), SEED, shared=shared)
    counts = np.bincount(np.array(tokens), minlength=5)[[3, 0, 2, 1, 4]]
    assert ((counts - runs * probs) ** 2 / (runs * probs)).sum() < 23.5


def test_shared_noise_depends_on_position_and_id_alone() -> None:
    ids, probs = rows(1, 1, 40)
    order = mx.array(np.random.default_rng(2).permutation(40))
    shuffled = (ids[:, order], probs[:, order])
    for position in range(60):
        token = draw_rows(ids, probs, mx.array(position), SEED, shared=True)
        again = draw_rows(*shuffled, mx.array(position - 5), SEED, index=5, shared=True)
        assert token.item() == again.item()


def test_shared_noise_makes_like_rows_draw_alike() -> None:
    """At 1000 positions two rows 0.1 apart in total variation nearly always agree."""
    p, q = np.array([0.4, 0.3, 0.2, 0.1]), np.array([0.3, 0.4, 0.2, 0.1])
    ids = mx.broadcast_to(mx.arange(4), (1000, 4))
    draws = [
        draw_rows(ids, mx.broadcast_to(mx.array(x, dtype=mx.float32), (1000, 4)), mx.array(0), s,
                   shared=True)
        for x, s in ((p, SEED), (q, SEED), (q, mx.array(6, dtype=mx.uint32)))
    ]  # fmt: skip
    assert (draws[0] == draws[1]).sum().item() > 800 > 450 > (draws[0] == draws[2]).sum().item()


def test_inversion_walks_the_candidates_in_order() -> None:
    ids, probs = mx.array([[4, 2, 9]]), mx.array([[0.5, 0.0, 0.5]])
    for u, token in [(0.0, 4), (0.499, 4), (0.5, 9), (1 - 2**-24, 9)]:
        assert invert(ids, probs, mx.array([u])).item() == token
        assert invert(ids, 1e-30 * probs, mx.array([u])).item() == token


def test_smallest_mass_is_drawn() -> None:
    """u times the smallest float rounds up to it: the inversion must not run off the end."""
    ids, probs = mx.array([[0, 1, 2]]), mx.array([[0.0, 2.0**-149, 0.0]])
    for position in range(40):
        at = mx.array(position)
        for op in (draw_token, draw_token_reference):
            assert draw_rows(ids, probs, at, SEED, shared=False, op=op).item() == 1


@pytest.mark.parametrize("shared", [True, False])
def test_no_rows(shared: bool) -> None:
    ids, probs = (a[:0] for a in rows(0, 1, 4))
    for op in (draw_token, draw_token_reference):
        out = draw_rows(ids, probs, mx.array(3), SEED, shared=shared, op=op)
        assert (out.shape, out.dtype) == ((0,), mx.int32)


def test_strided() -> None:
    ids, probs = rows(3, 8, 20)
    view = (ids[::2, 1::3], probs[::2, 1::3])
    for shared in (True, False):
        whole = draw_rows(*map(mx.contiguous, view), mx.array(9), SEED, shared=shared)
        assert draw_rows(*view, mx.array(9), SEED, shared=shared).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ids": mx.zeros((2, 3))}, "ids must be int32 but got float32."),
        ({"ids": mx.zeros(3, mx.int32)}, "ids must have shape [R, n] but got [3]."),
        ({"probs": mx.zeros((2, 4))}, "probs must have shape [2, 3] but got [2, 4]."),
        ({"probs": mx.zeros((2, 3), mx.float16)}, "probs must be float32 but got float16."),
        ({"position": mx.ones(2)}, "position must be int32 but got float32."),
        ({"position": mx.array(0)}, "position must have shape [2] but got []."),
        ({"index": mx.zeros(3, mx.int32)}, "index must have shape [2] but got [3]."),
        ({"seed": mx.array([1, 1])}, "seed must be uint32 but got int32."),
        ({"shared": mx.array([1, 0])}, "shared must be bool but got int32."),
    ],
)
def test_errors(change: dict[str, Any], text: str) -> None:
    args = {
        "ids": mx.zeros((2, 3), mx.int32),
        "probs": mx.zeros((2, 3)),
        "position": mx.zeros(2, mx.int32),
        "index": mx.zeros(2, mx.int32),
        "seed": mx.zeros(2, mx.uint32),
        "shared": mx.array([True, False]),
        **change,
    }
    with pytest.raises(ValueError) as error:
        draw_token(**args)
    assert str(error.value) == f"[draw_token] {text}"


def test_law_of_the_race_is_exact() -> None:
    """Two candidates: the grid of noise integrates to the probability within its own step."""
    grid = (np.arange(4096) / 4096).astype(np.float32) + 2.0**-13
    times = np.array(exponential(mx.array(grid))).astype(np.float64)
    for p in (0.5, 0.9, 0.03):
        share = (times[:, None] / p < times[None] / (1 - p)).mean()
        assert math.isclose(share, p, abs_tol=2e-4)


def candidates(d: Draw, rows: int, count: int, vocab: int) -> tuple[mx.array, mx.array]:
    """Ids once a row, some of them outside of the vocabulary, and probabilities."""
    ids = np.stack([d.rng.permutation(vocab)[:count] for _ in range(rows)] or [np.zeros(count)])
    ids = ids[:rows].astype(np.int64)
    if count and d.chance(0.4):
        outside = np.array([*INT32, vocab, vocab + 1, vocab + 2])
        some = d.rng.permutation(count)[: min(3, count)]
        ids[:, some] = d.rng.permutation(outside)[: len(some)]
    probs = d.rng.random((rows, count)).astype(np.float32)
    probs[d.rng.random((rows, count)) < 0.2] = 0
    probs /= np.maximum(probs.sum(axis=-1, keepdims=True), 1e-6)
    return d.laid_out(mx.array(ids.astype(np.int32))), d.laid_out(mx.array(probs))


def random_call(d: Draw) -> Call:
    T, n = d.size(1, 2, 17), d.size(1, 15, 16, 17, 100)
    ids, probs = candidates(d, T, n, 2 * n + 1)
    position, index = (
        d.laid_out(mx.array([int(d.pick(some)) for _ in range(T)], dtype=mx.int32))
        for some in ((*INT32, 0, 5), (*INT32, 0, 1, 5))
    )
    seed = d.laid_out(mx.array([d.pick((0, 7, 2**32 - 1)) for _ in range(T)], dtype=mx.uint32))
    shared = d.laid_out(mx.array(d.rng.random(T) < 0.5))
    return Call((ids, probs, position, index, seed, shared), {}, exact)


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_draw_token.py has to say that its SMALL call moves: 6 rows of 64 candidates of 8
# bytes; position, index and seed of 4 bytes and a truth value; 6 tokens
BENCH_BYTES = 6 * 64 * 8 + 6 * 13 + 24
