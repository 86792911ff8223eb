"""quantized_expert_matmul: the bits of one matmul per token and expert, edges, errors."""

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near_sum

from pyengine import ops
from pyengine.ops import (
    dispatch,
    quantized_expert_matmul,
    quantized_expert_matmul_reference,
    quantized_gated_matmul,
    quantized_matmul,
)

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def stack(seed, X, N, K, group_size=64, bits=8, dtype=mx.float32):
    flat = mx.quantize(normal(seed, X * N, K, dtype=dtype) / K**0.5, group_size, bits)
    return [a.reshape(X, N, -1) for a in flat]


def choose(seed, T, U, X) -> mx.array:
    draw = np.random.default_rng(seed)
    ids = np.stack([np.sort(draw.permutation(X)[:U]) for _ in range(T)])
    return mx.array(ids.astype(np.int32))


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def one_by_one(x, matrix, ids, group_size, bits, up=None, out_dtype=None) -> np.ndarray:
    """Every token and slot with an op of its own."""
    rows = []
    for t, row in enumerate(ids.tolist()):
        for u, expert in enumerate(row):
            own = x[t : t + 1] if x.ndim == 2 else x[t, u : u + 1]
            mine = [a[expert] for a in matrix]
            if up is None:
                y = quantized_matmul(own, *mine, group_size, bits, out_dtype=out_dtype)
            else:
                y = quantized_gated_matmul(own, mine, [a[expert] for a in up], group_size, bits)
            rows.append(bits_of(y)[0])
    return np.stack(rows).reshape(*ids.shape, -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size, bits", [(64, 8), (32, 6), (128, 4)])
@pytest.mark.parametrize("T, U, X, N", [(1, 2, 4, 40), (6, 3, 5, 33), (21, 2, 2, 9), (40, 1, 3, 6)])
def test_bits_are_those_of_single_matmuls(T, U, X, N, group_size, bits, dtype):
    K = 3 * group_size
    first, up = (stack(seed, X, N, K, group_size, bits, dtype) for seed in (1, 2))
    ids = choose(3, T, U, X)
    for x in (normal(4, T, K, dtype=dtype), normal(5, T, U, K, dtype=dtype)):
        out = quantized_expert_matmul(x, first, ids, group_size, bits, out_dtype=mx.float32)
        assert out.dtype == mx.float32 and out.shape == (T, U, N)
        expected = one_by_one(x, first, ids, group_size, bits, out_dtype=mx.float32)
        assert np.array_equal(bits_of(out), expected)
        out = quantized_expert_matmul(x, first, ids, group_size, bits, up=up)
        assert out.dtype == dtype
        assert np.array_equal(bits_of(out), one_by_one(x, first, ids, group_size, bits, up))


def test_matches_reference():
    """Products of size 1; float32, so both sides differ by their sums' rounding."""
    x, ids = normal(6, 7, 256), choose(7, 7, 3, 6)
    first, up = stack(8, 6, 20, 256), stack(9, 6, 20, 256)
    for second in (None, up):
        out = quantized_expert_matmul(x, first, ids, up=second)
        expected = quantized_expert_matmul_reference(x, first, ids, up=second)
        assert mx.allclose(out, expected, rtol=1e-4, atol=1e-5)


def test_one_expert_may_be_named_twice():
    x, first = normal(10, 3, 64), stack(11, 2, 8, 64)
    ids = mx.array([[1, 1], [0, 1], [1, 1]])
    out = bits_of(quantized_expert_matmul(x, first, ids))
    assert np.array_equal(out, one_by_one(x, first, ids, 64, 8))


def test_no_tokens():
    out = quantized_expert_matmul(
        mx.zeros((0, 64)), stack(12, 2, 8, 64), mx.zeros((0, 2), mx.int32)
    )
    mx.eval(out)
    assert out.shape == (0, 2, 8)


def test_use_reference_and_mlx(monkeypatch):
    x, ids = normal(13, 129, 64), choose(14, 129, 2, 4)
    first, up = stack(15, 4, 8, 64), stack(16, 4, 8, 64)
    expected = quantized_expert_matmul_reference(x, first, ids, up=up)
    ops.use("reference")
    try:
        assert np.array_equal(
            bits_of(quantized_expert_matmul(x, first, ids, up=up)), bits_of(expected)
        )
    finally:
        ops.use("native")
    own = bits_of(quantized_expert_matmul(x[:128], first, ids[:128]))
    monkeypatch.setattr(dispatch.mx, "default_device", lambda: mx.gpu)
    assert mx.allclose(
        quantized_expert_matmul(x, first, ids, up=up), expected, rtol=1e-4, atol=1e-5
    )
    alone = mx.broadcast_to(x[:, None], (129, 2, 64))
    assert mx.allclose(
        quantized_expert_matmul(alone, first, ids),
        quantized_expert_matmul_reference(x, first, ids),
        rtol=1e-4,
        atol=1e-5,
    )
    assert np.array_equal(bits_of(quantized_expert_matmul(x[:128], first, ids[:128])), own)


X, FIRST, IDS = mx.zeros((2, 64)), stack(0, 2, 8, 64), mx.zeros((2, 1), mx.int32)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": X.astype(mx.int32)}, "x must be float32, float16 or bfloat16 but got int32."),
        ({"x": X[0]}, "x must have shape [T, K] or [T, U, K] but got [64]."),
        ({"x": mx.zeros((2, 3, 64))}, "x must have shape [2, 1, 64] but got [2, 3, 64]."),
        ({"ids": IDS.astype(mx.uint32)}, "ids must be int32 but got uint32."),
        ({"ids": IDS[0]}, "ids must have shape [T, U] but got [1]."),
        ({"ids": IDS[:1]}, "ids must have shape [2, 1] but got [1, 1]."),
        ({"bits": 3}, "bits must be 4, 6 or 8 but got 3."),
        ({"group_size": 256}, "group_size must be 32, 64 or 128 but got 256."),
        (
            {"stack": [a[0] for a in FIRST]},
            "w must have shape [X, N, K * bits / 32] but got [8, 16].",
        ),
        ({"stack": [a[:0] for a in FIRST]}, "w must have at least 1 expert but got 0."),
        ({"stack": FIRST[:2]}, "stack must have 3 arrays but got 2."),
        ({"up": [a[:1] for a in FIRST]}, "up_w must have shape [2, 8, 16] but got [1, 8, 16]."),
        (
            {"up": FIRST, "x": X.astype(mx.float16)},
            "scales must have the dtype of x but got float32.",
        ),
        (
            {"out_dtype": mx.float16},
            "out_dtype must be float32 or the dtype of x but got float16.",
        ),
    ],
)
def test_errors(change, text):
    arguments = {"x": X, "stack": FIRST, "ids": IDS, **change}
    with pytest.raises(ValueError) as error:
        quantized_expert_matmul(**arguments)
    assert str(error.value) == f"[quantized_expert_matmul] {text}"


