"""Which implementation the ops run."""

from typing import Literal

import mlx.core as mx

Implementation = Literal["native", "reference"]

_IMPLEMENTATIONS = ("native", "reference")
_chosen: Implementation = "native"


def use(implementation: Implementation) -> None:
    """Switch every op of the engine to one implementation.

    Args:
        implementation: "native" for our kernels, "reference" for the plain MLX definitions they are
            tested against.

    Raises:
        ValueError: The implementation is not one of those.
    """
    global _chosen
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"[use] implementation must be one of {', '.join(_IMPLEMENTATIONS)} "
            f"but got {implementation}."
        )
    _chosen = implementation


def chosen() -> Literal["native", "reference", "mlx"]:
    """What an op called now runs; "mlx" on a GPU, where no kernel of ours exists yet."""
    if _chosen == "native" and mx.default_device() == mx.gpu:
        return "mlx"
    return _chosen
