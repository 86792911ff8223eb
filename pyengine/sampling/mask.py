"""Masks of the vocabulary, a bit per token: which ids a distribution may have."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from pyengine import ops
from pyengine.ops.filter_logits import Filtered


def filter_masked(logits: mx.array, masks: mx.array, **settings: Any) -> Filtered:
    """What :func:`pyengine.ops.filter_logits` makes of the logits of allowed tokens alone.

    The mask comes before all else, and flags tell of the logits without it: 2 where one is NaN or
    +inf, or no candidate is left.

    Args:
        logits: ``[T, V]`` float32.
        masks: uint32 ``[T, ceil(V / 32)]``; token t may be chosen where bit t % 32 of number
            t // 32 is set.
        settings: As the op takes them.
    """
    found = ops.filter_logits(
        mx.where(unpacked(masks, logits.shape[-1]), logits, -mx.inf), **settings
    )
    finite = mx.isfinite(logits).all(axis=-1)
    broken = (mx.isnan(logits) | (logits == mx.inf)).any(axis=-1) | (found.flags > 1)
    flags = mx.where(broken, 2, mx.where(finite, 0, 1))
    return found._replace(flags=flags.astype(mx.int32))


def unpacked(masks: mx.array, vocab: int) -> mx.array:
    """The bits of masks, bool ``[T, V]``."""
    places = mx.arange(32, dtype=mx.uint32)
    each = (masks[..., None] >> places) & 1
    return each.reshape(masks.shape[0], -1)[:, :vocab] != 0
