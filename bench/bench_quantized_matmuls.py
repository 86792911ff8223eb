"""quantized_matmuls against a quantized_matmul for each matrix: what one launch saves.

Run: pytest bench/bench_quantized_matmuls.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import numpy as np
import pytest
from timing import cold_copies, compare

from pyengine.ops import quantized_matmul, quantized_matmuls

GROUP, BITS = 64, 8
# Columns of q, k and v, and K: the embedded pair's target, a sliding and a full layer of E2B.
SHAPES = {
    "nano": ((256, 256, 256), 128),
    "e2b-sliding": ((2048, 256, 256), 1536),
    "e2b-full": ((4096, 512, 512), 1536),
}


@pytest.mark.parametrize("M", [1, 4, 6, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_quantized_matmuls(benchmark, name, M):
    columns, K = SHAPES[name]
    nbytes = sum(columns) * K * BITS // 8 + 2 * sum(columns) * K // GROUP * 2
    x = mx.random.normal((M, K), key=mx.random.key(0)).astype(mx.bfloat16)
    first = [
        mx.quantize(mx.random.normal((N, K)).astype(mx.bfloat16), GROUP, BITS) for N in columns
    ]
    # The embedded pair stays in the cache, as it does when it runs; the others do not fit
    count = 64 if name == "nano" else cold_copies(nbytes)
    copies = [first] + [[[a + 0 for a in q] for q in first] for _ in range(count - 1)]
    mx.eval(x, copies)
    together = quantized_matmuls(x, first, GROUP, BITS)
    for out, q in zip(together, first, strict=True):
        assert np.array_equal(
            *(np.array(a.view(mx.uint16)) for a in (out, quantized_matmul(x, *q, GROUP, BITS)))
        )

    def separate():
        mx.eval([[quantized_matmul(x, *q, GROUP, BITS) for q in matrices] for matrices in copies])

    compare(
        benchmark,
        lambda: mx.eval([quantized_matmuls(x, matrices, GROUP, BITS) for matrices in copies]),
        separate,
        calls=count,
        baseline_calls=count,
        nbytes=nbytes,
        shape=name,
        M=M,
    )
