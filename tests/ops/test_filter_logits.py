"""filter_logits: kernel against reference, ties, edges, row-stability, errors."""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from draw import INT32, Call, Draw, as_numpy, exact, near

from pyengine import ops
from pyengine.ops import filter_logits, filter_logits_reference
from pyengine.ops.filter_logits import Edits

# exp and the order of two divisions differ: a few units in the last place of a probability
TOLERANCE = 4e-7


def random_edits(rng: np.random.Generator, rows: int, vocab: int, count: int) -> Edits:
    """Sorted ids, then some that stand in the list already, as a block's drafts do."""
    ids = np.sort(rng.choice(vocab, min(count, vocab), replace=False))
    again = rng.integers(0, ids.size, 3)
    factors = rng.choice([1.0, 1.3, 0.7], (rows, ids.size))
    deltas = np.where(rng.random((rows, ids.size)) < 0.2, -np.inf, rng.normal(0, 2, factors.shape))
    wide = [np.concatenate([x, x[:, again]], axis=1) for x in (factors, deltas)]
    both = np.concatenate([ids, ids[again]]).astype(np.int32)
    return Edits(mx.array(both)[None], *(mx.array(x.astype(np.float32)) for x in wide))


def random_mask(rng: np.random.Generator, rows: int, vocab: int) -> mx.array:
    """Words with no bit, all and some; a token stays in each row. Past V all bits are random."""
    words = rng.integers(0, 1 << 32, (rows, -(-vocab // 32)))
    words[rng.random(words.shape) < 0.3] = 0
    words[rng.random(words.shape) < 0.3] = 0xFFFFFFFF
    left = rng.integers(0, vocab, rows)
    words[np.arange(rows), left // 32] |= 1 << left % 32
    return mx.array(words.astype(np.uint32))


def without(logits: mx.array, mask: mx.array) -> mx.array:
    """The logits with -inf where the mask has no bit."""
    bits = np.unpackbits(np.array(mask).view(np.uint8), axis=1, bitorder="little")
    return mx.array(np.where(bits[:, : logits.shape[1]] == 1, np.array(logits), -np.inf))


def random_logits(seed: int, rows: int, vocab: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 4, (rows, vocab)).astype(np.float32))


def assert_same(logits: mx.array, **kw: Any) -> None:
    ids, probs, flags = filter_logits(logits, **kw)
    want_ids, want_probs, want_flags = filter_logits_reference(logits, **kw)
    assert ids.dtype == mx.int32 and probs.dtype == mx.float32 and flags.dtype == mx.int32
    assert flags.tolist() == want_flags.tolist()
    assert np.array_equal(np.array(ids), np.array(want_ids))
    assert np.allclose(np.array(probs), np.array(want_probs), rtol=TOLERANCE, atol=TOLERANCE)
    assert np.allclose(np.array(probs).sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 255, 256, 257, 1000, 262144])
@pytest.mark.parametrize("top_k", [0, 1, 2, 64, 256])
def test_equals_reference(vocab: int, top_k: int) -> None:
    assert_same(random_logits(vocab + top_k, 2, vocab), top_k=top_k, top_p=0.95)


@pytest.mark.parametrize("temperature", [0.01, 0.6, 1.0, 1.3, 50.0])
@pytest.mark.parametrize(("top_p", "min_p"), [(1.0, 0.0), (0.95, 0.0), (0.3, 0.0), (1.0, 0.1)])
def test_settings(temperature: float, top_p: float, min_p: float) -> None:
    logits = random_logits(3, 5, 777)
    assert_same(logits, temperature=temperature, top_p=top_p, min_p=min_p)
    assert_same(logits, temperature=temperature, top_p=top_p, min_p=min_p, top_k=0)


@pytest.mark.parametrize("seed", range(20))
def test_ties_go_to_the_lower_id(seed: int) -> None:
    """Few distinct values, so that the border of the candidates falls among equals."""
    rng = np.random.default_rng(seed)
    values = np.array([-np.inf, -1.0, -0.0, 0.0, 0.5, 3.0], np.float32)
    logits = mx.array(values[rng.integers(0, 6, (3, 100))])
    for top_k in (1, 5, 33, 99, 100):
        assert_same(logits, top_k=top_k)


def test_order_is_not_that_of_the_input() -> None:
    for row in (np.arange(300), -np.arange(300), np.roll(np.arange(300), 7)):
        assert_same(mx.array(row[None].astype(np.float32)), top_k=40)


def test_one_allowed_token() -> None:
    logits = mx.full((1, 50), -mx.inf)
    logits[0, 37] = -3.0
    ids, probs, flags = filter_logits(logits, top_k=4, top_p=0.95)
    assert flags.tolist() == [1]
    assert ids[0].tolist() == [37, 0, 1, 2] and probs[0].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("vocab", [5, 16, 17, 300, 5000])
@pytest.mark.parametrize("top_k", [0, 1, 64])
def test_edits(vocab: int, top_k: int) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        edits = random_edits(rng, 4, vocab, int(rng.choice([1, 4, 40, 300])))
        first = edits.ids == edits.ids[:, :1]  # a token that stays
        edits = edits._replace(deltas=mx.where(first, 0.5, edits.deltas))
        logits = random_logits(seed, 4, vocab)
        assert_same(logits, top_k=top_k, top_p=0.9, temperature=0.8, edits=edits)
        plain = np.array(logits)  # not written to
        assert np.array_equal(plain, np.array(random_logits(seed, 4, vocab)))


def test_edits_by_hand() -> None:
    edits = Edits(
        mx.array([[1, 3, 4]], dtype=mx.int32),
        mx.array([[2.0, 2.0, 1.0], [1.0, 1.0, 1.0]]),
        mx.array([[0.0, 0.0, 5.0], [0.0, -mx.inf, 0.0]]),
    )
    logits = mx.array([[0.0, 4.0, 1.0, -1.0, -3.0], [0.0, 4.0, 1.0, 5.0, 2.0]])
    ids, probs, flags = filter_logits(logits, top_k=0, edits=edits)
    assert ids.tolist() == [[1, 4, 2, 0, 3], [1, 4, 2, 0, 3]]  # 2 2 1 0 -2; 4 2 1 0 -inf
    assert probs[0, 0].item() == probs[0, 1].item() and probs[1, 4].item() == 0
    assert flags.tolist() == [0, 0]


@pytest.mark.parametrize("vocab", [1, 5, 16, 17, 31, 32, 33, 300, 5000, 262144])
@pytest.mark.parametrize("top_k", [0, 1, 64])
def test_mask(vocab: int, top_k: int) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        logits, mask = random_logits(seed, 3, vocab), random_mask(rng, 3, vocab)
        kw: dict[str, Any] = {"top_k": top_k, "top_p": 0.9, "temperature": 0.8}
        if seed % 2:
            edits = random_edits(rng, 3, vocab, 40)
            kw["edits"] = edits._replace(deltas=mx.maximum(edits.deltas, -9))
        assert_same(logits, mask=mask, **kw)
        masked, cut = (
            filter_logits(logits, mask=mask, **kw),
            filter_logits(without(logits, mask), **kw),
        )
        assert masked.ids.tolist() == cut.ids.tolist()
        assert masked.probs.tolist() == cut.probs.tolist()
        assert masked.flags.tolist() == [0] * 3  # of the logits as given, which are finite


def test_mask_by_hand() -> None:
    """Token 32 is bit 0 of the second number; an edit does not bring back what is away."""
    logits = mx.arange(40)[None].astype(mx.float32)
    mask = mx.array([[0b1010, 0b1]], dtype=mx.uint32)
    back = Edits(mx.array([[39]]), mx.ones((1, 1)), mx.full((1, 1), 1e6))
    for function in (filter_logits, filter_logits_reference):
        for edits in (None, back):
            out = function(logits, top_k=4, mask=mask, edits=edits)
            assert out.ids[0, :3].tolist() == [32, 3, 1] and out.probs[0, 3].item() == 0
        broken = mx.where(logits == 7, mx.nan, logits)
        assert function(broken, mask=mask).flags.tolist() == [2]
        assert function(logits, mask=mx.zeros_like(mask)).flags.tolist() == [2]
        strided = mx.stack([mask, mask], axis=-1)[..., 0]
        assert function(logits, top_k=1, mask=strided).ids.tolist() == [[32]]


def test_greedy_is_the_best_candidate_alone() -> None:
    logits = mx.array([[0.0, 2.0, -0.0, 2.0], [-mx.inf, -5.0, -mx.inf, -5.0]])
    edits = Edits(mx.array([[1]]), mx.ones((2, 1)), mx.array([[0.0], [-mx.inf]]))
    for given, want in ((None, [[1], [1]]), (edits, [[1], [3]])):
        for function in (filter_logits, filter_logits_reference):
            ids, probs, _ = function(logits, temperature=0.0, top_p=0.5, edits=given)
            assert ids.tolist() == want and probs.tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("where", [0, 15, 16, 40, 99])
@pytest.mark.parametrize(
    ("value", "flag"), [(mx.nan, 2), (mx.inf, 2), (-mx.inf, 1), (3e38, 0), (-3e38, 0)]
)
@pytest.mark.parametrize("top_k", [0, 1, 8])
def test_flags(where: int, value: float, flag: int, top_k: int) -> None:
    logits = random_logits(1, 3, 100)
    logits[1, where] = value
    for edits in (None, Edits(mx.array([[where]]), mx.ones((3, 1)), mx.zeros((3, 1)))):
        for function in (filter_logits, filter_logits_reference):
            out = function(logits, top_k=top_k, edits=edits)
            assert out.flags.tolist() == [0, flag, 0]
            assert ((out.ids >= 0) & (out.ids < 100)).all().item()


def test_flag_when_no_candidate_is_left() -> None:
    edits = Edits(mx.arange(3)[None], mx.ones((1, 3)), mx.full((1, 3), -mx.inf))
    for function in (filter_logits, filter_logits_reference):
        assert function(mx.zeros((1, 3)), edits=edits).flags.tolist() == [2]
        assert function(mx.full((1, 3), -mx.inf)).flags.tolist() == [2]


def hard_case(rng: np.random.Generator) -> tuple[mx.array, dict[str, Any]]:
    """Ties, equal logits, one allowed token, all suppressed but one, tiny and huge settings."""
    rows, vocab = int(rng.integers(1, 5)), int(rng.choice([1, 2, 7, 16, 33, 130, 400]))
    kind = rng.integers(5)
    logits = rng.normal(0, rng.choice([0.1, 3.0, 30.0]), (rows, vocab))
    if kind == 0:
        logits = np.round(logits)
    elif kind == 1:
        logits[:] = logits[:, :1]
    elif kind == 2:
        hot = rng.integers(vocab)
        logits[:, np.arange(vocab) != hot] = -np.inf
    kw: dict[str, Any] = {
        "temperature": float(rng.choice([0.0, 0.3, 1.0, 2.5])),
        "top_k": int(rng.choice([0, 1, 5, 64, 256])),
        # Few values: a cut that falls within rounding of a border may go either way
        "top_p": float(rng.choice([1.0, 0.951, 0.517, 1e-6])),
        "min_p": float(rng.choice([0.0, 0.0517])),
    }
    if kind == 3:  # all but one taken away
        deltas = np.full((rows, vocab), -np.inf, np.float32)
        deltas[:, rng.integers(vocab)] = 0
        kw["edits"] = Edits(mx.arange(vocab)[None], mx.ones((rows, vocab)), mx.array(deltas))
    elif kind != 2 and rng.random() < 0.3:
        kw["mask"] = random_mask(rng, rows, vocab)
    elif rng.random() < 0.4 and kind != 2:
        edits = random_edits(rng, rows, vocab, 20)
        first = edits.ids == edits.ids[:, :1]  # a token that stays
        kw["edits"] = edits._replace(deltas=mx.where(first, 1.0, edits.deltas))
    return mx.array(logits.astype(np.float32)), kw


def fuzz(cases: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(cases):
        logits, kw = hard_case(rng)
        assert_same(logits, **kw)


def test_fuzzed() -> None:
    fuzz(500, 1)


@pytest.mark.long
def test_fuzzed_ten_thousand_times() -> None:
    fuzz(10_000, 2)


def test_row_stable() -> None:
    logits = random_logits(9, 16, 5000)
    together = filter_logits(logits, top_p=0.9)
    for t in range(16):
        alone = filter_logits(logits[t : t + 1], top_p=0.9)
        assert np.array_equal(np.array(together[0][t]), np.array(alone[0][0]))
        assert np.array_equal(np.array(together[1][t]), np.array(alone[1][0]))


def test_strided_logits() -> None:
    logits = random_logits(4, 300, 6)
    assert_same(logits.T, top_k=9)
    assert_same(random_logits(4, 8, 300)[::2, 1::3], top_k=9)


def test_reference_can_be_chosen() -> None:
    logits = random_logits(1, 1, 99)
    ops.use("reference")
    try:
        got = filter_logits(logits)
    finally:
        ops.use("native")
    want = filter_logits_reference(logits)
    assert np.array_equal(np.array(got[1]), np.array(want[1]))


@pytest.mark.parametrize(
    ("logits", "kw", "text"),
    [
        (mx.zeros((2, 3), mx.bfloat16), {}, "logits must be float32 but got bfloat16."),
        (mx.zeros(3), {}, "logits must have shape [R, V] but got [3]."),
        (mx.zeros((1, 3)), {"temperature": -1.0}, "temperature must be above 0 but got -1."),
        (mx.zeros((1, 3)), {"top_k": 257}, "top_k must be 0 (off) to 256 but got 257."),
        (mx.zeros((1, 3)), {"top_p": 0.0}, "top_p must be above 0 and at most 1 but got 0."),
        (mx.zeros((1, 3)), {"min_p": 1.0}, "min_p must be 0 or more and below 1 but got 1."),
        (
            mx.zeros((1, 3)),
            {"edits": Edits(mx.zeros((1, 2)), mx.ones((1, 2)), mx.zeros((1, 2)))},
            "edit ids must be int32 but got float32.",
        ),
        (
            mx.zeros((1, 3)),
            {"edits": Edits(mx.zeros(2, mx.int32), mx.ones((1, 2)), mx.zeros((1, 2)))},
            "edit ids must have shape [Q, L] but got [2].",
        ),
        (
            mx.zeros((1, 3)),
            {"edits": Edits(mx.zeros((1, 2), mx.int32), mx.ones((2, 2)), mx.zeros((1, 2)))},
            "edit factors must have shape [1, 2] but got [2, 2].",
        ),
        (
            mx.zeros((1, 3)),
            {"edits": Edits(mx.zeros((1, 2), mx.int32), mx.ones((1, 2)), mx.zeros((1, 3)))},
            "edit deltas must have shape [1, 2] but got [1, 3].",
        ),
        (
            mx.zeros((2, 33)),
            {"mask": mx.zeros((2, 2), mx.int32)},
            "mask must be uint32 but got int32.",
        ),
        (
            mx.zeros((2, 33)),
            {"mask": mx.zeros((2, 1), mx.uint32)},
            "mask must have shape [2, 2] but got [2, 1].",
        ),
    ],
)
def test_errors(logits: mx.array, kw: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:
        filter_logits(logits, **kw)
    assert str(error.value) == f"[filter_logits] {text}"


def filter_settings(d: Draw, V: int) -> dict[str, Any]:
    return {
        "temperature": d.number(0.0, 0.5, 1.0),
        "top_k": d.integer(0, 1, 5, 64, 256, 257),
        "top_p": d.number(1.0, 0.9, 1e-9),
        "min_p": d.number(0.0, 0.05),
    }


def mask(d: Draw, T: int, V: int) -> mx.array | None:
    """Often none stays in a row."""
    if d.chance(0.6):
        return None
    words = d.rng.integers(0, 1 << 32, (T, -(-V // 32))).astype(np.uint32)
    words[d.rng.random(words.shape) < 0.5] = d.pick((0, 0xFFFFFFFF, 1))
    return d.laid_out(mx.array(words))


def edits(d: Draw, T: int, V: int) -> Edits | None:
    if d.chance(0.5):
        return None
    L = d.size(1, 3, 20)
    # Those within the vocabulary once each; of the others any
    ids = d.rng.permutation(max(V, 1))[:L]
    ids = np.concatenate([ids, d.rng.choice([*INT32, V, V + 1, -V], L - len(ids))])
    if L and d.chance(0.5):
        some = d.rng.random(L) < 0.4
        ids = np.where(some, d.rng.choice([*INT32, V, V + 1, -max(V, 1)], L), ids)
    deltas = d.array(T, L)
    if d.chance(0.2):
        deltas = deltas - mx.inf
    return Edits(
        d.laid_out(mx.array(ids[None].astype(np.int32))), mx.abs(d.array(T, L)) + 0.5, deltas
    )


def filtered_alike(settings: dict[str, Any]) -> Callable[..., bool] | None:
    """Ids and flags equal bit for bit, probabilities nearly, where a float32 can hold them."""
    if settings["temperature"] not in (0.0, 0.5, 1.0) or settings["top_p"] not in (1.0, 1e-9):
        return None  # a prefix may end one candidate earlier

    def alike(got: Sequence[mx.array], want: Sequence[mx.array]) -> bool:
        flags = as_numpy(want[2])
        if not np.array_equal(as_numpy(got[2]), flags):
            return False
        good = mx.array(flags < 2)
        (ids, probs), (other_ids, other_probs) = (
            [mx.where(good[:, None], a, 0) for a in out[:2]] for out in (got, want)
        )
        return exact([ids], [other_ids]) and near([probs], [other_probs])

    return alike


def random_call(d: Draw) -> Call:
    T, V = d.size(1, 2, 5), d.size(1, 15, 16, 17, 100, 300, 5000)
    logits = d.array(T, V)
    if d.chance(0.3):
        logits = mx.round(2 * logits)
    if d.chance(0.2) and logits.size:
        logits = mx.where(logits > 1.5, d.pick((mx.nan, mx.inf, -mx.inf)), logits)
    settings = filter_settings(d, V)
    options = {**settings, "mask": mask(d, T, V), "edits": edits(d, T, V)}
    return Call((logits,), options, filtered_alike(settings))


# The largest call of a kind that the Metal kernel takes
LIMITS = {
    "candidates with `top_k` 0": (256, lambda n: filter_logits(mx.zeros((1, n)), top_k=0)),
    "logits with `top_k` 256": (262144, lambda n: filter_logits(mx.zeros((1, n)), top_k=256)),
}

# What bench/bench_filter_logits.py has to say that its SMALL call moves: 6 rows of 8192 logits, 64
# candidates of 8 bytes and a flag
BENCH_BYTES = 6 * (8192 * 4 + 64 * 8 + 4)
