"""The norms on Metal, in the workbench: the processor's bits, each row read once."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from launched import launched, launches_of
from matmuls import bits_of, normal
from test_residual_norm import TOLERANCE as SUM_TOLERANCE
from test_rms_norm import TOLERANCE

from pyengine import _ext, ops
from pyengine.ops import dispatch

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# Single elements, odd rows, and all around a simdgroup's 64 and a piece's 1024; 31B's width; the
# widest
WIDTHS = [1, 2, 33, 63, 64, 66, 1023, 1024, 1025, 2050, 5376, 16384]
FUSED = _ext.instruction_set() != "portable"  # which has no fused multiply-add


def norm(x: mx.array, weight: mx.array | None, eps: float = 1e-6, **options: Any):
    (out,), report = launched(ops.rms_norm(x, weight, eps), **options)
    return out, report


def add(
    h: mx.array,
    y: mx.array,
    weight: mx.array,
    scalar: mx.array | None = None,
    next_weight: mx.array | None = None,
    **options: Any,
):
    total, _ = ops.residual_norm(h, y, weight, scalar=scalar, next_weight=next_weight)
    return launched(total, **options)


def inputs(T: int, E: int, dtype: mx.Dtype, seed: int = 0) -> tuple[mx.array, ...]:
    """h, y, weight, scalar, next_weight."""
    rows = normal(seed, T, E, dtype=dtype), normal(seed + 1, T, E, dtype=dtype)
    scalar = mx.array([0.7]).astype(dtype)
    return *rows, normal(seed + 2, E, dtype=dtype), scalar, normal(seed + 3, E, dtype=dtype)


def assert_same(out: mx.array, native: mx.array, reference: mx.array, tolerance: float) -> None:
    """The processor's bits, where it fuses; the definition's value, but for what terms of size 4,
    which may cancel, lose, and what a plain sum of 16384 squares does."""
    assert out.dtype == native.dtype and out.shape == native.shape
    if FUSED:
        assert np.array_equal(bits_of(out), bits_of(native))
    a, b = (np.array(x.astype(mx.float32)) for x in (out, reference))
    np.testing.assert_allclose(a, b, rtol=max(tolerance, 4e-6), atol=4 * tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", WIDTHS)
def test_rms_norm_has_no_fault_and_the_processors_bits(D, dtype):
    x, _, weight, *_ = inputs(3, D, dtype, D)
    for w in (weight, None):
        out, _ = norm(x, w, mode="check")
        native, reference = ops.rms_norm(x, w), ops.rms_norm_reference(x, w)
        assert_same(out, native, reference, TOLERANCE[dtype])
    small = (x.astype(mx.float32) * 1e-3).astype(dtype)
    out, _ = norm(small, weight, 0.5, mode="check")
    native, reference = (
        ops.rms_norm(small, weight, 0.5),
        ops.rms_norm_reference(small, weight, 0.5),
    )
    assert_same(out, native, reference, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("E", WIDTHS)
def test_residual_norm_has_no_fault_and_the_processors_bits(E, dtype):
    h, y, weight, scalar, next_weight = inputs(3, E, dtype, E)
    for s in (None, scalar):
        for n in (None, next_weight):
            outs, _ = add(h, y, weight, s, n, mode="check")
            kw = {"scalar": s, "next_weight": n}
            native = ops.residual_norm(h, y, weight, **kw)
            reference = ops.residual_norm_reference(h, y, weight, **kw)
            assert len(outs) == (1 if n is None else 2)
            for triple in zip(outs, native, reference, strict=False):
                assert_same(*triple, SUM_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_order_of_lanes_and_no_contraction_changes_a_bit(dtype):
    h, y, weight, scalar, next_weight = inputs(2, 2050, dtype, 9)
    alone, both = norm(y, weight)[0], add(h, y, weight, scalar, next_weight)[0]
    for options in (
        {"mode": "check", "order": "reverse"},
        {"mode": "check", "order": "random"},
        {"contract": "fast"},
    ):
        assert np.array_equal(bits_of(norm(y, weight, **options)[0]), bits_of(alone))
        outs = add(h, y, weight, scalar, next_weight, **options)[0]
        assert all(np.array_equal(bits_of(a), bits_of(b)) for a, b in zip(outs, both, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("E", [33, 1536])
def test_rows_are_stable(E, dtype):
    """A row's bits are those of the row alone, beside 1 to 15 others, whatever they hold."""
    h, y, weight, _, next_weight = inputs(16, E, dtype, 20)
    rows = [slice(t, t + 1) for t in range(16)]
    alone = [bits_of(norm(y[t], weight)[0]) for t in rows]
    sums, nexts = (
        [bits_of(a) for a in outs]
        for outs in zip(*(add(h[t], y[t], weight, None, next_weight)[0] for t in rows), strict=True)
    )
    for T in range(1, 17):
        assert np.array_equal(bits_of(norm(y[:T], weight)[0]), np.concatenate(alone[:T]))
        total, following = add(h[:T], y[:T], weight, None, next_weight)[0]
        assert np.array_equal(bits_of(total), np.concatenate(sums[:T]))
        assert np.array_equal(bits_of(following), np.concatenate(nexts[:T]))
    for value in (float("nan"), float("inf"), 6e4):
        y[3] = value
        total, following = add(h, y, weight, None, next_weight)[0]
        keep = [t for t in range(16) if t != 3]
        assert np.array_equal(bits_of(total)[keep], np.concatenate(sums)[keep])
        assert np.array_equal(bits_of(following)[keep], np.concatenate(nexts)[keep])


