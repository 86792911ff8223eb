"""prepare_qkv: the bits of the three ops it stands for, aliasing, rings, row-stability, errors."""

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, near_sum
from test_norm_rope import (
    assert_close,
    bits,
    frequencies,
    normal,
    proportional,
    sliding,
    turns_alike,
)
from test_write_cache import address, fresh

from pyengine import ops
from pyengine.ops import prepare_qkv, prepare_qkv_reference

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
SHAPES = [
    (1, 2, 1, 9, 32),
    (5, 4, 2, 9, 64),
    (9, 1, 1, 9, 6),
    (3, 8, 4, 40, 512),
    (40, 3, 3, 41, 16),
    (300, 4, 2, 301, 64),  # shared by threads
]


def arguments(T, H, K, C, D, dtype=mx.float32, offset=0, same=False) -> dict[str, mx.array]:
    k = normal(2, T, K * D, dtype=dtype)
    return {
        "q": normal(1, T, H * D, dtype=dtype),
        "k": k,
        "v": k if same else normal(3, T, K * D, dtype=dtype),
        "q_norm": normal(4, D, dtype=dtype),
        "k_norm": normal(5, D, dtype=dtype),
        "inv_freq": sliding(D),
        "keys": fresh(1, K, C, D, dtype=dtype),
        "values": fresh(1, K, C, D, dtype=dtype),
        "offset": mx.array(offset),
    }


def composed(q, k, v, q_norm, k_norm, inv_freq, keys, values, offset) -> tuple[mx.array, ...]:
    T, D = q.shape[0], q_norm.size
    q, k, v = (a.reshape(1, T, -1, D) for a in (q, k, v))
    k, v = ops.norm_rope(k, k_norm, offset, inv_freq), ops.rms_norm(v, None, 1e-6)
    return (
        ops.norm_rope(q, q_norm, offset, inv_freq),
        ops.write_cache(keys, k, offset),
        ops.write_cache(values, v, offset),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("same", [False, True])
def test_bits_of_the_three_ops(shape, dtype, same):
    for offset in (0, 7, 100_003):
        outs = [
            f(**arguments(*shape, dtype=dtype, offset=offset, same=same))
            for f in (prepare_qkv, composed)
        ]
        for got, want in zip(*outs, strict=True):
            assert got.dtype == dtype and got.shape == want.shape
            assert np.array_equal(bits(got), bits(want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_matches_reference(shape, dtype):
    for inv_freq in (sliding(shape[-1]), proportional(shape[-1])):
        a, b = (arguments(*shape, dtype=dtype, offset=33) | {"inv_freq": inv_freq} for _ in "ab")
        for got, want in zip(prepare_qkv(**a), prepare_qkv_reference(**b), strict=True):
            assert_close(got, want)


def test_strided_inputs():
    shape = (4, 2, 1, 9, 32)
    want = prepare_qkv(**arguments(*shape, offset=5))
    given = arguments(*shape, offset=5)
    for name in ("q", "k", "v"):
        given[name] = mx.contiguous(given[name].T).T
        mx.eval(given[name])
    for got, expected in zip(prepare_qkv(**given), want, strict=True):
        assert np.array_equal(bits(got), bits(expected))


def test_cache_is_written_in_place_and_nowhere_else():
    given = arguments(2, 2, 2, 8, 16, offset=7)
    before = {name: np.array(given[name]) for name in ("keys", "values")}
    at = {name: address(given[name]) for name in before}
    _, keys, values = prepare_qkv(**given)
    for name, out in (("keys", keys), ("values", values)):
        assert address(out) == at[name]
        changed = (np.array(out) != before[name]).any(axis=(0, 1, 3))
        assert np.flatnonzero(changed).tolist() == [0, 7]  # positions 7 and 8 of a ring of 8


def test_rows_do_not_depend_on_the_others():
    shape = (6, 4, 2, 64, 32)
    T, whole = shape[0], arguments(*shape, dtype=mx.bfloat16, offset=20)
    out, keys, values = prepare_qkv(**whole)
    mx.eval(out, keys, values)
    for t in range(T):
        one = arguments(*shape, dtype=mx.bfloat16, offset=20 + t)
        one |= {name: one[name][t : t + 1] for name in ("q", "k", "v")}
        row, own_keys, own_values = prepare_qkv(**one)
        assert np.array_equal(bits(row[:, 0]), bits(out[:, t]))
        for own, full in ((own_keys, keys), (own_values, values)):
            assert np.array_equal(bits(own[:, :, 20 + t]), bits(full[:, :, 20 + t]))


def test_no_rows_leave_the_cache_alone():
    given = arguments(0, 2, 1, 4, 8)
    before = np.array(given["keys"])
    out, keys, _ = prepare_qkv(**given)
    assert out.shape == (1, 0, 2, 8) and np.array_equal(np.array(keys), before)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"q": mx.zeros((3, 4, 8))}, r"q must have shape \[T, H \* D\] but got \[3, 4, 8\]"),
        ({"q": mx.zeros((3, 12))}, r"q must have shape \[T, H \* D\] but got \[3, 12\]"),
        (
            {"q": mx.zeros((3, 16), mx.int32)},
            "q must be float32, float16 or bfloat16 but got int32",
        ),
        ({"k": mx.zeros((2, 8))}, r"k must have shape \[3, 8\] but got \[2, 8\]"),
        ({"v": mx.zeros((3, 16))}, r"v must have shape \[3, 8\] but got \[3, 16\]"),
        ({"v": mx.zeros((3, 8), mx.float16)}, "v must have the dtype of q but got float16"),
        ({"q_norm": mx.zeros(4)}, r"q_norm must have shape \[8\] but got \[4\]"),
        ({"k_norm": mx.zeros(8, mx.bfloat16)}, "k_norm must have the dtype of q but got bfloat16"),
        ({"inv_freq": mx.zeros(8)}, r"inv_freq must have shape \[4\] but got \[8\]"),
        ({"inv_freq": mx.zeros(4, mx.float16)}, "inv_freq must be float32 but got float16"),
        ({"keys": mx.zeros((2, 1, 4, 8))}, r"keys must have shape \[1, K, C, D\] but got"),
        ({"values": mx.zeros((1, 1, 5, 8))}, r"values must have shape \[1, 1, 4, 8\] but got"),
        ({"offset": mx.array([0])}, r"offset must have shape \[\] but got \[1\]"),
        ({"offset": mx.array(0.0)}, "offset must be int32 but got float32"),
        ({"eps": 0.0}, "eps must be positive but got 0"),
    ],
)
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_what_is_refused(changes, message, implementation):
    ops.use(implementation)
    try:
        with pytest.raises(ValueError, match=r"^\[prepare_qkv\] " + message):
            prepare_qkv(**arguments(3, 2, 1, 4, 8) | changes)
    finally:
        ops.use("native")


