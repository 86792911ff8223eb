"""quantized_matmul against mx.quantized_matmul, on weights that no cache holds.

Run: pytest bench/bench_quantized_matmul.py --benchmark-columns=median,iqr,rounds
"""

from pathlib import Path

import mlx.core as mx
import pytest
import timing
from sized_calls import BITS, GROUP, MODEL_WIDTHS, ROWS, Call, MlxKernel, quantized, random

from pyengine.ops import quantized_matmul, quantized_matmul_reference, workbench

# The call of docs/ops.md
SMALL = {"N": 128, "K": 1536, "bits": 8, "M": 6}
TABLE = "matrices"  # of bench/count.py


@pytest.mark.parametrize("M", [1, 2, 4, 6, 8, 16])
@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("N, K", [(4096, 4096), (5376, 21504)])
def test_quantized_matmul(benchmark, N, K, bits, M):
    # Weights, scales and biases; x and results
    nbytes = N * K * bits // 8 + 2 * N * K // GROUP * 2 + M * K * 2 + M * N * 2
    x = timing.normal(0, M, K)
    matrix = timing.quantized(1, N, K, group_size=GROUP, bits=bits)
    turns = timing.turns(*matrix, nbytes=nbytes)

    def kernel(*q):
        return quantized_matmul(x, *q, GROUP, bits)

    def mlx(*q):
        return mx.quantized_matmul(x, *q, True, GROUP, bits)

    expected = quantized_matmul_reference(x, *turns[0], GROUP, bits)
    timing.check(kernel(*turns[0]), expected, rtol=2**-6, atol=2)
    labels = {"N": N, "K": K, "bits": bits, "M": M}
    timing.compare(benchmark, kernel, mlx, turns, nbytes=nbytes, baseline_calls=1, **labels)


def counted(M, N, K):
    labels = {"M": M, "N": N, "K": K}
    x, matrix = random(0, M, K), quantized(1, N, K)
    yield Call("quantized_matmul", quantized_matmul(x, *matrix, GROUP, BITS), labels)
    # MLX's kernels load byte by byte: counting their longest rows would take minutes
    if M in ROWS and K // 4 not in MODEL_WIDTHS:
        # As MLX chooses them: qmv_fast where a simdgroup's steps divide K
        narrow = "qmv_fast" if K % 512 == 0 else "qmv"
        for name in (narrow, "qmv_wide") if M > 1 else (narrow,):
            yield Call("quantized_matmul", mlx_kernel(name, x, *matrix), labels)


def mlx_kernel(name, x, w, scales, biases):
    """One of MLX's kernels as its own code starts it."""
    bench = workbench.load()
    (M, K), N = x.shape, w.shape[0]
    wide = name == "qmv_wide"
    arrays = {"w": w, "scales": scales, "biases": biases, "x": x}
    given = {name: workbench.to_numpy(a) for name, a in arrays.items()}
    sizes = [K, N, M] if wide else [K, N]
    launch = bench.Launch(
        library=str(Path(__file__).with_name("mlx_quantized.metal")),
        kernel=f"affine_{name}<bfloat, {GROUP}, {BITS}, {'4, 8, ' if wide else ''}false>",
        constants={},
        grid=((M + 3) // 4 if wide else M, N // 8, 1),
        threadgroup=(32, 2, 1),
        buffers=[
            *(
                bench.Buffer(name, "in", a.shape, "uint32" if name == "w" else "bfloat16")
                for name, a in given.items()
            ),
            bench.Buffer("out", "out", (M, N), "bfloat16"),
            *(bench.Buffer("size", "bytes", data=size.to_bytes(4, "little")) for size in sizes),
            *[bench.Buffer("unused", "bytes", data=bytes(64))] * 8,
        ],
        threadgroup_memory=[],
    )
    return MlxKernel(launch, given)
