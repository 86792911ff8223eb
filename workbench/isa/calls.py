"""The calls whose kernels are counted: lazy results of ops, never evaluated."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

GROUP_SIZE = 64
BENCH = Path(__file__).parents[2] / "bench"


def matmul_calls(columns: int) -> dict[str, Callable[[int, int, int], Any]]:
    """By op: its lazy result for M rows of width K and a number of bits."""
    import mlx.core as mx

    from pyengine import ops

    def rows(M: int, K: int) -> mx.array:
        return mx.zeros((M, K), mx.bfloat16)

    def matrix(N: int, K: int, bits: int, *stack: int) -> tuple[mx.array, mx.array, mx.array]:
        factors = mx.zeros((*stack, N, K // GROUP_SIZE), mx.bfloat16)
        return mx.zeros((*stack, N, K * bits // 32), mx.uint32), factors, factors

    def matmul(M: int, K: int, bits: int) -> Any:
        return ops.quantized_matmul(rows(M, K), *matrix(columns, K, bits), GROUP_SIZE, bits)

    def matmuls(M: int, K: int, bits: int) -> Any:
        parts = [matrix(columns // n, K, bits) for n in (2, 4, 4)]
        return ops.quantized_matmuls(rows(M, K), parts, GROUP_SIZE, bits)

    def gated(M: int, K: int, bits: int) -> Any:
        gate, up = (matrix(columns, K, bits) for _ in range(2))
        return ops.quantized_gated_matmul(rows(M, K), gate, up, GROUP_SIZE, bits)

    def expert(M: int, K: int, bits: int) -> Any:
        """All tokens use the one expert."""
        stack, up = (matrix(704, K, bits, 1) for _ in range(2))
        ids = mx.zeros((M, 1), mx.int32)
        return ops.quantized_expert_matmul(rows(M, K), stack, ids, GROUP_SIZE, bits, up=up)

    def head(M: int, K: int, bits: int) -> Any:
        """A slice has four tiles at least."""
        return ops.quantized_filter_logits(rows(M, K), *matrix(128, K, bits), GROUP_SIZE, bits)

    def dense(M: int, K: int, bits: int) -> Any:
        return ops.dense_matmul(rows(M, K), mx.zeros((columns, K), mx.bfloat16))

    return {
        "quantized_matmul": matmul,
        "quantized_matmuls": matmuls,
        "quantized_gated_matmul": gated,
        "quantized_expert_matmul": expert,
        "quantized_filter_logits": head,
        "dense_matmul": dense,
    }


def attention() -> Any:
    """A block of six against a full layer of the 31B."""
    import mlx.core as mx

    from pyengine import ops

    T, H, K, D, N = 6, 32, 4, 512, 16
    q = mx.ones((T, H, D), mx.bfloat16)
    keys, values = (mx.ones((N, K, 64, D), mx.bfloat16) for _ in range(2))
    lengths, tables = mx.array([64 * N - T]), mx.arange(N, dtype=mx.int32)[None]
    return ops.block_attention(q, keys, values, lengths, tables, [T])


def small_call(op: str) -> tuple[Any, int | None]:
    """The SMALL call of its bench, whose first threadgroup has work, and its rows."""
    if op == "block_attention":
        return attention(), 6
    if str(BENCH) not in sys.path:
        sys.path.append(str(BENCH))
    from pyengine.bench import arrays

    timing, bench = (importlib.import_module(name) for name in ("timing", f"bench_{op}"))
    kept: list[Any] = []

    def compare(_: Any, kernel: Any, baseline: Any, turns: Any, **rest: Any) -> None:
        kept.append(kernel(*turns[0]))

    def check(*_: Any, **rest: Any) -> None:
        pass

    few = mock.patch.object(arrays, "cold_copies", lambda nbytes: 1)
    with few, mock.patch.multiple(timing, compare=compare, check=check):
        getattr(bench, f"test_{op}")(None, **bench.SMALL)
    return kept[0], bench.SMALL.get("R", bench.SMALL.get("T"))
