"""filter_logits against its definition in MLX's operations, at Gemma 4's vocabulary.

Run: pytest bench/bench_filter_logits.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import numpy as np
import pytest
import timing
from sized_calls import Call

from pyengine.ops import filter_logits, filter_logits_reference

# The call of docs/ops.md
SMALL = {"V": 8192, "T": 6}
TABLE = "rules"  # of bench/count.py
TOP_K = 64


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("V", [262144])
def test_filter_logits(benchmark, V, T):
    # Logits, ids and probabilities of the candidates, a flag per row
    nbytes = 4 * T * V + T * TOP_K * (4 + 4) + 4 * T
    turns = timing.turns(timing.normal(0, T, V, dtype=mx.float32) * 4, nbytes=nbytes)

    def of(op):
        return lambda logits: op(logits, top_k=TOP_K, top_p=0.95)

    kernel, plain = of(filter_logits), of(filter_logits_reference)
    timing.check(kernel(*turns[0]), plain(*turns[0]), rtol=1e-4)
    timing.compare(benchmark, kernel, plain, turns, nbytes=nbytes, baseline_calls=8, V=V, T=T)


def counted(rows, vocab):
    draw = np.random.default_rng(0)
    for T in rows:
        logits = mx.array(draw.normal(0, 4, (T, vocab)).astype(np.float32))
        result = filter_logits(logits, top_k=TOP_K, top_p=0.95)
        yield Call("filter_logits", result, {"M": T, "N": vocab})
