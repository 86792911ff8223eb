"""Heads on Metal, in the workbench: norm_rope, prepare_qkv and write_cache, to the processor's
bits."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launched import launched, launches_of
from matmuls import bits_of, normal
from test_norm_rope import assert_close, proportional, sliding
from test_positions import unseen
from test_prepare_qkv import arguments
from test_write_cache import fresh

from pyengine import _ext, ops

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
FUSED = _ext.instruction_set() != "portable"  # which has no fused multiply-add
# T, H, K, C, D: the smallest head and the widest, halves that end between lanes and in one, heads
# that leave a threadgroup ragged, a ring as long as the call, both heads of 31B
SHAPES = [
    (2, 1, 1, 2, 2),
    (9, 1, 1, 9, 6),
    (5, 4, 2, 9, 66),
    (1, 5, 1, 3, 1024),
    (6, 32, 16, 17, 256),
    (1, 32, 4, 9, 512),
]


def prepare(given: dict[str, mx.array], **options: Any) -> tuple[list[mx.array], Any]:
    return launched(ops.prepare_qkv(**given), **options)


def turn(x, weight, offset: int, inv_freq, **options: Any) -> tuple[mx.array, Any]:
    (out,), report = launched(ops.norm_rope(x, weight, mx.array(offset), inv_freq), **options)
    return out, report


def assert_same(out: mx.array, native: mx.array) -> None:
    assert out.dtype == native.dtype and out.shape == native.shape
    if FUSED:
        assert np.array_equal(bits_of(out), bits_of(native))
    else:
        assert_close(out, native)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prepare_qkv_has_no_fault_and_the_processors_bits(shape, dtype):
    """Where the cache is linear, where it wraps, and 2**18 positions on; keys that are values."""
    for offset, same, inv_freq in (
        (0, False, sliding),
        (7, True, proportional),
        (2**18 - 3, False, sliding),
    ):
        given = arguments(*shape, dtype=dtype, offset=offset, same=same)
        given["inv_freq"] = inv_freq(shape[-1])
        outs, _ = prepare(given, mode="check")
        reference = ops.prepare_qkv_reference(**given)
        for out, native, expected in zip(outs, ops.prepare_qkv(**given), reference, strict=True):
            assert_same(out, native)
            assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2), (2, 3, 5, 6), (1, 7, 3, 66), (1, 1, 32, 512), (3, 2, 4, 256)]
)
def test_norm_rope_has_no_fault_and_the_processors_bits(shape, dtype):
    D = shape[-1]
    x, weight = normal(1, *shape, dtype=dtype), normal(2, D, dtype=dtype)
    for offset, inv_freq in ((0, sliding(D)), (1023, proportional(D)), (2**18 - 9, sliding(D))):
        out, _ = turn(x, weight, offset, inv_freq, mode="check")
        assert_same(out, ops.norm_rope(x, weight, mx.array(offset), inv_freq))
        assert_close(out, ops.norm_rope_reference(x, weight, mx.array(offset), inv_freq))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_order_of_lanes_and_no_contraction_changes_a_bit(dtype):
    given = arguments(3, 3, 2, 4, 66, dtype=dtype, offset=1001)
    x, weight = given["q"].reshape(1, 3, 3, 66), given["q_norm"]
    rest = (1001, given["inv_freq"])
    alone, together = turn(x, weight, *rest)[0], prepare(given)[0]
    for options in (
        {"mode": "check", "order": "reverse"},
        {"mode": "check", "order": "random"},
        {"contract": "fast"},
    ):
        assert np.array_equal(bits_of(turn(x, weight, *rest, **options)[0]), bits_of(alone))
        outs = prepare(given, **options)[0]
        assert all(
            np.array_equal(bits_of(a), bits_of(b)) for a, b in zip(outs, together, strict=True)
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_stable(dtype):
    """A position's bits are those of the position alone, in calls of 1 to 16."""
    shape = (16, 4, 2, 64, 34)
    whole = arguments(*shape, dtype=dtype, offset=20)
    rows = ("q", "k", "v")
    alone = []
    for t in range(16):
        one = whole | {name: whole[name][t : t + 1] for name in rows}
        q, keys, values = prepare(one | {"offset": mx.array(20 + t)})[0]
        alone.append([bits_of(a) for a in (q[:, 0], keys[:, :, 20 + t], values[:, :, 20 + t])])
    for T in range(1, 17):
        q, keys, values = prepare(whole | {name: whole[name][:T] for name in rows})[0]
        for t in range(T):
            got = (q[:, t], keys[:, :, 20 + t], values[:, :, 20 + t])
            for a, b in zip(got, alone[t], strict=True):
                assert np.array_equal(bits_of(a), b), (T, t)


