"""dense_matmul against x @ w.T of MLX, on weights that no cache holds.

Run: pytest bench/bench_dense_matmul.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing
from sized_calls import Call, random

from pyengine.ops import dense_matmul, dense_matmul_reference

# The call of docs/ops.md
SMALL = {"N": 128, "K": 1536, "dtype": mx.bfloat16, "M": 6}
TABLE = "matrices"  # of bench/count.py


@pytest.mark.parametrize("M", [1, 2, 4, 6, 8, 16])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("N, K", [(4096, 4096)])
def test_dense_matmul(benchmark, N, K, dtype, M):
    nbytes = (N * K + M * K + M * N) * dtype.size
    x = timing.normal(0, M, K, dtype=dtype)
    turns = timing.turns(timing.normal(1, N, K, dtype=dtype), nbytes=nbytes)

    def kernel(w):
        return dense_matmul(x, w)

    timing.check(kernel(*turns[0]), dense_matmul_reference(x, *turns[0]), rtol=2**-6, atol=2)
    timing.compare(
        benchmark,
        kernel,
        lambda w: x @ w.T,
        turns,
        nbytes=nbytes,
        baseline_calls=1,
        N=N,
        K=K,
        dtype=str(dtype).removeprefix("mlx.core."),
        M=M,
    )


def counted(M, N, K):
    result = dense_matmul(random(0, M, K), random(3, N, K))
    yield Call("dense_matmul", result, {"M": M, "N": N, "K": K})
