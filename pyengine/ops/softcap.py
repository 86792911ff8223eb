import mlx.core as mx

from pyengine import _ext

from . import workbench
from .dispatch import chosen


def softcap(x: mx.array, cap: float) -> mx.array:
    """Bend numbers so that they stay between ``-cap`` and ``cap``: ``cap * tanh(x / cap)``.

    With our own tanh, so that :func:`quantized_filter_logits` gives the same bits, on a GPU too.

    Args:
        x: float32, any shape and strides.
        cap: Above 0.

    Returns:
        float32, shape of ``x``.

    Raises:
        ValueError: A dtype or limit above does not hold.
    """
    out = _ext.softcap(x, cap)  # checks in every case
    implementation = chosen("softcap")
    if implementation == "native":
        return out
    if implementation == "workbench" and out.size > 0:
        return workbench.run(_ext.softcap_launch(x.size, cap), x)[0].reshape(x.shape)
    return softcap_reference(x, cap)


def softcap_reference(x: mx.array, cap: float) -> mx.array:
    """The same in plain MLX."""
    return cap * mx.tanh(x / cap)