def test_the_cache_is_written_at_its_positions_and_nowhere_else():
    given = arguments(2, 2, 2, 8, 16, offset=7)
    _, keys, values = prepare(given, mode="check")[0]
    for name, out in (("keys", keys), ("values", values)):
        changed = (np.array(out) != np.array(given[name])).any(axis=(0, 1, 3))
        assert np.flatnonzero(changed).tolist() == [0, 7]  # positions 7 and 8 of a ring of 8


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, T, K, C, D", [(1, 1, 1, 1, 1), (2, 5, 3, 7, 10), (1, 40, 2, 40, 256)])
def test_write_cache_moves_its_rows(B, T, K, C, D, dtype):
    cache, new = fresh(B, K, C, D, dtype=dtype), normal(3, B, T, K, D, dtype=dtype)
    for offset in (0, 4, 100_003, -3):
        (out,), report = launched(ops.write_cache(cache, new, unseen(offset)), mode="count")
        expected = ops.write_cache_reference(cache, new, mx.array(offset))
        assert np.array_equal(bits_of(out), bits_of(expected))
        assert report.traffic["cache"].device_read_bytes == 0


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("H, K, D", [(32, 16, 256), (32, 4, 512)])
def test_heads_are_read_once(T, H, K, D):
    """Of weights and frequencies each threadgroup's four heads read one copy."""
    given = arguments(T, H, K, 8, D, dtype=mx.bfloat16, same=H != 2 * K)
    _, report = prepare(given, mode="count")
    traffic = report.traffic
    for name in ("q", "k", "v"):
        assert traffic[name].device_read_bytes == traffic[name].size == given[name].nbytes, name
    assert traffic["out"].device_written_bytes == given["q"].nbytes
    for name in ("keys", "values"):
        assert traffic[name].device_read_bytes == 0
        assert traffic[name].device_written_bytes == given["k"].nbytes
    groups = T * (H + 2 * K) // 4
    for name, size in (("q_norm", 2 * D), ("k_norm", 2 * D), ("inv_freq", 2 * D)):
        assert 32 * traffic[name].group_read_sectors <= groups * size, name
    x = given["q"].reshape(1, T, H, D)
    _, report = turn(x, given["q_norm"], 3, given["inv_freq"], mode="count")
    assert report.traffic["x"].device_read_bytes == x.nbytes
    assert report.traffic["out"].device_written_bytes == x.nbytes


def test_launches():
    given = arguments(6, 32, 16, 100, 256, dtype=mx.bfloat16)
    (launch,) = launches_of(ops.prepare_qkv(**given))
    assert launch.grid == [16, 6, 1] and launch.threadgroup == [128, 1, 1]
    assert launch.threadgroup_memory == [(0, 4 * 4 * 256)]
    roles = {b.name: b.role for b in launch.buffers}
    assert roles["keys"] == roles["values"] == "inout" and roles["offset"] == "in"
    read, written = _ext.launch_arguments([launch])
    names = "q k v q_norm k_norm inv_freq offset keys values"
    assert [b.name for b in read] == names.split()
    assert [b.name for b in written] == ["out", "keys", "values"]
    assert all(b.alignment == 4 for b in launch.buffers if b.dtype == "bfloat16")
    turned = ops.norm_rope(mx.zeros((2, 3, 5, 8)), mx.zeros(8), mx.array(0), mx.zeros(4))
    assert launches_of(turned)[0].grid == [2, 3, 2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ops_run_them(dtype):
    """As the engine calls them; the cache they return is a copy here."""

    def outputs() -> list[mx.array]:
        given = arguments(5, 4, 2, 9, 32, dtype=dtype, offset=6)
        x = given["q"].reshape(1, 5, 4, 32)[:, ::2]
        out = [*ops.prepare_qkv(**given)]
        out += [ops.norm_rope(x, given["q_norm"], given["offset"], given["inv_freq"])]
        new = given["k"].reshape(1, 5, 2, 32)
        out += [ops.write_cache(fresh(1, 2, 9, 32, dtype=dtype), new[:, 1:], given["offset"])]
        out += [*ops.prepare_qkv(**arguments(0, 4, 2, 9, 32, dtype=dtype))]
        mx.eval(out)
        return out

    expected = outputs()
    ops.use("workbench")
    try:
        kernels = {row["op"]: row["kernel"] for row in ops.status()}
        out = outputs()
    finally:
        ops.use("native")
    for name in ("norm_rope", "prepare_qkv", "write_cache"):
        assert kernels[name] == "Metal (workbench)"
    for a, b in zip(out, expected, strict=True):
        assert_same(a, b)