def test_limits_of_width_and_capacity():
    with pytest.raises(ValueError, match="D must be even and at most 1024 but got 7"):
        prepare_qkv(**arguments(1, 1, 1, 4, 8) | {"keys": mx.zeros((1, 1, 4, 7))})
    with pytest.raises(ValueError, match="T must be at most the capacity 4 but got 5"):
        prepare_qkv(**arguments(5, 1, 1, 4, 8))


def test_a_strided_cache_is_refused_when_evaluated():
    given = arguments(1, 1, 1, 4, 8)
    given["keys"] = mx.zeros((1, 1, 8, 8))[:, :, ::2]
    mx.eval(given["keys"])
    with pytest.raises(RuntimeError, match="keys and values must be contiguous but got a strided"):
        mx.eval(prepare_qkv(**given))


def random_call(d: Draw) -> Call:
    H, K, C = d.size(1, 2, 4), d.size(1, 2, 3), d.size(1, 2, 9, 40)
    T, D, dtype = d.pick((0, 1, 2, max(C - 1, 0), C)), d.size(2, 6, 16, 34, 64, 256), d.dtype()
    offset = d.offset(3 * C)
    q, k = d.array(T, H * D, dtype=dtype), d.array(T, K * D, dtype=dtype)
    v = k if d.chance(0.2) else d.array(T, K * D, dtype=dtype)
    weights = d.array(D, dtype=dtype), d.array(D, dtype=dtype)
    keys, values = (d.cache(1, K, C, D, dtype=dtype) for _ in range(2))
    # Angles are 0 where they would be too large to compare: slots still are
    inv_freq = frequencies(d, D)
    if not turns_alike(offset):
        inv_freq = inv_freq * 0
    position = d.whole(offset)
    args = (q, k, v, *weights, inv_freq, keys, values, position, d.number(1e-6, 1.0))
    return Call(args, {}, near_sum, written=(6, 7))


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_prepare_qkv.py has to say that its SMALL call moves: 48 heads of queries and 24
# of keys and values, 512 bytes each, in and out; two weights, 128 frequencies, the offset
BENCH_BYTES = 2 * (48 + 24) * 512 + 2 * 512 + 512 + 4
