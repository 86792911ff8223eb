"""The matmuls as the tests of their Metal kernels see them: inputs, launch, reference, weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from launched import launches_of

import workbench
from pyengine import ops
from pyengine.ops.workbench import to_mlx, to_numpy


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32)).astype(dtype)


def bits_of(x: mx.array) -> np.ndarray:
    return np.array(mx.contiguous(x).view(mx.uint32 if x.dtype == mx.float32 else mx.uint16))


@dataclass
class Matmul:
    """One op with its weights: everything but the rows."""

    op: str
    weights: dict[str, mx.array]  # by name of the kernel's buffer
    launch: Callable[[int], Any]  # of so many rows
    native: Callable[[mx.array], mx.array]
    reference: Callable[[mx.array], mx.array]
    scale: Callable[[mx.array], mx.array]  # sum of the absolute products, float32

    @property
    def stored_bytes(self) -> int:
        return sum(a.nbytes for a in self.weights.values())

    def metal(self, x: mx.array, **options: Any) -> tuple[mx.array, Any]:
        """The kernel's output and report for rows x [M, K]."""
        launch = self.launch(x.shape[0])
        arrays = {name: to_numpy(a) for name, a in {"x": x, **self.weights}.items()}
        outputs, report = workbench.run(launch, arrays, **options)
        dtype = next(b.dtype for b in launch.buffers if b.name == "out")
        return to_mlx(outputs["out"], dtype), report


def q8(seed, N, K, dtype, group_size=64, bits=8, out_dtype=None) -> Matmul:
    q = mx.quantize(normal(seed, N, K, dtype=dtype), group_size, bits)
    values = abs(mx.dequantize(q[0], *(a.astype(mx.float32) for a in q[1:]), group_size, bits))

    def native(x: mx.array) -> mx.array:
        return ops.quantized_matmul(x, *q, group_size, bits, out_dtype=out_dtype)

    return Matmul(
        "quantized_matmul",
        dict(zip(("w", "scales", "biases"), q, strict=True)),
        lambda M: launches_of(native(mx.zeros((M, K), dtype)))[0],
        native,
        lambda x: ops.quantized_matmul_reference(x, *q, group_size, bits, out_dtype=out_dtype),
        lambda x: abs(x.astype(mx.float32)) @ values.T,
    )


def gated(seed, N, K, dtype, group_size=64, bits=8, activation="gelu") -> Matmul:
    gate, up = (mx.quantize(normal(seed + i, N, K, dtype=dtype), group_size, bits) for i in (0, 1))
    names = ("w", "scales", "biases")
    weights = {f"gate_{name}": a for name, a in zip(names, gate, strict=True)}
    weights |= {f"up_{name}": a for name, a in zip(names, up, strict=True)}

    def native(x: mx.array) -> mx.array:
        return ops.quantized_gated_matmul(x, gate, up, group_size, bits, activation)

    def scale(x: mx.array) -> mx.array:
        """|d out| <= |d gate| * 1.13 |up| + |gate| |d up|: gelu is no steeper than 1.13, silu than
        1.1."""
        sizes, sums = [], []
        for w, *factors in (gate, up):
            values = mx.dequantize(w, *(a.astype(mx.float32) for a in factors), group_size, bits)
            sizes.append(abs(x.astype(mx.float32)) @ abs(values).T)
            sums.append(abs(x.astype(mx.float32) @ values.T))
        return 1.13 * (sizes[0] * (sums[1] + 1) + sizes[1] * (sums[0] + 1))

    return Matmul(
        "quantized_gated_matmul",
        weights,
        lambda M: launches_of(native(mx.zeros((M, K), dtype)))[0],
        native,
        lambda x: ops.quantized_gated_matmul_reference(x, gate, up, group_size, bits, activation),
        scale,
    )


def dense(seed, N, K, dtype, out_dtype=None) -> Matmul:
    w = normal(seed, N, K, dtype=dtype)

    def native(x: mx.array) -> mx.array:
        return ops.dense_matmul(x, w, out_dtype=out_dtype)

    return Matmul(
        "dense_matmul",
        {"w": w},
        lambda M: launches_of(native(mx.zeros((M, K), dtype)))[0],
        native,
        lambda x: ops.dense_matmul_reference(x, w, out_dtype=out_dtype),
        lambda x: abs(x.astype(mx.float32)) @ abs(w.astype(mx.float32)).T,
    )
