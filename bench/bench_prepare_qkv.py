"""prepare_qkv against the five ops it stands for: what one launch saves.

Run: pytest bench/bench_prepare_qkv.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing

from pyengine.ops import norm_rope, prepare_qkv, prepare_qkv_reference, rms_norm, write_cache

# The call of docs/ops.md
SMALL = {"H": 8, "K": 2, "D": 256, "T": 6}
C = 1024  # places of the cache


@pytest.mark.parametrize("T", [1, 6])
@pytest.mark.parametrize("H, K, D", [(4, 1, 256), (32, 16, 256)])
def test_prepare_qkv(benchmark, H, K, D, T):
    # Queries in and out, keys and values in and into the cache; two norms, frequencies, the offset
    nbytes = 2 * T * H * D * 2 + 2 * 2 * T * K * D * 2 + 2 * D * 2 + D // 2 * 4 + 4
    rows = [timing.normal(i, T, heads * D) for i, heads in enumerate((H, K, K))]
    norms = timing.normal(3, D), timing.normal(4, D)
    inv_freq, offset = 10000.0 ** (-mx.arange(D // 2) / (D // 2)), mx.array(C + 9)
    cache = timing.normal(5, 1, K, C, D), timing.normal(6, 1, K, C, D)
    turns = timing.turns(*rows, *norms, inv_freq, *cache, offset, nbytes=nbytes)

    def separate(q, k, v, q_norm, k_norm, inv_freq, keys, values, offset):
        q, k, v = (a.reshape(1, T, -1, D) for a in (q, k, v))
        k = norm_rope(k, k_norm, offset, inv_freq)
        keys, values = write_cache(keys, k, offset), write_cache(values, rms_norm(v), offset)
        return norm_rope(q, q_norm, offset, inv_freq), keys, values

    expected = prepare_qkv_reference(*turns[0])
    timing.check(prepare_qkv(*turns[0]), expected, rtol=2**-7, atol=2**-10)
    timing.check(separate(*turns[0]), prepare_qkv(*turns[0]))
    timing.compare(benchmark, prepare_qkv, separate, turns, nbytes=nbytes, H=H, K=K, D=D, T=T)
