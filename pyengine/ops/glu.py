import math
from collections.abc import Iterator
from typing import Literal

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, first, normal, rounded
from .sizes import Settings, Shape, Sizes

Activation = Literal["gelu", "silu"]


def glu(gate: mx.array, up: mx.array, activation: Activation = "gelu") -> mx.array:
    """Gate by an activation: ``gelu_tanh(gate) * up``, or ``silu(gate) * up``.

    ``gelu_tanh(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g ** 3)))`` and ``silu(g) =
    g / (1 + exp(-g))``, in float32, the product rounded once.

    Args:
        gate: ``[..., F]``, float32, float16 or bfloat16.
        up: Shape and dtype of ``gate``.
        activation: Which of the two.

    Returns:
        Shape and dtype of ``gate``.

    Raises:
        ValueError: The shapes or dtypes differ, the dtype is not one of the three, or there is no
            such activation.

    Source: tanh form of GELU, arXiv:1606.08415, where SiLU is too; gated, arXiv:2002.05202.
    """
    return run(_ext.glu(gate, up, activation), glu_reference, gate, up, activation)


ELEMENTWISE = True  # the reference has no reduction


def glu_reference(gate: mx.array, up: mx.array, activation: Activation = "gelu") -> mx.array:
    """The same in plain MLX."""
    g = gate.astype(mx.float32)
    if activation == "gelu":
        inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g * g * g)
        g = 0.5 * g * (1 + mx.tanh(inner))
    else:
        g = g / (1 + mx.exp(-g))
    return (g * up.astype(mx.float32)).astype(gate.dtype)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for F, activation in sizes.gates:
        settings: Settings = {"F": F, "dtype": sizes.dtype}
        if activation != "gelu":
            settings["activation"] = activation
        yield settings, {}


def example(F: int, dtype: str, activation: Activation = "gelu") -> Call:
    gate, up = (normal(i, MOST, F, dtype=dtype, scale=2.0) for i in (1, 2))
    return Call(lambda b, e: [glu(gate[b:e], up[b:e], activation)], first, rounded(1))
