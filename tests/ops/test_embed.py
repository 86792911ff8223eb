"""embed: kernel against reference and numpy, bit for bit; edges, ids outside, errors."""

import mlx.core as mx
import numpy as np
import pytest
from draw import Call, Draw, exact

from pyengine import _ext
from pyengine.ops import embed, embed_reference

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
SCALE = float(mx.array(1536**0.5, dtype=mx.bfloat16).item())


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


def assert_same(a: mx.array, b: mx.array) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    assert np.array_equal(bits_of(a), bits_of(b))


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def tables(dtype: mx.Dtype, V: int = 50, E: int = 256):
    """Every form of a table, with its packing."""
    yield (normal(1, V, E, dtype=dtype),), ()
    for bits in (8, 6, 4):
        for group_size in (32, 64, 128):
            yield mx.quantize(normal(1, V, E, dtype=dtype), group_size, bits), (group_size, bits)


def in_numpy(ids: np.ndarray, table, packing, scale: float) -> np.ndarray:
    """float32, not yet rounded to the storage dtype; integers unpacked bit by bit."""
    arrays = [np.array(a if a.dtype == mx.uint32 else a.astype(mx.float32)) for a in table]
    if not packing:
        return arrays[0][ids] * np.float32(scale)
    w, scales, biases = (a[ids] for a in arrays)
    group_size, bits = packing
    stream = np.unpackbits(w.view(np.uint8), axis=-1, bitorder="little")
    q = stream.reshape(len(ids), -1, bits) @ (1 << np.arange(bits))
    scales, biases = (a.repeat(group_size, axis=-1) for a in (scales, biases))
    return (q.astype(np.float32) * scales + biases) * np.float32(scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference_and_numpy(dtype):
    ids = mx.array([49, 0, 7, 7, 31], dtype=mx.int32)
    for table, packing in tables(dtype):
        for out_dtype in (None, mx.float32):
            out = embed(ids, table, *packing, scale=SCALE, out_dtype=out_dtype)
            assert out.dtype == (out_dtype or dtype)
            exact = mx.array(in_numpy(np.array(ids), table, packing, SCALE)).astype(out.dtype)
            assert_same(out, exact)
            reference = embed_reference(ids, table, *packing, scale=SCALE, out_dtype=out_dtype)
            assert_same(out, reference)


@pytest.mark.parametrize("shape", [(1,), (), (2, 3), (3000,)])
def test_ids_of_any_shape(shape):
    rng = np.random.default_rng(4)
    ids = mx.array(rng.integers(0, 50, shape, dtype=np.int32))
    for table, packing in tables(mx.bfloat16, E=128):
        out = embed(ids, table, *packing, scale=3.0)
        assert out.shape == (*shape, 128)
        flat = embed_reference(ids.reshape(-1), table, *packing, scale=3.0)
        assert_same(out, flat.reshape(out.shape))


def test_no_ids():
    for table, packing in tables(mx.bfloat16):
        out = embed(mx.zeros((0, 3), mx.int32), table, *packing)
        mx.eval(out)
        assert out.shape == (0, 3, 256) and out.dtype == mx.bfloat16


@pytest.mark.parametrize("E", [1, 15, 30, 33, 200])
def test_rows_of_floats_have_any_width(E):
    w = normal(2, 9, E, dtype=mx.float16)
    ids = mx.array([8, 1, 0, 8], dtype=mx.int32)
    assert_same(embed(ids, (w,), scale=0.3), embed_reference(ids, (w,), scale=0.3))


def test_strided_ids_and_tables():
    ids = mx.array(np.random.default_rng(5).integers(0, 20, (6, 4), dtype=np.int32))
    w = normal(6, 128, 40, dtype=mx.bfloat16)
    assert_same(embed(ids.T, (w.T[:20],)), embed_reference(ids.T, (w.T[:20],)))
    table = [a[::2] for a in mx.quantize(normal(7, 40, 64), 64, 8)]
    assert_same(embed(ids[:, ::2], table), embed_reference(ids[:, ::2], table))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_id_outside_gives_a_row_of_nan(dtype):
    ids = mx.array([-1, 3, 50, 2**31 - 1, -(2**31), 49], dtype=mx.int32)
    for table, packing in tables(dtype):
        for function in (embed, embed_reference):
            out = function(ids, table, *packing)
            wrong = mx.isnan(out).all(axis=-1).tolist()
            assert wrong == [True, False, True, True, True, False]
            inside = mx.array([3, 49], dtype=mx.int32)
            assert_same(out[1::4], embed(inside, table, *packing))


def test_nothing_is_added_to_a_product_unrounded():
    """A fused product and sum would differ in some of these, so equal bits mean something."""
    table = mx.quantize(normal(8, 64, 256), 64, 8)
    scales, biases = (np.array(a, np.float64) for a in table[1:])
    q = np.array(table[0]).view(np.uint8).astype(np.float64)
    fused = (q * scales.repeat(64, axis=-1) + biases.repeat(64, axis=-1)).astype(np.float32)
    out = embed(mx.arange(64, dtype=mx.int32), table)
    assert (np.array(out) != fused).any()


def test_instruction_sets_agree():
    name, ids = _ext.instruction_set(), mx.array([3, 41], dtype=mx.int32)
    forms = list(tables(mx.bfloat16))
    want = [embed_reference(ids, table, *packing, scale=SCALE) for table, packing in forms]
    try:
        for each in _ext.instruction_sets():
            _ext.use_instruction_set(each)
            for (table, packing), expected in zip(forms, want, strict=True):
                assert_same(embed(ids, table, *packing, scale=SCALE), expected)
    finally:
        _ext.use_instruction_set(name)


def test_inside_compile():
    table = mx.quantize(normal(9, 30, 64), 64, 8)
    ids = mx.arange(10, dtype=mx.int32)
    # Two calls that differ in an attribute alone must not become one
    compiled = mx.compile(lambda i: [embed(i + 1, table), embed(i + 1, table, scale=2.0)])
    for out, scale in zip(compiled(ids), (1.0, 2.0), strict=True):
        assert_same(out, embed(ids + 1, table, scale=scale))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ids": mx.zeros(2, mx.uint32)}, "ids must be int32 but got uint32."),
        ({"table": []}, "table must be w alone or w, scales and biases but got 0 arrays."),
        ({"table": [mx.zeros((2, 4), mx.int32)]}, "w must be float32, float16 or bfloat16 but got"),
        ({"table": [mx.zeros(4)]}, "w must have shape [V, E] but got [4]."),
        ({"bits": 5}, "bits must be 4, 6 or 8 but got 5."),
        ({"group_size": 16}, "group_size must be 32, 64 or 128 but got 16."),
        ({"group_size": 32}, "w must have shape [8, 8] but got [8, 16]."),
        ({"bits": 4}, "w must have shape [8, 8] but got [8, 16]."),
        ({"w": mx.zeros((8, 16))}, "w must be uint32 but got float32."),
        ({"scales": mx.zeros(8)}, "scales must have shape [V, E / group_size] but got [8]."),
        ({"scales": mx.zeros((8, 1), mx.int32)}, "scales must be float32, float16 or bfloat16 but"),
        ({"biases": mx.zeros((8, 2))}, "biases must have shape [8, 1] but got [8, 2]."),
        (
            {"biases": mx.zeros((8, 1), mx.float16)},
            "biases must have the dtype of scales but got float16.",
        ),
        (
            {"out_dtype": mx.float16},
            "out_dtype must be float32 or the dtype of the table but got float16.",
        ),
    ],
)
def test_errors(change, message):
    names = ("w", "scales", "biases")
    arrays = dict(zip(names, mx.quantize(normal(10, 8, 64), 64, 8), strict=True))
    arrays |= {name: change.pop(name) for name in names if name in change}
    given = {"ids": mx.zeros(2, mx.int32), "table": list(arrays.values())} | change
    with pytest.raises(ValueError) as error:
        embed(given.pop("ids"), given.pop("table"), **given)
    assert str(error.value).startswith(f"[embed] {message}")


def random_call(d: Draw) -> Call:
    V, dtype, shape = d.size(1, 5, 300), d.dtype(), d.pick(((), (0,), (1,), (7,), (2, 3)))
    out_dtype = d.pick((None, mx.float32, dtype))
    options = {"scale": d.number(1.0, 3.5), "out_dtype": out_dtype}
    ids = d.ids(shape, V)
    if d.chance(0.5):
        table = (d.array(V, d.size(1, 5, 16, 33, 200), dtype=dtype),)
        return Call((ids, table), options, exact)
    group_size, bits = d.packing()
    E = group_size * d.size(1, 3)
    table = d.quantized(V, E, dtype=dtype, group_size=group_size, bits=bits)
    given = d.integer(group_size), d.integer(bits)
    return Call((ids, table, *given), options, exact)


LIMITS = {}  # the Metal kernel takes every call

# What bench/bench_embed.py has to say that its SMALL call moves: 6 rows of 1536 weights with 24
# scales and biases, as floats of two bytes, and an id each
BENCH_BYTES = 6 * (1536 + 24 * 4 + 1536 * 2 + 4)
