import mlx.core as mx

from pyengine import _ext

from . import workbench
from .switch import chosen


def block_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    offset: mx.array,
    *,
    scale: float = 1.0,
    window: int | None = None,
    start: mx.array | None = None,
) -> mx.array:
    """Attend the T positions of a block to a linear or ring cache in one pass.

    ``out = softmax(scale * q @ k.T + mask) @ v``. Row t sits at position ``p = offset + t`` and
    sees positions ``0 <= j <= p``, the last ``window`` of them when ``window`` is given, itself
    included; the block's own keys are already in the cache. Position j lies in slot
    ``(j - start) % C``. Query head h reads key head ``h // (H / K)``. Scores, softmax and sums are
    float32, rounded once.

    Sums run over absolute position in a fixed tree, so the bits of a row depend on that row and its
    visible keys alone: not on T, C, ``start`` or threads. The Metal kernels give the bits of
    processors with fused multiply-adds, for up to 128 positions; a GPU runs longer blocks, which
    are prefill, as plain MLX. There a cache too small is not noticed: its rows hold anything.

    Args:
        q: Queries ``[B, T, H, D]``, float32, float16 or bfloat16; D is a multiple of 16, at most
            512.
        k: Keys ``[B, K, C, D]``, dtype of ``q``; H is a multiple of K; T <= C.
        v: Values, shape and dtype of ``k``.
        offset: int32 ``[]``, the position of row 0, on the device.
        scale: Multiplies the scores. Gemma 4 uses 1.0: its queries are normalised.
        window: Sliding window length, or None for full attention; at least 1.
        start: int32 ``[]``, a position that lies in slot 0, or None for 0.

    Returns:
        ``[B, T, H, D]``, dtype of ``q``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
        RuntimeError: The cache is too small to still hold a visible position (when evaluated); on
            a GPU, k or v is a strided view.

    Source: online softmax, arXiv:1805.02867.
    """
    out = _ext.block_attention(q, k, v, offset, scale, window, start)  # checks in every case
    B, T, H, D = q.shape
    implementation = chosen("block_attention", _ext.block_attention_has_launch(T))
    if implementation == "workbench" and out.size > 0:
        K, C = k.shape[1:3]
        launches = _ext.block_attention_launches(
            B, T, H, K, C, D, q.dtype, scale, window, start is not None
        )
        position = (offset,) if start is None else (offset, start)
        return workbench.run(launches, q, k, *position, v)[0]
    if implementation in ("native", "workbench"):
        return out
    return block_attention_reference(q, k, v, offset, scale=scale, window=window, start=start)


def block_attention_reference(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    offset: mx.array,
    *,
    scale: float = 1.0,
    window: int | None = None,
    start: mx.array | None = None,
) -> mx.array:
    """The same in plain MLX."""
    B, T, H, D = q.shape
    K, C = k.shape[1], k.shape[2]
    last = offset + (T - 1)
    base = last if start is None else last - start
    held = last - (base - mx.arange(C)) % C  # [C], the newest position a slot can hold
    rows = (offset + mx.arange(T))[:, None]  # [T, 1]
    visible = (held >= 0) & (held <= rows)
    if window is not None:
        visible = visible & (held > rows - window)

    q32 = q.astype(mx.float32).reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k32 = k.astype(mx.float32)[:, :, None]  # [B, K, 1, C, D]
    v32 = v.astype(mx.float32)[:, :, None]
    scores = scale * (q32 @ k32.swapaxes(-1, -2))  # [B, K, H / K, T, C]
    weights = mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1)
    out = weights @ v32  # [B, K, H / K, T, D]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D).astype(q.dtype)
