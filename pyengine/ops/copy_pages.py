from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, Results, copied, normal
from .prepare_qkv import PAGE
from .sizes import Shape, Sizes


def copy_pages(arena: mx.array, sources: mx.array, targets: mx.array) -> mx.array:
    """Copy whole pages of keys or values within an arena, in place.

    Page ``targets[i]`` gets what page ``sources[i]`` holds. A pair with a page that is none of the
    P is left out. No page may be the target of two, or target of one and source of another. The
    result *is* the arena's memory, with the rules for handles of :func:`prepare_qkv`.

    Args:
        arena: ``[P, K, 64, D]``, float32, float16 or bfloat16, evaluated to a contiguous array.
        sources: int32 ``[n]``, on the device.
        targets: The same.

    Returns:
        The arena ``[P, K, 64, D]`` with up to n pages replaced.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
        RuntimeError: The arena turns out not to be contiguous when evaluated.
    """
    args = (arena, sources, targets)
    return run(_ext.copy_pages(*args), copy_pages_reference, *args)


ELEMENTWISE = True  # the reference has no reduction


def copy_pages_reference(arena: mx.array, sources: mx.array, targets: mx.array) -> mx.array:
    """The same in plain MLX, as a copy: older handles keep their content."""
    P = arena.shape[0]
    if not (arena.size and sources.size):
        return arena * 1
    known = (sources >= 0) & (sources < P) & (targets >= 0) & (targets < P)
    room = mx.concatenate([arena, mx.zeros_like(arena[:1])])
    room[mx.where(known, targets, P)] = arena[mx.where(known, sources, 0)]
    return mx.contiguous(room[:-1])


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for heads in sizes.heads:
        yield {"K": heads.K, "D": heads.D, "dtype": sizes.dtype}, {}


def example(K: int, D: int, dtype: str) -> Call:
    """Half of the pages to the other half; a row is a page."""
    kept = normal(1, 2 * MOST, K, PAGE, D, dtype=dtype)
    targets = mx.arange(MOST)
    sources = MOST + 5 * targets % MOST

    def copy(arena: mx.array, b: int, e: int) -> Results:
        return [copy_pages(arena, sources[b:e], targets[b:e])]

    own = copied(kept)
    return Call(
        lambda b, e: copy(copied(kept), b, e),
        lambda results, i, t: [results[0][t]],
        exact_definition=True,
        timed=lambda b, e: copy(own, b, e),
    )
