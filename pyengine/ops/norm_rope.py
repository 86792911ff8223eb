from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, first, frequencies, normal, of_rows, rounded
from .rms_norm import rms_norm
from .sizes import Shape, Sizes


def norm_rope(
    x: mx.array,
    weight: mx.array,
    positions: mx.array,
    inv_freq: mx.array,
    eps: float = 1e-6,
) -> mx.array:
    """Normalise each head of queries or keys and turn it to its position.

    RMSNorm over D with ``weight``, then half-split rotary embedding: with ``n`` the normalised
    head, ``angle = positions[r] * inv_freq``, element ``i < D / 2`` and its partner ``i + D / 2``::

        out[i]         = n[i] * cos(angle[i]) - n[i + D / 2] * sin(angle[i])
        out[i + D / 2] = n[i + D / 2] * cos(angle[i]) + n[i] * sin(angle[i])

    All of it in float32, rounded once at the end; where ``inv_freq`` is 0 an element is not turned.
    Sine and cosine are within 1.7 units in the last place for angles up to 2**18.

    Args:
        x: ``[R, H, D]``, float32, float16 or bfloat16; D is even, at most 1024.
        weight: ``[D]``, dtype of ``x``.
        positions: int32 ``[R]``, on the device; of any sequences.
        inv_freq: float32 ``[D / 2]``, radians per position.
        eps: Added to the mean of squares; positive.

    Returns:
        Shape and dtype of ``x``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    args = (x, weight, positions, inv_freq, eps)
    return run(_ext.norm_rope(*args), norm_rope_reference, *args, otherwise=_mlx)


def _mlx(
    x: mx.array, weight: mx.array, positions: mx.array, inv_freq: mx.array, eps: float
) -> mx.array:
    """MLX's own kernels, which round once more; they want wavelengths, and a batch of offsets."""
    n = rms_norm(x, weight, eps)[:, :, None]  # [R, H, 1, D]: a batch of single positions
    lengths = 1 / inv_freq  # infinite where nothing turns
    turned = mx.fast.rope(
        n, x.shape[-1], traditional=False, base=None, scale=1.0, offset=positions, freqs=lengths
    )
    return turned[:, :, 0]


def norm_rope_reference(
    x: mx.array,
    weight: mx.array,
    positions: mx.array,
    inv_freq: mx.array,
    eps: float = 1e-6,
) -> mx.array:
    """The same in plain MLX."""
    x32 = x.astype(mx.float32)
    n = x32 * mx.rsqrt(mx.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    n = n * weight.astype(mx.float32)
    angles = (positions.astype(mx.float32)[:, None] * inv_freq)[:, None, :]  # [R, 1, D / 2]
    cos, sin = mx.cos(angles), mx.sin(angles)
    low, high = mx.split(n, 2, axis=-1)
    out = mx.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return out.astype(x.dtype)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for H, D in sizes.queries:
        yield {"H": H, "D": D, "dtype": sizes.dtype}, {}


def example(H: int, D: int, dtype: str) -> Call:
    x, w = normal(1, MOST, H, D, dtype=dtype), normal(2, D, dtype=dtype)
    positions, turn = of_rows()[0], frequencies(D)
    return Call(lambda b, e: [norm_rope(x[b:e], w, positions[b:e], turn)], first, rounded(1))
