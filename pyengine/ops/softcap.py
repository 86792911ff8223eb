from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, first, normal, rounded
from .sizes import Shape, Sizes


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
    return run(_ext.softcap(x, cap), softcap_reference, x, cap)


ELEMENTWISE = True  # the reference has no reduction


def softcap_reference(x: mx.array, cap: float) -> mx.array:
    """The same in plain MLX."""
    return cap * mx.tanh(x / cap)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for V, cap in sizes.vocabularies:
        if cap is not None:
            yield {"V": V, "cap": cap}, {}


def example(V: int, cap: float) -> Call:
    x = normal(1, MOST, V, scale=16.0)
    return Call(lambda b, e: [softcap(x[b:e], cap)], first, rounded(1))
