from collections.abc import Iterator

import mlx.core as mx

from pyengine import _ext

from .dispatch import run
from .example import MOST, Call, first, normal, of_candidates
from .sizes import Shape, Sizes


def route_experts(logits: mx.array, scales: mx.array, used: int) -> tuple[mx.array, mx.array]:
    """Choose the ``used`` experts of each row with the highest logits, and weigh them.

    Ties go to the lower id. A weight is the softmax over the chosen logits, added in the order of
    the ids, times the expert's scale. All in float32. Where logits are NaN so are weights. On a GPU
    plain MLX serves more than 32 experts per row.

    Args:
        logits: The router's, float32 ``[T, X]``, any strides.
        scales: float32 ``[X]``.
        used: 1 to X.

    Returns:
        Ids, int32 ``[T, used]``, rising; weights, float32 ``[T, used]``.

    Raises:
        ValueError: A shape, dtype or limit above does not hold.
    """
    outs = _ext.route_experts(logits, scales, used)
    ids, weights = run(outs, route_experts_reference, logits, scales, used)
    return ids, weights


def route_experts_reference(
    logits: mx.array, scales: mx.array, used: int
) -> tuple[mx.array, mx.array]:
    """The same in plain MLX, the ids equal bit for bit. Sums are spelled out, so that no reduction
    may choose its order by the number of rows."""
    X = logits.shape[-1]
    order = mx.arange(X, dtype=mx.int32)
    mine, others = logits[:, :, None], logits[:, None, :]
    ahead = (others > mine) | ((others == mine) & (order[None, :] < order[:, None]))
    chosen = ahead.sum(axis=-1) < used
    ids = mx.sort(mx.where(chosen, order, X), axis=-1)[:, :used]
    logits = mx.take_along_axis(logits, ids, axis=-1)
    weights = mx.exp(logits - mx.max(logits, axis=-1, keepdims=True))
    total = weights[:, :1]
    for slot in range(1, used):
        total = total + weights[:, slot : slot + 1]
    return ids, weights / total * mx.take(scales, ids)


def shapes(sizes: Sizes) -> Iterator[Shape]:
    for X, used, _ in sizes.routers:
        yield {"X": X, "used": used}, {}


def example(X: int, used: int) -> Call:
    # Few values, so that there are ties
    logits = mx.random.randint(0, 500, (MOST, X), key=mx.random.key(1)).astype(mx.float32) / 32
    scales = abs(normal(2, X)) + 0.5
    return Call(lambda b, e: list(route_experts(logits[b:e], scales, used)), first, of_candidates)
