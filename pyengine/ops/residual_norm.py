from collections.abc import Iterator
from typing import overload

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, Results, first, normal, rounded
from .rms_norm import rms_norm, rms_norm_reference
from .sizes import Shape, Sizes


@overload
def residual_norm(
    h: mx.array,
    y: mx.array,
    weight: mx.array,
    *,
    scalar: mx.array | None = None,
    next_weight: mx.array,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array]: ...


@overload
def residual_norm(
    h: mx.array,
    y: mx.array,
    weight: mx.array,
    *,
    scalar: mx.array | None = None,
    next_weight: None = None,
    eps: float = 1e-6,
) -> tuple[mx.array, None]: ...


def residual_norm(
    h: mx.array,
    y: mx.array,
    weight: mx.array,
    *,
    scalar: mx.array | None = None,
    next_weight: mx.array | None = None,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array | None]:
    """Add a normalised branch to the residual stream and take the next norm of the sum.

    ``h' = (h + rms_norm(y) * weight) * scalar``, rounded; then ``x = rms_norm(h') * next_weight``
    of the rounded sum, so that ``x`` equals ``pyengine.ops.rms_norm(h', next_weight)`` bit for bit.
    On a GPU MLX's own, which is not row-stable, serves rows of more than 16384 elements.

    Args:
        h: Residual stream ``[..., E]``, float32, float16 or bfloat16.
        y: Output of the branch, shape and dtype of ``h``.
        weight: ``[E]``, dtype of ``h``.
        scalar: ``[1]``, dtype of ``h``, or None for 1 (Gemma 4's ``layer_scalar``).
        next_weight: ``[E]``, dtype of ``h``, or None when no next norm is wanted.
        eps: Added to the mean of squares, in both norms; positive.

    Returns:
        ``(h', x)``, both like ``h``; ``x`` is None when ``next_weight`` is None.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    total, *following = run(
        _ext.residual_norm(h, y, weight, scalar, next_weight, eps),
        residual_norm_reference,
        h,
        y,
        weight,
        otherwise=_mlx,
        scalar=scalar,
        next_weight=next_weight,
        eps=eps,
    )
    return total, following[0] if following else None


def _mlx(
    h: mx.array,
    y: mx.array,
    weight: mx.array,
    *,
    scalar: mx.array | None,
    next_weight: mx.array | None,
    eps: float,
) -> tuple[mx.array, mx.array | None]:
    """MLX's own norms, which round once more."""
    total = h + rms_norm(y, weight, eps)
    if scalar is not None:
        total = total * scalar
    return total, None if next_weight is None else rms_norm(total, next_weight, eps)


def residual_norm_reference(
    h: mx.array,
    y: mx.array,
    weight: mx.array,
    *,
    scalar: mx.array | None = None,
    next_weight: mx.array | None = None,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array | None]:
    """The same in plain MLX."""
    normed = rms_norm_reference(y.astype(mx.float32), weight, eps)
    total = h.astype(mx.float32) + normed
    if scalar is not None:
        total = total * scalar.astype(mx.float32)
    out = total.astype(h.dtype)
    return out, None if next_weight is None else rms_norm_reference(out, next_weight, eps)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for E in sizes.streams:
        yield {"E": E, "dtype": sizes.dtype}, {}


def example(E: int, dtype: str) -> Call:
    h, y = (normal(i, MOST, E, dtype=dtype) for i in (1, 2))
    w, following, scalar = (normal(i, n, dtype=dtype) for i, n in ((3, E), (4, E), (5, 1)))

    def run(b: int, e: int) -> Results:
        return list(residual_norm(h[b:e], y[b:e], w, scalar=scalar, next_weight=following))

    return Call(run, first, rounded(2))
