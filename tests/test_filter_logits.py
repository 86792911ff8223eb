"""filter_logits: kernel against reference, ties, edges, row-stability, errors."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pyengine import ops
from pyengine.ops import filter_logits, filter_logits_reference

# exp and the order of two divisions differ: a few units in the last place of a probability
TOLERANCE = 4e-7


def random_logits(seed: int, rows: int, vocab: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, 4, (rows, vocab)).astype(np.float32))


def assert_same(logits: mx.array, **kw: Any) -> None:
    ids, probs = filter_logits(logits, **kw)
    want_ids, want_probs = filter_logits_reference(logits, **kw)
    assert ids.dtype == mx.int32 and probs.dtype == mx.float32
    assert np.array_equal(np.array(ids), np.array(want_ids))
    assert np.allclose(np.array(probs), np.array(want_probs), rtol=TOLERANCE, atol=TOLERANCE)
    assert np.allclose(np.array(probs).sum(axis=-1), 1, atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 2, 15, 16, 17, 255, 256, 257, 1000, 262144])
@pytest.mark.parametrize("top_k", [1, 2, 64, 256])
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
    ids, probs = filter_logits(logits, top_k=4, top_p=0.95)
    assert ids[0].tolist() == [37, 0, 1, 2] and probs[0].tolist() == [1, 0, 0, 0]


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
        (mx.zeros(3), {}, "logits must have shape [T, V] but got [3]."),
        (mx.zeros((1, 3)), {"temperature": 0.0}, "temperature must be positive but got 0."),
        (mx.zeros((1, 3)), {"top_k": 257}, "top_k must be 1 to 256 but got 257."),
        (mx.zeros((1, 3)), {"top_p": 0.0}, "top_p must be above 0 and at most 1 but got 0."),
        (mx.zeros((1, 3)), {"min_p": 1.0}, "min_p must be 0 or more and below 1 but got 1."),
    ],
)
def test_errors(logits: mx.array, kw: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as error:
        filter_logits(logits, **kw)
    assert str(error.value) == f"[filter_logits] {text}"
