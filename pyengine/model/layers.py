"""What a layer of the target and one of the assistant have in common."""

from dataclasses import dataclass, field

import mlx.core as mx

from pyengine import ops
from pyengine.model.linear import Linear, gated
from pyengine.ops.glu import Activation


@dataclass(frozen=True)
class MLP:
    gate: Linear
    up: Linear
    down: Linear
    activation: Activation = field(default="gelu", kw_only=True)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down(gated(self.gate, self.up, x, self.activation))


def residual(
    h: mx.array,
    y: mx.array,
    weight: mx.array,
    next_weight: mx.array,
    eps: float,
    scalar: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """The stream with a normed branch added, and the norm of it that the next branch reads."""
    h, x = ops.residual_norm(h, y, weight, scalar=scalar, next_weight=next_weight, eps=eps)
    assert x is not None
    return h, x
