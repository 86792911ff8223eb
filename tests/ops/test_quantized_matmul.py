"""quantized_matmul: kernel against reference, edges, row-stability, errors."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near_sum

from pyengine import _ext, ops
from pyengine.ops import dispatch, quantized_matmul, quantized_matmul_reference
from pyengine.ops.quantized_matmul import PLANES

# Times sum |x * w|, the scale of the sum's rounding errors. float32: both sides add K products in
# different orders, each within about K / 16 roundings of the exact sum. float16, bfloat16: the same
# sum rounded once to 11 or 8 bits, where the two sides may fall on neighbouring values.
TOLERANCE = {mx.float32: 4e-6, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
# Of rows of bfloat16 that are multiplied as whole numbers: an element is rounded to 2^-15 of the
# largest of 64, which is some three times the mean of those drawn here (csrc/cpu/planes.h)
PLANES_TOLERANCE = 2.0**-13
DTYPES = list(TOLERANCE)
BITS = [8, 6, 4]
GROUPS = [32, 64, 128]


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def quantized(seed, N, K, group_size=64, bits=8, dtype=mx.float32):
    return mx.quantize(normal(seed, N, K, dtype=dtype), group_size, bits)


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def assert_close(out, expected, x, w, scales, biases, group_size, bits) -> None:
    assert out.dtype == expected.dtype and out.shape == expected.shape
    weights = mx.dequantize(w, *(a.astype(mx.float32) for a in (scales, biases)), group_size, bits)
    size = np.array(mx.abs(x.astype(mx.float32)) @ mx.abs(weights).T)
    a, b = (np.array(y.astype(mx.float32)) for y in (out, expected))
    tolerance = TOLERANCE[out.dtype]
    if x.dtype == mx.bfloat16 and _ext.instruction_set() in PLANES:
        tolerance = max(tolerance, PLANES_TOLERANCE)
    assert np.all(np.abs(a - b) <= tolerance * size)


@pytest.fixture
def restore():
    """Threads and instruction set as they were."""
    threads, name = _ext.threads(), _ext.instruction_set()
    yield
    _ext.set_threads(threads)
    _ext.use_instruction_set(name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
def test_matches_reference(group_size, bits, dtype):
    for rows, N, groups in [(1, 1, 1), (3, 7, 3), (4, 66, 2), (16, 33, 5), (17, 40, 1), (33, 5, 2)]:
        K = groups * group_size
        x = normal(rows, rows, K, dtype=dtype)
        q = quantized(N, N, K, group_size, bits, dtype)
        for out_dtype in (None, mx.float32):
            out = quantized_matmul(x, *q, group_size, bits, out_dtype=out_dtype)
            expected = quantized_matmul_reference(x, *q, group_size, bits, out_dtype=out_dtype)
            assert_close(out, expected, x, *q, group_size, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("K", [5376, 21504])  # model and feed-forward width of Gemma 4 31B
def test_real_widths(K, bits):
    x = normal(1, 6, K, dtype=mx.bfloat16)
    q = quantized(2, 24, K, 64, bits, mx.bfloat16)
    expected = quantized_matmul_reference(x, *q, 64, bits)
    assert_close(quantized_matmul(x, *q, 64, bits), expected, x, *q, 64, bits)


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_every_weight_lies_where_mlx_packs_it(bits, group_size, restore):
    """One-hot rows read the matrix back; small powers of two make every number exact."""
    N, K = 9, 3 * group_size
    rng = np.random.default_rng(3)
    w = mx.array(rng.integers(0, 2**32, size=(N, K * bits // 32), dtype=np.uint32))
    scales = mx.array(2.0 ** rng.integers(-3, 3, size=(N, 3))).astype(mx.float32)
    biases = mx.array(rng.integers(-8, 8, size=(N, 3)).astype(np.float32))
    expected = np.array(mx.dequantize(w, scales, biases, group_size, bits))
    for name in _ext.instruction_sets():
        _ext.use_instruction_set(name)
        out = quantized_matmul(mx.eye(K), w, scales, biases, group_size, bits)
        assert np.array_equal(np.array(out).T, expected), name


@pytest.mark.parametrize("bits", BITS)
def test_error_stays_below_its_bound(bits, restore):
    """K / 16 roundings per lane, four where they meet, one per weight (portable: more)."""
    K = 4096
    x, q = normal(4, 2, K), quantized(5, 32, K, 64, bits)
    codes = mx.dequantize(q[0], mx.ones_like(q[1]), mx.zeros_like(q[2]), 64, bits)
    scales, biases = (np.repeat(np.array(a, np.float64), 64, axis=1) for a in q[1:])
    products, x64 = np.array(codes, np.float64) * scales, np.array(x, np.float64)
    bound = (K / 16 + 8) * 2.0**-24 * (np.abs(x64) @ (np.abs(products) + np.abs(biases)).T)
    for name in _ext.instruction_sets():
        _ext.use_instruction_set(name)
        out = np.array(quantized_matmul(x, *q, 64, bits))
        assert np.all(np.abs(out - x64 @ (products + biases).T) <= bound), name


def assert_rows_stable(row_counts, x, q, group_size, bits) -> None:
    """First and last rows of every count against the same rows computed alone."""
    last = x.shape[0]
    alone = [bits_of(quantized_matmul(x[m : m + 1], *q, group_size, bits)) for m in range(last)]
    for rows in row_counts:
        for first in {0, last - rows}:
            out = bits_of(quantized_matmul(x[first : first + rows], *q, group_size, bits))
            assert np.array_equal(out, np.concatenate(alone[first : first + rows])), rows


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group_size, N, K", [(64, 45, 512), (32, 37, 352), (128, 70, 384)])
def test_rows_are_stable(group_size, N, K, dtype, bits):
    x = normal(6, 33, K, dtype=dtype)
    q = quantized(7, N, K, group_size, bits, dtype)
    assert_rows_stable([*range(1, 18), 33], x, q, group_size, bits)


@pytest.mark.parametrize("bits", BITS)
def test_rows_are_stable_in_every_instruction_set(bits, restore):
    x, q = normal(6, 17, 352), quantized(7, 37, 352, 32, bits)
    for name in _ext.instruction_sets():
        _ext.use_instruction_set(name)
        assert_rows_stable([2, 3, 4, 5, 8, 9, 16, 17], x, q, 32, bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("K", [32, 224, 256, 288, 512, 544, 800, 4128])
def test_blocks_of_k_and_of_columns(K, bits, restore):
    """More rows than a register's worth go through blocks of 32 columns and 256, 512 or 4096 k."""
    x, q = normal(20, 16, K), quantized(21, 71, K, 32, bits)
    expected = quantized_matmul_reference(x, *q, 32, bits)
    for name in _ext.instruction_sets():
        _ext.use_instruction_set(name)
        assert_close(quantized_matmul(x, *q, 32, bits), expected, x, *q, 32, bits)
        assert_rows_stable([4, 5, 7, 11, 16], x, q, 32, bits)


