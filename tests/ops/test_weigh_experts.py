"""weigh_experts: kernel against reference, bit for bit; float64, edges, errors."""

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, exact

from pyengine import _ext
from pyengine.ops import weigh_experts, weigh_experts_reference

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
SHAPES = [(1, 8, 2816), (5, 8, 64), (3, 1, 30), (2, 2, 1), (200, 3, 200)]


def draw(T: int, U: int, E: int) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(T + U + E)
    parts, weights = rng.normal(size=(T, U, E)), rng.uniform(size=(T, U))
    return mx.array(parts.astype(np.float32)), mx.array(weights.astype(np.float32))


def same(a: mx.array, b: mx.array) -> bool:
    kind = mx.uint32 if a.dtype == mx.float32 else mx.uint16
    return a.dtype == b.dtype and mx.array_equal(a.view(kind), b.view(kind)).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, U, E", SHAPES)
def test_is_the_reference(T, U, E, dtype):
    parts, weights = draw(T, U, E)
    out = weigh_experts(parts, weights, dtype)
    assert out.shape == (T, E) and same(out, weigh_experts_reference(parts, weights, dtype))


def test_is_the_sum_in_float64():
    parts, weights = draw(5, 8, 64)
    exact = np.einsum("tue,tu->te", np.array(parts, np.float64), np.array(weights, np.float64))
    out = weigh_experts(parts, weights, mx.float32)
    np.testing.assert_allclose(np.array(out), exact, rtol=1e-5, atol=1e-6)
    # So rounded that a fused product or another order would show: some sums differ from the nearest
    assert (np.array(out) != exact.astype(np.float32)).any()


def test_strided_inputs_and_single_rows():
    parts, weights = draw(6, 4, 50)
    whole = weigh_experts(parts, weights, mx.bfloat16)
    for t in range(6):
        assert same(weigh_experts(parts[t : t + 1], weights[t : t + 1], mx.bfloat16)[0], whole[t])
    turned = mx.contiguous(parts.swapaxes(0, 2)).swapaxes(0, 2)
    assert same(weigh_experts(turned, mx.contiguous(weights.T).T, mx.bfloat16), whole)
    assert same(weigh_experts(parts[::2], weights[::2], mx.bfloat16), whole[::2])


def test_instruction_sets_agree():
    parts, weights = draw(5, 8, 64)
    want, name = weigh_experts_reference(parts, weights, mx.bfloat16), _ext.instruction_set()
    try:
        for each in _ext.instruction_sets():
            _ext.use_instruction_set(each)
            assert same(weigh_experts(parts, weights, mx.bfloat16), want)
    finally:
        _ext.use_instruction_set(name)


def test_no_rows_and_inside_compile():
    mx.eval(weigh_experts(mx.zeros((0, 2, 4)), mx.zeros((0, 2)), mx.float32))
    parts, weights = draw(3, 2, 20)
    compiled = mx.compile(lambda p: [weigh_experts(p + 1, weights, d) for d in DTYPES])
    for out, dtype in zip(compiled(parts), DTYPES, strict=True):
        assert same(out, weigh_experts(parts + 1, weights, dtype))


@pytest.mark.parametrize(
    "parts, weights, out_dtype, message",
    [
        (
            mx.zeros((2, 3, 4), mx.float16),
            mx.ones((2, 3)),
            mx.float32,
            "parts must be float32 but got float16.",
        ),
        (
            mx.zeros((2, 3)),
            mx.ones((2, 3)),
            mx.float32,
            "parts must have shape [T, U, E] but got [2, 3].",
        ),
        (
            mx.zeros((2, 0, 4)),
            mx.ones((2, 0)),
            mx.float32,
            "parts must have shape [T, U, E] but got [2, 0, 4].",
        ),
        (
            mx.zeros((2, 3, 4)),
            mx.ones((2, 3), mx.int32),
            mx.float32,
            "weights must be float32 but got int32.",
        ),
        (
            mx.zeros((2, 3, 4)),
            mx.ones((2, 4)),
            mx.float32,
            "weights must have shape [2, 3] but got [2, 4].",
        ),
        (
            mx.zeros((2, 3, 4)),
            mx.ones((2, 3)),
            mx.int32,
            "out_dtype must be float32, float16 or bfloat16 but got int32.",
        ),
    ],
)
def test_errors(parts, weights, out_dtype, message):
    with pytest.raises(ValueError) as error:
        weigh_experts(parts, weights, out_dtype)
    assert str(error.value) == f"[weigh_experts] {message}"


def random_call(d: Draw) -> Call:
    T, U, E = d.size(1, 2, 17), d.size(1, 2, 8), d.size(1, 15, 16, 17, 300)
    return Call((d.array(T, U, E), d.array(T, U), d.dtype()), {}, exact)


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_weigh_experts.py has to say that its SMALL call moves: 48 rows of 1536 numbers of
# four bytes, their weights, 6 rows of two bytes
BENCH_BYTES = 48 * 6144 + 48 * 4 + 6 * 3072
