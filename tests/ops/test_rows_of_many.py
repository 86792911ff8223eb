"""Rows of many sequences in one call: the bits of a call for each, in every implementation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from pyengine import ops
from pyengine.ops.filter_logits import Edits, Filtered

MANY = [*range(1, 41), 64, 128]  # rows
FEW = [1, 2, 5, 17, 40]
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@contextmanager
def implementation(name: Any) -> Iterator[None]:
    ops.use(name)
    try:
        yield
    finally:
        ops.use("native")


def same(a: mx.array, b: mx.array) -> bool:
    kinds = (a.shape, a.dtype) == (b.shape, b.dtype)
    return kinds and np.array(a).tobytes() == np.array(b).tobytes()


class Sequences(NamedTuple):
    """Rows of each sequence, in a random order of sequences, and the settings of each."""

    owner: list[int]
    settings: list[dict[str, Any]]

    def rows(self, q: int) -> list[int]:
        return [r for r, owner in enumerate(self.owner) if owner == q]

    def array(self, name: str, dtype: mx.Dtype) -> mx.array:
        return mx.array([own[name] for own in self.settings], dtype=dtype)


def sequences(rng: np.random.Generator, R: int, *, dense: bool = False) -> Sequences:
    Q = int(rng.integers(1, min(R, 9) + 1))
    owner = [*range(Q), *rng.integers(0, Q, R - Q).tolist()]
    rng.shuffle(owner)
    settings = [
        {
            "temperature": float(rng.choice([0.25, 1.0, 1.0, 1.7])),
            "top_k": 0 if dense else int(rng.choice([1, 2, 5, 33, 64])),
            "top_p": float(rng.choice([0.5, 0.9, 1.0])),
            "min_p": float(rng.choice([0.0, 0.0, 0.05, 0.3])),
        }
        for _ in range(Q)
    ]
    return Sequences(owner, settings)


def edit_lists(rng: np.random.Generator, texts: Sequences, V: int) -> tuple[Edits, list[Edits]]:
    """Lists of unlike lengths, which are padded, some empty; and each sequence's own. Neighbours
    edit the same ids unlike."""
    Q, R = len(texts.settings), len(texts.owner)
    lengths = rng.choice([0, 1, 3, 12], Q)
    L = int(max(lengths.max(), 1))
    ids = np.full((Q, L), -1, np.int32)
    factors = rng.choice([1.0, 1.3, 0.7], (R, L)).astype(np.float32)
    deltas = rng.normal(0, 8, (R, L)).astype(np.float32)
    deltas[rng.random(deltas.shape) < 0.1] = -np.inf
    own = []
    for q, length in enumerate(lengths):
        ids[q, L - length :] = np.sort(rng.permutation(min(V, 16))[:length])
        rows, at = texts.rows(q), slice(L - length, L)
        parts = (ids[q : q + 1, at], factors[rows, at], deltas[rows, at])
        own.append(Edits(*map(mx.array, parts)))
    return Edits(*map(mx.array, (ids, factors, deltas))), own


def filtered(
    op: Any, inputs: mx.array, texts: Sequences, edits: Edits | None, own: Sequence[Edits | None]
) -> tuple[Filtered, list[Filtered]]:
    """The rows of all in one call; and each sequence's in a call of its own, by numbers."""
    width = max(s["top_k"] for s in texts.settings)
    together = op(
        inputs,
        temperature=texts.array("temperature", mx.float32),
        top_k=texts.array("top_k", mx.int32),
        top_p=texts.array("top_p", mx.float32),
        min_p=texts.array("min_p", mx.float32),
        owner=mx.array(texts.owner, dtype=mx.int32),
        width=width,
        edits=edits,
    )
    each = [
        op(inputs[mx.array(texts.rows(q))], **settings, edits=own[q])
        for q, settings in enumerate(texts.settings)
    ]
    return together, each


def assert_rows_are_those_of_each(
    texts: Sequences, together: Filtered, each: Sequence[Filtered]
) -> None:
    for q, alone in enumerate(each):
        rows, n = mx.array(texts.rows(q)), alone.ids.shape[1]
        ids, probs, flags = (part[rows] for part in together)
        assert same(ids[:, :n], alone.ids) and same(flags, alone.flags)
        assert same(probs[:, :n], alone.probs)
        assert (ids[:, n:] == -1).all() and (probs[:, n:] == 0).all()


def hard_logits(rng: np.random.Generator, R: int, V: int) -> mx.array:
    """Some equal, some -inf, now and then NaN; whole numbers, so that every exp is of few."""
    logits = rng.integers(-12, 12, (R, V)).astype(np.float32)
    logits[rng.random((R, V)) < 0.05] = -np.inf
    broken = rng.random(R) < 0.05
    logits[broken, rng.integers(V)] = np.nan
    return mx.array(logits)


