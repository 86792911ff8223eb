"""Positions that there are not, on Metal in the workbench: the reference's slots and no others."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from launched import launched
from matmuls import bits_of, normal
from test_metal_rope import prepare
from test_positions import WRONG, unseen
from test_prepare_qkv import arguments
from test_write_cache import fresh

from pyengine import _ext, ops

FUSED = _ext.instruction_set() != "portable"  # which has no fused multiply-add


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("offset", WRONG)
def test_write_cache(offset, dtype):
    B, T, K, C, D = 2, 5, 3, 7, 9
    new, cache = normal(1, B, T, K, D, dtype=dtype), fresh(B, K, C, D, dtype=dtype)
    want = ops.write_cache_reference(cache, new, unseen(offset))
    (out,), _ = launched(ops.write_cache(cache, new, unseen(offset)), mode="check")
    assert np.array_equal(bits_of(out), bits_of(want))


@pytest.mark.parametrize("offset", WRONG)
def test_prepare_qkv(offset):
    T, H, K, C, D = 5, 2, 3, 7, 16
    # Whoever is turned so far has no right angle: only slots are compared with the reference
    given = arguments(T, H, K, C, D) | {"offset": unseen(offset)}
    own = {name: a + 0 for name, a in given.items()}
    plain = ops.prepare_qkv_reference(**own | {"inv_freq": 0 * own["inv_freq"]})
    for inv_freq in (own["inv_freq"], 0 * own["inv_freq"]):
        call = own | {"inv_freq": inv_freq, "offset": unseen(offset)}
        outs, _ = prepare(call, mode="check")
    for got, want in zip(outs, plain, strict=True):
        assert mx.allclose(got, want, rtol=1e-5, atol=1e-5)
    native = ops.prepare_qkv(**arguments(T, H, K, C, D) | {"offset": unseen(offset)})
    outs, _ = prepare(own | {"offset": unseen(offset)}, mode="check")
    for got, want in zip(outs, native, strict=True):
        assert not FUSED or np.array_equal(bits_of(got), bits_of(want))


@pytest.mark.parametrize("offset", WRONG)
def test_norm_rope(offset):
    x, weight, inv_freq = normal(2, 1, 3, 2, 16), normal(3, 16), mx.zeros(8)
    (out,), _ = launched(ops.norm_rope(x, weight, unseen(offset), inv_freq), mode="check")
    want = ops.norm_rope_reference(x, weight, unseen(offset), inv_freq)
    assert mx.allclose(out, want, rtol=1e-5, atol=1e-5)


def test_ids_of_no_expert():
    """Whatever an id is: no byte outside, and no row left unwritten."""
    stack = [a.reshape(3, 21, -1) for a in mx.quantize(normal(4, 63, 64), 64, 8)]
    x, ids = normal(5, 18, 64), np.random.default_rng(6).integers(-2, 5, (18, 2))
    ids[0] = -(2**31), 2**31 - 1
    given = mx.array(ids.astype(np.int32))
    for order in ("forward", "random"):
        result = ops.quantized_expert_matmul(x, stack, given)
        (out,), _ = launched(result, mode="check", order=order)
        want = ops.quantized_expert_matmul_reference(x, stack, given)
        assert mx.allclose(out, want, rtol=1e-4, atol=1e-5, equal_nan=True)
