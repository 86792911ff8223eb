"""prepare_qkv against the ops it stands for: norms and rotations of our own, MLX's scatters.

MLX's scatter copies an arena that somebody else holds; the arenas here are small.

Run: pytest bench/bench_prepare_qkv.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing
from sized_calls import EPS, HEADS, Call, frequencies, random

from pyengine.ops import norm_rope, prepare_qkv, prepare_qkv_reference, rms_norm

# The call of docs/ops.md
SMALL = {"H": 8, "K": 2, "D": 256, "Q": 2, "R": 6}
TABLE = "layers"  # of bench/count.py
P = 16  # pages of an arena


@pytest.mark.parametrize("Q, R", [(1, 1), (1, 6), (8, 8), (8, 48)])
@pytest.mark.parametrize("H, K, D", [(4, 1, 256), (32, 16, 256)])
def test_prepare_qkv(benchmark, H, K, D, Q, R):
    """As many rows of each of Q sequences, which end anywhere in a page of their own."""
    T = R // Q
    # Queries in and out, keys and values in and into the arenas; two norms, frequencies; positions
    # and owners; one page of each sequence
    nbytes = 2 * R * H * D * 2 + 2 * 2 * R * K * D * 2 + 2 * D * 2 + D // 2 * 4 + 2 * R * 4 + Q * 4
    rows = [timing.normal(i, R, heads * D) for i, heads in enumerate((H, K, K))]
    norms = timing.normal(3, D), timing.normal(4, D)
    inv_freq = 10000.0 ** (-mx.arange(D // 2) / (D // 2))
    arenas = timing.normal(5, P, K, 64, D), timing.normal(6, P, K, 64, D)
    owners = mx.arange(R) // T
    positions, tables = owners * 7 % 50 + mx.arange(R) % T, P - 1 - mx.arange(Q)[:, None]
    where = positions, owners, tables
    turns = timing.turns(*rows, *norms, inv_freq, *arenas, *where, nbytes=nbytes)

    def separate(q, k, v, q_norm, k_norm, inv_freq, keys, values, positions, owners, tables):
        q, k, v = (a.reshape(R, -1, D) for a in (q, k, v))
        k, v = norm_rope(k, k_norm, positions, inv_freq), rms_norm(v)
        pages = tables[owners, positions // 64 % tables.shape[1]]
        written = []
        for arena, new in ((keys, k), (values, v)):
            arena = arena + 0
            arena[pages, :, positions % 64] = new
            written.append(arena)
        return norm_rope(q, q_norm, positions, inv_freq), *written

    expected = prepare_qkv_reference(*turns[0])
    apart = separate(*turns[0])
    mx.eval(expected, apart)  # before the arenas are written
    timing.check(prepare_qkv(*turns[0]), expected, rtol=2**-7, atol=2**-10)
    timing.check(apart, prepare_qkv(*turns[0]))
    timing.compare(
        benchmark,
        prepare_qkv,
        separate,
        turns,
        nbytes=nbytes,
        baseline_calls=10,
        H=H,
        K=K,
        D=D,
        Q=Q,
        R=R,
    )


def counted(T):
    """A sequence per row, each with a page."""
    for H, K, D in HEADS:
        q, k, v = random(1, T, H * D), random(2, T, K * D), random(3, T, K * D)
        norms = random(4, D), random(5, D), frequencies(D)
        keys, values = random(6, T, K, 64, D), random(6, T, K, 64, D)
        owners = mx.arange(T)
        where = (keys, values, 4000 + owners, owners, owners[:, None])
        result = prepare_qkv(q, k, v, *norms, *where, eps=EPS)[0]
        yield Call("prepare_qkv", result, {"M": T, "shape": f"{H} + 2 * {K} of {D}"}, 1 / 64)
