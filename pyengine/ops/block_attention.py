from typing import Any

import mlx.core as mx

from pyengine import _ext

from .dispatch import run

MAX_POSITIONS = 1 << 30  # positions are below it; metal/positions.h has the same
TILE = 512  # keys that a long block's rows meet at a time
UNSEEN = -1e38  # a score that no weight is left of; finite, so that no row has a NaN of it


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
    processors with fused multiply-adds, for up to 128 positions. A GPU runs longer blocks, which
    are prefill, as plain MLX, 512 keys at a time: scores are never larger than ``[H, T, 512]``.
    With scores of up to 64 in size the result is then within ``2**-16`` of the largest value; on an
    M5 within ``2**-10``, as MLX's tensor units keep 11 bits of a float32 factor.

    ``offset`` is from 0 to 2**30 - T, and C is at least ``T + min(offset, window - 1)``, so that
    every visible position is still held. Where that turns out wrong only on the device, all of the
    result is NaN.

    Args:
        q: Queries ``[B, T, H, D]``, float32, float16 or bfloat16; D is a multiple of 16, at most
            512.
        k: Keys ``[B, K, C, D]``, dtype of ``q``; H is a multiple of K; T <= C.
        v: Values, shape and dtype of ``k``.
        offset: int32 ``[]``, the position of row 0, on the device.
        scale: Multiplies the scores. Gemma 4 uses 1.0: its queries are normalised.
        window: Sliding window length, or None for full attention; at least 1, below 2**31.
        start: int32 ``[]``, a position that lies in slot 0, or None for 0; may be negative.

    Returns:
        ``[B, T, H, D]``, dtype of ``q``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
        RuntimeError: On a GPU, k or v turns out to be a strided view when evaluated.

    Source: online softmax, arXiv:1805.02867.
    """
    out = _ext.block_attention(q, k, v, offset, scale, window, start)
    args = (q, k, v, offset)
    options = {"scale": scale, "window": window, "start": start}
    return run(out, block_attention_reference, *args, otherwise=_otherwise, **options)


def _otherwise(q: mx.array, *args: Any, **options: Any) -> mx.array:
    """MLX's own kernel, whose scores are all there at once at these widths; of a whole chunk by
    tiles."""
    return (_tiled if q.shape[1] > _ext.max_launch_rows else _mlx)(q, *args, **options)


def _mlx(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    offset: mx.array,
    *,
    scale: float,
    window: int | None,
    start: mx.array | None,
) -> mx.array:
    T = q.shape[1]
    held, whole = _held(T, k.shape[2], offset, window, start)
    seen = _visible(held, offset, T, window)
    out = mx.fast.scaled_dot_product_attention(q.swapaxes(1, 2), k, v, scale=scale, mask=seen)
    return mx.where(whole, out, mx.nan).astype(q.dtype).swapaxes(1, 2)


def _tiled(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    offset: mx.array,
    *,
    scale: float,
    window: int | None,
    start: mx.array | None,
) -> mx.array:
    """The reference a tile of keys at a time, with a running maximum and sum for each row.

    Tiles are counted from the last slot: where that holds the last position of a chunk at a
    multiple of TILE, their borders lie at multiples of it.
    """
    B, T, H, D = q.shape
    K, C = k.shape[1], k.shape[2]
    held, whole = _held(T, C, offset, window, start)
    # The rows of a key head's queries are one matrix: each tile of keys is read once for them
    rows = (scale * q.astype(mx.float32)).reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    rows = rows.reshape(B, K, H // K * T, D)
    best = mx.full((B, K, H // K * T, 1), UNSEEN)
    total, out = mx.zeros(best.shape), mx.zeros(rows.shape)
    for end in range((C - 1) % TILE + 1, C + 1, TILE):
        tile = slice(max(0, end - TILE), end)
        # After the tile before: MLX may otherwise make the scores of all tiles first
        keys, values = mx.depends([k[:, :, tile], v[:, :, tile]], [out, total])
        scores = rows @ keys.astype(mx.float32).swapaxes(-1, -2)  # [B, K, H / K * T, tile]
        scores = scores.reshape(B, K, H // K, T, -1)
        seen = _visible(held[tile], offset, T, window)
        scores = mx.where(seen, scores, UNSEEN).reshape(B, K, H // K * T, -1)
        higher = mx.maximum(best, scores.max(axis=-1, keepdims=True))
        # All that a row without a visible key yet has summed up is forgotten when it meets one
        kept = mx.exp(best - higher)
        weights = mx.exp(scores - higher)
        total = total * kept + weights.sum(axis=-1, keepdims=True)
        out = out * kept + weights @ values.astype(mx.float32)
        best = higher
    out = mx.where(whole, out / total, mx.nan).reshape(B, K, H // K, T, D)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D).astype(q.dtype)


def _held(
    T: int, C: int, offset: mx.array, window: int | None, start: mx.array | None
) -> tuple[mx.array, mx.array]:
    """The newest position that each slot can hold, int32 ``[C]``; and whether all that the rows
    would see are held."""
    before = offset if window is None else mx.minimum(offset, window - 1)
    whole = (offset >= 0) & (offset <= MAX_POSITIONS - T) & (before <= C - T)
    last = offset + (T - 1)
    base = last % C if start is None else last % C - start % C
    return last - (base - mx.arange(C)) % C, whole


def _visible(held: mx.array, offset: mx.array, T: int, window: int | None) -> mx.array:
    """Which of these positions a row sees, bool ``[T, C]``."""
    rows = (offset + mx.arange(T))[:, None]  # [T, 1]
    visible = (held >= 0) & (held <= rows)
    return visible if window is None else visible & (held > rows - window)


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
    held, whole = _held(T, C, offset, window, start)
    visible = _visible(held, offset, T, window)
    q32 = q.astype(mx.float32).reshape(B, T, K, H // K, D).transpose(0, 2, 3, 1, 4)
    k32 = k.astype(mx.float32)[:, :, None]  # [B, K, 1, C, D]
    v32 = v.astype(mx.float32)[:, :, None]
    scores = scale * (q32 @ k32.swapaxes(-1, -2))  # [B, K, H / K, T, C]
    weights = mx.softmax(mx.where(visible, scores, -mx.inf), axis=-1)
    out = mx.where(whole, weights @ v32, mx.nan)  # [B, K, H / K, T, D]
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, H, D).astype(q.dtype)
