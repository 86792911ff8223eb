"""quantized_gated_matmul: the bits of the three ops it stands for, edges, errors."""

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near
from test_quantized_matmul import packed_case

from pyengine import _ext, ops
from pyengine.ops import (
    dispatch,
    glu,
    quantized_gated_matmul,
    quantized_gated_matmul_reference,
    quantized_matmul,
)

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# Times gelu's largest slope and the size of the other factor: see assert_close.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def pair(seed, N, K, group_size=64, bits=8, dtype=mx.float32):
    return [
        mx.quantize(normal(seed + i, N, K, dtype=dtype) / K**0.5, group_size, bits) for i in (0, 1)
    ]


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def three_ops(x, gate, up, group_size, bits, activation):
    parts = (quantized_matmul(x, *matrix, group_size, bits) for matrix in (gate, up))
    return glu(*parts, activation=activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_bits_are_those_of_three_ops(activation, group_size, bits, dtype):
    for M, N, groups in [(1, 1, 1), (3, 7, 3), (16, 66, 2), (17, 33, 5), (33, 40, 1)]:
        K = groups * group_size
        x = normal(M, M, K, dtype=dtype)
        gate, up = pair(N, N, K, group_size, bits, dtype)
        out = quantized_gated_matmul(x, gate, up, group_size, bits, activation)
        assert out.dtype == dtype and out.shape == (M, N)
        expected = three_ops(x, gate, up, group_size, bits, activation)
        assert np.array_equal(bits_of(out), bits_of(expected)), (M, N, K)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype, activation):
    """Inputs of size 1: gates, ups and so errors are of the order of their rounding."""
    x, (gate, up) = normal(1, 6, 512, dtype=dtype), pair(2, 70, 512, dtype=dtype)
    out = quantized_gated_matmul(x, gate, up, activation=activation)
    expected = quantized_gated_matmul_reference(x, gate, up, activation=activation)
    a, b = (np.array(y.astype(mx.float32)) for y in (out, expected))
    assert np.all(np.abs(a - b) <= TOLERANCE[dtype] * (1 + np.abs(b)))


def test_threads_and_rows_change_nothing():
    x, (gate, up) = normal(3, 16, 256), pair(4, 600, 256)
    threads = _ext.threads()
    try:
        _ext.set_threads(1)
        alone = np.concatenate(
            [bits_of(quantized_gated_matmul(x[m : m + 1], gate, up)) for m in range(16)]
        )
        for count in (2, 3):
            _ext.set_threads(count)
            for M in (1, 5, 16):
                assert np.array_equal(bits_of(quantized_gated_matmul(x[:M], gate, up)), alone[:M])
    finally:
        _ext.set_threads(threads)


def test_shapes_and_strides():
    gate, up = pair(5, 10, 64)
    x = normal(6, 4, 3, 128)
    expected = bits_of(quantized_gated_matmul(mx.contiguous(x[:, ::2, 64:]), gate, up))
    assert np.array_equal(bits_of(quantized_gated_matmul(x[:, ::2, 64:], gate, up)), expected)
    mx.eval(gate, up)
    sliced = quantized_gated_matmul(x[0, :, :64], [a[::2] for a in gate], [a[::2] for a in up])
    assert np.array_equal(
        bits_of(sliced), bits_of(quantized_gated_matmul(x[0, :, :64], gate, up)[:, ::2])
    )
    assert quantized_gated_matmul(x[:0, :, :64], gate, up).shape == (0, 3, 10)


def test_use_reference_and_mlx(monkeypatch):
    x, (gate, up) = normal(7, 129, 64), pair(8, 8, 64)
    ops.use("reference")
    try:
        out = quantized_gated_matmul(x, gate, up)
    finally:
        ops.use("native")
    assert np.array_equal(bits_of(out), bits_of(quantized_gated_matmul_reference(x, gate, up)))
    own = bits_of(quantized_gated_matmul(x[:128], gate, up))
    monkeypatch.setattr(dispatch.mx, "default_device", lambda: mx.gpu)
    parts = [mx.quantized_matmul(x, *matrix, True, 64, 8) for matrix in (gate, up)]
    served = quantized_gated_matmul(x, gate, up)
    assert mx.allclose(served, ops.glu_reference(*parts), rtol=1e-5, atol=1e-6)
    assert np.array_equal(bits_of(quantized_gated_matmul(x[:128], gate, up)), own)


X, (GATE, UP) = mx.zeros((2, 64)), pair(0, 8, 64)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": X.astype(mx.int32)}, "x must be float32, float16 or bfloat16 but got int32."),
        ({"x": mx.array(1.0)}, "x must have at least 1 dimension but got 0."),
        ({"activation": "relu"}, "activation must be gelu or silu but got relu."),
        ({"bits": 5}, "bits must be 4, 6 or 8 but got 5."),
        ({"group_size": 16}, "group_size must be 32, 64 or 128 but got 16."),
        (
            {"x": mx.zeros((2, 96))},
            "the last dimension of x must be a multiple of group_size 64 but got 96.",
        ),
        (
            {"gate": (GATE[0][0], *GATE[1:])},
            "gate_w must have shape [N, K * bits / 32] but got [16].",
        ),
        (
            {"up": (UP[0].astype(mx.int32), *UP[1:])},
            "up_w must be uint32 but got int32.",
        ),
        ({"up": [a[:4] for a in UP]}, "up_w must have shape [8, 16] but got [4, 16]."),
        (
            {"gate": (GATE[0], GATE[1].astype(mx.float16), GATE[2])},
            "gate_scales must have the dtype of x but got float16.",
        ),
        (
            {"up": (UP[0], UP[1], UP[2][:, :0])},
            "up_biases must have shape [8, 1] but got [8, 0].",
        ),
    ],
)
def test_errors(change, text):
    arguments = {"x": X, "gate": GATE, "up": UP, **change}
    with pytest.raises(ValueError) as error:
        quantized_gated_matmul(**arguments)
    assert str(error.value) == f"[quantized_gated_matmul] {text}"


def near_product(got: list[mx.array], want: list[mx.array]) -> bool:
    """What is lost where one sum cancels is multiplied by the other, in MLX's own by much."""
    return near(got, want, slack=64)


def random_call(d: Draw) -> Call:
    dtype, group_size, bits, K, shape = packed_case(d)
    N = d.size(1, 5, 9, 40, 65)
    gate, up = (d.quantized(N, K, dtype=dtype, group_size=group_size, bits=bits) for _ in range(2))
    given = d.integer(group_size), d.integer(bits), d.pick(("gelu", "silu"))
    return Call((d.array(*shape, K, dtype=dtype), gate, up, *given), {}, near_product)


# The largest call of a kind that the Metal kernel takes
LIMITS = {
    "rows": (
        128,
        lambda n: quantized_gated_matmul(
            mx.zeros((n, 64)), *2 * [mx.quantize(mx.zeros((32, 64)), 64, 8)]
        ),
    )
}

# What bench/bench_quantized_gated_matmul.py has to say that its SMALL call moves: twice 128 rows of
# 1536 weights with 24 scales and biases; 6 rows of x and of results
BENCH_BYTES = 2 * 128 * (1536 + 24 * 4) + 6 * (3072 + 256)