def test_more_rows_than_are_made_ready_together(restore):
    """128 rows share a reading of the weights; the rest of them come after."""
    x, q = normal(26, 150, 128), quantized(27, 70, 128)
    for name in _ext.instruction_sets():
        _ext.use_instruction_set(name)
        assert_rows_stable([127, 128, 129, 150], x, q, 64, 8)


def test_threads_change_nothing(restore):
    x, q = normal(8, 20, 512), quantized(9, 301, 512)
    assert _ext.quantized_matmul_plan(20, 301, 512, 64, 8).groups > 4
    _ext.set_threads(1)
    expected = bits_of(quantized_matmul(x, *q))
    for threads in (2, 3, 8):
        _ext.set_threads(threads)
        for _ in range(10):
            assert np.array_equal(bits_of(quantized_matmul(x, *q)), expected), threads


def test_other_rows_may_hold_anything():
    x, q = normal(8, 8, 256), quantized(9, 65, 256)
    expected = bits_of(quantized_matmul(x, *q))
    for value in (float("nan"), float("inf"), 3e38):
        spoilt = mx.array(x)
        spoilt[3] = value
        out = quantized_matmul(spoilt, *q)
        keep = [0, 1, 2, 4, 5, 6, 7]
        assert np.array_equal(bits_of(out)[keep], expected[keep])
        assert not np.any(np.isfinite(np.array(out)[3])) or value == 3e38


