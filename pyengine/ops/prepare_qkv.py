import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .norm_rope import norm_rope, norm_rope_reference
from .rms_norm import rms_norm, rms_norm_reference
from .write_cache import write_cache, write_cache_reference


def prepare_qkv(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_norm: mx.array,
    k_norm: mx.array,
    inv_freq: mx.array,
    keys: mx.array,
    values: mx.array,
    offset: mx.array,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array, mx.array]:
    """All that stands between the projections of T positions and their attention.

    Queries and keys as :func:`norm_rope`, values by RMSNorm without weights, then keys and values
    into the cache as :func:`write_cache`: in place, with its rules for the handles. Each is rounded
    once, so the bits are those of the three ops.

    Args:
        q: ``[T, H * D]``, float32, float16 or bfloat16; D is even, at most 1024.
        k: ``[T, K * D]``, dtype of ``q``.
        v: The same; ``k`` again where keys double as values.
        q_norm: ``[D]``, dtype of ``q``.
        k_norm: ``[D]``, dtype of ``q``.
        inv_freq: float32 ``[D / 2]``, radians per position.
        keys: The cache's, ``[1, K, C, D]``, dtype of ``q``, evaluated to a contiguous array; T is
            at most C.
        values: The same.
        offset: int32 ``[]``, the position of row 0, on the device; position p goes to slot p % C,
            by the rule of :func:`write_cache` for those there should not be.
        eps: Added to the means of squares; positive.

    Returns:
        Queries ``[1, T, H, D]``; keys and values ``[1, K, C, D]`` with T positions replaced.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
        RuntimeError: keys or values turn out not to be contiguous when evaluated.
    """
    args = (q, k, v, q_norm, k_norm, inv_freq, keys, values, offset, eps)
    outs = run(_ext.prepare_qkv(*args), prepare_qkv_reference, *args, otherwise=_one_by_one)
    turned, keys, values = outs
    return turned, keys, values


def _one_by_one(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_norm: mx.array,
    k_norm: mx.array,
    inv_freq: mx.array,
    keys: mx.array,
    values: mx.array,
    offset: mx.array,
    eps: float,
) -> tuple[mx.array, mx.array, mx.array]:
    T, D = q.shape[0], keys.shape[-1]
    q, k, v = (a.reshape(1, T, -1, D) for a in (q, k, v))
    q, k = (norm_rope(a, w, offset, inv_freq, eps) for a, w in ((q, q_norm), (k, k_norm)))
    v = rms_norm(v, None, eps)
    return q, write_cache(keys, k, offset), write_cache(values, v, offset)


def prepare_qkv_reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    q_norm: mx.array,
    k_norm: mx.array,
    inv_freq: mx.array,
    keys: mx.array,
    values: mx.array,
    offset: mx.array,
    eps: float = 1e-6,
) -> tuple[mx.array, mx.array, mx.array]:
    """The same in plain MLX; the cache is copied."""
    (_, K, _, D), T = keys.shape, q.shape[0]
    q = norm_rope_reference(q.reshape(1, T, q.shape[1] // D, D), q_norm, offset, inv_freq, eps)
    k = norm_rope_reference(k.reshape(1, T, K, D), k_norm, offset, inv_freq, eps)
    v = rms_norm_reference(v.reshape(1, T, K, D), None, eps)
    return q, write_cache_reference(keys, k, offset), write_cache_reference(values, v, offset)