def test_a_broken_row_is_nan_and_zeros_stay_zeros():
    x = mx.zeros((3, 1500))
    x[1, 1400] = float("nan")
    out = np.array(norm(x, None, mode="check")[0])
    assert np.isnan(out[1]).all() and not out[[0, 2]].any()


@pytest.mark.parametrize("T", [1, 6])
def test_rows_are_read_once(T):
    E = 5376
    h, y, weight, scalar, next_weight = inputs(T, E, mx.bfloat16)
    _, report = norm(y, weight, mode="count")
    assert report.traffic["x"].device_read_bytes == report.traffic["x"].size == 2 * T * E
    assert report.traffic["weight"].device_read_bytes == 2 * T * E  # by every row
    assert report.traffic["out"].device_written_bytes == 2 * T * E
    _, report = add(h, y, weight, scalar, next_weight, mode="count")
    for name in ("h", "y", "weight", "next_weight"):
        assert report.traffic[name].device_read_bytes == 2 * T * E, name
    for name in ("sum", "next"):
        assert report.traffic[name].device_written_bytes == 2 * T * E, name
        assert report.traffic[name].device_read_bytes == 0, name


def test_launches():
    """A row a threadgroup, 1024 elements a simdgroup; pairs need their alignment."""
    x = mx.zeros((5, 5376), mx.bfloat16)
    (launch,) = launches_of(ops.rms_norm(x, x[0]))
    assert launch.grid == [5, 1, 1] and launch.threadgroup == [32 * 6, 1, 1]
    assert launch.kernel == "rms_norm_bfloat16" and launch.buffers[0].alignment == 4
    (odd,) = launches_of(ops.rms_norm(x[:, :33], x[0, :33]))
    assert odd.buffers[1].name == "weight" and odd.buffers[1].alignment == 2
    h = mx.zeros((1, 1025))
    (launch,) = launches_of(ops.residual_norm(h, h, h[0], next_weight=h[0])[0])
    assert launch.threadgroup == [64, 1, 1] and launch.buffers[0].alignment == 4
    assert [b.name for b in launch.buffers if b.role == "in"] == [
        *("h", "y", "weight", "weight", "next_weight")
    ]


def test_wider_rows_are_not_given_to_the_kernel(monkeypatch):
    limit = 16384
    assert launches_of(ops.rms_norm(mx.zeros((1, limit))))
    assert _ext.launches_of(ops.rms_norm(mx.zeros((1, limit + 1))))[0] is None
    for E in (1, limit, limit + 1):
        h = mx.zeros((1, E))
        launches, _ = _ext.launches_of(ops.residual_norm(h, h, h[0])[0])
        assert (launches is None) is (limit < E)
    x = normal(1, 1, limit + 1)
    expected = ops.rms_norm(x)
    monkeypatch.setattr(dispatch, "_chosen", "workbench")
    monkeypatch.setattr(ops.workbench, "run", None)  # whoever calls it fails
    assert mx.array_equal(ops.rms_norm(x), expected)
    assert mx.array_equal(ops.residual_norm(x, x, x[0])[0], x + ops.rms_norm(x, x[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ops_run_them(dtype):
    """Of any shape and strides; without rows there is nothing to run."""
    h, y, weight, scalar, next_weight = inputs(12, 96, dtype, 40)
    h, y = (a.reshape(3, 4, 96)[:, ::2] for a in (h, y))
    kw = {"scalar": scalar, "next_weight": next_weight}
    expected = [ops.rms_norm(y, weight), ops.rms_norm(y), *ops.residual_norm(h, y, weight, **kw)]
    mx.eval(expected)
    ops.use("workbench")
    try:
        out = [ops.rms_norm(y, weight), ops.rms_norm(y), *ops.residual_norm(h, y, weight, **kw)]
        assert ops.residual_norm(h, y, weight)[1] is None
        assert ops.rms_norm(y[:0], weight).shape == (0, 2, 96)
    finally:
        ops.use("native")
    for a, b in zip(out, expected, strict=True):
        assert_same(a, b, b, TOLERANCE[dtype])
