"""Count mode: what a launch moves, worked out by hand beside it."""

import numpy as np
from snippets import launch, run

import workbench


def traffic(body, **about):
    outputs, report = run(body, mode="count", **about)
    assert report.findings == []
    return outputs, report


def test_a_coalesced_copy():
    outputs, report = traffic("o[i] = a[i];", n=256)
    a, o = report.traffic["a"], report.traffic["o"]
    assert (a.reads, a.read_bytes, a.simd_reads) == (256, 1024, 8)
    # 32 lanes of 4 bytes: 4 sectors of 32 bytes and 2 lines of 64 in each of 8 simd loads.
    assert (a.read_sectors, a.read_lines) == (32, 16)
    assert a.device_read_bytes == a.size == 1024
    assert (o.writes, o.simd_writes, o.written_sectors, o.device_written_bytes) == (
        256,
        8,
        32,
        1024,
    )
    assert (a.writes, o.reads, report.launches) == (0, 0, 1)
    np.testing.assert_array_equal(outputs["o"], np.arange(256))


def test_lanes_that_read_the_same_bytes_cost_them_once():
    _, report = traffic("o[i] = a[0];", n=128)
    a = report.traffic["a"]
    assert (a.read_bytes, a.simd_reads, a.read_sectors, a.read_lines) == (512, 4, 4, 4)
    # Two threadgroups of two simdgroups: the sector comes once to each, once in all.
    assert (a.group_read_sectors, a.distinct_read_sectors) == (2, 1)


def test_strided_lanes_touch_a_line_each():
    _, report = traffic("o[i] = a[16 * i % n];", n=1024)
    site = next(site for site in report.sites if site.buffer == "a")
    assert site.lines_per_access == 32 and not site.write
    assert site.where.endswith(".metal:9")
    assert (site.accesses, site.lanes, site.bytes) == (32, 1024, 4096)
    stores = next(site for site in report.sites if site.buffer == "o")
    assert stores.lines_per_access == 2 and stores.write


def test_a_vector_load_is_one_access():
    body = "float4 v = *(const device float4*)(a + 4 * l); o[i] = v.x + v.w;"
    _, report = traffic(body, n=256, groups=1, threads=64, options={"allow": {"unwritten-output"}})
    a = report.traffic["a"]
    assert (a.reads, a.read_bytes, a.simd_reads, a.read_lines) == (64, 1024, 2, 16)


def test_packed_vectors_are_one_access_of_their_size():
    body = "packed_float3 v = *(const device packed_float3*)(a + 3 * l); o[i] = v.x + v.y + v.z;"
    _, report = traffic(body, n=192, groups=1, threads=64, options={"allow": {"unwritten-output"}})
    a = report.traffic["a"]
    assert (a.reads, a.read_bytes, a.distinct_read_sectors) == (64, 768, 24)


def test_a_loop_counts_every_turn():
    _, report = traffic("float s = 0; for (uint k = 0; k < n; k += 32) s += a[k + lane]; o[i] = s;")
    a = report.traffic["a"]
    # 2 turns of 2 simdgroups; every load brings 4 sectors.
    assert (a.simd_reads, a.read_sectors, a.group_read_sectors) == (4, 16, 8)


def test_reading_twice_what_the_registers_hold_is_free():
    _, report = traffic("o[i] = a[i] + a[i];")
    assert report.traffic["a"].reads == 64


def test_threadgroup_memory_is_not_device_memory():
    body = "threadgroup float t[64]; t[l] = a[i]; o[i] = t[l];"
    _, report = traffic(body)
    assert set(report.traffic) == {"a", "o", "n"}
    assert report.threadgroup_bytes == 256


def test_atomics_are_counted():
    body = (
        "o[i] = 0; atomic_fetch_add_explicit((device atomic_uint*)o + i, 1u, memory_order_relaxed);"
    )
    _, report = traffic(body)
    o = report.traffic["o"]
    assert (o.atomics, o.reads, o.writes) == (128, 64, 128)


def test_launches_of_a_run_add_up():
    one = launch("o[i] = a[i];", n=128)
    again = workbench.Launch(
        one.library,
        one.kernel,
        one.grid,
        one.threadgroup,
        (
            workbench.Buffer("o", "in", (128,), "float32"),
            workbench.Buffer("second", "out", (128,), "float32"),
            one.buffers[2],
        ),
    )
    a = np.arange(128, dtype=np.float32)
    outputs, report = workbench.run([one, again], {"a": a}, mode="count")
    assert report.launches == 2
    np.testing.assert_array_equal(outputs["second"], a)
    assert report.traffic["o"].read_bytes == report.traffic["o"].written_bytes == 512
    assert report.traffic["o"].size == 512
