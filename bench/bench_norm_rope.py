"""norm_rope against MLX's norm and rotation, one after the other.

Run: pytest bench/bench_norm_rope.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest
import timing
from sized_calls import EPS, HEADS, Call, frequencies, random

from pyengine.ops import norm_rope, norm_rope_reference

# The call of docs/ops.md
SMALL = {"H": 8, "D": 256, "R": 6}
TABLE = "layers"  # of bench/count.py


@pytest.mark.parametrize("R", [1, 6])
@pytest.mark.parametrize("H, D", [(4, 256), (32, 512)])
def test_norm_rope(benchmark, H, D, R):
    nbytes = 2 * R * H * D * 2 + D * 2 + D // 2 * 4 + 4 * R
    weight, positions = timing.normal(0, D), 1000 + 7 * mx.arange(R)
    inv_freq = 10000.0 ** (-mx.arange(D // 2) / (D // 2))
    wavelengths = 1 / inv_freq
    turns = timing.turns(timing.normal(1, R, H, D), nbytes=nbytes)
    mx.eval(weight, positions, inv_freq, wavelengths)

    def kernel(x):
        return norm_rope(x, weight, positions, inv_freq)

    def mlx(x):
        heads = mx.fast.rms_norm(x, weight, 1e-6)[:, :, None]  # [R, H, 1, D]
        options = {"traditional": False, "base": None, "scale": 1.0, "freqs": wavelengths}
        return mx.fast.rope(heads, D, offset=positions, **options)

    expected = norm_rope_reference(*turns[0], weight, positions, inv_freq)
    timing.check(kernel(*turns[0]), expected, rtol=2**-7, atol=2**-10)
    timing.check(mlx(*turns[0])[:, :, 0], expected, rtol=2**-6, atol=2**-4)
    timing.compare(benchmark, kernel, mlx, turns, nbytes=nbytes, H=H, D=D, R=R)


def counted(T):
    for H, _, D in HEADS:
        x, positions = random(1, T, H, D), 4000 + mx.arange(T)
        result = norm_rope(x, random(4, D), positions, frequencies(D), eps=EPS)
        yield Call("norm_rope", result, {"M": T, "shape": f"{H} of {D}"})
