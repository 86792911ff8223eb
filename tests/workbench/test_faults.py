"""Every fault that the workbench must catch, planted; and beside it the kernel put right."""

import numpy as np
import pytest
from snippets import run

from workbench import Buffer, Fault

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


def only(report, kind):
    """The one finding, of this kind."""
    assert [finding.kind for finding in report.findings] == [kind]
    return report.findings[0]


def silent(report):
    assert report.findings == []


def test_a_correct_kernel_is_silent():
    outputs, report = run("if (i < n) o[i] = a[i] * 2;")
    silent(report)
    np.testing.assert_array_equal(outputs["o"], np.arange(64) * 2)


def test_read_out_of_bounds_names_line_thread_buffer_and_offset():
    _, report = run("float x = 1;\no[i] = a[i + 1] + x;")
    finding = only(report, "out-of-bounds")
    assert finding.where.endswith(".metal:10")
    assert (finding.buffer, finding.offset, finding.thread) == ("a", 256, 63)
    assert "read of 4 bytes, the buffer has 256" in str(finding)


def test_write_out_of_bounds():
    finding = only(run("o[2 * i] = 1;")[1], "out-of-bounds")
    assert (finding.buffer, finding.offset, finding.thread) == ("o", 256, 32)
    assert finding.message.startswith("write of 4 bytes")


def test_before_the_start():
    finding = only(run("o[i] = a[int(i) - 1];")[1], "out-of-bounds")
    assert (finding.buffer, finding.offset, finding.thread) == ("a", -4, 0)


@pytest.mark.parametrize("index", ["i + (1u << 26)", "int(i) - (1 << 27)"])
def test_far_out_of_bounds_still_names_the_buffer(index):
    assert only(run(f"o[i] = a[{index}];")[1], "out-of-bounds").buffer == "a"


def test_threadgroup_memory_out_of_bounds():
    _, report = run("threadgroup float t[64]; t[l + 1] = a[i]; o[i] = 0;")
    finding = only(report, "out-of-bounds")
    assert (finding.buffer, finding.offset, finding.thread) == ("t", 256, 63)


def test_atomic_out_of_bounds():
    body = "atomic_store_explicit((device atomic_uint*)o + i + 1, 1u, memory_order_relaxed);"
    finding = only(run(body)[1], "out-of-bounds")
    assert (finding.buffer, finding.offset) == ("o", 256)
    assert finding.where.endswith(".metal:9")


def test_whole_objects_out_of_bounds():
    before = "struct Nine { float x[9]; };"
    body = "Nine nine = *((const device Nine*)(a + 60)); o[i] = nine.x[i % 9];"
    finding = only(run(body, before=before)[1], "out-of-bounds")
    assert (finding.buffer, finding.offset) == ("a", 240)


def test_missing_barrier():
    body = "threadgroup float t[64]; t[l] = a[i]; {} o[i] = t[63 - l];"
    _, report = run(body.format(""))
    assert report.kinds() == {"race", "uninitialised-read"}
    race = next(f for f in report.findings if f.kind == "race")
    assert race.buffer == "t" and race.where.endswith(".metal:9") and "thread" in race.other
    outputs, report = run(body.format(BARRIER))
    silent(report)
    np.testing.assert_array_equal(outputs["o"], np.arange(64)[::-1])


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_a_race_is_found_in_every_order(order):
    body = "threadgroup float t[64]; t[l] = a[i]; o[i] = t[l ^ 1];"
    _, report = run(body, options={"order": order})
    assert "race" in report.kinds()


def test_missing_second_barrier_of_a_loop():
    body = f"""threadgroup float t[64]; float sum = 0;
    for (uint k = 0; k < n; k += 16) {{ t[l] = a[i] + k; {BARRIER} sum += t[63 - l]; %s }}
    o[i] = sum;"""
    _, report = run(body % "")
    assert report.kinds() == {"race"}
    assert "write after an unordered read" in {finding.message for finding in report.findings}
    silent(run(body % BARRIER)[1])


def test_wrong_barrier_flag():
    body = "threadgroup float t[64]; t[l] = a[i]; threadgroup_barrier(mem_flags::%s); "
    body += "o[i] = t[63 - l];"
    assert only(run(body % "mem_device")[1], "race").buffer == "t"
    assert only(run(body % "mem_none")[1], "race").buffer == "t"
    silent(run(body % "mem_device | mem_flags::mem_threadgroup")[1])


