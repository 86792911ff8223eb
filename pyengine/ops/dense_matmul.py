from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, absolute_sums, first, normal, of_sums, order_error
from .sizes import Shape, Sizes, scaled


def dense_matmul(x: mx.array, w: mx.array, *, out_dtype: mx.Dtype | None = None) -> mx.array:
    """Multiply rows by a matrix, reading each weight once for up to 16 rows.

    ``out[m, n] = sum over k of x[m, k] * w[n, k]`` in float32, in an order that depends on K alone,
    rounded once: before that, the result is within ``(K / 16 + 8) * 2**-24`` times the same sum
    with absolute values. More than 16 rows run as slices of 16. On a GPU MLX's ``matmul``, which
    is not row-stable, serves more than 128 rows: a prefill.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16; any strides.
        w: ``[N, K]``, dtype of ``x``.
        out_dtype: float32 or the dtype of ``x``; None is the dtype of ``x``.

    Returns:
        ``[..., N]``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    out = _ext.dense_matmul(x, w, out_dtype)
    return run(out, dense_matmul_reference, x, w, otherwise=_prefill, out_dtype=out_dtype)


def _prefill(x: mx.array, w: mx.array, *, out_dtype: mx.Dtype | None) -> mx.array:
    """MLX's own kernel."""
    dtype = out_dtype or x.dtype
    return x.astype(dtype) @ w.astype(dtype).T


def dense_matmul_reference(
    x: mx.array, w: mx.array, *, out_dtype: mx.Dtype | None = None
) -> mx.array:
    """The same in plain MLX."""
    return product(x.astype(mx.float32), w.astype(mx.float32)).astype(out_dtype or x.dtype)


def product(x: mx.array, w: mx.array) -> mx.array:
    """``x @ w.T``. Of no rows MLX's own, seen on processors, damages memory beside its inputs."""
    return x @ w.T if x.size else mx.zeros((*x.shape[:-1], w.shape[0]), x.dtype)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for K, true, dtype in sizes.dense:
        N = sizes.fitted(true, K, None)
        yield {"N": N, "K": K, "dtype": dtype}, scaled("N", true, N)


def example(N: int, K: int, dtype: str) -> Call:
    x, w = normal(1, MOST, K, dtype=dtype), normal(2, N, K, dtype=dtype, scale=K**-0.5)
    return Call(
        lambda b, e: [dense_matmul(x[b:e], w)],
        first,
        lambda results: of_sums(results, [order_error(K) * absolute_sums(x, [w])]),
        same_bits=False,
        weights=[w],
    )