def test_fused_instruction_sets_agree(restore):
    """AVX-512, AVX2 and NEON share lanes, fma and tree; portable rounds products too."""
    x, q = normal(10, 5, 1376), quantized(11, 130, 1376, 32)
    out = {}
    for name in _ext.instruction_sets():
        _ext.use_instruction_set(name)
        out[name] = quantized_matmul(x, *q, 32)
    fused = [bits_of(y) for name, y in out.items() if name != "portable"]
    assert all(np.array_equal(y, fused[0]) for y in fused)
    for y in out.values():
        assert_close(y, quantized_matmul_reference(x, *q, 32), x, *q, 32, 8)


def test_strided_inputs():
    q = quantized(12, 33, 128)
    base = normal(13, 4, 6, 256)
    for x in (base[:, 1:4, ::2], base[:, :, 128:].transpose(1, 0, 2), base[..., 127::-1]):
        assert np.array_equal(
            bits_of(quantized_matmul(x, *q)), bits_of(quantized_matmul(mx.contiguous(x), *q))
        )
    columns = normal(14, 128, 3).T
    assert np.array_equal(
        bits_of(quantized_matmul(columns, *q)),
        bits_of(quantized_matmul(mx.contiguous(columns), *q)),
    )
    wide = mx.broadcast_to(normal(15, 1, 128), (5, 128))
    assert np.array_equal(
        bits_of(quantized_matmul(wide, *q)),
        np.repeat(bits_of(quantized_matmul(wide[:1], *q)), 5, 0),
    )


def test_sliced_weights():
    x, q = normal(16, 2, 128), quantized(17, 64, 128)
    mx.eval(q)
    expected = bits_of(quantized_matmul(x, *q))
    assert np.array_equal(bits_of(quantized_matmul(x, *(a[::2] for a in q))), expected[:, ::2])
    assert np.array_equal(bits_of(quantized_matmul(x, *(a[5:20] for a in q))), expected[:, 5:20])


def test_any_number_of_leading_dimensions():
    q = quantized(18, 10, 64)
    x = normal(19, 2, 3, 64)
    out = quantized_matmul(x, *q)
    assert out.shape == (2, 3, 10)
    assert np.array_equal(
        bits_of(out).reshape(6, 10), bits_of(quantized_matmul(x.reshape(6, 64), *q))
    )
    assert quantized_matmul(x[0, 0], *q).shape == (10,)
    assert quantized_matmul(x[:0], *q).shape == (0, 3, 10)
    mx.eval(quantized_matmul(x[:0], *q))
    empty = quantized_matmul(x[..., :0], *(a[:, :0] for a in q))  # a sum of nothing
    assert empty.shape == (2, 3, 10) and not np.any(np.array(empty))


def test_inside_compile():
    x, q = normal(20, 3, 64), quantized(21, 8, 64)
    compiled = mx.compile(lambda x: quantized_matmul(x + 1, *q) * 2)
    assert np.array_equal(bits_of(compiled(x)), bits_of(quantized_matmul(x + 1, *q) * 2))


def test_streams_share_the_pool():
    """Two streams at once: one gets the pool, the other works alone, both are right."""
    x, q = normal(22, 4, 512), quantized(23, 600, 512)
    expected = bits_of(quantized_matmul(x, *q))
    mx.eval(x, q)
    wrong: list[int] = []

    def run() -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            for i in range(20):
                out = [quantized_matmul(x, *q) for _ in range(20)]
                mx.eval(out)
                if not all(np.array_equal(bits_of(y), expected) for y in out):
                    wrong.append(i)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_use_reference():
    x, q = normal(24, 2, 64), quantized(25, 8, 64)
    ops.use("reference")
    try:
        out = quantized_matmul(x, *q)
        with pytest.raises(
            ValueError, match=r"\[quantized_matmul\] bits must be 4, 6 or 8 but got 5\."
        ):
            quantized_matmul(x, *q, bits=5)
    finally:
        ops.use("native")
    assert np.array_equal(bits_of(out), bits_of(quantized_matmul_reference(x, *q)))


