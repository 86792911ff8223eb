"""Heads on Metal, in the workbench: norm_rope, prepare_qkv and copy_pages, to the processor's
bits."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launched import launched, launches_of
from matmuls import bits_of, normal
from test_copy_pages import by_hand, fresh, int32
from test_norm_rope import assert_close, proportional, sliding
from test_prepare_qkv import arguments, place

from pyengine import _ext, ops

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
FUSED = _ext.instruction_set() != "portable"  # which has no fused multiply-add
# H, K, D: the smallest head and the widest, halves that end between lanes and in one, heads that
# leave a threadgroup ragged, both heads of 31B
SHAPES = [(1, 1, 2), (1, 1, 6), (4, 2, 66), (5, 1, 1024), (32, 16, 256), (32, 4, 512)]
# Lengths of sequences and rows of each: across a page's end, several of them, 2**18 positions on
PIECES = [([0], [2]), ([63, 0, 128], [2, 1, 1]), ([2**18 - 3], [3])]


def prepare(given: dict[str, mx.array], **options: Any) -> tuple[list[mx.array], Any]:
    return launched(ops.prepare_qkv(**given), **options)


def turn(x, weight, positions: Any, inv_freq, **options: Any) -> tuple[mx.array, Any]:
    turned = ops.norm_rope(x, weight, int32(positions), inv_freq)
    (out,), report = launched(turned, **options)
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
    for (lengths, counts), same, inv_freq in zip(
        PIECES, (False, True, False), (sliding, proportional, sliding), strict=True
    ):
        given = arguments(lengths, counts, *shape, dtype=dtype, same=same, window=64)
        given["inv_freq"] = inv_freq(shape[-1])
        outs, _ = prepare(given, mode="check")
        reference = ops.prepare_qkv_reference(**given)
        for out, native, expected in zip(outs, ops.prepare_qkv(**given), reference, strict=True):
            assert_same(out, native)
            assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (6, 5, 6), (7, 3, 66), (1, 32, 512), (6, 4, 256)])
def test_norm_rope_has_no_fault_and_the_processors_bits(shape, dtype):
    R, _, D = shape
    x, weight = normal(1, *shape, dtype=dtype), normal(2, D, dtype=dtype)
    apart = np.random.default_rng(3).integers(0, 2**18, R)
    for positions, inv_freq in (
        (np.arange(R), sliding(D)),
        (1023 + np.arange(R), proportional(D)),
        (apart, sliding(D)),
    ):
        out, _ = turn(x, weight, positions, inv_freq, mode="check")
        args = (x, weight, int32(positions), inv_freq)
        assert_same(out, ops.norm_rope(*args))
        assert_close(out, ops.norm_rope_reference(*args))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_order_of_lanes_and_no_contraction_changes_a_bit(dtype):
    given = arguments([1001, 63], [1, 2], 3, 2, 66, dtype=dtype, window=64)
    x, weight = given["q"].reshape(3, 3, 66), given["q_norm"]
    rest = (given["positions"], given["inv_freq"])
    arena, pages = given["keys"], ([0, 1], [2, 3])
    alone, together = turn(x, weight, *rest)[0], prepare(given)[0]
    copied = by_hand(arena, *pages)
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
        copy = ops.copy_pages(arena, *(int32(a) for a in pages))
        assert np.array_equal(bits_of(launched(copy, **options)[0][0]), copied)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_stable(dtype):
    """A row's bits are those of the row alone, in calls of 1 to 16 rows of two sequences."""
    whole = arguments([56, 3], [12, 4], 4, 2, 34, dtype=dtype)
    rows = ("q", "k", "v", "positions", "owners")

    def found(outs: list[mx.array], r: int, i: int) -> list[np.ndarray]:
        """Of row r of all, which is row i of the call."""
        q, keys, values = (bits_of(a) for a in outs)
        page, at = place(whole, r)
        return [q[i], keys[page, :, at], values[page, :, at]]

    alone = []
    for r in range(16):
        one = whole | {name: whole[name][r : r + 1] for name in rows}
        alone.append(found(prepare(one)[0], r, 0))
    for R in range(1, 17):
        outs = prepare(whole | {name: whole[name][:R] for name in rows})[0]
        for r in range(R):
            for a, b in zip(found(outs, r, r), alone[r], strict=True):
                assert np.array_equal(a, b), (R, r)


