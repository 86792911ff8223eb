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
    assert not play.is_program
    mx.eval(got, want)
    assert play.is_program
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
    for n in (0, 0, 1, 2, 1, 0, 0):
        same(play([large[n], weight]), chain([large[n], weight]))
        assert play.is_program
    square = normal(7, 256, 256)
    mx.eval(square)
    for x in (square, square.T, square):  # one address, other strides
        same(play([x, weight[:256]]), chain([x, weight[:256]]))


def test_what_is_mostly_mlx_is_played_node_by_node() -> None:
    play = _ext.Recorded(lambda arrays: [mx.exp(ops.softcap(arrays[0] + 1, 2.0)) * 2])
    for seed in range(3):
        x = normal(seed, 5)
        same(play([x]), [mx.exp(ops.softcap(x + 1, 2.0)) * 2])
    assert play.is_program is False


def test_large_arguments_are_not_kept() -> None:
    def chain(arrays):
        x = ops.rms_norm(arrays[0], None)
        for _ in range(8):
            x = ops.rms_norm(x[:2] if x.shape[0] > 2 else x, None)
        return [x]

    play = _ext.Recorded(chain)
    x = normal(0, 512, 1024)
    mx.eval(play([x]))
    assert play.is_program
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
    assert play.is_program
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


@pytest.mark.parametrize("size", [16, 4096])
def test_what_is_written_in_place_is_written_where_it_lies(size: int) -> None:
    """Small enough to be copied or not: the memory itself, whoever holds it."""

    def write(arrays):
        cache, new, at = arrays
        for _ in range(4):
            new = ops.rms_norm(new, None)
        return [ops.write_cache(cache, new, at), ops.softcap(new, 2.0)]

    play = _ext.Recorded(write)
    caches = [mx.zeros((1, 1, size, 16)) for _ in range(2)]
    mx.eval(caches)
    for at in range(6):
        new = normal(at, 1, 1, 1, 16)
        cache = caches[at % 2]
        out, _ = play([cache, new, mx.array(at, mx.int32)])
        mx.eval(out)
        want = new
        for _ in range(4):
            want = ops.rms_norm(want, None)
        assert (bits(cache[0, 0, at]) == bits(want[0, 0, 0])).all()  # through the older handle
        assert (bits(out[0, 0, at]) == bits(want[0, 0, 0])).all()
        assert not cache[0, 0, at + 1 :].any()
    assert play.is_program
