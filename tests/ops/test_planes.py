"""Rows of 16-bit floats as planes of whole numbers, which AMX multiplies: csrc/cpu/planes.h.

A processor without tiles runs these by `.ci/tiles.sh`.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest

from pyengine import _ext
from pyengine.ops import quantized_matmul, quantized_matmuls

pytestmark = pytest.mark.skipif(
    "amx" not in _ext.instruction_sets(), reason="this machine has no tiles of bytes (AMX)"
)

HALVES = {mx.bfloat16: 8, mx.float16: 11}  # bits of a number
PLANE_BITS = 22  # of the row's largest magnitude; planes.h


@pytest.fixture(autouse=True)
def tiles() -> Iterator[None]:
    before = _ext.instruction_set()
    _ext.use_instruction_set("amx")
    yield
    _ext.use_instruction_set(before)


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32))


def matrix(seed: int, N: int, K: int, group_size: int, bits: int, dtype: mx.Dtype):
    """Random weights, and what they are in float64."""
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
    return (w, *factors), codes * scales + biases, np.abs(codes * scales) + np.abs(biases)


def rows_of(seed: int, M: int, K: int, dtype: mx.Dtype) -> mx.array:
    rng = np.random.default_rng(seed)
    return mx.array(rng.normal(size=(M, K)).astype(np.float32)).astype(dtype)


def as_float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), np.float64)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_error_stays_below_its_bound(group_size, bits, dtype):
    """x to 2^-23 of its row's largest; a few roundings per group, none of them within one."""
    K = 5 * group_size if group_size == 32 else 1152
    q, weights, sizes = matrix(1, 41, K, group_size, bits, dtype)
    for M in range(1, 17):
        x = rows_of(M, M, K, dtype)
        # Rows that need their exponents: large, small and one number that towers above the rest
        x[0] *= 2.0**-13
        x[M - 1, K // 2] = 300
        out = as_float64(quantized_matmul(x, *q, group_size, bits, out_dtype=mx.float32))
        x64 = as_float64(x)
        largest = np.abs(x64).max(axis=1, keepdims=True)
        rounded_x = largest * 2.0 ** -(PLANE_BITS + 1) * sizes.sum(axis=1)
        rounded_sums = (K / group_size + 4) * 2.0**-23 * (np.abs(x64) @ sizes.T)
        assert np.all(np.abs(out - x64 @ weights.T) <= rounded_x + rounded_sums), M


@pytest.mark.parametrize("dtype", HALVES)
def test_small_numbers_beside_a_large_one_keep_their_bits(dtype):
    """Down to 2^-14 (float16: 2^-11) of the largest: a row of bits comes back as it is."""
    K = N = 64
    bits = HALVES[dtype]
    w = mx.array(np.eye(N, K, dtype=np.uint8).view(np.uint32))  # column n is element n
    ones = mx.ones((N, 1), dtype)
    rng = np.random.default_rng(2)
    exponents = rng.integers(-(PLANE_BITS - bits), 1, size=(3, K))
    mantissas = rng.integers(2 ** (bits - 1), 2**bits, size=(3, K)) / 2.0**bits
    signs = rng.choice([-1.0, 1.0], size=(3, K))
    values = signs * mantissas * 2.0**exponents
    values[:, 5] = 1 - 2.0**-bits  # the largest
    x = mx.array(values.astype(np.float32)).astype(dtype)
    out = quantized_matmul(x, w, ones, 0 * ones, 64, 8)
    assert out.dtype == dtype and mx.array_equal(out, x)


def test_every_size_of_a_row():
    """From the largest bfloat16 to below the smallest that is scaled by its own exponent."""
    K = 64
    q, weights, sizes = matrix(3, 16, K, 64, 8, mx.bfloat16)
    base = as_float64(rows_of(4, 1, K, mx.bfloat16))
    base /= np.abs(base).max() * 1.01
    for exponent in [*range(-110, 110, 7), -126, 118]:
        x = mx.array((base * 2.0**exponent).astype(np.float32)).astype(mx.bfloat16)
        out = as_float64(quantized_matmul(x, *q, 64, 8, out_dtype=mx.float32))
        x64 = as_float64(x)
        unit = 2.0 ** -(PLANE_BITS - 1) * max(np.abs(x64).max(), 2.0**-105)
        bound = unit * sizes.sum(axis=1) + 2.0**-19 * np.abs(x64) @ sizes.T
        assert np.all(np.abs(out - x64 @ weights.T) <= bound), exponent
    zero = quantized_matmul(mx.zeros((2, K), mx.bfloat16), *q, 64, 8)
    assert not np.any(np.array(zero.astype(mx.float32)))


@pytest.mark.parametrize("M", [1, 2, 3, 4, 7, 16])
def test_a_row_without_a_number_spoils_no_other(M):
    K = 128
    q, _, _ = matrix(5, 40, K, 64, 8, mx.bfloat16)
    x = rows_of(6, M, K, mx.bfloat16)
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
    q, _, _ = matrix(7, N, K, group_size, bits, mx.bfloat16)
    x = rows_of(8, 150, K, mx.bfloat16)  # more than are made ready together
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
    q, _, _ = matrix(13, 40, 64, 64, 8, mx.bfloat16)
    x = mx.zeros((M, 0), mx.bfloat16)
    out = quantized_matmul(x, *(a[:, :0] for a in q), 64, 8)
    assert out.shape == (M, 40) and not np.any(np.array(out.astype(mx.float32)))


def test_strided_rows():
    q, _, _ = matrix(9, 33, 128, 64, 4, mx.bfloat16)
    base = rows_of(10, 24, 256, mx.bfloat16).reshape(4, 6, 256)
    for x in (base[:, 1:4, ::2], base[:, :, 128:].transpose(1, 0, 2), base[..., 127::-1]):
        same = quantized_matmul(mx.contiguous(x), *q, 64, 4)
        assert mx.array_equal(quantized_matmul(x, *q, 64, 4), same)


def test_float32_rows_stay_what_they_are_with_avx512():
    q, _, _ = matrix(11, 50, 320, 64, 8, mx.float32)
    x = rows_of(12, 7, 320, mx.float32)
    out = bits_of(quantized_matmul(x, *q, 64, 8))
    _ext.use_instruction_set("avx512")
    assert np.array_equal(bits_of(quantized_matmul(x, *q, 64, 8)), out)