def test_device_memory_needs_the_device_flag():
    body = "o[i] = a[i]; threadgroup_barrier(mem_flags::%s); float x = o[63 - l]; %s o[i] += x;"
    second = "threadgroup_barrier(mem_flags::mem_device);"
    assert only(run(body % ("mem_threadgroup", second))[1], "race").buffer == "o"
    silent(run(body % ("mem_device", second))[1])


def test_a_simdgroup_barrier_orders_its_simdgroup_only():
    body = "threadgroup float t[64]; t[l] = a[i]; %s o[i] = t[l ^ %d];"
    barrier = "simdgroup_barrier(mem_flags::mem_threadgroup);"
    silent(run(body % (barrier, 1))[1])
    assert "race" in run(body % ("", 1))[1].kinds()
    assert "race" in run(body % (barrier, 32))[1].kinds()
    body = f"threadgroup float t[32]; if (l < 32) t[l] = a[i]; {barrier} o[i] = t[lane];"
    assert only(run(body)[1], "race").message == "read after an unordered write"


def test_race_across_threadgroups():
    _, report = run("o[l] = a[i]; if (g == 0) o[64 + l] = 0;", n=128)
    finding = only(report, "race")
    assert finding.message == "write after an unordered write"
    assert finding.threadgroup == (1, 0, 0) and "threadgroup (0, 0, 0)" in finding.other


def test_no_barrier_orders_threadgroups():
    barrier = "threadgroup_barrier(mem_flags::mem_device);"
    body = f"o[64 + l] = a[i]; if (g == 0) o[l] = 1; {barrier} if (g == 1) o[l] = 2;"
    _, report = run(body, n=128)
    assert {finding.kind for finding in report.findings} == {"race"}
    assert {finding.offset < 256 for finding in report.findings} == {True, False}


def test_reading_what_another_threadgroup_writes():
    _, report = run("o[i] = i; if (g == 1) o[i] = o[0];", n=128)
    assert only(report, "race").message == "read after an unordered write"


def test_writing_the_same_value_is_a_milder_fault():
    body = "o[i] = i; threadgroup float t[1]; t[0] = 7;"
    assert only(run(body)[1], "same-value-race").buffer == "t"
    silent(run(body, options={"allow": {"same-value-race"}})[1])


def test_atomics_do_not_race_with_each_other():
    counter = {
        "arguments": ", device atomic_uint* c [[buffer(3)]]",
        "buffers": (Buffer("c", "inout", (1,), "uint32"),),
        "arrays": {"c": np.zeros(1, np.uint32)},
    }
    body = "atomic_fetch_add_explicit(c, 2u, memory_order_relaxed); o[i] = 0;"
    outputs, report = run(body, n=256, **counter)
    silent(report)
    assert outputs["c"][0] == 512
    plain = "if (i == 5) *(device uint*)c = 7;"
    assert only(run(body + plain, n=256, **counter)[1], "race").buffer == "c"


def test_barrier_that_some_threads_never_reach():
    _, report = run("o[i] = 1; if (l >= 40) return; threadgroup_barrier(mem_flags::mem_none);")
    finding = only(report, "barrier-divergence")
    assert (
        finding.message == "threadgroup_barrier not reached by 24 of 64 threads, which have ended"
    )


def test_different_barriers_in_two_branches():
    body = """o[i] = 1;
    if (l < 32) { threadgroup_barrier(mem_flags::mem_none); o[i] = 2; }
    else { threadgroup_barrier(mem_flags::mem_none); o[i] = 3; }"""
    finding = only(run(body)[1], "barrier-divergence")
    assert {finding.where[-2:], finding.other.split(",")[0][-2:]} == {"10", "11"}


def test_barrier_divergence_is_found_in_fast_mode():
    with pytest.raises(Fault, match="barrier-divergence"):
        run(f"o[i] = 1; if (l >= 40) return; {BARRIER} o[i] = 2;", mode="fast", raising=True)


def test_simdgroup_barrier_divergence():
    body = "o[i] = 1; if (lane < 7) simdgroup_barrier(mem_flags::mem_none); else %s"
    assert only(run(body % BARRIER)[1], "barrier-divergence").thread == 0


def test_simd_divergence():
    body = "float x = 0; if (lane < 16) x = simd_sum(a[i]); o[i] = x;"
    outputs, report = run(body)
    finding = only(report, "simd-divergence")
    assert "lanes 0x0000ffff of 0xffffffff" in finding.message
    # What it computes is what the lanes that take part give.
    outputs, report = run(body, options={"allow": {"simd-divergence"}})
    silent(report)
    assert outputs["o"][0] == sum(range(16)) and outputs["o"][20] == 0


