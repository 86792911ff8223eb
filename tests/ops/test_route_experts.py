"""route_experts: kernel against reference and float64, ties, NaN, row-stability, errors."""

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near

from pyengine import _ext
from pyengine.ops import route_experts, route_experts_reference

SHAPES = [(1, 128, 8), (5, 128, 8), (3, 8, 2), (2, 1, 1), (4, 33, 33), (2, 70, 40), (300, 64, 6)]


def draw(T: int, X: int, seed: int = 1) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (T, X)).astype(np.float32)
    return mx.array(logits), mx.array(rng.uniform(0.5, 2, X).astype(np.float32))


def bits(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32))


@pytest.mark.parametrize("T, X, used", SHAPES)
def test_matches_reference_and_float64(T, X, used):
    logits, scales = draw(T, X)
    ids, weights = route_experts(logits, scales, used)
    assert ids.dtype == mx.int32 and weights.dtype == mx.float32
    assert ids.shape == weights.shape == (T, used)
    values = np.array(logits, np.float64)
    best = np.sort(np.argsort(-values, axis=-1)[:, :used], axis=-1)
    assert np.array_equal(np.array(ids), best)
    chosen = np.take_along_axis(values, best, axis=-1)
    exact = np.exp(chosen - chosen.max(axis=-1, keepdims=True))
    exact *= np.array(scales, np.float64)[best] / exact.sum(axis=-1, keepdims=True)
    # exp within 1.1 units in the last place, then a sum of `used` terms, a quotient and a product
    np.testing.assert_allclose(np.array(weights), exact, rtol=1e-7 * (4 + used / 2))
    other_ids, other = route_experts_reference(logits, scales, used)
    assert mx.array_equal(ids, other_ids)
    # MLX's exp is some ten units off
    np.testing.assert_allclose(np.array(weights), np.array(other), rtol=5e-6)


def test_ties_go_to_the_lower_id():
    logits = mx.array([[1.0, 2.0, 2.0, 1.0, 2.0, 1.0], [0.0, -0.0, 0.0, -1.0, 0.0, -0.0]])
    for function in (route_experts, route_experts_reference):
        ids, weights = function(logits, mx.ones(6), 4)
        assert ids.tolist() == [[0, 1, 2, 4], [0, 1, 2, 4]]
        assert weights[1].tolist() == [0.25] * 4


def test_infinite_and_nan_logits_choose_experts_that_exist():
    bad = [[mx.nan] * 5, [0.0, mx.nan, 1.0, mx.nan, 2.0], [-mx.inf, 0.0, -mx.inf, 1.0, -mx.inf]]
    for function in (route_experts, route_experts_reference):
        ids, weights = function(mx.array(bad), mx.ones(5), 3)
        assert ids.tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 3]]
        assert mx.isnan(weights[:2]).all(axis=-1).tolist() == [True, True]
        assert weights[2, 0].item() == 0


def test_a_row_has_the_same_bits_anywhere():
    logits, scales = draw(300, 64, seed=2)
    whole = [np.array(ids_or_bits(a)) for a in route_experts(logits, scales, 6)]
    for t in (0, 7, 299):
        alone = route_experts(logits[t : t + 1], scales, 6)
        for a, b in zip(alone, whole, strict=True):
            assert np.array_equal(ids_or_bits(a)[0], b[t])
    turned = route_experts(mx.contiguous(logits.T).T, scales[::-1][::-1], 6)
    for a, b in zip(turned, whole, strict=True):
        assert np.array_equal(ids_or_bits(a), b)


def ids_or_bits(a: mx.array) -> np.ndarray:
    return np.array(a) if a.dtype == mx.int32 else bits(a)


def test_fused_instruction_sets_agree():
    logits, scales = draw(4, 128)
    name, found = _ext.instruction_set(), []
    try:
        for each in _ext.instruction_sets():
            _ext.use_instruction_set(each)
            ids, weights = route_experts(logits, scales, 8)
            mx.eval(ids, weights)
            if each != "portable":
                found.append((np.array(ids), bits(weights)))
    finally:
        _ext.use_instruction_set(name)
    for ids, weights in found:
        assert np.array_equal(ids, found[0][0]) and np.array_equal(weights, found[0][1])


def test_no_rows_and_inside_compile():
    logits, scales = draw(0, 8)
    ids, weights = route_experts(logits, scales, 2)
    mx.eval(ids, weights)
    assert ids.shape == weights.shape == (0, 2)
    logits, scales = draw(3, 8)
    compiled = mx.compile(
        lambda x: [*route_experts(x + 1, scales, 2), *route_experts(x, scales, 3)]
    )
    want = [*route_experts(logits + 1, scales, 2), *route_experts(logits, scales, 3)]
    for a, b in zip(compiled(logits), want, strict=True):
        assert np.array_equal(ids_or_bits(a), ids_or_bits(b))


@pytest.mark.parametrize(
    "logits, scales, used, message",
    [
        (mx.zeros((2, 4), mx.bfloat16), mx.ones(4), 2, "logits must be float32 but got bfloat16."),
        (mx.zeros(4), mx.ones(4), 2, "logits must have shape [T, X] but got [4]."),
        (mx.zeros((2, 4)), mx.ones(4, mx.int32), 2, "scales must be float32 but got int32."),
        (mx.zeros((2, 4)), mx.ones(3), 2, "scales must have shape [4] but got [3]."),
        (mx.zeros((2, 4)), mx.ones(4), 0, "used must be at least 1 and at most X but got 0."),
        (mx.zeros((2, 4)), mx.ones(4), 5, "used must be at least 1 and at most X but got 5."),
    ],
)
def test_errors(logits, scales, used, message):
    with pytest.raises(ValueError) as error:
        route_experts(logits, scales, used)
    assert str(error.value) == f"[route_experts] {message}"


def random_call(d: Draw) -> Call:
    T, X = d.size(1, 2, 17), d.size(1, 2, 31, 32, 33, 128)
    logits = d.array(T, X)
    if d.chance(0.3):  # ties
        logits = mx.round(logits)
    return Call((logits, d.array(X), d.integer(1, 2, 8, X)), {}, near)


# The largest call of a kind that the Metal kernel takes
LIMITS = {"experts of a row": (32, lambda n: route_experts(mx.zeros((1, 64)), mx.zeros(64), n))}

# What bench/bench_route_experts.py has to say that its SMALL call moves: 6 rows of 128 logits, 128
# scales, 48 ids and weights
BENCH_BYTES = 6 * 512 + 512 + 48 * 8
