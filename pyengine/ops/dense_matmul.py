import mlx.core as mx


def dense_matmul(x: mx.array, w: mx.array, *, out_dtype: mx.Dtype | None = None) -> mx.array:
    """Multiply rows by a matrix of floats, ``out[m, n] = sum over k of x[m, k] * w[n, k]``.

    Args:
        x: ``[..., K]``, float32, float16 or bfloat16.
        w: ``[N, K]``, dtype of ``x``.
        out_dtype: float32 or the dtype of ``x``; None is the dtype of ``x``.

    Returns:
        ``[..., N]``.
    """
    return dense_matmul_reference(x, w, out_dtype=out_dtype)


def dense_matmul_reference(
    x: mx.array, w: mx.array, *, out_dtype: mx.Dtype | None = None
) -> mx.array:
    """The same in plain MLX."""
    out = x.astype(mx.float32) @ w.astype(mx.float32).T
    return out.astype(out_dtype or x.dtype)
