"""residual_norm against the same in MLX's own ops: at these sizes the cost is that of a call.

Run: pytest bench/bench_residual_norm.py --benchmark-columns=median,iqr,rounds
"""

import mlx.core as mx
import pytest

from pyengine.ops import residual_norm

CALLS = 200  # a chain, as in a forward pass: each call reads what the last one wrote


@pytest.mark.parametrize("implementation", ["mlx", "native"])
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("width", [128, 5376])
def test_residual_norm(benchmark, width, T, implementation):
    h, y = (mx.random.normal((T, width), key=mx.random.key(i)).astype(mx.bfloat16) for i in (0, 1))
    weight = mx.ones(width, dtype=mx.bfloat16)
    mx.eval(h, y, weight)

    def native(h: mx.array) -> mx.array:
        return residual_norm(h, y, weight, next_weight=weight)[1]

    def mlx(h: mx.array) -> mx.array:
        return mx.fast.rms_norm(h + mx.fast.rms_norm(y, weight, 1e-6), weight, 1e-6)

    assert mx.allclose(native(h), mlx(h), atol=2**-5)
    step = native if implementation == "native" else mlx

    def chain() -> None:
        x = h
        for _ in range(CALLS):
            x = step(x)
        mx.eval(x)

    benchmark.group = f"E={width} T={T}"
    benchmark.pedantic(chain, warmup_rounds=2, rounds=9)
    benchmark.extra_info["us per call"] = round(benchmark.stats.stats.median / CALLS * 1e6, 2)
