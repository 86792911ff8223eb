import math

import mlx.core as mx

from pyengine import _ext

from .dispatch import run


def glu(gate: mx.array, up: mx.array) -> mx.array:
    """Gate an activation: ``gelu_tanh(gate) * up``.

    ``gelu_tanh(g) = g / 2 * (1 + tanh(sqrt(2 / pi) * (g + 0.044715 * g ** 3)))``, in float32,
    the product rounded once.

    Args:
        gate: ``[..., F]``, float32, float16 or bfloat16.
        up: Shape and dtype of ``gate``.

    Returns:
        Shape and dtype of ``gate``.

    Raises:
        ValueError: The shapes or dtypes differ or the dtype is not one of the three.

    Source: tanh form of GELU, arXiv:1606.08415.
    """
    return run(_ext.glu(gate, up), glu_reference, gate, up)


ELEMENTWISE = True  # the reference has no reduction


def glu_reference(gate: mx.array, up: mx.array) -> mx.array:
    """The same in plain MLX."""
    g = gate.astype(mx.float32)
    inner = math.sqrt(2 / math.pi) * (g + 0.044715 * g * g * g)
    out = 0.5 * g * (1 + mx.tanh(inner)) * up.astype(mx.float32)
    return out.astype(gate.dtype)
