"""quantized_matmuls: the bits of a quantized_matmul for each matrix, edges, errors."""

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near_sum
from test_quantized_matmul import packed_case

from pyengine import _ext, ops
from pyengine.ops import (
    dispatch,
    quantized_matmul,
    quantized_matmul_reference,
    quantized_matmuls,
    quantized_matmuls_reference,
)

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def matrices(seed, columns, K, group_size=64, bits=8, dtype=mx.float32):
    return [
        mx.quantize(normal(seed + i, N, K, dtype=dtype), group_size, bits)
        for i, N in enumerate(columns)
    ]


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def assert_same(outs: list[mx.array], expected: list[mx.array]) -> None:
    assert len(outs) == len(expected)
    for a, b in zip(outs, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.array_equal(bits_of(a), bits_of(b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bits_are_those_of_separate_calls(group_size, bits, dtype):
    """Columns that end inside a thread's share, outgrow it, or are fewer than it holds."""
    for M, columns, groups in [
        (1, (1, 1), 1),
        (3, (7, 2, 300), 3),
        (16, (66, 33, 9), 2),
        (17, (33, 5), 5),
        (33, (40, 8, 16), 1),
    ]:
        K = groups * group_size
        x = normal(M, M, K, dtype=dtype)
        packed = matrices(M, columns, K, group_size, bits, dtype)
        outs = quantized_matmuls(x, packed, group_size, bits)
        assert_same(outs, [quantized_matmul(x, *matrix, group_size, bits) for matrix in packed])


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(dtype):
    x, packed = normal(1, 6, 512, dtype=dtype), matrices(2, (70, 20), 512, dtype=dtype)
    bound = {mx.float32: 1e-5, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}[dtype]
    pairs = zip(quantized_matmuls(x, packed), quantized_matmuls_reference(x, packed), strict=True)
    for out, expected in pairs:
        a, b = (np.array(y.astype(mx.float32)) for y in (out, expected))
        assert np.all(np.abs(a - b) <= bound * (512**0.5 + np.abs(b)))


def test_threads_and_rows_change_nothing():
    x, packed = normal(3, 16, 256), matrices(4, (600, 90, 70), 256)
    threads = _ext.threads()
    try:
        _ext.set_threads(1)
        alone = [quantized_matmuls(x[m : m + 1], packed) for m in range(16)]
        expected = [mx.concatenate(rows) for rows in zip(*alone, strict=True)]
        mx.eval(expected)
        for count in (2, 3):
            _ext.set_threads(count)
            for M in (1, 5, 16):
                outs = quantized_matmuls(x[:M], packed)
                assert_same(outs, [rows[:M] for rows in expected])
    finally:
        _ext.set_threads(threads)


def test_shapes_and_strides():
    packed = matrices(5, (10, 6, 4), 64)
    x = normal(6, 4, 3, 128)
    dense = mx.contiguous(x[:, ::2, 64:])
    assert_same(quantized_matmuls(x[:, ::2, 64:], packed), quantized_matmuls(dense, packed))
    mx.eval(packed)
    outs = quantized_matmuls(dense, packed)
    assert [out.shape for out in outs] == [(4, 2, 10), (4, 2, 6), (4, 2, 4)]
    halves = [[a[::2] for a in matrix] for matrix in packed]
    assert_same(quantized_matmuls(dense, halves), [out[..., ::2] for out in outs])
    assert [out.shape for out in quantized_matmuls(x[:0, :, :64], packed)] == [
        (0, 3, 10),
        (0, 3, 6),
        (0, 3, 4),
    ]
    empty = [packed[0], [a[:0] for a in packed[1]], packed[2]]
    assert_same(quantized_matmuls(dense, empty), [outs[0], outs[1][..., :0], outs[2]])


def test_one_result_may_be_asked_for_alone():
    packed = matrices(7, (10, 6), 64)
    x = normal(8, 2, 64)
    second = quantized_matmuls(x, packed)[1]
    mx.eval(second)
    assert_same([second], [quantized_matmul(x, *packed[1])])


def test_use_reference_and_mlx(monkeypatch):
    x, packed = normal(9, 129, 64), matrices(10, (8, 4, 4), 64)
    ops.use("reference")
    try:
        outs = quantized_matmuls(x, packed)
    finally:
        ops.use("native")
    assert_same(outs, [quantized_matmul_reference(x, *matrix) for matrix in packed])
    own = quantized_matmuls(x[:128], packed)
    mx.eval(own)
    monkeypatch.setattr(dispatch.mx, "default_device", lambda: mx.gpu)
    expected = [mx.quantized_matmul(x, *matrix, True, 64, 8) for matrix in packed]
    assert_same(quantized_matmuls(x, packed), expected)
    assert_same(quantized_matmuls(x[:128], packed), own)


X, PACKED = mx.zeros((2, 64)), matrices(0, (8, 4, 4), 64)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": X.astype(mx.int32)}, "x must be float32, float16 or bfloat16 but got int32."),
        ({"x": mx.array(1.0)}, "x must have at least 1 dimension but got 0."),
        ({"bits": 5}, "bits must be 4, 6 or 8 but got 5."),
        ({"group_size": 16}, "group_size must be 32, 64 or 128 but got 16."),
        (
            {"x": mx.zeros((2, 96))},
            "the last dimension of x must be a multiple of group_size 64 but got 96.",
        ),
        ({"matrices": PACKED[:1]}, "matrices must be 2 or 3 but got 1."),
        ({"matrices": PACKED + PACKED[:1]}, "matrices must be 2 or 3 but got 4."),
        ({"matrices": [PACKED[0], PACKED[1][:2]]}, "matrices[1] must have 3 arrays but got 2."),
        (
            {"matrices": [PACKED[0], [PACKED[1][0][0], *PACKED[1][1:]]]},
            "matrices[1] w must have shape [N, K * bits / 32] but got [16].",
        ),
        (
            {"matrices": [[PACKED[0][0].astype(mx.int32), *PACKED[0][1:]], PACKED[1]]},
            "matrices[0] w must be uint32 but got int32.",
        ),
        (
            {"matrices": [*PACKED[:2], matrices(1, (4,), 128)[0]]},
            "matrices[2] w must have shape [4, 16] but got [4, 32].",
        ),
        (
            {
                "matrices": [
                    PACKED[0],
                    (PACKED[1][0], PACKED[1][1].astype(mx.float16), PACKED[1][2]),
                ]
            },
            "matrices[1] scales must have the dtype of x but got float16.",
        ),
        (
            {"matrices": [PACKED[0], (*PACKED[1][:2], PACKED[1][2][:3])]},
            "matrices[1] biases must have shape [4, 1] but got [3, 1].",
        ),
    ],
)
def test_errors(change, text):
    with pytest.raises(ValueError) as error:
        quantized_matmuls(**{"x": X, "matrices": PACKED, **change})
    assert str(error.value) == f"[quantized_matmuls] {text}"


def random_call(d: Draw) -> Call:
    dtype, group_size, bits, K, shape = packed_case(d)
    sizes = [d.size(1, 5, 9, 40, 65) for _ in range(d.pick((1, 2, 3, 3, 4)))]
    matrices = [d.quantized(N, K, dtype=dtype, group_size=group_size, bits=bits) for N in sizes]
    given = d.integer(group_size), d.integer(bits)
    return Call((d.array(*shape, K, dtype=dtype), matrices, *given), {}, near_sum)


# The largest call of a kind that the Metal kernel takes
LIMITS = {
    "rows": (
        128,
        lambda n: quantized_matmuls(
            mx.zeros((n, 64)), 2 * [mx.quantize(mx.zeros((32, 64)), 64, 8)]
        ),
    )
}

# What bench/bench_quantized_matmuls.py has to say that its SMALL call moves: 768 rows of 128
# weights with 2 scales and biases; 6 rows of x and of results
BENCH_BYTES = 768 * (128 + 2 * 4) + 6 * (256 + 1536)
