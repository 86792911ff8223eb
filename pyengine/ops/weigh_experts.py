from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import DTYPES, MOST, Call, first, normal
from .sizes import Shape, Sizes


def weigh_experts(parts: mx.array, weights: mx.array, out_dtype: mx.Dtype) -> mx.array:
    """Add what a row's experts gave, each times its weight.

    ``out[t] = sum over u of parts[t, u] * weights[t, u]``, u rising, products and sums each rounded
    to float32, the result once more to its dtype.

    Args:
        parts: float32 ``[T, U, E]``, any strides; U is at least 1.
        weights: float32 ``[T, U]``.
        out_dtype: float32, float16 or bfloat16.

    Returns:
        ``[T, E]``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    out = _ext.weigh_experts(parts, weights, out_dtype)
    return run(out, weigh_experts_reference, parts, weights, out_dtype)


ELEMENTWISE = True  # the reference has no reduction


def weigh_experts_reference(parts: mx.array, weights: mx.array, out_dtype: mx.Dtype) -> mx.array:
    """The same in plain MLX, equal bit for bit."""
    total = parts[:, 0] * weights[:, :1]
    for slot in range(1, weights.shape[1]):
        total = total + parts[:, slot] * weights[:, slot : slot + 1]
    return total.astype(out_dtype)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for _, U, E in sizes.routers:
        yield {"U": U, "E": E, "dtype": sizes.dtype}, {}


def example(U: int, E: int, dtype: str) -> Call:
    parts, weights = normal(1, MOST, U, E), normal(2, MOST, U)
    return Call(
        lambda b, e: [weigh_experts(parts[b:e], weights[b:e], DTYPES[dtype])],
        first,
        exact_definition=True,
    )
