"""Which implementation runs: the switch, and what status says of it."""

import mlx.core as mx
import pytest

from pyengine import _ext, ops

NAMES = [name for name in ops.__all__ if name + "_reference" in ops.__all__]


def test_status_names_every_op() -> None:
    rows = ops.status()
    assert [row["op"] for row in rows] == sorted(NAMES)
    kernel = f"SIMD ({_ext.instruction_set()})"
    assert all(row["kernel"] == kernel and row["row_stable"] is True for row in rows)


def test_use_switches_every_op() -> None:
    ops.use("reference")
    try:
        rows = {row["op"]: row for row in ops.status()}
        x = mx.ones((1, 64))
        mx.eval(ops.rms_norm(x, None))  # runs in plain MLX
    finally:
        ops.use("native")
    assert {row["kernel"] for row in rows.values()} == {"reference"}
    assert not rows["q8_matmul"]["row_stable"] and rows["geglu"]["row_stable"]


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError) as error:
        ops.use("fast")  # type: ignore[arg-type]
    text = "[use] implementation must be one of native, reference but got fast."
    assert str(error.value) == text
    assert ops.status()[0]["kernel"].startswith("SIMD")
