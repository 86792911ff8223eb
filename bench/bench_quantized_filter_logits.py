"""quantized_filter_logits against the three ops it stands for, at the head of E2B.

Run: pytest bench/bench_quantized_filter_logits.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing
from sized_calls import BITS, GROUP, HEAD_WIDTH, Call, quantized, random

from pyengine import ops

# The call of docs/ops.md
SMALL = {"V": 512, "E": 256, "T": 4}
TABLE = "rules"  # of bench/count.py
TOP_K = 64


@pytest.mark.parametrize("T", [1, 4, 6, 16])
@pytest.mark.parametrize("V, E", [(262144, 1536)])
def test_quantized_filter_logits(benchmark, V, E, T):
    # Weights, scales, biases and x; ids, probabilities and flags
    nbytes = V * E + 2 * V * E // GROUP * 2 + T * E * 2 + T * TOP_K * (4 + 4) + 4 * T
    x = timing.normal(0, T, E)
    turns = timing.turns(*timing.quantized(1, V, E), nbytes=nbytes)

    def kernel(*head):
        return ops.quantized_filter_logits(x, *head, softcap=30.0, top_k=TOP_K, top_p=0.95)

    def separate(*head):
        logits = ops.softcap(ops.quantized_matmul(x, *head, out_dtype=mx.float32), 30.0)
        return ops.filter_logits(logits, top_k=TOP_K, top_p=0.95)

    timing.check(kernel(*turns[0]), separate(*turns[0]))
    timing.compare(benchmark, kernel, separate, turns, nbytes=nbytes, rounds=15, V=V, E=E, T=T)


def counted(rows, vocab):
    """The vocabulary is scaled down."""
    V = vocab // 32
    head = quantized(1, V, HEAD_WIDTH)
    settings = {"softcap": 30.0, "top_k": TOP_K, "top_p": 0.95}
    for T in rows:
        x = random(2, T, HEAD_WIDTH)
        result = ops.quantized_filter_logits(x, *head, GROUP, BITS, **settings)
        yield Call("quantized_filter_logits", result, {"M": T, "N": V, "K": HEAD_WIDTH})
