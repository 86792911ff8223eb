"""A weight matrix, dense or quantised, that knows how to multiply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import mlx.core as mx

from pyengine import ops
from pyengine.ops.glu import Activation


@dataclass(frozen=True)
class Linear:
    """A matrix ``[N, K]`` or a stack of them ``[X, N, K]``, dense or MLX affine quantised.

    Calling it multiplies: ``x[..., K] @ W.T``, weights dequantised in float32, rounded once.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 0
    group_size: int = 0

    def __call__(self, x: mx.array, out_dtype: mx.Dtype | None = None) -> mx.array:
        if self.scales is None or self.biases is None:
            return ops.dense_matmul(x, self.weight, out_dtype=out_dtype)
        return ops.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            self.group_size,
            self.bits,
            out_dtype=out_dtype,
        )

    @property
    def packed(self) -> tuple[mx.array, mx.array, mx.array] | None:
        """Weights, scales and biases; None if dense."""
        if self.scales is None or self.biases is None:
            return None
        return self.weight, self.scales, self.biases

    @property
    def packing(self) -> tuple[int, int] | None:
        """Group size and bits; None if dense."""
        return None if self.scales is None else (self.group_size, self.bits)

    def packed_like(self, other: Linear) -> bool:
        """Whether both are quantised, in the same way and shape."""
        same = self.packing == other.packing and self.weight.shape == other.weight.shape
        return self.scales is not None and same

    @property
    def outputs(self) -> int:
        """N."""
        return self.weight.shape[-2]

    @property
    def arrays(self) -> list[mx.array]:
        return [a for a in (self.weight, self.scales, self.biases) if a is not None]

    @property
    def dtype(self) -> mx.Dtype:
        return (self.weight if self.scales is None else self.scales).dtype

    def take(self, indices: mx.array) -> Linear:
        """The matrix (or stack) with only these rows (or members), in this order."""
        return self._map(lambda a: mx.take(a, indices, axis=0))

    def member(self, i: int) -> Linear:
        """One matrix of a stack."""
        return self._map(lambda a: a[i])

    def joined(self) -> Linear:
        """A stack [X, N, K] as one matrix [X * N, K]."""
        return self._map(lambda a: a.reshape(-1, a.shape[-1]))

    def stacked(self, count: int) -> Linear:
        """A matrix [X * N, K] as a stack of ``count``, [X, N, K]."""
        return self._map(lambda a: a.reshape(count, -1, a.shape[-1]))

    def astype(self, dtype: mx.Dtype) -> Linear:
        if self.scales is None or self.biases is None:
            return Linear(self.weight.astype(dtype))
        return replace(self, scales=self.scales.astype(dtype), biases=self.biases.astype(dtype))

    def values(self) -> mx.array:
        """The matrix in float32, unrounded."""
        if self.scales is None or self.biases is None:
            return self.weight.astype(mx.float32)
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        return mx.dequantize(self.weight, scales, biases, self.group_size, self.bits)

    def rows(self, ids: mx.array, scale: float, out_dtype: mx.Dtype | None = None) -> mx.array:
        """Rows of a table times scale, ``[..., K]``; NaN for ids that it does not have."""
        packing = self.packing or ()
        return ops.embed(ids, self.arrays, *packing, scale=scale, out_dtype=out_dtype)

    def _map(self, f: Callable[[mx.array], mx.array]) -> Linear:
        if self.scales is None or self.biases is None:
            return Linear(f(self.weight))
        return replace(self, weight=f(self.weight), scales=f(self.scales), biases=f(self.biases))


def gated(gate: Linear, up: Linear, x: mx.array, activation: Activation = "gelu") -> mx.array:
    """``activation(gate(x)) * up(x)``, in one op where the two are packed alike."""
    first, second = gate.packed, up.packed
    if first is None or second is None or not gate.packed_like(up):
        return ops.glu(gate(x), up(x), activation)
    packing = gate.group_size, gate.bits
    return ops.quantized_gated_matmul(x, first, second, *packing, activation)


def side_by_side(matrices: Sequence[Linear], x: mx.array) -> list[mx.array]:
    """``[matrix(x) for each matrix]``, in one op where two or three are packed alike."""
    packed = [matrix.packed for matrix in matrices if matrix.packed is not None]
    packing = matrices[0].packing
    alike = all(matrix.packing == packing for matrix in matrices)
    if packing is None or not alike or len(matrices) not in (2, 3):
        return [matrix(x) for matrix in matrices]
    return ops.quantized_matmuls(x, packed, *packing)


@dataclass(frozen=True)
class MLP:
    gate: Linear
    up: Linear
    down: Linear
    activation: Activation = field(default="gelu", kw_only=True)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(gated(self.gate, self.up, x, self.activation))


@dataclass(frozen=True)
class Weights:
    """The arrays of one model, by module path (matrices) or full name (everything else)."""

    matrices: Mapping[str, Linear]
    vectors: Mapping[str, mx.array]
    dtype: mx.Dtype
