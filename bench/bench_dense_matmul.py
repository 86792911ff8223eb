"""dense_matmul against x @ w.T of MLX, on weights that no cache holds.

Run: pytest bench/bench_dense_matmul.py --benchmark-columns=median,iqr,rounds
"""

import itertools

import mlx.core as mx
import pytest
from timing import cold_copies, compare

from pyengine.ops import dense_matmul, dense_matmul_reference


@pytest.mark.parametrize("M", [1, 2, 4, 6, 8, 16])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize("N, K", [(4096, 4096)])
def test_dense_matmul(benchmark, N, K, dtype, M):
    nbytes = N * K * dtype.size  # x and out are at most a few thousandths of it
    x = mx.random.normal((M, K), key=mx.random.key(0)).astype(dtype)
    first = mx.random.normal((N, K)).astype(dtype)
    copies = [first] + [first + 0 for _ in range(cold_copies(nbytes) - 1)]
    mx.eval(x, copies)
    expected = dense_matmul_reference(x, first)
    assert mx.allclose(dense_matmul(x, first), expected, rtol=2**-6, atol=2)

    turns = itertools.cycle(copies)
    compare(
        benchmark,
        lambda: mx.eval([dense_matmul(x, w) for w in copies]),
        lambda: mx.eval(x @ next(turns).T),
        calls=len(copies),
        nbytes=nbytes,
        N=N,
        K=K,
        dtype=str(dtype).removeprefix("mlx.core."),
        M=M,
    )
