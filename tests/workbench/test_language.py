"""Metal's language and library, as far as kernels use them."""

import numpy as np
import pytest
from snippets import PREAMBLE, run, source

import workbench
from workbench import Buffer, CompileError, Launch

A = np.random.default_rng(0).uniform(-2, 2, 64).astype(np.float32)
I = np.arange(64)  # noqa: E741
LANE = I % 32


def values(*expressions, **about):
    """Each expression's value in all 64 threads."""
    body = "".join(f"o[{64 * j} + i] = {e};\n" for j, e in enumerate(expressions))
    n = 64 * len(expressions)
    a = np.concatenate([A, np.zeros(n - 64, np.float32)])
    outputs, report = run(body, n=n, groups=1, a=a, **about)
    assert report.findings == []
    return outputs["o"].reshape(len(expressions), 64)


def test_float_functions():
    names = [
        *("exp", "exp2", "sin", "cos", "tanh", "atan", "sinh"),
        *("floor", "ceil", "trunc", "rint", "fabs", "sign"),
    ]
    got = values(*(f"{name}(a[i])" for name in names))
    numpy_names = {"atan": "arctan", "fabs": "abs"}
    for name, row in zip(names, got, strict=True):
        function = getattr(np, numpy_names.get(name, name))
        np.testing.assert_allclose(row, function(A), rtol=1e-6, atol=1e-7, err_msg=name)


def test_functions_of_several_arguments():
    got = values(
        "fma(a[i], 2.0f, 1.0f)",
        "clamp(a[i], -1.0f, 1.0f)",
        "mix(a[i], 1.0f, 0.25f)",
        "select(a[i], 5.0f, a[i] < 0)",
        "max(a[i], 0.5f) + min(int(i), 3)",
        "pow(fabs(a[i]), 3.0f)",
        "precise::rsqrt(fabs(a[i])) - fast::divide(1.0f, a[i])",
        "max(NAN, a[i])",
    )
    expected = [
        A * 2 + 1,
        np.clip(A, -1, 1),
        A + (1 - A) / 4,
        np.where(A < 0, 5, A),
        np.maximum(A, 0.5) + np.minimum(I, 3),
        np.abs(A) ** 3,
        1 / np.sqrt(np.abs(A)) - 1 / A,
        A,
    ]
    for row, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(row, right, rtol=1e-5, atol=1e-6)


def test_integers_and_bits():
    got = values(
        "popcount(i) + clz(uint(i)) + ctz(i | 64)",
        "mulhi(i << 28, 16u) + rotate(i, 31u) % 1000",
        "as_type<float>(as_type<uint>(a[i]) ^ 0x80000000u)",
        "extract_bits(i, 1u, 3u)",
        "(7u - 9u > 0u) + (char(200) < 0) + (uchar(300) == 44)",
    )
    popcount = [bin(i).count("1") for i in range(64)]
    clz = [32 - int(i).bit_length() for i in range(64)]
    ctz = [((i | 64) & -(i | 64)).bit_length() - 1 for i in range(64)]
    np.testing.assert_array_equal(got[0], np.add(popcount, np.add(clz, ctz)))
    rotated = (I >> 1 | (I & 1) << 31) % 1000
    np.testing.assert_array_equal(got[1], ((I << 28) % 2**32 * 16 >> 32) + rotated)
    np.testing.assert_array_equal(got[2], -A)
    np.testing.assert_array_equal(got[3], I >> 1 & 7)
    np.testing.assert_array_equal(got[4], np.full(64, 3))


def test_vectors():
    got = values(
        "dot(float4(a[i], 1, float2(2, 3)), float4(1, 2, 3, 4))",
        "float4(uchar4(1, 2, 3, uchar(i)))[3] + float3(2).z",
        "(float2(a[i], i) * 2.0f).yx.x",
        "float4(as_type<uchar4>(uint(0x04030201 + i))).w + half2(1.5h, 2.0h).y",
        "length(float2(3, 4)) + all(int2(1, 0) == int2(1, 0)) + any(bool2(false, true))",
        "vec<float, 4>(a[i], 0, 0, 1).x + (float)ushort2(3, 4).y",
    )
    expected = [A + 2 + 6 + 12, I + 2, 2 * I, np.full(64, 6), np.full(64, 7), A + 4]
    for row, right in zip(got, expected, strict=True):
        np.testing.assert_allclose(row, right, rtol=1e-6)


