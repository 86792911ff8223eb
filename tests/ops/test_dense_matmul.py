"""dense_matmul: kernel against reference, edges, row-stability, errors."""

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near_sum

from pyengine import _ext, ops
from pyengine.ops import dense_matmul, dense_matmul_reference, dispatch

# Times sum |x * w|, the scale of the sum's rounding errors. float32: both sides add K products in
# different orders, each within about K / 16 roundings of the exact sum. float16, bfloat16: the same
# sum rounded once to 11 or 8 bits, where the two sides may fall on neighbouring values.
TOLERANCE = {mx.float32: 4e-6, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
DTYPES = list(TOLERANCE)


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def assert_close(out, expected, x, w) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    size = np.array(mx.abs(x.astype(mx.float32)) @ mx.abs(w.astype(mx.float32)).T)
    a, b = (np.array(y.astype(mx.float32)) for y in (out, expected))
    assert np.all(np.abs(a - b) <= TOLERANCE[out.dtype] * size)


@pytest.fixture
def restore():
    """Threads and instruction set as they were."""
    threads, name = _ext.threads(), _ext.instruction_set()
    yield
    _ext.set_threads(threads)
    _ext.use_instruction_set(name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("K", [1, 15, 16, 17, 31, 32, 33, 64, 100, 2816])
def test_matches_reference(K, dtype, restore):
    for rows, N in [(1, 1), (2, 3), (4, 66), (7, 5), (16, 33), (17, 40), (33, 2)]:
        x, w = normal(rows, rows, K, dtype=dtype), normal(100 + N, N, K, dtype=dtype)
        for out_dtype in (None, mx.float32):
            expected = dense_matmul_reference(x, w, out_dtype=out_dtype)
            for name in _ext.instruction_sets():
                _ext.use_instruction_set(name)
                assert_close(dense_matmul(x, w, out_dtype=out_dtype), expected, x, w)


@pytest.mark.parametrize("N, K", [(128, 2816), (24, 21504)])  # 26B-A4B's router; 31B's width
def test_real_shapes(N, K):
    x, w = normal(1, 6, K, dtype=mx.bfloat16), normal(2, N, K, dtype=mx.bfloat16)
    assert_close(dense_matmul(x, w), dense_matmul_reference(x, w), x, w)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_read(dtype):
    """One-hot rows give the matrix back, bit for bit."""
    w = normal(3, 21, 83, dtype=dtype)
    out = dense_matmul(mx.eye(83, dtype=dtype), w)
    assert np.array_equal(bits_of(out).T, bits_of(w))


def test_extreme_values():
    """Subnormals, the largest numbers, infinities and NaNs of each storage dtype."""
    for dtype, values in {
        mx.float16: [6e-8, 6.1e-5, 65504.0, -65504.0, float("inf"), float("nan"), -0.0],
        mx.bfloat16: [1e-38, 3.3e38, -3.3e38, float("inf"), float("nan"), -0.0],
        mx.float32: [1e-38, 3.4e38, -3.4e38, float("inf"), float("nan"), -0.0],
    }.items():
        w = mx.array(values).astype(dtype)[:, None]
        out = np.array(dense_matmul(mx.ones((1, 1), dtype=dtype), w).astype(mx.float32))[0]
        np.testing.assert_array_equal(out, np.array(w.astype(mx.float32))[:, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_stays_below_its_bound(dtype):
    """K / 16 roundings per lane, four where the lanes meet (portable: a few more)."""
    K = 4096
    x, w = normal(4, 2, K, dtype=dtype), normal(5, 32, K, dtype=dtype)
    x64, w64 = (np.array(a.astype(mx.float32), np.float64) for a in (x, w))
    bound = (K / 16 + 8) * 2.0**-24 * (np.abs(x64) @ np.abs(w64).T)
    out = np.array(dense_matmul(x, w, out_dtype=mx.float32))
    assert np.all(np.abs(out - x64 @ w64.T) <= bound)


def assert_rows_stable(row_counts, x, w) -> None:
    """First and last rows of every count against the same rows computed alone."""
    last = x.shape[0]
    alone = [bits_of(dense_matmul(x[m : m + 1], w)) for m in range(last)]
    for rows in row_counts:
        for first in {0, last - rows}:
            out = bits_of(dense_matmul(x[first : first + rows], w))
            assert np.array_equal(out, np.concatenate(alone[first : first + rows])), rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N, K", [(45, 512), (70, 87)])
def test_rows_are_stable(N, K, dtype):
    x, w = normal(6, 33, K, dtype=dtype), normal(7, N, K, dtype=dtype)
    assert_rows_stable([*range(1, 18), 33], x, w)


def test_rows_are_stable_in_every_instruction_set(restore):
    for K in (87, 4100):  # within a block of k, and one of each size and some
        x, w = normal(6, 17, K), normal(7, 37, K)
        for name in _ext.instruction_sets():
            _ext.use_instruction_set(name)
            assert_rows_stable([2, 3, 4, 5, 8, 9, 16, 17], x, w)


def test_threads_change_nothing(restore):
    x, w = normal(8, 20, 512), normal(9, 301, 512)
    assert _ext.dense_matmul_plan(20, 301, 512, 4).groups > 4
    _ext.set_threads(1)
    expected = bits_of(dense_matmul(x, w))
    for threads in (2, 3, 8):
        _ext.set_threads(threads)
        for _ in range(10):
            assert np.array_equal(bits_of(dense_matmul(x, w)), expected), threads


def test_fused_instruction_sets_agree(restore):
    """AVX-512, AVX2 and NEON share lanes, fma and tree."""
    x, w = normal(10, 5, 1383, dtype=mx.bfloat16), normal(11, 130, 1383, dtype=mx.bfloat16)
    out = []
    for name in _ext.instruction_sets():
        if name != "portable":
            _ext.use_instruction_set(name)
            out.append(bits_of(dense_matmul(x, w, out_dtype=mx.float32)))
    assert all(np.array_equal(y, out[0]) for y in out)


def test_strided_inputs():
    w = normal(12, 33, 100)
    base = normal(13, 4, 6, 200)
    for x in (base[:, 1:4, ::2], base[:, :, 100:].transpose(1, 0, 2), base[..., 99::-1]):
        assert np.array_equal(
            bits_of(dense_matmul(x, w)), bits_of(dense_matmul(mx.contiguous(x), w))
        )
    transposed = normal(14, 100, 33).T
    mx.eval(transposed)
    assert np.array_equal(
        bits_of(dense_matmul(base[0, :, :100], transposed)),
        bits_of(dense_matmul(base[0, :, :100], mx.contiguous(transposed))),
    )


def test_any_number_of_leading_dimensions():
    w, x = normal(18, 10, 50), normal(19, 2, 3, 50)
    out = dense_matmul(x, w)
    assert out.shape == (2, 3, 10)
    assert np.array_equal(bits_of(out).reshape(6, 10), bits_of(dense_matmul(x.reshape(6, 50), w)))
    assert dense_matmul(x[0, 0], w).shape == (10,)
    assert dense_matmul(x[:0], w).shape == (0, 3, 10)
    mx.eval(dense_matmul(x[:0], w))
    empty = dense_matmul(x[..., :0], w[:, :0])  # a sum of nothing
    assert empty.shape == (2, 3, 10) and not np.any(np.array(empty))


def test_use_reference():
    x, w = normal(24, 2, 64), normal(25, 8, 64)
    ops.use("reference")
    try:
        out = dense_matmul(x, w)
    finally:
        ops.use("native")
    assert np.array_equal(bits_of(out), bits_of(dense_matmul_reference(x, w)))


def test_on_a_gpu_mlx_serves_a_prefill(monkeypatch):
    """No GPU here: the answer to "which device" is replaced, what follows from it is real."""
    x, w = normal(24, 129, 64, dtype=mx.float16), normal(25, 8, 64, dtype=mx.float16)
    block = dense_matmul(x[:128], w)
    monkeypatch.setattr(dispatch.mx, "default_device", lambda: mx.gpu)
    for out_dtype in (None, mx.float32):
        dtype = out_dtype or mx.float16
        out = dense_matmul(x, w, out_dtype=out_dtype)
        assert out.dtype == dtype and mx.array_equal(out, x.astype(dtype) @ w.astype(dtype).T)
    assert np.array_equal(bits_of(dense_matmul(x[:128], w)), bits_of(block))


@pytest.mark.parametrize("M, N, K", [(1, 1, 1), (16, 262144, 5376), (17, 9, 64), (4, 5376, 21504)])
def test_plan_covers_every_column_once(M, N, K):
    plan = _ext.dense_matmul_plan(M, N, K, 2)
    assert (plan.groups - 1) * plan.columns < N <= plan.groups * plan.columns
    assert (plan.slices - 1) * 16 < M <= plan.slices * 16
    assert plan.scratch >= min(M, 16) * K
    assert plan.group_scratch == plan.columns * min(M, 16)
    assert plan.work == min(M, 128) * N * K


@pytest.mark.parametrize(
    "x, w, out_dtype, text",
    [
        (
            mx.zeros((2, 8), mx.int32),
            mx.zeros((4, 8)),
            None,
            "x must be float32, float16 or bfloat16 but got int32.",
        ),
        (mx.array(1.0), mx.zeros((4, 8)), None, "x must have at least 1 dimension but got 0."),
        (
            mx.zeros((2, 8)),
            mx.zeros((4, 8), mx.float16),
            None,
            "w must have the dtype of x but got float16.",
        ),
        (mx.zeros((2, 8)), mx.zeros((8,)), None, "w must have shape [N, K] but got [8]."),
        (mx.zeros((2, 8)), mx.zeros((4, 9)), None, "w must have shape [4, 8] but got [4, 9]."),
        (
            mx.zeros((2, 8)),
            mx.zeros((4, 8)),
            mx.bfloat16,
            "out_dtype must be float32 or the dtype of x but got bfloat16.",
        ),
    ],
)
def test_errors(x, w, out_dtype, text):
    with pytest.raises(ValueError) as error:
        dense_matmul(x, w, out_dtype=out_dtype)
    assert str(error.value) == f"[dense_matmul] {text}"


def random_call(d: Draw) -> Call:
    shape = d.pick(((), (1,), (5,), (16,), (17,), (2, 3), (0,), (2, 0)))
    N, K, dtype = d.size(1, 5, 9, 40, 65), d.size(1, 15, 16, 17, 100, 1030), d.dtype()
    x, w = d.array(*shape, K, dtype=dtype), d.array(N, K, dtype=dtype)
    return Call((x, w), {"out_dtype": d.pick((None, mx.float32, dtype))}, near_sum)


# The largest call of a kind that the Metal kernel takes
LIMITS = {"rows": (128, lambda n: dense_matmul(mx.zeros((n, 64)), mx.zeros((32, 64))))}

# What bench/bench_dense_matmul.py has to say that its SMALL call moves: 128 rows of 1536 weights, 6
# rows of x, 6 * 128 results, all of two bytes
BENCH_BYTES = (128 * 1536 + 6 * 1536 + 6 * 128) * 2