def test_gate_needs_the_dtype_of_x():
    half = [FIRST[0], *(a.astype(mx.float16) for a in FIRST[1:])]
    with pytest.raises(ValueError, match="out_dtype must be the dtype of x where up is given"):
        quantized_expert_matmul(X.astype(mx.float16), half, IDS, up=half, out_dtype=mx.float32)


def random_call(d: Draw) -> Call:
    group_size, bits = d.packing()
    X, N, K, dtype = d.size(1, 2, 5), d.size(1, 5, 17), group_size * d.size(1, 2, 3), d.dtype()
    T, U = d.size(1, 2, 17), d.size(1, 2, 3, 33)
    rows = (T, K) if d.chance(0.5) else (T, U, K)
    packing = {"dtype": dtype, "group_size": group_size, "bits": bits}
    up = d.quantized(X, N, K, **packing) if d.chance(0.5) else None
    options = {"up": up, "out_dtype": d.pick((None, mx.float32, dtype))}
    stack, ids = d.quantized(X, N, K, **packing), d.ids((T, U), X)
    given = d.integer(group_size), d.integer(bits)
    return Call((d.array(*rows, dtype=dtype), stack, ids, *given), options, near_sum)


def of_one_expert(T: int, U: int) -> mx.array:
    w, scales, biases = (a[None] for a in mx.quantize(mx.zeros((32, 64)), 64, 8))
    ids = mx.zeros((T, U), mx.int32)
    return ops.quantized_expert_matmul(mx.zeros((T, 64)), (w, scales, biases), ids)


# The largest call of a kind that the Metal kernel takes
LIMITS = {
    "tokens": (128, lambda n: of_one_expert(n, 2)),
    "experts of a token": (32, lambda n: of_one_expert(2, n)),
}

# What bench/bench_quantized_expert_matmul.py has to say that its SMALL call moves: 13 experts of
# two matrices: 64 * 512 weights with 512 scales and biases; 6 rows of x, 48 ids, 48 rows of results
BENCH_BYTES = 13 * 2 * (32768 + 512 * 4) + 6 * 1024 + 48 * 4 + 48 * 128
