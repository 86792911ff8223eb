"""Rows of bfloat16 as planes of whole numbers, which VNNI and AMX multiply: csrc/cpu/planes.h."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from pyengine import _ext
from pyengine.ops import quantized_matmul, quantized_matmuls

SETS = [name for name in _ext.instruction_sets() if name in ("vnni", "amx")]
pytestmark = pytest.mark.skipif(not SETS, reason="this machine multiplies no bytes (VNNI or AMX)")

CHUNK = 64  # elements of a row that share a unit
PLANE_BITS = 15  # of the chunk's largest magnitude


@pytest.fixture(autouse=True, params=SETS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _ext.instruction_set()
    _ext.use_instruction_set(request.param)
    yield request.param
    _ext.use_instruction_set(before)


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32))


def matrix(seed: int, N: int, K: int, group_size: int, bits: int, dtype=mx.bfloat16):
    """Random weights; their codes, and in float64 what scale and bias belong to each."""
    rng = np.random.default_rng(seed)
    w = mx.array(rng.integers(0, 2**32, size=(N, K * bits // 32), dtype=np.uint32))
    factors = [
        mx.array(rng.normal(size=(N, K // group_size)).astype(np.float32)).astype(dtype)
        for _ in range(2)
    ]
    ones = mx.ones_like(factors[0]).astype(mx.float32)
    codes = np.array(mx.dequantize(w, ones, 0 * ones, group_size, bits), np.float64)
    scales, biases = (
        np.repeat(np.array(a.astype(mx.float32), np.float64), group_size, axis=1) for a in factors
    )
    return (w, *factors), codes, scales, biases


def rows_of(seed: int, M: int, K: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.normal(size=(M, K)).astype(np.float32)).astype(dtype)


def as_float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


def in_scratch_order(a: np.ndarray, bits: int) -> np.ndarray:
    """The order in which weights of four bits unpack: of 32 every second, then the others."""
    if bits != 4:
        return a
    rows, K = a.shape
    return a.reshape(rows, K // 32, 16, 2).swapaxes(2, 3).reshape(rows, K)


def units_of(x: np.ndarray) -> np.ndarray:
    """What one unit of each row's chunks is worth, by the text of planes.h."""
    M, K = x.shape
    chunks = np.zeros((M, -(-K // CHUNK) * CHUNK))
    chunks[:, :K] = x
    largest = np.abs(chunks).reshape(M, -1, CHUNK).max(axis=2)
    # In [1/2, 1); with eight ones in front it counts as 1
    mantissa, exponent = np.frexp(largest)
    exponent = np.where(mantissa >= 255 / 256, exponent + 1, exponent)
    exponent = np.where(largest == 0, -1000, exponent)
    return 2.0 ** (np.maximum(exponent, -111) - PLANE_BITS)


def by_definition(x, codes, scales, biases, group_size: int, bits: int) -> np.ndarray:
    """The sums of planes.h, a number at a time in arithmetic that rounds where it says."""
    x, codes, scales, biases = (in_scratch_order(a, bits) for a in (x, codes, scales, biases))
    units = units_of(x)
    sums = np.zeros((len(x), len(codes)), np.float32)
    piece = min(group_size, CHUNK)
    for k in range(0, x.shape[1], piece):
        unit = units[:, k // CHUNK, None]
        here = slice(k, k + piece)
        whole = np.rint(x[:, here] / unit)
        products = (whole @ codes[:, here].T).astype(np.float32).astype(np.longdouble)
        totals = whole.sum(axis=1, keepdims=True).astype(np.longdouble)
        sums = (products * unit * scales[:, k] + sums).astype(np.float32)
        sums = (totals * unit * biases[:, k] + sums).astype(np.float32)
    return sums


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("N", [1, 15, 16, 20, 41, 96])
def test_bits_are_those_of_the_definition(N, group_size, bits):
    K = 5 * group_size if group_size == 32 else 384
    q, *weights = matrix(1, N, K, group_size, bits)
    x = rows_of(2, 16, K)
    x[1] *= 2.0**-13
    x[2, K // 2] = 300
    x[3, : K // 2] = 0
    x[4, 7] = 255 / 128  # eight ones
    x[5] *= 2.0**-120
    expected = by_definition(as_float64(x), *weights, group_size, bits)
    for M in range(1, 17):
        out = quantized_matmul(x[:M], *q, group_size, bits, out_dtype=mx.float32)
        assert np.array_equal(bits_of(out), expected[:M].view(np.uint32)), M


@pytest.mark.parametrize(("bits", "K"), [(8, 2048), (6, 8192), (4, 4096)])
@pytest.mark.parametrize("group_size", [32, 64])
def test_bits_of_columns_that_are_powers_of_two_apart(group_size, bits, K):
    q, *weights = matrix(16, 20, K, group_size, bits)
    x = rows_of(17, 6, K)
    expected = by_definition(as_float64(x), *weights, group_size, bits)
    for M in range(1, 7):
        out = quantized_matmul(x[:M], *q, group_size, bits, out_dtype=mx.float32)
        assert np.array_equal(bits_of(out), expected[:M].view(np.uint32)), M


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_error_stays_below_its_bound(group_size, bits):
    """x to half a unit, 2^-15 of its chunk's largest; a few roundings per piece, none within."""
    K = 5 * group_size if group_size == 32 else 1152
    q, codes, scales, biases = matrix(1, 41, K, group_size, bits)
    weights, sizes = codes * scales + biases, np.abs(codes * scales) + np.abs(biases)
    x = rows_of(3, 16, K)
    # Rows that need their exponents: large, small and one number that towers above the rest
    x[0] *= 2.0**-13
    x[15, K // 2] = 300
    out = as_float64(quantized_matmul(x, *q, group_size, bits, out_dtype=mx.float32))
    x64 = as_float64(x)
    padded = np.zeros((16, -(-K // CHUNK) * CHUNK))
    padded[:, :K] = np.abs(x64)  # four bits unpack within 32, so chunks hold the same elements
    largest = np.repeat(padded.reshape(16, -1, CHUNK).max(axis=2), CHUNK, axis=1)[:, :K]
    rounded_x = 2.0**-PLANE_BITS * largest @ sizes.T
    rounded_sums = (2 * K / min(group_size, CHUNK) + 4) * 2.0**-23 * (np.abs(x64) @ sizes.T)
    assert np.all(np.abs(out - x64 @ weights.T) <= rounded_x + rounded_sums)


def test_small_numbers_beside_a_large_one_keep_their_bits():
    """Down to 2^-6 of the chunk's largest: a row of bits comes back as it is."""
    K = N = 64
    w = mx.array(np.eye(N, K, dtype=np.uint8).view(np.uint32))  # column n is element n
    ones = mx.ones((N, 1), mx.bfloat16)
    rng = np.random.default_rng(2)
    exponents = rng.integers(-6, 1, size=(3, K))
    mantissas = rng.integers(128, 256, size=(3, K)) / 256
    values = rng.choice([-1.0, 1.0], size=(3, K)) * mantissas * 2.0**exponents
    values[:, 5] = 255 / 256  # the largest
    x = mx.array(values.astype(np.float32)).astype(mx.bfloat16)
    out = quantized_matmul(x, w, ones, 0 * ones, 64, 8)
    assert out.dtype == mx.bfloat16 and mx.array_equal(out, x)


def test_every_size_of_a_row():
    """From the largest bfloat16 to below the smallest that is scaled by its own exponent."""
    K = 64
    q, codes, scales, biases = matrix(3, 16, K, 64, 8)
    weights, sizes = codes * scales + biases, np.abs(codes * scales) + np.abs(biases)
    base = as_float64(rows_of(4, 1, K))
    base /= np.abs(base).max() * 1.01
    for exponent in [*range(-110, 110, 7), -126, 118]:
        x = mx.array((base * 2.0**exponent).astype(np.float32)).astype(mx.bfloat16)
        out = as_float64(quantized_matmul(x, *q, 64, 8, out_dtype=mx.float32))
        x64 = as_float64(x)
        unit = 2.0 ** -(PLANE_BITS - 1) * max(np.abs(x64).max(), 2.0**-112)
        bound = unit * sizes.sum(axis=1) + 2.0**-19 * np.abs(x64) @ sizes.T
        assert np.all(np.abs(out - x64 @ weights.T) <= bound), exponent
    zero = quantized_matmul(mx.zeros((2, K), mx.bfloat16), *q, 64, 8)
    assert not np.any(np.array(zero.astype(mx.float32)))


@pytest.mark.parametrize("M", [1, 2, 3, 4, 7, 16])
def test_a_row_without_a_number_spoils_no_other(M):
    K = 128
    q, *_ = matrix(5, 40, K, 64, 8)
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
    q, *_ = matrix(7, N, K, group_size, bits)
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
    q, *_ = matrix(13, 40, 64, 64, 8)
    x = mx.zeros((M, 0), mx.bfloat16)
    out = quantized_matmul(x, *(a[:, :0] for a in q), 64, 8)
    assert out.shape == (M, 40) and not np.any(np.array(out.astype(mx.float32)))


def test_strided_rows():
    q, *_ = matrix(9, 33, 128, 64, 4)
    base = rows_of(10, 24, 256).reshape(4, 6, 256)
    for x in (base[:, 1:4, ::2], base[:, :, 128:].transpose(1, 0, 2), base[..., 127::-1]):
        same = quantized_matmul(mx.contiguous(x), *q, 64, 4)
        assert mx.array_equal(quantized_matmul(x, *q, 64, 4), same)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_other_rows_stay_what_they_are_with_avx512(dtype):
    q, *_ = matrix(11, 50, 320, 64, 8, dtype)
    x = rows_of(12, 7, 320, dtype)
    out = quantized_matmul(x, *q, 64, 8, out_dtype=mx.float32)
    _ext.use_instruction_set("avx512")
    assert mx.array_equal(quantized_matmul(x, *q, 64, 8, out_dtype=mx.float32), out)


def test_all_sets_of_planes_have_the_same_bits():
    q, *_ = matrix(14, 75, 448, 64, 8)
    x = rows_of(15, 40, 448)
    found = []
    for name in SETS:
        _ext.use_instruction_set(name)
        found.append(bits_of(quantized_matmul(x, *q, 64, 8, out_dtype=mx.float32)))
    assert all(np.array_equal(one, found[0]) for one in found)
