"""Positions and pages that there are not, on Metal in the workbench: the processor's bits, and no
byte outside."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from launched import launched
from matmuls import bits_of, normal
from test_copy_pages import by_hand, fresh, int32
from test_metal_rope import prepare
from test_positions import WRONG
from test_prepare_qkv import arguments, assert_close, composed

from pyengine import _ext, ops

FUSED = _ext.instruction_set() != "portable"  # which has no fused multiply-add
ORDERS = ("forward", "reverse", "random")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_copy_pages(order, dtype):
    P = 5
    wrong = [*WRONG, P]
    sources = [*wrong, *[0] * len(wrong), *wrong, 4, 4, 1]
    targets = [*[1] * len(wrong), *wrong, *wrong[::-1], 2, 3, 1]
    arena = fresh(P, 2, 64, 6, dtype=dtype)
    want = by_hand(arena, sources, targets)
    copy = ops.copy_pages(arena, int32(sources), int32(targets))
    (out,), _ = launched(copy, mode="check", order=order)
    assert np.array_equal(bits_of(out), want)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("value", [*WRONG, None])
@pytest.mark.parametrize("name, count", [("positions", -1), ("owners", 3), ("tables", 15)])
def test_prepare_qkv(name, count, value, order):
    """Half of the rows, or of the pages, say what there is not; then all of them."""
    value = count if value is None else value  # the first that there is not
    for every in (2, 1):
        given = arguments([60, 0, 511], [6, 1, 2], 2, 3, 16, N=16)
        assert given["keys"].shape[0] == 15
        wrong = np.array(given[name])
        wrong.reshape(-1)[::every] = value
        if name == "positions" and value >= 0:  # a place, but only one
            wrong[1:] = -1
        given[name] = mx.array(wrong) + mx.array(0)
        # Whoever is turned so far has no right angle: only the processor's bits are compared
        want = composed(given)
        outs, _ = prepare(given, mode="check", order=order)
        if name == "positions" and not FUSED:
            outs, want = outs[1:], want[1:]
        for got, expected in zip(outs, want, strict=True):
            if FUSED:
                assert np.array_equal(bits_of(got), expected)
            else:
                assert_close(got, mx.array(expected).view(mx.float32))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_prepare_qkv_without_tables(shape):
    given = arguments([5], [2], 2, 1, 8) | {"tables": mx.zeros(shape, mx.int32)}
    before = bits_of(given["keys"])
    (out, keys, _), _ = prepare(given, mode="check")
    assert np.isfinite(np.array(out)).all() and np.array_equal(bits_of(keys), before)


def test_norm_rope():
    x, weight = normal(2, len(WRONG), 2, 16), normal(3, 16)
    for inv_freq in (mx.zeros(8), normal(4, 8)):
        turned = ops.norm_rope(x, weight, mx.array(WRONG) + mx.array(0), inv_freq)
        (out,), _ = launched(turned, mode="check")
        assert not FUSED or np.array_equal(bits_of(out), bits_of(turned))
    turned = ops.norm_rope(x, weight, mx.array(WRONG), mx.zeros(8))
    (out,), _ = launched(turned, mode="check")
    assert_close(out, ops.rms_norm_reference(x, weight))


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
