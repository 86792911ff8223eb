"""Which tokens a distribution may have, row by row: a grammar's say in it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from pyengine import ops
from pyengine.ops.filter_logits import Filtered


def filter_masked(logits: mx.array, masks: mx.array, **settings: Any) -> Filtered:
    """What :func:`pyengine.ops.filter_logits` makes of the logits of allowed tokens alone.

    The mask comes before all else. Flags tell of the logits without it: 2 where one is NaN or +inf,
    or no candidate is left.

    Args:
        logits: ``[T, V]`` float32.
        masks: Added to the logits, float32 ``[T, V]``: -inf takes a token away, 0 leaves it.
        settings: As the op takes them.
    """
    found = ops.filter_logits(logits + masks, **settings)
    whole = ops.filter_logits(logits, temperature=0)
    return found._replace(flags=mx.where(found.flags > 1, found.flags, whole.flags))
