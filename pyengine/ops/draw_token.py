from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import VOCABULARY, Call, Results, candidates, first
from .random_uniform import Purpose, philox_uniform
from .sizes import Shape, Sizes


def draw_token(
    ids: mx.array,
    probs: mx.array,
    position: mx.array,
    index: mx.array,
    seed: mx.array,
    shared: mx.array,
) -> mx.array:
    """Draw one token from each row of candidates, rows of one or of several sequences.

    Shared noise is a race: candidate x of a row gets ``-log(1 - u) / probs``, u from the counter
    (position + index, x), and the smallest wins (of equals the first). The winner depends on the
    seed, the absolute position and the distribution alone, and two rows of like probabilities
    mostly draw alike. Otherwise the distribution function is inverted at u of the counter
    (position, index), in the order of the candidates.

    Args:
        ids: Candidates, int32 ``[R, n]``.
        probs: Their probabilities, float32 ``[R, n]``; rows need not be normalised, and what has
            probability 0 is not drawn, so rows may be padded with it.
        position: int32 ``[R]``; its 32 bits are what counts, so any will do.
        index: Added to the position (shared) or counted within it, int32 ``[R]``.
        seed: uint32 ``[R]``.
        shared: Which of the two draws, bool ``[R]``.

    Returns:
        int32 ``[R]``.

    Raises:
        ValueError: A shape or dtype above does not hold.
    """
    args = (ids, probs, position, index, seed, shared)
    return run(_ext.draw_token(*args), draw_token_reference, *args)


def draw_token_reference(
    ids: mx.array,
    probs: mx.array,
    position: mx.array,
    index: mx.array,
    seed: mx.array,
    shared: mx.array,
) -> mx.array:
    """The same in plain MLX, equal bit for bit; all arguments may have leading dimensions."""
    if ids.size == 0:  # MLX reduces no empty array
        return mx.zeros(ids.shape[:-1], dtype=mx.int32)
    position, index = position.astype(mx.uint32), index.astype(mx.uint32)
    u = uniforms((position + index)[..., None], ids, seed[..., None], Purpose.PLAIN)
    raced = race(ids, probs, exponential(u))
    inverted = invert(ids, probs, uniforms(position, index, seed, Purpose.DRAFT))
    return mx.where(shared, raced, inverted)


def uniforms(position: mx.array, lane: mx.array, seed: mx.array, purpose: Purpose) -> mx.array:
    """One number for each counter (position, lane, 0, 0) and seed; the three broadcast."""
    words = position.astype(mx.uint32), lane.astype(mx.uint32), seed
    position, lane, seed = mx.broadcast_arrays(*words)
    zero = mx.zeros_like(lane)
    return philox_uniform(mx.stack([position, lane, zero, zero], axis=-1), seed, int(purpose))


def race(ids: mx.array, probs: mx.array, times: mx.array) -> mx.array:
    """The candidate whose exponential time over its probability is smallest: ``[..., T]``."""
    finish = mx.where(probs > 0, times.astype(probs.dtype) / probs, mx.inf)
    return _pick(ids, mx.argmin(finish, axis=-1))


def invert(ids: mx.array, probs: mx.array, u: mx.array) -> mx.array:
    """The first candidate whose mass, summed from the first on, exceeds u of the whole."""
    mass = mx.cumsum(probs, axis=-1)
    whole = mass[..., -1:]
    # The whole itself counts, for a mass so small that u times it rounds up to it
    passed = (mass > u[..., None].astype(probs.dtype) * whole) | (mass == whole)
    return _pick(ids, mx.argmax(passed, axis=-1))


def _pick(ids: mx.array, at: mx.array) -> mx.array:
    return mx.take_along_axis(ids, at[..., None], axis=-1)[..., 0]


# log(1 + r) = r - r^2 / 2 + r^3 P(r) for r in [sqrt(1/2) - 1, sqrt(2) - 1]; our own fit, within
# 6e-9 of the result. csrc/cpu/rng.h holds the same numbers and the same order of operations.
_LOG = (
    0.33333331,
    -0.250008196,
    0.200012311,
    -0.166234031,
    0.142017171,
    -0.131597579,
    0.12761618,
    -0.0763554052,
)
_SQRT_HALF = 0x3F3504F3  # bits of sqrt(1/2)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def exponential(u: mx.array) -> mx.array:
    """-log(1 - u) within one unit in the last place, for u in [0, 1) on a grid of 2**-24.

    Written out, with no fused operation, so that every implementation gives the same bits: a
    logarithm of the machine's own would now and then decide a race otherwise.
    """
    bits = (1.0 - u).view(mx.int32)
    exponent = (bits - _SQRT_HALF) >> 23
    r = (bits - (exponent << 23)).view(mx.float32) - 1.0
    e = exponent.astype(mx.float32)
    y = mx.full(r.shape, _LOG[-1], dtype=mx.float32)
    for c in _LOG[-2::-1]:
        y = y * r + c
    r2 = r * r
    y = y * r * r2 - 0.5 * r2
    return 0.0 - (e * _LN2_HIGH + (r + (y + e * _LN2_LOW)))


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for n in (64, 256):
        for shared in (False, True):
            yield {"n": n, "shared": shared}, {}


def example(n: int, shared: bool) -> Call:
    ids, probs = candidates(1, n, VOCABULARY)

    def run(b: int, e: int) -> Results:
        index, count = mx.arange(b, e, dtype=mx.int32), (e - b,)
        position, seed = mx.full(count, 1021, mx.int32), mx.full(count, 7, mx.uint32)
        return [draw_token(ids[b:e], probs[b:e], position, index, seed, mx.full(count, shared))]

    return Call(run, first, exact_definition=True)