def test_the_arenas_are_written_at_their_places_and_nowhere_else():
    given = arguments([63, 128], [2, 1], 2, 2, 16, poison=True)
    _, keys, values = prepare(given, mode="check")[0]
    places = {place(given, r) for r in range(3)}
    for name, out in (("keys", keys), ("values", values)):
        changed = (bits_of(out) != bits_of(given[name])).any(axis=(1, 3))
        assert {tuple(at) for at in np.argwhere(changed)} == places


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("P, K, D", [(2, 1, 2), (5, 3, 10), (4, 2, 256), (4, 1, 5)])
def test_copy_pages_moves_its_pages(P, K, D, dtype):
    """Each byte of them is read once and written once."""
    arena, n = fresh(P, K, 64, D, dtype=dtype), P // 2
    pages = np.random.default_rng(4).permutation(P).tolist()
    sources, targets = pages[:n], pages[n : 2 * n]
    copy = ops.copy_pages(arena, int32(sources), int32(targets))
    (out,), report = launched(copy, mode="count")
    assert np.array_equal(bits_of(out), by_hand(arena, sources, targets))
    moved = report.traffic["arena"]
    assert moved.device_read_bytes == moved.device_written_bytes == n * arena.nbytes // P
    launched(copy, mode="check")


@pytest.mark.parametrize("R", [1, 6])
@pytest.mark.parametrize("H, K, D", [(32, 16, 256), (32, 4, 512)])
def test_heads_are_read_once(R, H, K, D):
    """Of weights and frequencies each threadgroup's four heads read one copy."""
    given = arguments([60], [R], H, K, D, dtype=mx.bfloat16, same=H != 2 * K, spare=0)
    _, report = prepare(given, mode="count")
    traffic = report.traffic
    for name in ("q", "k", "v"):
        assert traffic[name].device_read_bytes == traffic[name].size == given[name].nbytes, name
    assert traffic["out"].device_written_bytes == given["q"].nbytes
    for name in ("keys", "values"):
        assert traffic[name].device_read_bytes == 0
        assert traffic[name].device_written_bytes == given["k"].nbytes
    groups = R * (H + 2 * K) // 4
    for name, size in (("q_norm", 2 * D), ("k_norm", 2 * D), ("inv_freq", 2 * D)):
        assert 32 * traffic[name].group_read_sectors <= groups * size, name
    x = given["q"].reshape(R, H, D)
    _, report = turn(x, given["q_norm"], given["positions"], given["inv_freq"], mode="count")
    assert report.traffic["x"].device_read_bytes == x.nbytes
    assert report.traffic["out"].device_written_bytes == x.nbytes


def test_launches():
    """The same for six rows of a sequence as for six sequences."""
    for lengths, counts in (([60], [6]), ([60] * 6, [1] * 6)):
        given = arguments(lengths, counts, 32, 16, 256, dtype=mx.bfloat16)
        (launch,) = launches_of(ops.prepare_qkv(**given))
        assert launch.grid == [16, 6, 1] and launch.threadgroup == [128, 1, 1]
        assert launch.threadgroup_memory == [(0, 4 * 4 * 256)]
    roles = {b.name: b.role for b in launch.buffers}
    assert roles["keys"] == roles["values"] == "inout" and roles["tables"] == "in"
    read, written = _ext.launch_arguments([launch])
    names = "q k v q_norm k_norm inv_freq positions owners tables keys values"
    assert [b.name for b in read] == names.split()
    assert [b.name for b in written] == ["out", "keys", "values"]
    assert all(b.alignment == 4 for b in launch.buffers if b.dtype == "bfloat16")
    turned = ops.norm_rope(mx.zeros((6, 5, 8)), mx.zeros(8), mx.zeros(6, mx.int32), mx.zeros(4))
    assert launches_of(turned)[0].grid == [2, 6, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ops_run_them(dtype):
    """As the engine calls them; the arena they return is a copy here."""

    def outputs() -> list[mx.array]:
        given = arguments([62, 3], [4, 1], 4, 2, 32, dtype=dtype)
        x, arena = given["q"].reshape(5, 4, 32)[:, ::2], given["keys"] + 0
        mx.eval(arena)
        out = [*ops.prepare_qkv(**given)]
        out += [ops.norm_rope(x, given["q_norm"], given["positions"], given["inv_freq"])]
        out += [ops.copy_pages(arena, int32([0, 1]), int32([3, 2]))]
        rows = ("q", "k", "v", "positions", "owners")
        given = arguments([62, 3], [4, 1], 4, 2, 32, dtype=dtype)
        out += [*ops.prepare_qkv(**given | {name: given[name][:0] for name in rows})]
        mx.eval(out)
        return out

    expected = outputs()
    ops.use("workbench")
    try:
        kernels = {row["op"]: row["kernel"] for row in ops.status()}
        out = outputs()
    finally:
        ops.use("native")
    for name in ("norm_rope", "prepare_qkv", "copy_pages"):
        assert kernels[name] == "Metal (workbench)"
    for a, b in zip(out, expected, strict=True):
        assert_same(a, b)
