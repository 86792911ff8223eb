"""embed against the same in MLX's own operations, as a forward pass looks a token up.

Run: pytest bench/bench_embed.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import numpy as np
import pytest
import timing

from pyengine.ops import embed, embed_reference

CALLS = 200
V = 4096


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("E", [128, 5376])
def test_embed(benchmark, E, T, bits):
    values = mx.random.normal((V, E), key=mx.random.key(1)).astype(mx.bfloat16)
    table = mx.quantize(values, 64, bits)
    draw = np.random.default_rng(2)
    ids = [mx.array(draw.integers(0, V, T, dtype=np.int32)) for _ in range(CALLS)]
    mx.eval(table, ids)
    assert mx.array_equal(embed(ids[0], table, 64, bits), embed_reference(ids[0], table, 64, bits))

    def all_of(look_up):
        return lambda: mx.eval([look_up(i, table, 64, bits, scale=8.0) for i in ids])

    timing.compare(
        benchmark,
        all_of(embed),
        all_of(embed_reference),
        calls=CALLS,
        nbytes=T * (E * bits // 8 + 2 * E // 64 * 2),
        baseline_calls=CALLS,
        E=E,
        T=T,
        bits=bits,
    )
