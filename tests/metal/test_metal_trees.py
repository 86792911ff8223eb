"""Rows of trees on Metal, in the workbench: the processor's bits, faults, bounds, traffic."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launched import launched, launches_of
from matmuls import bits_of
from pieces import Paged, paged, piece, unseen
from test_metal_attention import assert_right, launches, only_between
from trees import Lines, arrays, random_trees, steps

from pyengine import _ext
from pyengine.ops import block_attention, move_rows


def metal(call: Paged, *, scale: float = 1.0, window: int | None = None, **how: Any):
    """The output of the launches, and their report."""
    lines = {name: how.pop(name) + mx.array(0) for name in ("depths", "ancestors") if name in how}
    result = block_attention(*unseen(call), scale=scale, window=window, **lines)
    (out,), report = launched(result, **how)
    return out, report


# Rows and lengths of pieces, H, K, D, window: ends of chunks and spans within a tree, more than 64
# rows in two tiles, widths that end inside a slice, a window's edge
CASES = {
    "begin": ([(5, 0), (1, 3)], 4, 2, 48, None),
    "chunk": ([(9, 60)], 4, 1, 80, None),
    "span": ([(12, 505), (3, 40)], 3, 1, 144, None),
    "spans": ([(16, 1020)], 2, 1, 16, None),
    "window": ([(16, 200), (8, 60)], 4, 2, 32, 70),
    "small-window": ([(16, 61)], 2, 1, 16, 3),
    "span-and-window": ([(16, 1530)], 1, 1, 16, 520),
    "tiles": ([(16, 58), (2, 9)], 8, 1, 32, None),
    "31b-full": ([(6, 509)], 8, 1, 512, None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_processors_bits(name):
    shapes, *sizes, window = CASES[name]
    rng = np.random.default_rng(len(name))
    for dtype in (mx.bfloat16,) if sizes[2] == 512 else (mx.bfloat16, mx.float32, mx.float16):
        pieces = [piece(3 * i, *shape, *sizes) for i, shape in enumerate(shapes)]
        trees = [Lines.random(rng, p.rows) for p in pieces]
        options = {"scale": sizes[2] ** -0.5, "window": window, **arrays(trees, rng, 1)}
        call = paged(pieces, window, dtype=dtype, room=1)
        assert_right(metal(call, **options)[0], call, **options)


def test_a_node_is_the_step_behind_its_path():
    rng = np.random.default_rng(1)
    for window in (None, 5, 64, 130):
        for _ in range(2):
            pieces, trees = random_trees(rng, 2, 1, int(rng.integers(1, 9)), 16)
            call, lines = paged(pieces, window, dtype=mx.bfloat16), arrays(trees, rng)
            out = bits_of(metal(call, window=window, **lines)[0])
            alone = steps(pieces, trees, window, mx.bfloat16)
            rows = [bits_of(metal(one, window=window)[0]) for one in alone]
            assert np.array_equal(out, np.concatenate(rows))


def test_a_chain_is_the_call_without_a_tree():
    rng = np.random.default_rng(2)
    pieces = [piece(5, 16, 505, 5, 1, 32), piece(6, 4, 62, 5, 1, 32)]
    call = paged(pieces, dtype=mx.bfloat16)
    lines = arrays([Lines.chain(p.rows) for p in pieces], rng)
    assert np.array_equal(bits_of(metal(call, **lines)[0]), bits_of(metal(call)[0]))


@pytest.mark.parametrize("name", ["chunk", "span", "window", "tiles"])
def test_no_fault(name):
    """In every order of lanes, which change no bit."""
    shapes, *sizes, window = CASES[name]
    rng = np.random.default_rng(3)
    pieces = [piece(3 * i, *shape, *sizes) for i, shape in enumerate(shapes)]
    lines = arrays([Lines.random(rng, p.rows) for p in pieces], rng)
    call = paged(pieces, window, dtype=mx.bfloat16)
    for order in ("forward", "reverse", "random"):
        out, report = metal(call, window=window, **lines, mode="check", order=order, raising=False)
        assert only_between(report), "\n".join(map(str, report.findings))
        assert_right(out, call, window=window, **lines)
        assert report.threadgroup_bytes <= 32768


def test_any_numbers_stay_in_bounds():
    """Of depths, ancestors, tables and lengths; what is wrong is NaN, as on a processor."""
    rng = np.random.default_rng(4)
    far = [-(2**31), -1, 0, 1, 3, 15, 16, 2**30, 2**31 - 1]
    for seed in range(12):
        pieces, trees = random_trees(rng, 3, 1, 2, 16)
        lines = {name: np.array(a) for name, a in arrays(trees, rng).items()}
        for a in lines.values():
            some = rng.random(a.shape) < 0.05
            a[some] = rng.choice(far, some.sum())
        window = None if seed % 2 else 20
        call = paged(pieces, window, seed=seed)
        if seed % 3 == 0:
            tables = np.array(call.tables)
            tables[0, rng.integers(tables.shape[1])] = rng.choice(far)
            lengths = np.array(call.lengths)
            lengths[1] = rng.choice([*far, int(lengths[1])])
            call = call._replace(tables=mx.array(tables), lengths=mx.array(lengths))
        given = {name: mx.array(a) for name, a in lines.items()}
        out, report = metal(call, window=window, **given, mode="check", raising=False)
        assert only_between(report), "\n".join(map(str, report.findings))
        if _ext.instruction_set() != "portable":
            expected = block_attention(*call, window=window, **given)
            assert np.array_equal(bits_of(out), bits_of(expected))


def test_contraction_changes_nothing():
    rng = np.random.default_rng(5)
    call, lines = paged([piece(23, 9, 505, 4, 1, 80)]), arrays([Lines.random(rng, 9)], rng)
    plain, fused = (bits_of(metal(call, contract=c, **lines)[0]) for c in ("off", "fast"))
    assert np.array_equal(plain, fused)


@pytest.mark.parametrize("length, window", [(700, None), (900, 512)])
def test_every_shared_byte_is_read_once(length, window):
    """Keys all, and values up to the tree; there each row reads those of its own path."""
    rng = np.random.default_rng(6)
    T, H, K, D = 8, 8, 2, 256
    tree = Lines.random(rng, T)
    call = paged([piece(26, T, length, H, K, D)], window, dtype=mx.bfloat16)
    lines = arrays([tree], rng)
    _, report = metal(call, window=window, **lines, mode="count", allow={"unwritten-output"})
    line = K * D * 2
    shared = length if window is None else window - 1
    keys, values = report.traffic["keys"], report.traffic["values"]
    assert keys.read_bytes == keys.device_read_bytes == (shared + T) * line
    # The four query heads of a position have their rows, and positions, in one simdgroup of eight
    paths = sum(depth + 1 for depth in tree.depths)
    assert values.read_bytes == (shared + 4 * paths) * line
    assert values.distinct_read_sectors * 32 == (shared + T) * line


def test_launches_say_that_there_is_a_tree():
    """One setting, of the kernels of all calls; two buffers of those that need them."""
    rng = np.random.default_rng(7)
    call = paged([piece(1, 5, 9, 2, 1, 16)])
    trees = launches_of(block_attention(*call, **arrays([Lines.chain(5)], rng)))
    for launch in trees:
        assert launch.constants == {0: True}
    names = [[b.name for b in launch.buffers][-2:] for launch in trees]
    assert names == [["params", "items"], *2 * [["depths", "ancestors"]]]
    for launch in launches([6], 4, 8, 4):
        assert launch.constants == {0: False}
        assert "depths" not in [b.name for b in launch.buffers]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_moves_touch_what_they_move(dtype):
    """3 of 4 kept rows stand elsewhere; nothing else is read or written, in any order of lanes."""
    arenas = [mx.array(np.random.default_rng(i).normal(size=(3, 2, 64, 6))) for i in range(2)]
    keys, values = (a.astype(dtype) for a in arenas)
    where = mx.array([61]), mx.array([[2, 0]]), mx.array([[0, 2, 3, 7]]), mx.array([4])
    want = [bits_of(a) for a in move_rows(keys * 1, values * 1, *where)]
    for order in ("forward", "reverse", "random"):
        out, report = launched(move_rows(keys * 1, values * 1, *where), mode="check", order=order)
        assert all(np.array_equal(bits_of(a), b) for a, b in zip(out, want, strict=True))
    _, report = launched(move_rows(keys * 1, values * 1, *where), mode="count")
    for name in ("keys", "values"):
        traffic = report.traffic[name]
        assert traffic.read_bytes == traffic.written_bytes == 3 * 2 * 6 * dtype.size
