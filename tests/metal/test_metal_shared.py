"""quantized_matmuls on Metal, in the workbench: the bits and bytes of separate launches, in one."""

import mlx.core as mx
import numpy as np
import pytest
from launched import launched, launches_of
from matmuls import bits_of, normal

from pyengine import ops

NAMES = ("first_", "second_", "third_")
PARTS = ("w", "scales", "biases")
# Columns that end inside a lane's, a simdgroup's and a threadgroup's own; the first case has whole
# threadgroups, the last one two matrices.
CASES = {
    "8-64": (mx.bfloat16, (64, 32, 32), 320, 64, 8),
    "8-32": (mx.float32, (70, 1, 66), 160, 32, 8),
    "6-64": (mx.float16, (3, 45, 9), 192, 64, 6),
    "4-128": (mx.bfloat16, (65, 30), 384, 128, 4),
}


def make(name: str):
    dtype, columns, K, group_size, bits = CASES[name]
    packed = [
        mx.quantize(normal(i, N, K, dtype=dtype), group_size, bits) for i, N in enumerate(columns)
    ]
    return packed, dtype, K, group_size, bits


def metal(x, packed, group_size=64, bits=8, **options):
    """The outputs of one launch, and its report."""
    return launched(ops.quantized_matmuls(x, packed, group_size, bits), **options)


def separate(x, matrix, group_size=64, bits=8, **options):
    """The output of a quantized_matmul launch, and its report."""
    (out,), report = launched(ops.quantized_matmul(x, *matrix, group_size, bits), **options)
    return out, report


@pytest.mark.parametrize("name", CASES)
def test_no_fault_and_the_bits_of_separate_launches(name):
    packed, dtype, K, *packing = make(name)
    x = normal(20, 6, K, dtype=dtype)
    outs, report = metal(x, packed, *packing, mode="check")
    assert report.launches == 1
    for out, matrix in zip(outs, packed, strict=True):
        assert np.array_equal(bits_of(out), bits_of(separate(x, matrix, *packing)[0]))
    natives = ops.quantized_matmuls(x, packed, *packing)
    bound = {mx.float32: 1e-5, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}[dtype]
    for out, native in zip(outs, natives, strict=True):
        a, b = (np.array(y.astype(mx.float32)) for y in (out, native))
        assert np.all(np.abs(a - b) <= bound * (K**0.5 + np.abs(b)))
    for order in ("reverse", "random"):
        others, _ = metal(x, packed, *packing, mode="check", order=order)
        for out, other in zip(outs, others, strict=True):
            assert np.array_equal(bits_of(out), bits_of(other)), order


@pytest.mark.parametrize("name", CASES)
def test_rows_are_stable(name):
    packed, dtype, K, *packing = make(name)
    x = normal(21, 22, K, dtype=dtype)
    alone = [metal(x[m : m + 1], packed, *packing)[0] for m in range(22)]
    expected = [np.concatenate([bits_of(row) for row in rows]) for rows in zip(*alone, strict=True)]
    for first, last in ((0, 6), (16, 22), (0, 22), (5, 21)):
        outs = metal(x[first:last], packed, *packing)[0]
        for out, rows in zip(outs, expected, strict=True):
            assert np.array_equal(bits_of(out), rows[first:last]), (first, last)


@pytest.mark.slow  # a compilation for every number of rows; the one above samples them
def test_every_number_of_rows():
    packed, dtype, K, *packing = make("8-64")
    x = normal(22, 16, K, dtype=dtype)
    whole = metal(x, packed, *packing)[0]
    for M in range(1, 16):
        for out, rows in zip(metal(x[:M], packed, *packing)[0], whole, strict=True):
            assert np.array_equal(bits_of(out), bits_of(rows)[:M]), M


def test_contraction_changes_nothing():
    packed, dtype, K, *packing = make("8-64")
    x = normal(23, 6, K, dtype=dtype)
    pairs = zip(*(metal(x, packed, *packing, contract=c)[0] for c in ("off", "fast")), strict=True)
    assert all(np.array_equal(bits_of(a), bits_of(b)) for a, b in pairs)


@pytest.mark.parametrize("M", [1, 6, 16])
def test_traffic_is_that_of_separate_launches(M):
    """E2B's attention, N scaled down: each byte as often as there, in one launch."""
    packed = [
        mx.quantize(normal(i, N, 1536, dtype=mx.bfloat16), 64, 8)
        for i, N in enumerate((128, 32, 32))
    ]
    x = normal(24, M, 1536, dtype=mx.bfloat16)
    _, report = metal(x, packed, mode="count")
    assert report.launches == 1
    x_bytes = 0
    for name, matrix in zip(NAMES, packed, strict=True):
        _, alone = separate(x, matrix, mode="count")
        for part in PARTS:
            assert report.traffic[name + part] == alone.traffic[part]
        assert report.traffic[name + "w"].device_read_bytes == matrix[0].nbytes
        x_bytes += alone.traffic["x"].device_read_bytes
    assert report.traffic["x"].device_read_bytes == x_bytes


def test_launch_is_data():
    def launch_of(M, columns, K, dtype):
        packed = [mx.quantize(mx.zeros((N, K), dtype), 64, 8) for N in columns]
        (launch,) = launches_of(ops.quantized_matmuls(mx.zeros((M, K), dtype), packed))
        return launch

    launch = launch_of(20, [100, 32, 1], 512, mx.bfloat16)
    assert (launch.library, launch.kernel) == ("quantized_matmuls", "quantized_matmuls_bfloat16_8")
    assert tuple(launch.grid) == (4 + 1 + 1, 2, 1) and tuple(launch.threadgroup) == (128, 1, 1)
    own = {0: 16, 1: 1, 2: False, 3: 64, 4: True}
    assert launch.constants == own | {7: 4, 8: False, 9: False}  # ragged in N and in rows
    assert [b.name for b in launch.buffers[3:8]] == [
        *("first_w", "first_scales", "first_biases", "first_out", "first_N"),
    ]
    two = launch_of(6, [64, 64], 512, mx.float32)
    assert two.constants[4] is False and len(two.buffers) == 13
    assert tuple(two.grid) == (4, 1, 1) and two.constants[8] is True  # few rows, whole tiles
