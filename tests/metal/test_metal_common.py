"""metal/common.h: the functions of csrc/cpu/mathfn.h, bit for bit, under any contraction."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import workbench
from pyengine import _ext, ops

SOURCE = """
#include "common.h"
kernel void apply(
    const device float* x [[buffer(0)]],
    device float* out [[buffer(1)]],
    constant uint& count [[buffer(2)]],
    uint i [[thread_position_in_grid]]) {
  if (i < count) {
    float2 turned = pyengine::sincos(x[i]);
    out[i] = pyengine::exp(x[i]);
    out[count + i] = pyengine::tanh(x[i]);
    out[2 * count + i] = turned.x;
    out[3 * count + i] = turned.y;
    out[4 * count + i] = pyengine::gelu(x[i]);
  }
}
"""


def inputs() -> np.ndarray:
    draw = np.random.default_rng(1)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 88.72283, 88.72284, -87.3365, -87.3366, 0.6]
    parts = [special, draw.normal(size=2000), draw.uniform(-100, 100, 2000)]
    parts.append(draw.uniform(-(2**18), 2**18, 2000))
    return np.concatenate(parts).astype(np.float32)


@pytest.mark.parametrize("contract", ["off", "fast"])
def test_functions_are_the_processors(contract, tmp_path: Path):
    x = inputs()
    file = tmp_path / "apply.metal"
    file.write_text(SOURCE)
    launch = workbench.Launch(
        library=str(file),
        kernel="apply",
        constants={},
        grid=((len(x) + 255) // 256, 1, 1),
        threadgroup=(256, 1, 1),
        buffers=[
            workbench.Buffer("x", "in", x.shape, "float32"),
            workbench.Buffer("out", "out", (5, len(x)), "float32"),
            workbench.Buffer("count", "bytes", data=len(x).to_bytes(4, "little")),
        ],
        threadgroup_memory=[],
    )
    outputs, _ = workbench.run(launch, {"x": x}, contract=contract)
    if _ext.instruction_set() == "portable":
        pytest.skip("the portable kernels have no fused multiply-add")
    expected = [np.array(_ext.mathfn(name, mx.array(x))) for name in ("exp", "tanh", "sin", "cos")]
    expected.append(np.array(ops.glu(mx.array(x), mx.ones_like(mx.array(x)))))
    names = ("exp", "tanh", "sin", "cos", "gelu")
    for name, a, b in zip(names, outputs["out"], expected, strict=True):
        same = (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))
        assert np.all(same), (name, x[~same][:5], a[~same][:5], b[~same][:5])