def test_half_and_bfloat_round_after_every_operation():
    got = values(
        "half(a[i]) * half(3) + half(0.1h)",
        "float(bfloat(a[i]) * bfloat(3.0f) + 0.1bf)",
        "float(static_cast<bfloat>(half(a[i])))",
    )
    half = A.astype(np.float16)
    np.testing.assert_array_equal(got[0], half * np.float16(3) + np.float16(0.1))

    def bfloat(x):
        bits = np.float32(x).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)

    right = bfloat(bfloat(bfloat(A) * np.float32(3)) + bfloat(np.float32(0.1)))
    np.testing.assert_array_equal(got[1], right)
    np.testing.assert_array_equal(got[2], bfloat(half.astype(np.float32)))


def test_simd_functions():
    got = values(
        "simd_sum(float(i))",
        "simd_max(a[i]) - simd_min(a[i])",
        "simd_product(1.0f + (lane == 5))",
        "simd_prefix_inclusive_sum(float(i))",
        "simd_prefix_exclusive_sum(float(i))",
        "simd_and(i | 1) + simd_or(i & 6) + simd_xor(i)",
        "quad_sum(float(i)) + quad_max(i)",
    )
    rows = I.reshape(2, 32)
    two = A.reshape(2, 32)
    quads = I.reshape(16, 4)
    expected = [
        np.repeat(rows.sum(1), 32),
        np.repeat(two.max(1) - two.min(1), 32),
        np.full(64, 2),
        np.cumsum(rows, 1).ravel(),
        (np.cumsum(rows, 1) - rows).ravel(),
        np.repeat([1 + 6 + 0, 33 + 6 + 0], 32),
        np.repeat(quads.sum(1) + quads.max(1), 4),
    ]
    for row, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(row, right.astype(np.float32))


