"""What `run` takes, returns and refuses."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from snippets import launch, run, source

import workbench
from workbench import Buffer

A = np.arange(64, dtype=np.float32)
COPY = "o[i] = a[i];"


def test_fast_and_checked_runs_agree_in_every_order():
    body = "threadgroup float t[64]; t[l] = a[i]; %s o[i] = simd_sum(t[63 - l]) * n;"
    body %= "threadgroup_barrier(mem_flags::mem_threadgroup);"
    expected = None
    for mode in ("fast", "check", "count"):
        for order in ("forward", "reverse", "random"):
            outputs, _ = run(body, n=512, mode=mode, options={"order": order, "seed": 12345})
            expected = outputs["o"] if expected is None else expected
            np.testing.assert_array_equal(outputs["o"], expected)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_every_order_runs_every_thread_of_every_group_once(order):
    body = "uint at = atomic_fetch_add_explicit(c, 1u, memory_order_relaxed); o[at] = i;"
    about = {
        "arguments": ", device atomic_uint* c [[buffer(3)]]",
        "buffers": (Buffer("c", "inout", (1,), "uint32"),),
        "arrays": {"c": np.zeros(1, np.uint32)},
    }
    outputs, _ = run(body, n=7 * 64, mode="fast", options={"order": order, "seed": 99}, **about)
    ran = outputs["o"].astype(int)
    assert sorted(ran) == list(range(448))
    assert (list(ran) == sorted(ran)) == (order == "forward")
    assert (list(ran) == sorted(ran, reverse=True)) == (order == "reverse")


def test_threads_in_three_dimensions():
    one = launch(
        "uint at = (p.z * s.y + p.y) * s.x + p.x; o[at] = t + 100 * g3.x + 10 * g3.y + g3.z;",
        n=2 * 3 * 4 * 24,
        arguments=""",
        uint3 p [[thread_position_in_grid]], uint3 s [[threads_per_grid]],
        uint t [[thread_index_in_threadgroup]], uint3 g3 [[threadgroup_position_in_grid]]""",
    )
    one = replace(one, grid=(2, 3, 4), threadgroup=(4, 3, 2))
    outputs, _ = workbench.run(one, {"a": np.zeros(576, np.float32)}, mode="check")
    z, y, x = np.meshgrid(*map(np.arange, (8, 9, 8)), indexing="ij")
    thread = (z % 2 * 3 + y % 3) * 4 + x % 4
    group = 100 * (x // 4) + 10 * (y // 3) + z // 2
    np.testing.assert_array_equal(outputs["o"], (thread + group).ravel())


def test_inout_starts_as_a_copy():
    one = launch(COPY.replace("=", "+="))
    one = replace(
        one, buffers=(one.buffers[0], replace(one.buffers[1], role="inout"), one.buffers[2])
    )
    o = np.ones(64, np.float32)
    for mode in ("fast", "check"):
        outputs, _ = workbench.run(one, {"a": A, "o": o}, mode=mode)
        np.testing.assert_array_equal(outputs["o"], A + 1)
        assert (o == 1).all()


def test_arrays_that_start_anywhere():
    shifted = np.frombuffer(bytes(4) + A.tobytes(), np.float32)[1:]
    assert shifted.ctypes.data % 16
    body = "o[i] = (*(const device float4*)(a + i / 4 * 4))[i % 4];"
    outputs, _ = run(body, a=shifted, mode="fast")
    np.testing.assert_array_equal(outputs["o"], A)


def test_any_object_with_the_attributes_of_a_launch_will_do():
    @dataclass
    class Lookalike:
        library: str
        kernel: str
        grid: list
        threadgroup: list
        buffers: list
        constants: dict
        threadgroup_memory: list

    one = launch(COPY)
    other = Lookalike(one.library, "k", [1, 1, 1], [64, 1, 1], list(one.buffers), {}, [])
    outputs, _ = workbench.run(other, {"a": A})
    np.testing.assert_array_equal(outputs["o"], A)


def refused(message, arrays=None, options=None, **changes):
    with pytest.raises(ValueError, match=message):
        workbench.run(
            replace(launch(COPY), **changes),
            {"a": A} if arrays is None else arrays,
            **(options or {}),
        )


def test_what_is_refused():
    refused(r"mode must be fast, check or count but got loud\.", options={"mode": "loud"})
    refused(r"order must be .* but got sorted\.", options={"order": "sorted"})
    refused(r"contract must be off or fast but got on\.", options={"contract": "on"})
    refused(r"library must be a file of metal/ but got no_such_op\.", library="no_such_op")
    refused(r"kernel must be one of k but got other\.", kernel="other")
    refused(r"grid must be three positive numbers but got \(0, 1, 1\)\.", grid=(0, 1, 1))
    refused(r"threadgroup must have 1\.\.1024 threads", threadgroup=(1025, 1, 1))
    refused(r"arrays must have `a`\.", arrays={})
    refused(r"`a` must be float32 \(64,\) .* but got float64", arrays={"a": A.astype(float)})
    refused(
        r"`a` must be float32 \(64,\) .* but got float32 \(8, 8\)", arrays={"a": A.reshape(8, 8)}
    )
    refused(r"`a` must be contiguous\.", arrays={"a": np.repeat(A, 2)[::2]})
    two = launch(COPY).buffers[:2]
    refused(r"k must be given buffers \[0, 1, 2\] but the launch has 2\.", buffers=two)
    four = (*launch(COPY).buffers, two[0])
    refused(r"k must be given buffers \[0, 1, 2\] but the launch has 4\.", buffers=four)
    refused(r"threadgroup_memory must be for one of \[\]", threadgroup_memory=((0, 16),))


NAMESPACED = """#include <metal_stdlib>
namespace ours {
using namespace metal;
inline float max(float a, float) { return a + 1.0f; }
constant constexpr int step = 1;
[[host_name("plain")]] [[kernel, max_total_threads_per_threadgroup(32)]] void add(
    const device float* a [[buffer(0)]],
    device float* o [[buffer(1)]],
    constant uint& n [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  o[i] = max(a[i], 0.0f);
}
template <int by>
[[kernel, max_total_threads_per_threadgroup(64)]] void add_some(
    const device float* a [[buffer(0)]],
    device float* o [[buffer(1)]],
    constant uint& n [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  o[i] = a[i] + by;
}
template [[host_name("some")]] [[kernel]] decltype(add_some<step>) add_some<step>;
} // namespace ours
"""


def test_kernels_of_a_namespace_and_the_threads_that_they_say():
    one = replace(launch(COPY), library=source(NAMESPACED))
    for kernel, threads in (("plain", 32), ("some", 64), ("add_some<1>", 64)):
        named = replace(one, kernel=kernel, threadgroup=(threads, 1, 1), grid=(64 // threads, 1, 1))
        outputs, _ = workbench.run(named, {"a": A})
        np.testing.assert_array_equal(outputs["o"], A + 1)
        text = rf"at most {threads} threads, by {kernel}'s .*, but got {threads + 1}\."
        with pytest.raises(ValueError, match=text):
            workbench.run(replace(named, threadgroup=(threads + 1, 1, 1)), {"a": A})


def test_threadgroup_arguments_need_a_size():
    with pytest.raises(ValueError, match=r"threadgroup_memory must have sizes for \[1\]\."):
        run("s[l] = 0; o[i] = s[l];", arguments=", threadgroup float* s [[threadgroup(1)]]")
