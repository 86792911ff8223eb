"""glu on Metal, in the workbench: the processor's bits."""

import mlx.core as mx
import numpy as np
import pytest
from launched import launched
from matmuls import bits_of, normal

from pyengine import _ext, ops

TOLERANCE = {mx.float32: 2e-6, mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}
FUSED = _ext.instruction_set() != "portable"  # which has no fused multiply-add


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bits_and_bytes(dtype, activation):
    special = mx.array([0.0, -0.0, np.inf, -np.inf, np.nan, 90.0, -90.0, 3e-39]).astype(dtype)
    for size in (1, 255, 257, 1000):
        gate = mx.concatenate([special, normal(1, size, dtype=dtype) * 4])[-size:]
        up = normal(2, size, dtype=dtype)
        native = ops.glu(gate, up, activation)
        (out,), report = launched(native, mode="count")
        if FUSED:
            same = bits_of(out) == bits_of(native)
            assert np.all(same | np.isnan(np.array(out.astype(mx.float32))))
        expected = ops.glu_reference(gate, up, activation)
        a, b = (np.array(x.astype(mx.float32)) for x in (out, expected))
        np.testing.assert_allclose(a, b, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
        sectors = -(-out.nbytes // 32)
        assert report.traffic["gate"].device_read_bytes == 32 * sectors
        assert report.traffic["up"].device_read_bytes == 32 * sectors
        assert report.traffic["out"].device_written_bytes == 32 * sectors


def test_the_op_runs_it():
    gate, up = normal(3, 4, 30, dtype=mx.bfloat16), normal(4, 4, 2, 30, dtype=mx.bfloat16)[:, 1]
    expected = ops.glu(gate, up)
    mx.eval(expected)
    ops.use("workbench")
    try:
        out = ops.glu(gate, up)
        assert ops.glu(gate[:0], up[:0]).shape == (0, 30)
        kernels = {row["op"]: row["kernel"] for row in ops.status()}
    finally:
        ops.use("native")
    assert kernels["glu"] == "Metal (workbench)" and out.shape == (4, 30)
    assert not FUSED or np.array_equal(bits_of(out), bits_of(expected))
