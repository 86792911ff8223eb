import mlx.core as mx

from pyengine import _ext

from .dispatch import run


def write_cache(cache: mx.array, new: mx.array, offset: mx.array) -> mx.array:
    """Write the keys or values of T positions into a cache, in place.

    Position ``p = offset + t`` goes to slot ``p % C``: one op serves a linear cache (no position
    reaches C) and a ring. ``offset`` is from 0 to 2**30 - T. Where another is known to the device
    alone, ``p % C`` still counts from 0, for a negative p too: nothing else is ever written. Our
    kernels touch nothing but the new rows: the result *is* the cache's
    memory, whoever else holds it. So the returned handle is the only one that may be used
    afterwards; every older handle sees the new rows too. MLX runs a write after an earlier read of
    the cache only if ``new`` or ``offset`` depends on what was read: in a decoder they do, through
    the token; where they do not, as between the chunks of a prompt, evaluate in between.

    Args:
        cache: ``[B, K, C, D]``, float32, float16 or bfloat16, evaluated to a contiguous array.
        new: ``[B, T, K, D]``, dtype of ``cache``; T <= C.
        offset: int32 ``[]``, the position of row 0, on the device.

    Returns:
        The cache ``[B, K, C, D]`` with T rows per head replaced.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
        RuntimeError: The cache turns out not to be contiguous when evaluated.
    """
    args = (cache, new, offset)
    return run(_ext.write_cache(*args), write_cache_reference, *args)


ELEMENTWISE = True  # the reference has no reduction


def write_cache_reference(cache: mx.array, new: mx.array, offset: mx.array) -> mx.array:
    """The same in plain MLX, as a copy: older handles keep their content."""
    C = cache.shape[2]
    slots = (offset % C + mx.arange(new.shape[1])) % C  # [T]
    rows = new.transpose(0, 2, 1, 3)  # [B, K, T, D]
    index = mx.broadcast_to(slots[:, None].astype(mx.uint32), rows.shape)
    return mx.put_along_axis(cache, index, rows, axis=2)
