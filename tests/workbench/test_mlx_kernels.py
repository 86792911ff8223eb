"""Kernels of MLX's own, unmodified: the right results, and no false alarm."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from snippets import source

import workbench
from workbench import Buffer, Launch

INCLUDE = Path(mx.__file__).parent / "include"
KERNELS = "mlx/backend/metal/kernels"


def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def number(value: int | float, dtype: str = "int32") -> Buffer:
    """A scalar argument."""
    return Buffer("number", "bytes", data=np.array(value, dtype).tobytes())


UNUSED = Buffer("unused", "bytes", data=bytes(64))


@dataclass
class Case:
    """A launch of an MLX kernel.

    `buffers` has arrays (inputs), Buffers, and shapes with a dtype (the outputs, in the order of
    `expected`).
    """

    headers: str
    kernel: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    buffers: list[Any]
    expected: list[np.ndarray[Any, Any]]
    tolerance: float = 1e-5
    constants: dict[int, Any] = field(default_factory=dict)


def rows(count: int, width: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return generator(seed).standard_normal((count, width)).astype(np.float32)


def softmax(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def quantised(n: int, k: int, seed: int) -> tuple[np.ndarray[Any, Any], ...]:
    """8-bit weights in groups of 64: packed, scales, biases, and their values."""
    w = generator(seed).integers(0, 256, (n, k), dtype=np.uint8)
    scales = generator(seed + 1).uniform(0.01, 0.02, (n, k // 64)).astype(np.float32)
    biases = generator(seed + 2).uniform(-2, -1, (n, k // 64)).astype(np.float32)
    values = w * np.repeat(scales, 64, 1) + np.repeat(biases, 64, 1)
    return w.view(np.uint32), scales, biases, values


def quantised_matmul(kernel: str, m: int, n: int, k: int) -> Case:
    w, scales, biases, values = quantised(n, k, 7)
    x = rows(m, k, 8)
    wide, tiled = "wide" in kernel, "qmm" in kernel
    sizes = [number(k), number(n)]
    grid, threads = (m, n // 8, 1), (32, 2, 1)
    if tiled:
        sizes.append(number(m))
        grid, threads = (n // 32, (m + 31) // 32, 1), (32, 2, 2)
    elif wide:
        sizes.append(number(m))
        grid = ((m + 3) // 4, n // 8, 1)
    return Case(
        "quantized_utils steel/gemm/gemm quantized",
        kernel,
        grid,
        threads,
        [w, scales, biases, x, ((m, n), "float32"), *sizes, *[UNUSED] * 8],
        [x @ values.T],
        tolerance=1e-4,
    )


def quantise() -> Case:
    w = rows(16, 128, 3)
    packed, scales, biases = map(np.array, mx.quantize(mx.array(w), 64, 8))
    return Case(
        "quantized_utils steel/gemm/gemm quantized",
        "affine_quantize<float, 64, 8>",
        (1, 16, 1),
        (64, 1, 1),
        [w, ((16, 128), "uint8"), (scales.shape, "float32"), (biases.shape, "float32")],
        [packed.view(np.uint8), scales, biases],
    )


def dequantise() -> Case:
    w, scales, biases, values = quantised(16, 128, 5)
    return Case(
        "quantized_utils steel/gemm/gemm quantized",
        "affine_dequantize<float, 64, 8>",
        (4, 16, 1),
        (32, 1, 1),
        [w.view(np.uint8), scales, biases, ((16, 128), "float32")],
        [values],
    )


def matrix_vector(rows_at_once: int, columns_at_once: int) -> Case:
    matrix, vector = rows(32, 128, 1), rows(1, 128, 2)[0]
    strides = Buffer("strides", "bytes", data=np.zeros(1, np.int64).tobytes())
    return Case(
        "gemv",
        f"gemv<float, {rows_at_once}, {columns_at_once}, 1, 32, 4, 4, false, false>",
        (8 // rows_at_once, 1, 1),
        (32, columns_at_once, rows_at_once),
        [
            *(matrix, vector, UNUSED, ((32,), "float32")),
            *(number(128), number(32), number(128)),
            *(number(1.0, "float32"), number(0.0, "float32")),
            *(number(1), UNUSED, strides, strides, strides, number(0)),
        ],
        [matrix @ vector],
    )


def attention() -> Case:
    q, k, v = rows(4, 64, 1), rows(2 * 70, 64, 2), rows(2 * 70, 64, 3)
    keys, values = k.reshape(2, 70, 64), v.reshape(2, 70, 64)
    expected = [softmax(q[h] @ keys[h // 2].T * 0.125) @ values[h // 2] for h in range(4)]
    return Case(
        "sdpa_vector",
        "sdpa_vector<float, 64>",
        (4, 1, 1),
        (1024, 1, 1),
        [
            *(q, keys, values, ((4, 64), "float32"), number(2), number(70)),
            *(number(70 * 64, "uint64"), number(64, "uint64")),
            *(number(70 * 64, "uint64"), number(64, "uint64"), number(0.125, "float32")),
        ],
        [np.array(expected)],
        constants=dict.fromkeys(range(20, 26), False),
    )


def matrix_product() -> Case:
    a, b = rows(40, 64, 1), rows(64, 72, 2)
    tiles_m, tiles_n = 2, 3
    params = np.array([40, 72, 64, 64, 72, 72, tiles_n, tiles_m], np.int32).tobytes()
    params += np.zeros(3, np.int64).tobytes() + np.array([0, 64 // 16, 1, 0], np.int32).tobytes()
    return Case(
        "steel/gemm/gemm steel/gemm/kernels/steel_gemm_fused",
        "gemm<float, 32, 32, 16, 2, 2, false, false>",
        (tiles_n, tiles_m, 1),
        (32, 2, 2),
        [a, b, UNUSED, ((40, 72), "float32"), Buffer("params", "bytes", data=params)],
        [a @ b],
        constants={10: False, 100: False, 110: False, 200: False, 201: False, 202: True},
    )


X = rows(3, 200)
KEYS = generator(4).permutation(700).astype(np.float32)
CASES = {
    "unary": Case(
        "unary_ops unary",
        "unary_v<float, float, Exp>",
        (3, 1, 1),
        (128, 1, 1),
        [X, (X.shape, "float32"), number(X.size, "uint32")],
        [np.exp(X)],
    ),
    "binary": Case(
        "binary_ops binary",
        "binary_vv<float, float, Add>",
        (3, 1, 1),
        (128, 1, 1),
        [X, X[::-1].copy(), (X.shape, "float32"), number(X.size, "uint32")],
        [X + X[::-1]],
    ),
    "ternary": Case(
        "ternary_ops ternary",
        "ternary_v<float, Select, false, false>",
        (3, 1, 1),
        (128, 1, 1),
        [X > 0, X, -X, (X.shape, "float32"), number(X.size, "uint32")],
        [np.abs(X)],
    ),
    "arange": Case(
        "arange",
        "arange<float>",
        (2, 1, 1),
        (64, 1, 1),
        [number(3.0, "float32"), number(0.5, "float32"), ((128,), "float32")],
        [3 + 0.5 * np.arange(128, dtype=np.float32)],
    ),
    "copy to half": Case(
        "copy",
        "copy_v<float, half>",
        (2, 1, 1),
        (128, 1, 1),
        [X, (X.shape, "float16"), number(X.size, "uint32")],
        [X.astype(np.float16)],
    ),
    "softmax": Case(
        "softmax",
        "softmax_single_row<float, float>",
        (3, 1, 1),
        (64, 1, 1),
        [X, (X.shape, "float32"), number(200)],
        [softmax(X)],
    ),
    "long softmax": Case(
        "softmax",
        "softmax_looped<float, float>",
        (2, 1, 1),
        (1024, 1, 1),
        [rows(2, 4500), ((2, 4500), "float32"), number(4500)],
        [softmax(rows(2, 4500))],
    ),
    "logsumexp": Case(
        "logsumexp",
        "logsumexp<float>",
        (3, 1, 1),
        (64, 1, 1),
        [X, ((3,), "float32"), number(200)],
        [np.log(np.exp(X).sum(-1))],
    ),
    "sum of all": Case(
        "atomic reduction/ops reduce",
        "all_reduce<float, float, Sum<float>>",
        (1, 1, 1),
        (128, 1, 1),
        [X, ((1,), "float32"), number(X.size, "uint64"), number(X.size, "uint64")],
        [X.sum(keepdims=True).ravel()],
        tolerance=1e-4,
    ),
    "row sums": Case(
        "atomic reduction/ops reduce",
        "row_reduce_simple<float, float, Sum<float>>",
        (1, 2, 1),
        (64, 1, 1),
        [rows(8, 300), ((8,), "float32"), number(300, "uint64"), number(8, "int64")],
        [rows(8, 300).sum(-1)],
        tolerance=1e-4,
    ),
    "cumulative sums": Case(
        "scan",
        "contiguous_scan<float, float, CumSum<float>, 4, true, false>",
        (1, 2, 1),
        (1024, 1, 1),
        [rows(2, 4500), ((2, 4500), "float32"), number(4500, "uint64")],
        [rows(2, 4500).cumsum(-1, dtype=np.float64)],
        tolerance=1e-3,
    ),
    "sort": Case(
        "sort",
        "block_sort<float, float, false, 128, 8>",
        (1, 1, 1),
        (128, 1, 1),
        [KEYS, ((700,), "float32"), number(700), *[number(1)] * 2, *[number(700)] * 2],
        [np.sort(KEYS)],
    ),
    "gemv": matrix_vector(8, 1),
    "gemm": matrix_product(),
    "attention": attention(),
    "quantize": quantise(),
    "dequantize": dequantise(),
    "qmv_fast": quantised_matmul("affine_qmv_fast<float, 64, 8, false>", 2, 16, 512),
    "qmv": quantised_matmul("affine_qmv<float, 64, 8, false>", 2, 16, 192),
    "qmv_wide": quantised_matmul("affine_qmv_wide<float, 64, 8, 4, 8, false>", 6, 16, 512),
    "qmm_t": quantised_matmul("affine_qmm_t<float, 64, 8, true, false>", 40, 64, 128),
}


def built(case: Case) -> tuple[Launch, dict[str, np.ndarray[Any, Any]], list[str]]:
    """The launch of a case, its arrays, and the names of its outputs."""
    included = "".join(f'#include "{KERNELS}/{name}.h"\n' for name in case.headers.split())
    text = f'#include <metal_stdlib>\n#include "{KERNELS}/utils.h"\n{included}'
    buffers, arrays, outputs = [], {}, []
    for i, content in enumerate(case.buffers):
        name = f"{i}"
        if isinstance(content, Buffer):
            buffers.append(content)
        elif isinstance(content, np.ndarray):
            arrays[name] = content
            buffers.append(Buffer(name, "in", content.shape, str(content.dtype)))
        else:
            outputs.append(name)
            buffers.append(Buffer(name, "out", *content))
    launch = Launch(
        source(text), case.kernel, case.grid, case.threadgroup, tuple(buffers), case.constants
    )
    return launch, arrays, outputs


@pytest.mark.parametrize("name", CASES)
def test_mlx_kernel(name):
    case = CASES[name]
    launch, arrays, outputs = built(case)
    for order in ("forward", "reverse", "random"):
        result, report = workbench.run(launch, arrays, mode="check", order=order, include=[INCLUDE])
        assert report.findings == []
        for output, expected in zip(outputs, case.expected, strict=True):
            np.testing.assert_allclose(
                result[output], expected, rtol=case.tolerance, atol=case.tolerance
            )


def test_a_barrier_of_mlx_that_most_lanes_never_reach():
    # With several simdgroups to a row, gemv waits inside `if (thrN == 0)`: the barrier is meant
    # for the one lane of each simdgroup that gets there. The alarm is right.
    launch, arrays, _ = built(matrix_vector(1, 4))
    _, report = workbench.run(launch, arrays, mode="check", include=[INCLUDE], raising=False)
    (finding,) = report.findings
    assert finding.kind == "barrier-divergence" and "gemv.h:" in finding.where
    assert "not reached by 124 of 128 threads" in finding.message


def test_there_are_enough_of_them():
    assert len({case.kernel.partition("<")[0] for case in CASES.values()}) >= 20