def test_shuffles():
    got = values(
        "simd_shuffle(a[i], ushort((lane * 7 + 3) % 32))",
        "simd_shuffle_xor(a[i], 5)",
        "simd_shuffle_down(a[i], 4)",
        "simd_shuffle_up(a[i], 4)",
        "simd_shuffle_rotate_down(a[i], 9)",
        "simd_shuffle_rotate_up(a[i], 9)",
        "simd_broadcast(a[i], 3) + simd_broadcast_first(a[i])",
        "simd_shuffle_and_fill_up(a[i], -a[i], 2)",
        "simd_shuffle_and_fill_down(a[i], -a[i], 2)",
        "quad_shuffle_xor(a[i], 1) + quad_broadcast(a[i], 2)",
    )
    base = I - LANE

    def of(lane):
        return A[base + lane]

    expected = [
        of((LANE * 7 + 3) % 32),
        of(LANE ^ 5),
        of(np.where(LANE + 4 < 32, LANE + 4, LANE)),
        of(np.where(LANE >= 4, LANE - 4, LANE)),
        of((LANE + 9) % 32),
        of((LANE - 9) % 32),
        of(3 + 0 * LANE) + of(0 * LANE),
        np.where(LANE >= 2, of((LANE - 2) % 32), -of((LANE - 2) % 32)),
        np.where(LANE < 30, of((LANE + 2) % 32), -of((LANE + 2) % 32)),
        A[I ^ 1] + A[I // 4 * 4 + 2],
    ]
    for row, right in zip(got, expected, strict=True):
        np.testing.assert_array_equal(row, right)


def test_votes():
    got = values(
        "popcount(uint((ulong)simd_ballot(a[i] > 0)))",
        "simd_any(a[i] > 1.9f) + 2 * simd_all(a[i] < 3) + 4 * simd_is_first()",
    )
    positive = (A > 0).reshape(2, 32).sum(1)
    np.testing.assert_array_equal(got[0], np.repeat(positive, 32))
    any_large = np.repeat((A > 1.9).reshape(2, 32).any(1), 32)
    np.testing.assert_array_equal(got[1], any_large + 2 + 4 * (LANE == 0))


def test_a_divided_simdgroup_gives_what_its_lanes_give():
    body = "float x; if (lane < 8) x = simd_sum(1.0f); else x = simd_sum(2.0f); o[i] = x;"
    outputs, _ = run(body, options={"allow": {"simd-divergence"}})
    np.testing.assert_array_equal(outputs["o"], np.where(LANE < 8, 8, 48))


def test_barriers_loops_and_early_exchange():
    body = """threadgroup float t[64];
    t[l] = a[i];
    for (uint step = 32; step > 0; step /= 2) {
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (l < step) t[l] += t[l + step];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    o[i] = t[0];"""
    a = np.arange(256, dtype=np.float32)
    for order in ("forward", "reverse", "random"):
        outputs, report = run(body, n=256, a=a, options={"order": order})
        assert report.findings == []
        np.testing.assert_array_equal(outputs["o"], np.repeat(a.reshape(4, 64).sum(1), 64))


def test_atomics():
    body = """threadgroup atomic_int t;
    if (l == 0) atomic_store_explicit(&t, 100, memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    atomic_fetch_max_explicit(&t, int(100 + l), memory_order_relaxed);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float old = 0;
    while (!atomic_compare_exchange_weak_explicit(
        c, &old, old + 0.5f, memory_order_relaxed, memory_order_relaxed)) {
    }
    atomic_fetch_and_explicit((device atomic_uint*)(d), ~(1u << lane), memory_order_relaxed);
    o[i] = atomic_load_explicit(&t, memory_order_relaxed);"""
    outputs, report = run(
        body,
        arguments=", device atomic<float>* c [[buffer(3)]], device uint* d [[buffer(4)]]",
        buffers=(Buffer("c", "inout", (1,), "float32"), Buffer("d", "inout", (1,), "uint32")),
        arrays={"c": np.zeros(1, np.float32), "d": np.full(1, 2**32 - 1, np.uint32)},
    )
    assert report.findings == []
    np.testing.assert_array_equal(outputs["o"], np.full(64, 163))
    assert outputs["c"][0] == 32 and outputs["d"][0] == 0


def test_simdgroup_matrices():
    text = f"""{PREAMBLE}
kernel void product(const device half* a [[buffer(0)]], const device float* b [[buffer(1)]],
    device float* c [[buffer(2)]]) {{
  simdgroup_half8x8 left;
  simdgroup_float8x8 right, sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
  threadgroup float copy[64];
  for (int k = 0; k < 4; ++k) {{
    simdgroup_load(left, a + 8 * k, 32);
    simdgroup_load(right, b, 32, ulong2(8 * k, 0), true);
    simdgroup_multiply_accumulate(sum, left, right, sum);
  }}
  simdgroup_store(sum, copy, 8);
  simdgroup_barrier(mem_flags::mem_threadgroup);
  simdgroup_load(sum, copy, 8);
  sum.thread_elements()[0] += 1;
  simdgroup_store(sum, c, 8);
}}"""
    generator = np.random.default_rng(1)
    a = generator.integers(-8, 8, (8, 32)).astype(np.float16)
    b = generator.integers(-8, 8, (8, 32)).astype(np.float32)
    launch = Launch(
        source(text),
        "product",
        (1, 1, 1),
        (32, 1, 1),
        (
            Buffer("a", "in", (8, 32), "float16"),
            Buffer("b", "in", (8, 32), "float32"),
            Buffer("c", "out", (8, 8), "float32"),
        ),
    )
    outputs, _ = workbench.run(launch, {"a": a, "b": b}, mode="check")
    even = np.arange(8) % 2 == 0
    np.testing.assert_array_equal(outputs["c"], a.astype(np.float32) @ b.T + even)


CONSTANTS = """constant bool flag [[function_constant(0)]];
constant int count [[function_constant(3)]];
constant int chosen = is_function_constant_defined(count) ? 10 : 20;"""


def test_function_constants():
    body = "if (flag) o[i] = count; else o[i] = is_function_constant_defined(count) ? 5 : 6;"
    for constants, right in [({0: True, 3: 42}, 42), ({0: False, 3: 1}, 5), ({0: False}, 6)]:
        outputs, _ = run(body, before=CONSTANTS, constants=constants)
        assert (outputs["o"] == right).all()


def test_a_function_constant_that_is_used_needs_a_value():
    with pytest.raises(ValueError, match=r"k must be given function constant 3 \(count\)\."):
        run("o[i] = count;", before=CONSTANTS, constants={0: True})


def test_a_function_constant_is_no_constant_expression():
    with pytest.raises(CompileError, match="variable length array"):
        run("threadgroup float t[count]; o[i] = 0;", before=CONSTANTS, constants={3: 4})


def test_templates_host_names_and_nested_threadgroup_variables():
    text = f"""{PREAMBLE}
template <typename T, int N>
struct Stage {{
  enum {{ size = N + 1 }};
  static void fill(threadgroup T (&t)[size], uint l) {{ if (l < size) t[l] = l; }}
}};
template <typename T, int N>
[[kernel, max_total_threads_per_threadgroup(64)]] void twice(
    device T* o [[buffer(0)]], uint2 p [[thread_position_in_grid]],
    ushort l [[thread_index_in_threadgroup]]) {{
  threadgroup T t[Stage<T, N>::size], s;
  Stage<T, N>::fill(t, l);
  if (l == 0) s = N;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  o[p.y * 8 + p.x] = t[l % N] * 2 + s;
}}
#define instantiate(name, ...) \\
  template [[host_name(name)]] [[kernel]] decltype(twice<__VA_ARGS__>) twice<__VA_ARGS__>;
instantiate("twice_" "float", float, 3)
instantiate("twice_half", half, 5)
"""
    for kernel, dtype, n in [
        ("twice_float", "float32", 3),
        ("twice_half", "float16", 5),
        ("twice<int, 7>", "int32", 7),
    ]:
        buffer = Buffer("o", "out", (4, 8), dtype)
        launch = Launch(source(text), kernel, (2, 2, 1), (4, 2, 1), (buffer,))
        outputs, _ = workbench.run(launch, {}, mode="check")
        y, x = np.divmod(np.arange(32), 8)
        thread = y % 2 * 4 + x % 4
        np.testing.assert_array_equal(outputs["o"].ravel(), thread % n * 2 + n)


def test_bfloat_buffers_travel_as_bits():
    text = f"""{PREAMBLE}
kernel void twice(const device bfloat* a [[buffer(0)]], device bfloat* o [[buffer(1)]],
    uint i [[thread_position_in_grid]]) {{ o[i] = a[i] * bfloat(2); }}"""
    buffers = (Buffer("a", "in", (32,), "bfloat16"), Buffer("o", "out", (32,), "bfloat16"))
    launch = Launch(source(text), "twice", (1, 1, 1), (32, 1, 1), buffers)
    bits = (np.arange(32, dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16)
    outputs, _ = workbench.run(launch, {"a": bits})
    twice = (outputs["o"].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(twice, 2 * np.arange(32))


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("thread const float* p = a; o[i] = *p;", "cannot initialize"),
        ("threadgroup float t[4]; device float* p = t; o[i] = *p;", "cannot initialize"),
        ("device const uint* p = &n; o[i] = *p;", "cannot initialize"),
        ("a[0] = 1;", "read-only variable is not assignable"),
        ("o[i] = no_such_function(a[i]);", "undeclared identifier 'no_such_function'"),
        ("o[i] = as_type<float>(half(1));", "different sizes"),
        ("float4 v = float4(1, 2, 3); o[i] = v.x;", "wrong number of elements"),
        ("double d = a[i]; o[i] = d;", "Metal has no `double`"),
        ("threadgroup float t[2] = {1, 2}; o[i] = t[0];", "must not have an initialiser"),
    ],
)
def test_what_metal_refuses(body, complaint):
    with pytest.raises(CompileError, match=complaint) as refused:
        run(body)
    assert ".metal:9" in str(refused.value)


def test_a_kernel_parameter_needs_an_address_space():
    text = f"{PREAMBLE}kernel void k(float* o [[buffer(0)]]) {{ o[0] = 1; }}"
    buffers = (Buffer("o", "out", (1,), "float32"),)
    with pytest.raises(CompileError, match=r"parameter `float \* o` must have an address space"):
        workbench.run(Launch(source(text), "k", (1, 1, 1), (1, 1, 1), buffers), {})


def test_contraction():
    # x * x - y with y = round(x * x): 0 when rounded twice, the rounding error when once.
    x = np.float32(1) + np.float32(2) ** -12
    a = np.full(64, x, np.float32)
    body = f"o[i] = a[i] * a[i] - {float(x * x):.9e}f;"
    exact = np.float64(x) * np.float64(x) - np.float64(x * x)
    for contract, right in [("off", 0), ("fast", exact)]:
        outputs, _ = run(body, a=a, mode="fast", options={"contract": contract})
        np.testing.assert_array_equal(outputs["o"], np.full(64, right, np.float32))
