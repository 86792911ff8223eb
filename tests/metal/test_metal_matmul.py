"""Metal matmuls in the workbench: right, the processor's within a bound, row-stable, traffic."""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from matmuls import Matmul, bits_of, dense, gated, normal, q8

# Times sum |x * w|, the scale of the sum's rounding errors. float32: two sums of K products in
# different orders, each within K / 16 + 8 roundings of the exact one (4 bits: K / 8 + 8); K is
# below 600 where out is float32.
# float16, bfloat16: the same sum rounded once to 11 or 8 bits, where the two sides may fall on
# neighbouring values; quantized_gated_matmul also rounds both of its sums.
TOLERANCE = {mx.float32: 1.7e-5, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
GATED_TOLERANCE = {mx.float32: 1.7e-5, mx.float16: 2.0**-9, mx.bfloat16: 2.0**-6}

# Ragged N and K: no multiple of a lane's columns, of a threadgroup's or of a chunk of 256; rows of
# factors that start anywhere, some longer than what is held of them. Each packing meets each dtype
# somewhere; all pairs would only cost compilations.
CASES = {
    "q8-64": (mx.bfloat16, lambda dtype: q8(1, 45, 320, dtype)),
    "q8-32": (mx.float32, lambda dtype: q8(2, 37, 544, dtype, 32)),
    "q8-128": (mx.float16, lambda dtype: q8(3, 66, 384, dtype, 128, out_dtype=mx.float32)),
    "q6-64": (mx.bfloat16, lambda dtype: q8(4, 33, 320, dtype, 64, 6)),
    "q6-32": (mx.float32, lambda dtype: q8(5, 9, 288, dtype, 32, 6)),
    "q4-64": (mx.float16, lambda dtype: q8(6, 70, 576, dtype, 64, 4)),
    "q8-long": (mx.bfloat16, lambda dtype: q8(16, 35, 2368, dtype)),
    "q4-long": (mx.float16, lambda dtype: q8(17, 69, 1440, dtype, 32, 4)),
    "gated-8": (mx.bfloat16, lambda dtype: gated(8, 23, 320, dtype)),
    "gated-6": (mx.float32, lambda dtype: gated(10, 18, 96, dtype, 32, 6)),
    "gated-silu": (mx.bfloat16, lambda dtype: gated(9, 23, 320, dtype, activation="silu")),
    "gated-4": (mx.float16, lambda dtype: gated(12, 35, 320, dtype, 64, 4)),
    "dense": (mx.bfloat16, lambda dtype: dense(14, 45, 328, dtype)),
    "dense-odd": (mx.float16, lambda dtype: dense(15, 34, 267, dtype, mx.float32)),
}


def make(name: str) -> tuple[Matmul, mx.Dtype]:
    dtype, build = CASES[name]
    return build(dtype), dtype


def rows(seed: int, M: int, matmul: Matmul, dtype: mx.Dtype) -> mx.array:
    K = next(b.shape[1] for b in matmul.launch(1).buffers if b.name == "x")
    return normal(seed, M, K, dtype=dtype)


def assert_close(out: mx.array, expected: mx.array, matmul: Matmul, x: mx.array) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    table = GATED_TOLERANCE if matmul.op == "quantized_gated_matmul" else TOLERANCE
    a, b = (np.array(y.astype(mx.float32)) for y in (out, expected))
    assert np.all(np.abs(a - b) <= table[out.dtype] * np.array(matmul.scale(x)))


@pytest.mark.parametrize("name", CASES)
def test_no_fault_and_the_reference_result(name):
    """In every order of lanes; the bits are the same in all of them."""
    matmul, dtype = make(name)
    x = rows(20, 6, matmul, dtype)
    out, _ = matmul.metal(x, mode="check")
    assert_close(out, matmul.reference(x), matmul, x)
    assert_close(out, matmul.native(x), matmul, x)
    for order in ("reverse", "random"):
        other, _ = matmul.metal(x, mode="check", order=order)
        assert np.array_equal(bits_of(other), bits_of(out)), order


@pytest.mark.parametrize("name", CASES)
def test_rows_are_stable(name):
    """A row's bits are those of the row alone, beside any others and beyond a slice."""
    matmul, dtype = make(name)
    x = rows(21, 22, matmul, dtype)
    alone = [bits_of(matmul.metal(x[m : m + 1])[0]) for m in range(22)]
    for first, last in ((0, 6), (16, 22), (0, 22), (5, 21)):
        out = bits_of(matmul.metal(x[first:last])[0])
        assert np.array_equal(out, np.concatenate(alone[first:last])), (first, last)


@pytest.mark.slow  # a compilation for every number of rows; the one above samples them
def test_every_number_of_rows():
    matmul, dtype = make("q8-64")
    x = rows(22, 16, matmul, dtype)
    whole = bits_of(matmul.metal(x)[0])
    for M in range(1, 16):
        assert np.array_equal(bits_of(matmul.metal(x[:M])[0]), whole[:M]), M


@pytest.mark.parametrize("name", ["q8-32", "gated-6", "dense-odd"])
def test_other_rows_may_hold_anything(name):
    matmul, dtype = make(name)
    x = rows(23, 6, matmul, dtype)
    expected = bits_of(matmul.metal(x)[0])
    for value in (float("nan"), float("inf"), 6e4):
        spoilt = mx.array(x)
        spoilt[2] = value
        out = bits_of(matmul.metal(spoilt)[0])
        keep = [0, 1, 3, 4, 5]
        assert np.array_equal(out[keep], expected[keep])


@pytest.mark.slow  # one more compilation for every case
@pytest.mark.parametrize("name", CASES)
def test_contraction_changes_nothing(name):
    """The compiler may fuse a * b + c as it likes: there is none left to fuse."""
    matmul, dtype = make(name)
    x = rows(24, 6, matmul, dtype)
    out = bits_of(matmul.metal(x)[0])
    assert np.array_equal(bits_of(matmul.metal(x, contract="fast")[0]), out)


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_every_weight_lies_where_mlx_packs_it(bits, group_size):
    """One-hot rows read the matrix back exactly: every other product is 0."""
    K = 3 * group_size
    matmul = q8(25, 9, K, mx.float32, group_size, bits)
    rows = mx.split(mx.eye(K), range(96, K, 96))
    out = mx.concatenate([matmul.metal(some)[0] for some in rows])
    assert np.array_equal(np.array(out).T, unpacked(matmul, group_size, bits))


def unpacked(matmul: Matmul, group_size: int, bits: int) -> np.ndarray:
    """The matrix of a quantized_matmul, each weight rounded once to float32."""
    w, scales, biases = (
        matmul.weights["w"],
        *(matmul.weights[name].astype(mx.float32) for name in ("scales", "biases")),
    )
    code = mx.dequantize(w, mx.ones_like(scales), mx.zeros_like(biases), group_size, bits)
    factors = [np.repeat(np.array(a, np.float64), group_size, axis=1) for a in (scales, biases)]
    return (np.array(code, np.float64) * factors[0] + factors[1]).astype(np.float32)


@pytest.mark.parametrize(
    "dtype, group_size, bits",
    [
        (mx.bfloat16, 64, 8),
        (mx.float32, 32, 8),
        (mx.bfloat16, 32, 4),
        (mx.float16, 128, 4),
        (mx.float16, 64, 6),
    ],
)
def test_every_group_has_its_own_factors(dtype, group_size, bits):
    """A one-hot row for each group of rows of 37 factors, which start and end within sectors."""
    groups = 37
    matmul = q8(40, 13, groups * group_size, dtype, group_size, bits, out_dtype=mx.float32)
    at = mx.array([g * group_size + g % group_size for g in range(groups)])
    x = mx.take(mx.eye(groups * group_size), at, axis=0).astype(dtype)
    expected = unpacked(matmul, group_size, bits)[:, np.array(at)].T
    assert np.array_equal(np.array(matmul.metal(x, mode="check")[0]), expected)
    assert np.array_equal(np.array(matmul.metal(x[:3])[0]), expected[:3])


# Widths of the layers of Gemma 4 31B, 12B and E2B; N is scaled down to two threadgroups.
WIDTHS = [5376, 21504, 3840, 15360, 1536, 6144]


def asked_for(report: Any, names: Iterable[str]) -> int:
    """Bytes of the sectors that each simd load asks for, summed over all loads."""
    return sum(report.traffic[name].device_read_bytes for name in names)


@pytest.mark.parametrize("M", [1, 6, 16])
@pytest.mark.parametrize("K", WIDTHS)
def test_every_weight_byte_is_loaded_once(K, M):
    matmul = q8(26, 64, K, mx.bfloat16)
    _, report = matmul.metal(normal(27, M, K, dtype=mx.bfloat16), mode="count")
    traffic = report.traffic
    assert report.launches == 1 and traffic["w"].read_bytes == traffic["w"].size
    # No lane asks for what another lane has, and each load takes whole sectors of 32 bytes
    assert asked_for(report, ["w"]) == traffic["w"].size
    # A sector of factors that two rows share is loaded for each
    assert asked_for(report, matmul.weights) <= 1.02 * matmul.stored_bytes
    kept = sum(traffic[name].group_read_sectors for name in matmul.weights)
    assert 32 * kept == matmul.stored_bytes
    assert asked_for(report, traffic) <= (2 if M <= 6 else 3) * matmul.stored_bytes


@pytest.mark.parametrize(
    "dtype, group_size, bits, K",
    [
        (mx.float32, 64, 8, 1536),
        (mx.bfloat16, 32, 8, 1536),
        (mx.bfloat16, 128, 8, 5376),
        (mx.bfloat16, 64, 4, 5376),
        (mx.bfloat16, 32, 4, 5376),
    ],
)
def test_factors_of_other_packings_are_loaded_once(dtype, group_size, bits, K):
    matmul = q8(36, 64, K, dtype, group_size, bits)
    _, report = matmul.metal(normal(37, 6, K, dtype=dtype), mode="count")
    assert asked_for(report, ["w"]) == report.traffic["w"].size
    assert asked_for(report, matmul.weights) <= 1.02 * matmul.stored_bytes


@pytest.mark.parametrize("K", [1536, 5376])
def test_factors_of_two_matrices_are_loaded_once(K):
    matmul = gated(38, 32, K, mx.bfloat16)
    _, report = matmul.metal(normal(39, 6, K, dtype=mx.bfloat16), mode="count")
    assert asked_for(report, matmul.weights) <= 1.02 * matmul.stored_bytes


@pytest.mark.parametrize("bits, dtype", [(8, mx.float32), (6, mx.bfloat16), (4, mx.bfloat16)])
def test_traffic_of_other_widths(bits, dtype):
    matmul = q8(28, 128, 1536, dtype, 64, bits)
    for M, limit in ((6, 2), (16, 3)):
        _, report = matmul.metal(normal(29, M, 1536, dtype=dtype), mode="count")
        assert report.traffic["w"].read_bytes == report.traffic["w"].size
        read = sum(entry.read_bytes for entry in report.traffic.values())
        assert read <= limit * matmul.stored_bytes


def test_loads_touch_as_few_lines_as_they_can():
    """8 bits: 512 bytes of a simd load in 8 lines of 64; a dense one likewise."""
    for matmul in (q8(30, 32, 1536, mx.bfloat16), dense(31, 32, 1536, mx.bfloat16)):
        _, report = matmul.metal(normal(32, 6, 1536, dtype=mx.bfloat16), mode="count")
        traffic = report.traffic["w"]
        assert traffic.read_lines * 64 == traffic.read_bytes == traffic.size


def test_gated_reads_both_matrices_once():
    matmul = gated(33, 64, 1536, mx.bfloat16)
    _, report = matmul.metal(normal(34, 6, 1536, dtype=mx.bfloat16), mode="count")
    for name in ("gate_w", "up_w"):
        assert report.traffic[name].device_read_bytes == report.traffic[name].size
    read = sum(entry.read_bytes for entry in report.traffic.values())
    assert report.launches == 1 and read <= 2 * matmul.stored_bytes


def test_launch_is_data():
    """What eval_gpu and the workbench are handed, in numbers."""
    launch = q8(35, 100, 512, mx.bfloat16).launch(20)
    assert (launch.library, launch.kernel) == ("quantized_matmul", "quantized_matmul_bfloat16_8")
    assert tuple(launch.grid) == (4, 2, 1)
    assert tuple(launch.threadgroup) == (128, 1, 1)
    own = {0: 16, 1: 1, 2: False, 3: 64}
    assert launch.constants == own | {7: 4, 8: False, 9: False}  # ragged in N and in rows
    assert [(b.name, b.role) for b in launch.buffers[3:6]] == [
        ("biases", "in"),
        ("out", "out"),
        ("M", "bytes"),
    ]
    assert launch.buffers[5].data == (20).to_bytes(4, "little")
    assert launch.buffers[4].shape == [20, 100] and launch.buffers[4].dtype == "bfloat16"
