"""quantized_expert_matmul on Metal, in the workbench: right, row-stable, weights read once."""

import mlx.core as mx
import numpy as np
import pytest
from launched import launched
from matmuls import bits_of, normal

from pyengine import ops

EXPERTS, SLOTS, N = 5, 3, 21


def stack(seed, K, dtype, group_size=64, bits=8, experts=EXPERTS, N=N):
    flat = mx.quantize(normal(seed, experts * N, K, dtype=dtype), group_size, bits)
    return [a.reshape(experts, N, -1) for a in flat]


def choose(seed, T, experts=EXPERTS) -> mx.array:
    draw = np.random.default_rng(seed)
    ids = np.stack([np.sort(draw.permutation(experts)[:SLOTS]) for _ in range(T)])
    return mx.array(ids.astype(np.int32))


def metal(x, first, ids, group_size=64, bits=8, up=None, out_dtype=None, **options):
    result = ops.quantized_expert_matmul(
        x, first, ids, group_size, bits, up=up, out_dtype=out_dtype
    )
    (out,), report = launched(result, **options)
    return out, report


@pytest.mark.parametrize(
    "dtype, group_size, bits, gated",
    [(mx.bfloat16, 64, 8, True), (mx.float32, 32, 6, False), (mx.float16, 128, 4, True)],
)
def test_no_fault_and_the_processors_result(dtype, group_size, bits, gated):
    """Both sides round like the other or fall on a neighbour, gated in three places."""
    K = 3 * group_size
    first, up = (stack(seed, K, dtype, group_size, bits) for seed in (1, 2))
    x, ids = normal(3, 6, K, dtype=dtype) / K**0.5, choose(4, 6)
    second = up if gated else None
    out, _ = metal(x, first, ids, group_size, bits, second, mode="check")
    bound = {mx.float32: 1e-5, mx.float16: 2.0**-8, mx.bfloat16: 2.0**-5}[dtype]
    for op in (ops.quantized_expert_matmul, ops.quantized_expert_matmul_reference):
        expected = op(x, first, ids, group_size, bits, up=second)
        a, b = (np.array(y.astype(mx.float32)) for y in (out, expected))
        assert np.all(np.abs(a - b) <= bound * (1 + np.abs(b)))
    for options in ({"order": "reverse"}, {"order": "random"}):
        other, _ = metal(x, first, ids, group_size, bits, second, mode="check", **options)
        assert np.array_equal(bits_of(other), bits_of(out))
    other, _ = metal(x, first, ids, group_size, bits, second, contract="fast")
    assert np.array_equal(bits_of(other), bits_of(out))


def test_bits_are_those_of_the_metal_matmul():
    """A token's row for an expert is that of quantized_matmul, whoever else chose the expert."""
    first, ids = stack(5, 320, mx.bfloat16), choose(6, 21)
    x = normal(7, 21, 320, dtype=mx.bfloat16)
    out = bits_of(metal(x, first, ids, out_dtype=mx.float32)[0])
    alone = mx.broadcast_to(x[:, None], (21, SLOTS, 320))
    assert np.array_equal(bits_of(metal(alone, first, ids, out_dtype=mx.float32)[0]), out)
    for expert in range(EXPERTS):
        matrix = [a[expert] for a in first]
        result = ops.quantized_matmul(x, *matrix, out_dtype=mx.float32)
        chosen = np.array(ids) == expert
        rows = bits_of(launched(result, order="random")[0][0])
        assert np.array_equal(out[chosen], rows[np.nonzero(chosen)[0]])


def test_an_expert_named_twice_is_computed_twice():
    first, x = stack(8, 64, mx.float32), normal(9, 1, 64)
    ids = mx.array([[2, 2, 4]], dtype=mx.int32)
    out, _ = metal(x, first, ids, mode="check")
    assert np.array_equal(bits_of(out)[0, 0], bits_of(out)[0, 1])
    expected = ops.quantized_expert_matmul_reference(x, first, ids)
    assert mx.allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_only_touched_experts_are_read_and_each_once():
    """Whole tiles: a column that there is not is read as the last one, once more."""
    first, up = (stack(seed, 1024, mx.bfloat16, experts=8, N=32) for seed in (10, 11))
    x = normal(12, 16, 1024, dtype=mx.bfloat16)
    ids = mx.array([[1, 3, 6]] * 8 + [[1, 2, 3]] * 8, dtype=mx.int32)  # four of eight
    _, report = metal(x, first, ids, up=up, mode="count")
    for name in ("w", "up_w", "scales", "biases", "up_scales", "up_biases"):
        traffic = report.traffic[name]
        assert traffic.device_read_bytes * 8 == traffic.size * 4, name
