"""Bits of the Metal matmuls: those of the order of addition that metal/matmul.h describes.

The order is written down here once more, in numpy. So a kernel may load, stage and convert as it
likes, but it gives the bits that it always gave.
"""

import mlx.core as mx
import numpy as np
import pytest
from launched import launched
from matmuls import bits_of, normal

from pyengine import _ext, ops

CHUNK = 256


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Rounded once: the product is exact in float64, and the sum there rounded to odd."""
    x, y = a.astype(np.float64) * b, c.astype(np.float64)
    total = x + y
    large, small = np.where(abs(x) >= abs(y), (x, y), (y, x))
    error = small - (total - large)
    bits = total.view(np.int64)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (bits % 2 == 0), bits + towards, bits)
    return odd.view(np.float64).astype(np.float32)


def unpacked(q: list[mx.array], group_size: int, bits: int) -> np.ndarray:
    """The matrix in float32, each weight rounded once."""
    w, *factors = q
    codes = np.array(w).view(np.uint8)
    codes = np.unpackbits(codes, axis=1, bitorder="little").reshape(len(codes), -1, bits)
    codes = codes @ (1 << np.arange(bits)).astype(np.float32)
    scales, biases = (
        np.repeat(np.array(a.astype(mx.float32)), group_size, axis=1) for a in factors
    )
    return fma(codes.astype(np.float32), scales, biases)


def expected(x: mx.array, q: list[mx.array], group_size: int, bits: int) -> np.ndarray:
    """x times the matrix, in the kernel's order: lanes own runs of a chunk, then meet in pairs."""
    run = 32 if bits == 4 else 16
    rows, columns = (np.array(x.astype(mx.float32)), unpacked(q, group_size, bits))
    pad = -rows.shape[1] % CHUNK
    rows, columns = (np.pad(a, ((0, 0), (0, pad))) for a in (rows, columns))
    lanes = CHUNK // run
    rows = rows.reshape(len(rows), 1, -1, lanes, run)
    columns = columns.reshape(1, len(columns), -1, lanes, run)
    sums = np.zeros((rows.shape[0], columns.shape[1], lanes), np.float32)
    for chunk in range(rows.shape[2]):
        for k in range(run):
            sums = fma(rows[:, :, chunk, :, k], columns[:, :, chunk, :, k], sums)
    while sums.shape[2] > 1:  # lanes 1, 2, 4, 8 apart
        sums = sums[:, :, 0::2] + sums[:, :, 1::2]
    return sums[:, :, 0]


def metal(x: mx.array, q: list[mx.array], group_size: int, bits: int) -> np.ndarray:
    result = ops.quantized_matmul(x, *q, group_size, bits, out_dtype=mx.float32)
    return bits_of(launched(result)[0][0])


# Rows on both sides of what decides a kernel's way: weights converted in place (3), tiles of half
# the columns (6), words asked for ahead (8); N and K whole and not; rows of factors that start
# within a sector, within 16 bytes, and of whole sectors.
CASES = [
    (1, 45, 320, mx.bfloat16, 64, 8),
    (3, 64, 5376, mx.bfloat16, 64, 8),
    (4, 64, 1536, mx.bfloat16, 64, 8),
    (9, 32, 2560, mx.float16, 64, 8),
    (20, 37, 544, mx.float32, 32, 8),
    (2, 33, 320, mx.float16, 64, 6),
    (7, 64, 1024, mx.bfloat16, 64, 6),
    (1, 70, 576, mx.float16, 64, 4),
    (2, 64, 5376, mx.bfloat16, 64, 4),
    (6, 128, 2816, mx.bfloat16, 64, 4),
    (16, 64, 1280, mx.float32, 128, 4),
]


@pytest.mark.parametrize("M, N, K, dtype, group_size, bits", CASES)
def test_bits_are_those_of_the_written_order(M, N, K, dtype, group_size, bits):
    x = normal(M, M, K, dtype=dtype)
    q = list(mx.quantize(normal(N, N, K, dtype=dtype), group_size, bits))
    out = metal(x, q, group_size, bits)
    assert np.array_equal(out, expected(x, q, group_size, bits).view(np.uint32))


@pytest.mark.parametrize(
    "dtype, bits, least",
    [
        (mx.bfloat16, 8, -118),
        (mx.bfloat16, 6, -124),
        (mx.bfloat16, 4, -114),
        (mx.float16, 8, -24),
        (mx.float16, 4, -24),
        (mx.float32, 8, -102),
        (mx.float32, 6, -108),
        (mx.float32, 4, -98),
    ],
)
def test_scales_of_every_size(dtype, bits, least):
    """Weights that are converted in place meet multiples of their scales, down to 2^-28: exact for
    every scale of float16, and of the others down to some that no quantiser writes."""
    largest = 15 if dtype == mx.float16 else 100
    draw = np.random.default_rng(5)
    w, scales, _ = mx.quantize(normal(6, 64, 512), 64, bits)
    signs = draw.choice([-1.0, 1.0], scales.shape)
    sizes = np.exp2(draw.integers(least, largest, scales.shape).astype(np.float64))
    odd = 1 + draw.integers(0, 128, scales.shape) / 128 * (dtype != mx.float16)
    some = mx.array((signs * sizes * odd).astype(np.float32)).astype(dtype)
    edges = mx.array([2.0**least, 2.0**largest, 0.0, -(2.0**least)]).astype(dtype)
    some[:, :4] = edges
    q = [w, some, mx.zeros_like(some)]
    x = mx.eye(512)[::37].astype(dtype)  # one weight of each row of the matrix
    for M in (1, 3, 4):
        out = metal(x[:M], q, 64, bits)
        assert np.array_equal(out, expected(x[:M], q, 64, bits).view(np.uint32))


def test_no_kernel_for_rows_of_no_width():
    """Plain MLX runs there: a kernel asks for its first words before it looks."""
    x = mx.zeros((2, 0), mx.bfloat16)
    q = [mx.zeros((32, 0), mx.uint32), *(mx.zeros((32, 0), mx.bfloat16) for _ in range(2))]
    for result in (ops.quantized_matmul(x, *q), ops.quantized_matmul_reference(x, *q)):
        assert result.shape == (2, 32) and not np.array(result.astype(mx.float32)).any()
    assert _ext.launches_of(ops.quantized_matmul(x, *q))[0] is None
