"""Recorded graphs that keep their memory: the same results, whatever was played before."""

from __future__ import annotations

import gc

import mlx.core as mx
import pytest
from tiny_pairs import bits

from pyengine import _ext, ops

pytestmark = pytest.mark.native("programs are made of the native ops' tasks")

WIDTH = 64
WEIGHT = mx.arange(WIDTH, dtype=mx.float32) / WIDTH


def normal(seed: int, *shape: int) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def layers(arrays):
    """Ours, with views and small nodes of MLX's in between."""
    x, y, n = arrays
    for i in range(6):
        x = ops.softcap(ops.rms_norm(x, None), 5.0 + i)
        x, y = ops.residual_norm(x.reshape(-1, WIDTH), y, WEIGHT, next_weight=WEIGHT, eps=1e-6)
    joined = mx.concatenate([x, y], axis=-1)
    return [ops.softcap(joined, 3.0), n + 1, x]


def same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (bits(a) == bits(b)).all()


def given(seed: int) -> list[mx.array]:
    return [normal(seed, 3, WIDTH), normal(seed + 1, 3, WIDTH), mx.array([seed], mx.int32)]


def test_results_are_those_of_the_function_and_stay() -> None:
    play = _ext.Recorded(layers)
    want = [layers(given(seed)) for seed in range(6)]
    got = [play(given(seed)) for seed in range(3)]  # not evaluated in between
    assert play.programs == 0
    mx.eval(got, want)
    assert play.programs
    got += [play(given(seed)) for seed in range(3, 6)]
    mx.eval(got)
    for a, b in zip(got, want, strict=True):
        same(a, b)


def test_results_may_be_arguments_of_the_next_play() -> None:
    play, x = _ext.Recorded(layers), given(1)
    want = given(1)
    for _ in range(5):
        joined, n, x0 = play(x)
        x = [x0, joined[:, :WIDTH], n]  # one of them strided
        w_joined, w_n, w_x0 = layers(want)
        want = [w_x0, w_joined[:, :WIDTH], w_n]
        mx.eval(x, want)
        same(x, want)


def test_arguments_may_be_strided_and_change_their_strides() -> None:
    play = _ext.Recorded(layers)
    for seed in range(6):
        x, y, n = given(seed)
        if seed % 2:
            x = mx.contiguous(x.T).T
            y = normal(seed, 6, WIDTH)[::2]
        mx.eval(x, y)
        same(play([x, y, n]), layers([x, y, n]))


def test_large_arguments_may_lie_elsewhere() -> None:
    """They are not copied: a program is for where they lie, and made anew for others."""

    def chain(arrays):
        x = arrays[0]
        for _ in range(8):
            x = ops.rms_norm(x, arrays[1])
        return [x]

    play, weight = _ext.Recorded(chain), normal(0, 1024)
    large = [normal(seed, 64, 1024) for seed in range(3)]
    mx.eval(large)
    for n, made in ((0, 1), (0, 1), (1, 2), (2, 3), (1, 4), (0, 5), (0, 5)):
        same(play([large[n], weight]), chain([large[n], weight]))
        assert play.programs == made
    square = normal(7, 256, 256)
    mx.eval(square)
    for x in (square, square.T, square):  # one address, other strides
        same(play([x, weight[:256]]), chain([x, weight[:256]]))


def test_a_program_is_made_once() -> None:
    """Whatever strides the nodes between give their results."""

    def between(arrays):
        x, _, n = arrays
        for _ in range(8):
            x = ops.rms_norm(ops.softcap(x, 3.0), None)
        wide = mx.broadcast_to(n, (3,)) + mx.arange(3)
        turned = mx.transpose(ops.softcap(x, 2.0)) * 2
        return [
            ops.softcap(mx.broadcast_to(x[:1], (3, WIDTH)), 2.0),
            wide,
            ops.rms_norm(turned, None),
        ]

    play = _ext.Recorded(between)
    for seed in range(4):
        same(play(given(seed)), between(given(seed)))
    assert play.programs == 1


def test_what_is_mostly_mlx_is_played_node_by_node() -> None:
    play = _ext.Recorded(lambda arrays: [mx.exp(ops.softcap(arrays[0] + 1, 2.0)) * 2])
    for seed in range(3):
        x = normal(seed, 5)
        same(play([x]), [mx.exp(ops.softcap(x + 1, 2.0)) * 2])
    assert play.programs == 0


def test_large_arguments_are_not_kept() -> None:
    def chain(arrays):
        x = ops.rms_norm(arrays[0], None)
        for _ in range(8):
            x = ops.rms_norm(x[:2] if x.shape[0] > 2 else x, None)
        return [x]

    play = _ext.Recorded(chain)
    x = normal(0, 512, 1024)
    mx.eval(play([x]))
    assert play.programs
    gc.collect()
    before = mx.get_active_memory()
    nbytes = x.nbytes
    del x
    assert mx.get_active_memory() <= before - nbytes


def test_places_are_used_again() -> None:
    def chain(arrays):
        x = arrays[0]
        for _ in range(1000):
            x = ops.rms_norm(x, None)
        return [x]

    play, x = _ext.Recorded(chain), mx.ones((256, 1024))
    mx.eval(x)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(play([x]))
    assert play.programs
    assert mx.get_peak_memory() - before < 5 * x.nbytes
    mx.eval(play([x]))
    assert mx.get_peak_memory() - before < 5 * x.nbytes


def test_what_has_no_elements_is_left_out() -> None:
    play = _ext.Recorded(layers)
    for _ in range(2):
        x, y, n = given(0)
        same(play([x[:0], y[:0], n])[1:2], [n + 1])


def test_two_graphs_do_not_share_places() -> None:
    first, second = _ext.Recorded(layers), _ext.Recorded(layers)
    want = [layers(given(seed)) for seed in range(4)]
    got = [(first if seed % 2 else second)(given(seed)) for seed in range(4)]
    got = [(first if seed % 2 else second)(given(seed)) for seed in range(4)]
    mx.eval(got, want)
    for a, b in zip(got, want, strict=True):
        same(a, b)


@pytest.mark.parametrize("pages", [4, 256])
def test_what_is_written_in_place_is_written_where_it_lies(pages: int) -> None:
    """Small enough to be copied or not: the memory itself, whoever holds it."""

    def write(arrays):
        arena, source, target, x = arrays
        for _ in range(4):
            x = ops.rms_norm(x, None)
        return [ops.copy_pages(arena, source, target), ops.softcap(x, 2.0)]

    play = _ext.Recorded(write)
    arenas = [normal(seed, pages, 1, 64, 16) for seed in range(2)]
    mx.eval(arenas)
    for n in range(6):
        arena, x = arenas[n % 2], normal(n, 3, 64)
        want = mx.array(arena)
        want[n % 3] = arena[3]
        mx.eval(want)
        out, made = play([arena, mx.array([3], mx.int32), mx.array([n % 3], mx.int32), x])
        mx.eval(out, made)
        assert (bits(arena) == bits(want)).all()  # through the older handle
        assert (bits(out) == bits(want)).all()
    assert play.programs