def test_simd_function_after_some_lanes_have_ended():
    _, report = run("o[i] = 0; if (lane == 3) return; o[i] = simd_max(a[i]);")
    assert "0x00000008 have ended" in only(report, "simd-divergence").message


def test_shuffle_from_a_lane_that_takes_no_part():
    body = "float x = 0; if (lane < 16) x = simd_shuffle(a[i], ushort(lane + 16)); o[i] = x;"
    outputs, report = run(body, options={"allow": {"simd-divergence"}})
    assert only(report, "inactive-lane").message.startswith("lane 0 reads lane 16")
    assert np.isnan(outputs["o"][0])


def test_uninitialised_threadgroup_memory():
    body = f"threadgroup float t[64]; if (l < 60) t[l] = a[i]; {BARRIER} o[i] = t[l];"
    finding = only(run(body)[1], "uninitialised-read")
    assert (finding.buffer, finding.offset, finding.thread) == ("t", 240, 60)


def test_threadgroup_memory_does_not_outlive_its_threadgroup():
    body = "threadgroup float t[64]; if (g == 0) t[l] = 1; o[i] = t[l];"
    finding = only(run(body, n=128)[1], "uninitialised-read")
    assert finding.threadgroup == (1, 0, 0)


def test_output_read_before_it_is_written():
    assert only(run("o[i] += a[i];")[1], "uninitialised-read").buffer == "o"


def test_output_that_nobody_writes():
    outputs, report = run("if (i != 7) o[i] = 1;")
    finding = only(report, "unwritten-output")
    assert (finding.buffer, finding.offset) == ("o", 28)
    assert np.isnan(outputs["o"][7])


def test_misaligned_vector():
    body = "const device float4* v = (const device float4*)(a + %d); o[i] = v[i / 32].x;"
    finding = only(run(body % 1)[1], "misaligned")
    assert finding.message == "read of 16 bytes at an address that is a multiple of 4 only"
    assert (finding.buffer, finding.offset) == ("a", 4)
    silent(run(body % 4)[1])
    silent(run(body.replace("float4", "packed_float4") % 1)[1])


def test_too_much_threadgroup_memory():
    body = "threadgroup float t[%d]; t[l] = 1; o[i] = t[l];"
    _, report = run(body % 8193)
    assert "threadgroup memory is 32784 bytes with t, the limit is 32768" in str(
        only(report, "threadgroup-memory")
    )
    _, report = run(body % 8192)
    silent(report)
    assert report.threadgroup_bytes == 32768


def test_variables_and_arguments_share_the_limit():
    about = {
        "arguments": ", threadgroup float* s [[threadgroup(0)]]",
        "threadgroup_memory": ((0, 32000),),
    }
    body = "threadgroup float t[%d]; t[l] = 1; s[l] = 2; o[i] = t[l] + s[l];"
    assert only(run(body % 256, **about)[1], "threadgroup-memory")
    silent(run(body % 64, **about)[1])


def test_write_to_an_input():
    finding = only(run("((device float*)(size_t)a)[i] = 1; o[i] = 0;")[1], "read-only-write")
    assert finding.buffer == "a"


def test_endless_loop():
    body = "o[i] = 1;\nwhile (((volatile device float*)o)[i] < 2) {\n}"
    finding = only(run(body, options={"step_limit": 100_000})[1], "endless-loop")
    assert finding.where.endswith((".metal:10", ".metal:11")) and finding.thread == 0


def test_endless_loop_without_memory():
    body = "uint x = i; while (x != n + 1) x = (x * 3 + 1) & ~1u; o[i] = x;"
    assert only(run(body, options={"step_limit": 100_000})[1], "endless-loop")


def test_endless_loop_with_a_barrier():
    body = f"o[i] = 1; for (;;) {{ {BARRIER} if (n == 0) break; }}"
    assert only(run(body, options={"step_limit": 100_000})[1], "endless-loop")


def test_wild_pointer():
    body = "o[i] = *(const device float*)(0x123456789abcul + i);"
    assert "where no buffer lies" in only(run(body)[1], "out-of-bounds").message


def test_null_pointer():
    body = "o[i] = *(const device float*)(size_t)(4 * i);"
    assert only(run(body)[1], "unbound-buffer").thread == 0


def test_findings_raise_and_carry_the_report():
    with pytest.raises(Fault, match=r"kernel k has faults:\n.*out-of-bounds") as caught:
        run("o[i] = a[i + 1];", raising=True)
    assert caught.value.report.kinds() == {"out-of-bounds"}