def check_filter(rng: np.random.Generator, R: int, V: int, *, dense: bool = False) -> None:
    texts, logits = sequences(rng, R, dense=dense), hard_logits(rng, R, V)
    edits, own = edit_lists(rng, texts, V)
    for given, of_each in ((None, [None] * len(own)), (edits, own)):
        results = filtered(ops.filter_logits, logits, texts, given, of_each)
        assert_rows_are_those_of_each(texts, *results)


@pytest.mark.parametrize("R", MANY)
def test_filter_logits(R: int) -> None:
    rng = np.random.default_rng(R)
    for V in (1, 40, 333):
        check_filter(rng, R, V)
    check_filter(rng, R, 50, dense=True)
    check_filter(rng, min(R, 5), 300, dense=True)


@pytest.mark.parametrize("R", FEW)
def test_filter_logits_in_the_workbench(R: int) -> None:
    with implementation("workbench"):
        check_filter(np.random.default_rng(R), R, 60)


@pytest.mark.parametrize("R", FEW)
def test_filter_logits_in_plain_mlx(R: int) -> None:
    """Plain MLX's exp of a row may differ in the last place with where the row lies, so there the
    logits are far apart: what is not the best has probability 0 or is as good."""
    rng = np.random.default_rng(R)
    with implementation("reference"):
        texts = sequences(rng, R)
        logits = mx.array(200.0 * rng.integers(-3, 3, (R, 60)).astype(np.float32))
        edits, own = edit_lists(rng, texts, 60)
        edits, own = (
            [Edits(e.ids, mx.ones_like(e.factors), 1000 * mx.round(e.deltas)) for e in some]
            for some in ([edits], own)
        )
        together, each = filtered(ops.filter_logits, logits, texts, edits[0], own)
        assert_rows_are_those_of_each(texts, together, each)


def check_quantized(rng: np.random.Generator, R: int, V: int, bits: int, dtype: mx.Dtype) -> None:
    texts = sequences(rng, R)
    x = mx.array(rng.normal(size=(R, 64)).astype(np.float32)).astype(dtype)
    w = mx.array(rng.normal(size=(V, 64)).astype(np.float32)).astype(dtype)
    matrix = mx.quantize(w, 64, bits)
    edits, own = edit_lists(rng, texts, V)

    def op(rows: mx.array, **settings: Any) -> Filtered:
        return ops.quantized_filter_logits(rows, *matrix, 64, bits, softcap=9.0, **settings)

    for given, of_each in ((None, [None] * len(own)), (edits, own)):
        assert_rows_are_those_of_each(texts, *filtered(op, x, texts, given, of_each))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", MANY)
