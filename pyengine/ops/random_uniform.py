from collections.abc import Iterator
from enum import IntEnum

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, first
from .sizes import Shape, Sizes


class Purpose(IntEnum):
    """Second word of the key: draws made for different ends never share a number."""

    PLAIN = 0
    DRAFT = 1
    ACCEPT = 2
    CORRECT = 3


def random_uniform(counters: mx.array, key: tuple[int, int]) -> mx.array:
    """Draw one uniform number per counter: no state, the same number for the same counter and key.

    Philox 4x32 with 10 rounds; of its four output words the first gives
    ``(word >> 8) * 2 ** -24``: the 2**24 multiples of 2**-24 in [0, 1), each exact in float32.

    Args:
        counters: uint32 ``[..., 4]``.
        key: Two integers in 0..2**32 - 1.

    Returns:
        float32 ``[...]``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    out = _ext.random_uniform(counters, key)
    return run(out, random_uniform_reference, counters, key)


ELEMENTWISE = True  # the reference has no reduction


def random_uniform_reference(counters: mx.array, key: tuple[int, int]) -> mx.array:
    """The same in plain MLX, equal bit for bit."""
    return philox_uniform(counters, mx.array(key[0], dtype=mx.uint32), key[1])


def philox_uniform(counters: mx.array, seed: mx.array, purpose: int) -> mx.array:
    """:func:`random_uniform_reference` with the first word of the key on the device."""
    low = mx.array(0xFFFFFFFF, dtype=mx.uint64)
    c0, c1, c2, c3 = (counters[..., i].astype(mx.uint64) for i in range(4))
    m0, m1 = mx.array(0xD2511F53, dtype=mx.uint64), mx.array(0xCD9E8D57, dtype=mx.uint64)
    k0, k1 = seed.astype(mx.uint64), mx.array(purpose, dtype=mx.uint64)
    step0, step1 = mx.array(0x9E3779B9, dtype=mx.uint64), mx.array(0xBB67AE85, dtype=mx.uint64)
    for _ in range(10):
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & low, (p0 >> 32) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + step0) & low, (k1 + step1) & low
    return (c0 >> 8).astype(mx.float32) * 2.0**-24


def shapes(sizes: Sizes) -> Iterator[Shape]:
    yield {"each": 64}, {}


def example(each: int) -> Call:
    words = mx.random.randint(0, 2**31 - 1, (MOST, each, 4), key=mx.random.key(1))
    counters = words.astype(mx.uint32)
    return Call(
        lambda b, e: [random_uniform(counters[b:e], (3, 2**32 - 5))],
        first,
        exact_definition=True,
    )
