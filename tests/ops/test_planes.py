"""Rows of bfloat16 as planes of whole numbers, which VNNI and AMX multiply: csrc/cpu/planes.h.

A processor without tiles runs these on those of AMX by `.ci/tiles.sh`.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from pyengine import _ext
from pyengine.ops import quantized_matmul, quantized_matmuls

SETS = [name for name in _ext.instruction_sets() if name in ("vnni", "amx")]
pytestmark = pytest.mark.skipif(not SETS, reason="this machine multiplies no bytes (VNNI, AMX)")

CHUNK = 64  # elements that share a unit; planes.h
LARGEST = 32639  # units


@pytest.fixture(params=SETS or ["none"], autouse=True)
def instruction_set(request) -> Iterator[str]:
    before = _ext.instruction_set()
    _ext.use_instruction_set(request.param)
    yield request.param
    _ext.use_instruction_set(before)


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32))


def matrix(seed: int, N: int, K: int, group_size: int, bits: int, dtype: mx.Dtype = mx.bfloat16):
    """Random weights; what they are in float64, and the sizes of what is added for each."""
    rng = np.random.default_rng(seed)
    w = mx.array(rng.integers(0, 2**32, size=(N, K * bits // 32), dtype=np.uint32))
    factors = [
        mx.array(rng.normal(size=(N, K // group_size)).astype(np.float32)).astype(dtype)
        for _ in range(2)
    ]
    codes = codes_of(w, N, K, group_size, bits)
    scales, biases = (np.repeat(as_float64(a), group_size, axis=1) for a in factors)
    return (w, *factors), codes * scales + biases, np.abs(codes * scales) + np.abs(biases)


def codes_of(w: mx.array, N: int, K: int, group_size: int, bits: int) -> np.ndarray:
    ones = mx.ones((N, K // group_size))
    return np.array(mx.dequantize(w, ones, 0 * ones, group_size, bits), np.float64)


def rows_of(seed: int, M: int, K: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.normal(size=(M, K)).astype(np.float32)).astype(dtype)


def as_float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once, where a product has 53 bits at most."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    # Rounded to odd, so that rounding to float32 cannot meet a tie that was none
    even = total.view(np.int64) % 2 == 0
    odd = np.nextafter(total, np.where(lost > 0, np.inf, -np.inf))
    return np.where((lost != 0) & even, odd, total).astype(np.float32)


def definition(x: mx.array, q: tuple[mx.array, ...], group_size: int, bits: int) -> np.ndarray:
    """planes.h in numpy: whole numbers under each chunk's unit, a rounding per piece and factor."""
    (M, K), N = x.shape, q[0].shape[0]
    codes = codes_of(q[0], N, K, group_size, bits).astype(np.int64)
    scales, biases = (np.array(a.astype(mx.float32)) for a in q[1:])
    x32 = np.array(x.astype(mx.float32))
    sums = np.zeros((M, N), np.float32)
    width = min(group_size, CHUNK)
    for k in range(0, K, width):
        first = k // CHUNK * CHUNK
        largest = np.abs(x32[:, first : first + CHUNK]).max(axis=1).view(np.int32)
        exponent = np.maximum((largest + 0x10000) >> 23, 15)
        unit = np.ldexp(np.float32(1), exponent - 14 - 127)[:, None]
        whole = np.rint(x32[:, k : k + width] / unit.astype(np.float64)).astype(np.int64)
        assert np.abs(whole).max() <= LARGEST
        product = (whole @ codes[:, k : k + width].T).astype(np.float32) * unit
        total = whole.sum(axis=1, keepdims=True).astype(np.float32) * unit
        g = k // group_size
        sums = fma(product, scales[None, :, g], sums)
        sums = fma(total, biases[None, :, g], sums)
    return sums


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bits_are_those_of_the_definition(group_size, bits):
    """Of each number of rows, whose chunks have units of their own, and half a chunk at the end."""
    K = 5 * group_size
    q, _, _ = matrix(21, 53, K, group_size, bits)
    sizes = np.random.default_rng(22).integers(-20, 20, size=(16, (K + CHUNK - 1) // CHUNK))
    x = rows_of(23, 16, K) * mx.array(2.0 ** np.repeat(sizes, CHUNK, axis=1)[:, :K], mx.bfloat16)
    x[3, 70] = 255 / 256  # what begins with eight ones
    expected = definition(x, q, group_size, bits)
    for M in range(1, 17):
        out = quantized_matmul(x[:M], *q, group_size, bits, out_dtype=mx.float32)
        assert np.array_equal(np.array(out), expected[:M]), M


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_error_stays_below_its_bound(group_size, bits):
    """Half a unit of each element, of which a chunk's largest has 16320; roundings of sums."""
    K = 5 * group_size if group_size == 32 else 1152
    q, weights, sizes = matrix(1, 41, K, group_size, bits)
    starts = np.arange(0, K, CHUNK)
    for M in range(1, 17):
        x = rows_of(M, M, K)
        # Rows that need their exponents: large, small and one number that towers above the rest
        x[0] *= 2.0**-13
        x[M - 1, K // 2] = 300
        out = as_float64(quantized_matmul(x, *q, group_size, bits, out_dtype=mx.float32))
        x64 = as_float64(x)
        largest = np.maximum.reduceat(np.abs(x64), starts, axis=1)
        rounded_x = largest / 32640 @ np.add.reduceat(sizes, starts, axis=1).T
        rounded_sums = (K / min(group_size, CHUNK) + 4) * 2.0**-23 * (np.abs(x64) @ sizes.T)
        assert np.all(np.abs(out - x64 @ weights.T) <= rounded_x + rounded_sums), M


def test_small_numbers_beside_a_large_one_keep_their_bits():
    """Down to 2^-6 of the chunk's largest: a row of bits comes back as it is."""
    K = N = 64
    w = mx.array(np.eye(N, K, dtype=np.uint8).view(np.uint32))  # column n is element n
    ones = mx.ones((N, 1), mx.bfloat16)
    rng = np.random.default_rng(2)
    exponents = rng.integers(-6, 1, size=(3, K))
    mantissas = rng.integers(128, 256, size=(3, K)) / 256
    signs = rng.choice([-1.0, 1.0], size=(3, K))
    values = signs * mantissas * 2.0**exponents
    values[:, 5] = 255 / 256  # the largest
    x = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
    out = quantized_matmul(x, w, ones, 0 * ones, 64, 8)
    assert out.dtype == x.dtype and mx.array_equal(out, x)


def test_every_size_of_a_row():
    """From the largest bfloat16 to below the smallest that is scaled by its own exponent."""
    K = 64
    q, weights, sizes = matrix(3, 16, K, 64, 8)
    base = as_float64(rows_of(4, 1, K))
    base /= np.abs(base).max() * 1.01
    for exponent in [*range(-120, 110, 7), -126, 118]:
        x = mx.array((base * 2.0**exponent).astype(np.float32)).astype(mx.bfloat16)
        out = as_float64(quantized_matmul(x, *q, 64, 8, out_dtype=mx.float32))
        x64 = as_float64(x)
        unit = max(np.abs(x64).max() / 16320, 2.0**-126)
        bound = unit / 2 * sizes.sum(axis=1) + 2.0**-19 * np.abs(x64) @ sizes.T
        assert np.all(np.abs(out - x64 @ weights.T) <= bound), exponent
    zero = quantized_matmul(mx.zeros((2, K), mx.bfloat16), *q, 64, 8)
    assert not np.any(np.array(zero.astype(mx.float32)))


@pytest.mark.parametrize("M", [1, 2, 3, 4, 7, 16])
def test_a_row_without_a_number_spoils_no_other(M):
    K = 128
    q, _, _ = matrix(5, 40, K, 64, 8)
    x = rows_of(6, M, K)
    expected = bits_of(quantized_matmul(x, *q, 64, 8, out_dtype=mx.float32))
    for value in (float("nan"), float("inf"), -float("inf")):
        for m in range(M):
            spoilt = mx.array(x)
            spoilt[m, 77] = value
            out = quantized_matmul(spoilt, *q, 64, 8, out_dtype=mx.float32)
            keep = [other for other in range(M) if other != m]
            assert np.array_equal(bits_of(out)[keep], expected[keep])
            assert np.all(np.isnan(np.array(out)[m]))


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_where_a_row_or_a_column_stands_changes_nothing(group_size, bits):
    """Neither beside how many others, nor in which tile, nor in which matrix of several."""
    N, K = 107, 3 * group_size
    q, _, _ = matrix(7, N, K, group_size, bits)
    x = rows_of(8, 150, K)  # more than are made ready together
    whole = bits_of(quantized_matmul(x, *q, group_size, bits, out_dtype=mx.float32))
    for M in (*range(1, 17), 33, 128, 129):
        some = quantized_matmul(x[150 - M :], *q, group_size, bits, out_dtype=mx.float32)
        assert np.array_equal(bits_of(some), whole[150 - M :]), M
    for first, last in [(0, 1), (3, 20), (90, 107), (1, 106), (16, 48), (17, 50)]:
        part = tuple(mx.contiguous(a[first:last]) for a in q)
        some = quantized_matmul(x[:20], *part, group_size, bits, out_dtype=mx.float32)
        assert np.array_equal(bits_of(some), whole[:20, first:last]), (first, last)
    several = quantized_matmuls(x[:9], [q, tuple(a[5:60] for a in q)], group_size, bits)
    alone = quantized_matmul(x[:9], *q, group_size, bits)
    assert mx.array_equal(several[0], alone) and mx.array_equal(several[1], alone[:, 5:60])


@pytest.mark.parametrize("M", [1, 5, 16])
def test_a_sum_of_nothing(M):
    q, _, _ = matrix(13, 40, 64, 64, 8)
    x = mx.zeros((M, 0), mx.bfloat16)
    out = quantized_matmul(x, *(a[:, :0] for a in q), 64, 8)
    assert out.shape == (M, 40) and not np.any(np.array(out.astype(mx.float32)))


def test_strided_rows():
    q, _, _ = matrix(9, 33, 128, 64, 4)
    base = rows_of(10, 24, 256).reshape(4, 6, 256)
    for x in (base[:, 1:4, ::2], base[:, :, 128:].transpose(1, 0, 2), base[..., 127::-1]):
        same = quantized_matmul(mx.contiguous(x), *q, 64, 4)
        assert mx.array_equal(quantized_matmul(x, *q, 64, 4), same)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_other_rows_stay_what_they_are_with_avx512(dtype):
    q, _, _ = matrix(11, 50, 320, 64, 8, dtype)
    x = rows_of(12, 7, 320, dtype)
    out = bits_of(quantized_matmul(x, *q, 64, 8, out_dtype=mx.float32))
    _ext.use_instruction_set("avx512")
    assert np.array_equal(bits_of(quantized_matmul(x, *q, 64, 8, out_dtype=mx.float32)), out)