def test_quantized_filter_logits(R: int, dtype: str) -> None:
    rng = np.random.default_rng(R)
    check_quantized(rng, R, int(rng.choice([20, 300])), int(rng.choice([4, 6, 8])), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("R", FEW)
def test_quantized_filter_logits_on_metal(R: int, dtype: str) -> None:
    """More sequences than rows of a slice too: edits then have a place per row."""
    rng = np.random.default_rng(R)
    with implementation("workbench"):
        check_quantized(rng, R, 150, 8, DTYPES[dtype])


def candidates(rng: np.random.Generator, rows: int, own: Sequence[int], n: int) -> tuple[Any, Any]:
    """Ids and probabilities of ``own`` candidates each, padded to n."""
    ids = np.stack([rng.permutation(2 * n)[:n] for _ in range(rows)]).astype(np.int32)
    probs = rng.dirichlet(np.full(n, 0.3), rows).astype(np.float32)
    probs[rng.random(probs.shape) < 0.2] = 0
    probs[:, 0] += 0.05
    past = np.arange(n) >= np.array(own)[:, None]
    return np.where(past, -1, ids).astype(np.int32), np.where(past, 0, probs).astype(np.float32)


def check_draw(rng: np.random.Generator, R: int) -> None:
    own = rng.choice([1, 3, 33, 64], R)
    ids, probs = candidates(rng, R, own, 64)
    # Neighbours share a position, an index or a seed, and draw the other way
    position, index = (rng.integers(0, 3, R).astype(np.int32) for _ in range(2))
    seed, shared = rng.integers(0, 3, R).astype(np.uint32), rng.random(R) < 0.5
    state = [mx.array(a) for a in (position, index, seed, shared)]
    together = ops.draw_token(mx.array(ids), mx.array(probs), *state)
    each = []
    for r, n in enumerate(own):
        rows = mx.array(ids[r : r + 1, :n]), mx.array(probs[r : r + 1, :n])
        each.append(ops.draw_token(*rows, *(a[r : r + 1] for a in state)))
    assert same(together, mx.concatenate(each))


@pytest.mark.parametrize("R", MANY)
def test_draw_token(R: int) -> None:
    check_draw(np.random.default_rng(R), R)


@pytest.mark.parametrize("R", FEW)
@pytest.mark.parametrize("name", ["reference", "workbench"])
def test_draw_token_elsewhere(name: str, R: int) -> None:
    with implementation(name):
        check_draw(np.random.default_rng(R), R)


def check_accept(rng: np.random.Generator, Q: int, most: int) -> set[int]:
    """Blocks of unlike lengths under unlike rules; p near q, so that many drafts are kept."""
    ks = rng.integers(0, most + 1, Q)
    ks[rng.integers(Q)] = most
    own = rng.choice([1, 2, 20], Q)
    counts = [int(k) + 1 for k in ks]
    p_ids, p = candidates(rng, sum(counts), np.repeat(own, counts), 20)
    starts = np.cumsum([0, *counts])
    q_rows = [r for s, k in zip(starts, ks, strict=False) for r in range(s, s + k)]
    q_ids, q = p_ids[q_rows], p[q_rows]
    other = candidates(rng, len(q_rows), np.repeat(own, ks), 20)[1]
    q = (0.8 * q + 0.2 * other).astype(np.float32)
    drafts = np.array([rng.choice(row[: max((row >= 0).sum(), 1)]) for row in q_ids], np.int32)
    position = mx.array(rng.integers(0, 2, Q).astype(np.int32))
    seed = mx.array(rng.integers(0, 2, Q).astype(np.uint32))
    rule = mx.array(rng.integers(0, 3, Q).astype(np.int32))
    rows = [mx.array(a) for a in (p_ids, p, q_ids, q, drafts)]
    accepted, token = ops.accept_block(*rows, position, seed, rule, counts=counts, vocab=64)
    first = 0
    for s, (k, n) in enumerate(zip(ks.tolist(), own.tolist(), strict=True)):
        of_p = [a[starts[s] : starts[s] + k + 1, :n] for a in rows[:2]]
        at = slice(s, s + 1)
        if k == 0:  # a step of plain decoding, whatever the rule
            state = position[at], mx.array([1]), seed[at], mx.array([True])
            want = mx.array([0]), ops.draw_token(*of_p, *state)
        else:
            of_q = [a[first : first + k, :n] for a in rows[2:4]]
            state = rows[4][first : first + k], position[at], seed[at], rule[at]
            want = ops.accept_block(*of_p, *of_q, *state, counts=(k + 1,), vocab=64)
        assert same(accepted[at], want[0]) and same(token[at], want[1]), (s, k)
        first += k
    return set(np.array(accepted).tolist())


@pytest.mark.parametrize("Q", MANY)
def test_accept_block(Q: int) -> None:
    rng = np.random.default_rng(Q)
    kept = set().union(*(check_accept(rng, Q, most) for most in (1, 3, 8)))
    assert len(kept) > 1


@pytest.mark.parametrize("Q", FEW)
@pytest.mark.parametrize("name", ["reference", "workbench"])
def test_accept_block_elsewhere(name: str, Q: int) -> None:
    rng = np.random.default_rng(Q)
    with implementation(name):
        check_accept(rng, Q, 4)


def test_owners_lead_nowhere_else() -> None:
    """Of an array that the host has not seen: the settings of the nearest there is."""
    logits = mx.array(np.random.default_rng(1).normal(size=(3, 40)).astype(np.float32))
    settings: dict[str, Any] = {"temperature": mx.array([1.0, 0.5]), "top_k": mx.array([3, 9])}
    for name in ("native", "workbench"):
        far = mx.array([-(2**31), 2**31 - 1, 1], dtype=mx.int32) * 1
        with implementation(name):
            found = ops.filter_logits(logits, **settings, width=9, owner=far)
            want = ops.filter_logits(logits, **settings, width=9, owner=mx.array([0, 1, 1]))
            assert all(same(a, b) for a, b in zip(found, want, strict=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"top_k": mx.array([1, 10])}, "top_k must be 1 to 9 but got 10."),
        ({"top_k": mx.array([1, 0])}, "top_k must be 1 to 9 but got 0."),
        ({"top_k": mx.array([1.0, 2.0])}, "top_k must be int32 but got float32."),
        ({"temperature": mx.array([1.0, 0.0])}, "temperature must be above 0 but got 0."),
        ({"temperature": mx.ones(3)}, "top_k must have shape [3] but got [2]."),
        ({"temperature": mx.array(1.0)}, "temperature must have shape [Q] but got []."),
        ({"top_p": mx.array([1.0, 1.5])}, "top_p must be above 0 and at most 1 but got 1.5."),
        ({"min_p": mx.array([0.0, 1.0])}, "min_p must be 0 or more and below 1 but got 1."),
        ({"owner": mx.array([0, 2, 1])}, "owner must be 0 to 1 but got 2."),
        ({"owner": mx.array([0, 1])}, "owner must have shape [3] but got [2]."),
        ({"width": None}, "width must be given where top_k is an array but got None."),
        ({"width": 257}, "top_k must be 0 (off) to 256 but got 257."),
    ],
)
def test_errors(change: dict[str, Any], text: str) -> None:
    settings = {"temperature": mx.ones(2), "top_k": mx.array([1, 9]), "width": 9}
    settings |= {"owner": mx.array([0, 1, 1]), **change}
    with pytest.raises(ValueError) as error:
        ops.filter_logits(mx.zeros((3, 40)), **settings)
    assert str(error.value) == f"[filter_logits] {text}"
