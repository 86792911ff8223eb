from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, first, normal, rounded
from .sizes import Shape, Sizes


def rms_norm(x: mx.array, weight: mx.array | None = None, eps: float = 1e-6) -> mx.array:
    """Divide each row by its root mean square and multiply by a weight.

    ``out = x / sqrt(mean(x ** 2) + eps) * weight`` over the last axis, in float32, rounded once.
    The weight is plain: Gemma 4 multiplies by ``weight``, not by ``1 + weight``.
    On a GPU MLX's own, which is not row-stable, serves rows of more than 16384 elements.

    Args:
        x: ``[..., D]``, float32, float16 or bfloat16.
        weight: ``[D]``, dtype of ``x``, or None for a norm without weight.
        eps: Added to the mean of squares; positive.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    args = (x, weight, eps)
    return run(_ext.rms_norm(*args), rms_norm_reference, *args, otherwise=_mlx)


def _mlx(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """MLX's own kernel."""
    return mx.fast.rms_norm(x, weight, eps)


def rms_norm_reference(x: mx.array, weight: mx.array | None = None, eps: float = 1e-6) -> mx.array:
    """The same in plain MLX."""
    x32 = x.astype(mx.float32)
    out = x32 * mx.rsqrt(mx.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    if weight is not None:
        out = out * weight.astype(mx.float32)
    return out.astype(x.dtype)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for D, heads, dtype in sizes.normed:
        yield {"D": D, "heads": heads, "dtype": dtype}, {}


def example(D: int, heads: int, dtype: str) -> Call:
    shape = (MOST, D) if heads == 1 else (MOST, heads, D)
    x, w = normal(1, *shape, dtype=dtype), normal(2, D, dtype=dtype)
    return Call(lambda b, e: [rms_norm(x[b:e], w)], first, rounded(1))