def test_on_a_gpu_mlx_serves_a_prefill(monkeypatch):
    """No GPU here: the answer to "which device" is replaced, what follows from it is real."""
    x, q = normal(24, 129, 64, dtype=mx.float16), quantized(25, 8, 64, dtype=mx.float16)
    block = quantized_matmul(x[:128], *q)
    monkeypatch.setattr(dispatch.mx, "default_device", lambda: mx.gpu)
    assert np.array_equal(bits_of(quantized_matmul(x[:128], *q)), bits_of(block))
    for out_dtype in (None, mx.float32):
        dtype = out_dtype or mx.float16
        wide = [a.astype(dtype) for a in (x, *q[1:])]
        expected = mx.quantized_matmul(wide[0], q[0], *wide[1:], True, 64, 8)
        out = quantized_matmul(x, *q, out_dtype=out_dtype)
        assert out.dtype == dtype and mx.array_equal(out, expected)
    with pytest.raises(
        ValueError, match=r"\[quantized_matmul\] bits must be 4, 6 or 8 but got 2\."
    ):
        quantized_matmul(x, *q, bits=2)


@pytest.mark.parametrize("M, N, K", [(1, 1, 32), (16, 262144, 5376), (17, 9, 64), (4, 5376, 21504)])
def test_plan_covers_every_column_once(M, N, K):
    plan = _ext.quantized_matmul_plan(M, N, K, 32, 8)
    assert (plan.groups - 1) * plan.columns < N <= plan.groups * plan.columns
    assert (plan.slices - 1) * 16 < M <= plan.slices * 16
    assert plan.scratch >= min(M, 16) * K
    assert plan.group_scratch == plan.columns * (min(M, 16) + 2 * K // 32)
    assert plan.work == min(M, 128) * N * K


X, Q = mx.zeros((2, 64)), quantized(0, 8, 64)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"x": X.astype(mx.int32)}, "x must be float32, float16 or bfloat16 but got int32."),
        ({"x": mx.array(1.0)}, "x must have at least 1 dimension but got 0."),
        (
            {"x": mx.zeros((2, 96))},
            "the last dimension of x must be a multiple of group_size 64 but got 96.",
        ),
        ({"w": Q[0].astype(mx.int32)}, "w must be uint32 but got int32."),
        ({"w": Q[0][0]}, "w must have shape [N, K * bits / 32] but got [16]."),
        ({"w": Q[0][:, :8]}, "w must have shape [8, 16] but got [8, 8]."),
        ({"scales": Q[1][:4]}, "scales must have shape [8, 1] but got [4, 1]."),
        ({"biases": Q[2].T}, "biases must have shape [8, 1] but got [1, 8]."),
        (
            {"scales": Q[1].astype(mx.float16)},
            "scales must have the dtype of x but got float16.",
        ),
        (
            {"biases": Q[2].astype(mx.bfloat16)},
            "biases must have the dtype of x but got bfloat16.",
        ),
        ({"group_size": 16}, "group_size must be 32, 64 or 128 but got 16."),
        ({"bits": 3}, "bits must be 4, 6 or 8 but got 3."),
        (
            {"out_dtype": mx.float16},
            "out_dtype must be float32 or the dtype of x but got float16.",
        ),
    ],
)
def test_errors(change, text):
    arguments = {"x": X, "w": Q[0], "scales": Q[1], "biases": Q[2], **change}
    with pytest.raises(ValueError) as error:
        quantized_matmul(**arguments)
    assert str(error.value) == f"[quantized_matmul] {text}"


def packed_case(d: Draw) -> tuple[mx.Dtype, int, int, int, tuple[int, ...]]:
    group_size, bits = d.packing()
    shape = d.pick(((1,), (2,), (5,), (16,), (17,), (2, 3), (0,), ()))
    return d.dtype(), group_size, bits, group_size * d.size(1, 2, 3, 9), shape


def random_call(d: Draw) -> Call:
    dtype, group_size, bits, K, shape = packed_case(d)
    matrix = d.quantized(d.size(1, 5, 9, 40, 65), K, dtype=dtype, group_size=group_size, bits=bits)
    given = d.integer(group_size), d.integer(bits)
    x = d.array(*shape, K, dtype=dtype)
    return Call((x, *matrix, *given), {"out_dtype": d.pick((None, mx.float32, dtype))}, near_sum)


# The largest call of a kind that the Metal kernel takes
LIMITS = {
    "rows": (
        128,
        lambda n: quantized_matmul(mx.zeros((n, 64)), *mx.quantize(mx.zeros((32, 64)), 64, 8)),
    )
}

# What bench/bench_quantized_matmul.py has to say that its SMALL call moves: 128 rows of 1536
# weights with 24 scales and biases; 6 rows of x and of results
BENCH_BYTES = 128 * (1536 + 24 * 4) + 6 * (3072 + 256)
