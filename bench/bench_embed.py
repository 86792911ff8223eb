"""embed against the same in MLX's own operations, as a forward pass looks a token up.

Run: pytest bench/bench_embed.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import embed, embed_reference

# The call of docs/ops.md
SMALL = {"E": 1536, "T": 6, "bits": 8}
V, GROUP = 4096, 64


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("E", [128, 5376])
def test_embed(benchmark, E, T, bits):
    # Of each row its weights, scales and biases; ids and results
    nbytes = T * (E * bits // 8 + 2 * E // GROUP * 2) + 4 * T + T * E * 2
    table = timing.quantized(1, V, E, group_size=GROUP, bits=bits)
    keys = (mx.random.key(i) for i in range(timing.CALLS))
    turns = [(mx.random.randint(0, V, (T,), mx.int32, key),) for key in keys]
    mx.eval(table, turns)

    def of(op):
        return lambda ids: op(ids, table, GROUP, bits, scale=8.0)

    kernel, plain = of(embed), of(embed_reference)
    timing.check(kernel(*turns[0]), plain(*turns[0]))
    timing.compare(benchmark, kernel, plain, turns, nbytes=nbytes, E=E, T=T, bits=bits)
