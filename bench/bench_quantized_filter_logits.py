"""quantized_filter_logits against the three ops it stands for, at the head of E2B.

Run: pytest bench/bench_quantized_filter_logits.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
from timing import compare

from pyengine import ops

V, E, GROUP = 262144, 1536, 64


@pytest.fixture(scope="module")
def head():
    w = mx.random.randint(0, 2**31, (V, E // 4), key=mx.random.key(0)).astype(mx.uint32)
    scales = (mx.random.normal((V, E // GROUP)) * 1e-4).astype(mx.bfloat16)
    q = (w, scales, scales * -128)
    mx.eval(q)
    return q


@pytest.mark.parametrize("T", [1, 4, 6, 16])
def test_quantized_filter_logits(benchmark, head, T):
    x = mx.random.normal((T, E), key=mx.random.key(T)).astype(mx.bfloat16)

    def fused():
        return ops.quantized_filter_logits(x, *head, softcap=30.0, top_p=0.95)

    def unfused():
        logits = ops.softcap(ops.quantized_matmul(x, *head, out_dtype=mx.float32), 30.0)
        return ops.filter_logits(logits, top_p=0.95)

    assert all(mx.array_equal(*pair) for pair in zip(fused(), unfused(), strict=True))
    compare(
        benchmark,
        lambda: mx.eval(fused()),
        lambda: mx.eval(unfused()),
        calls=1,
        nbytes=sum(a.nbytes for a in head),
        rounds=15,
        T=T,
        V=V,
        E=E,
    )
