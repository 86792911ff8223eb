from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, STEP, Call, first, normal, quantized
from .glu import Activation, glu, glu_reference
from .quantized_matmul import product_error, quantized_matmul, quantized_matmul_reference
from .sizes import Settings, Shape, Sizes, packed, scaled

Matrix = tuple[mx.array, mx.array, mx.array]


def quantized_gated_matmul(
    x: mx.array,
    gate: Matrix,
    up: Matrix,
    group_size: int = 64,
    bits: int = 8,
    activation: Activation = "gelu",
) -> mx.array:
    """Gate and up projection and their activation in one pass over x and both matrices.

    ``out = gelu_tanh(x @ gate.T) * (x @ up.T)``, or that with ``silu``. Each product is that of
    ``quantized_matmul``, rounded to the dtype of ``x``, and their meeting that of ``glu``: the bits
    are those of the three ops. On a GPU these three serve more than 128 rows.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16; K is a multiple of the group size.
        gate: Weights uint32 ``[N, K * bits / 32]``, scales and biases ``[N, K / group_size]`` of
            the dtype of ``x``, as ``mx.quantize`` gives them.
        up: A second matrix of the same shape.
        group_size: 32, 64 or 128 weights share a scale and a bias.
        bits: 8, 6 or 4 per weight.
        activation: ``"gelu"`` or ``"silu"``, as ``glu`` has them.

    Returns:
        ``[..., N]``, dtype of ``x``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    out = _ext.quantized_gated_matmul(x, *gate, *up, group_size, bits, activation)
    args = (x, gate, up, group_size, bits, activation)
    return run(out, quantized_gated_matmul_reference, *args, otherwise=_one_by_one)


def _one_by_one(
    x: mx.array, gate: Matrix, up: Matrix, group_size: int, bits: int, activation: Activation
) -> mx.array:
    gates, ups = (quantized_matmul(x, *matrix, group_size, bits) for matrix in (gate, up))
    return glu(gates, ups, activation)


def quantized_gated_matmul_reference(
    x: mx.array,
    gate: Matrix,
    up: Matrix,
    group_size: int = 64,
    bits: int = 8,
    activation: Activation = "gelu",
) -> mx.array:
    """The same in plain MLX."""
    product = quantized_matmul_reference
    gates, ups = (product(x, *matrix, group_size, bits) for matrix in (gate, up))
    return glu_reference(gates, ups, activation)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for packing in sizes.quantized:
        for K, true, activation in sizes.gated:
            N = sizes.fitted(true, K, packing, matrices=2)
            settings: Settings = {"N": N, "K": K, **packed(packing, sizes.dtype)}
            if activation != "gelu":
                settings["activation"] = activation
            yield settings, scaled("N", true, N)


def example(
    N: int, K: int, group: int, bits: int, dtype: str, activation: Activation = "gelu"
) -> Call:
    x = normal(1, MOST, K, dtype=dtype)
    gate, up = (quantized(i, N, K, group=group, bits=bits, dtype=dtype) for i in (2, 3))
    return Call(
        lambda b, e: [quantized_gated_matmul(x[b:e], gate, up, group, bits, activation)],
        first,
        lambda results: [gate_error(results[0], x, gate, up, (group, bits))],
        same_bits=False,
        weights=[*gate, *up],
    )


def gate_error(
    out: mx.array, x: mx.array, gate: Matrix, up: Matrix, packing: tuple[int, int]
) -> mx.array:
    """``|d out| <= |d gate| * 1.13 |up| + |gate| |d up|``, as gelu is no steeper than 1.13 and silu
    than 1.1; each product is rounded, and their meeting once more."""
    errors = [product_error(x, w, *packing) for w in (gate, up)]
    products = [abs(quantized_matmul_reference(x, *w, *packing)) for w in (gate, up)]
    products = [a.astype(mx.float32) for a in products]
    errors = [e + STEP[out.dtype] * a for e, a in zip(errors, products, strict=True)]
    total = 1.13 * errors[0] * (products[1] + errors[1]) + (products[0] + errors[0]) * errors[1]
    return total + abs(out.astype(mx.float32)) * STEP[out.dtype]
