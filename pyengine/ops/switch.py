"""Which implementation the ops run."""

from typing import Any, Literal

import mlx.core as mx

from pyengine import _ext

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


# Ops whose plain form has no reduction: MLX cannot choose an order for them by the number of rows.
_ELEMENTWISE = ("geglu", "random_uniform", "write_cache")
_REDUCING = (
    "accept_block",
    "block_attention",
    "dense_matmul",
    "draw_token",
    "filter_logits",
    "norm_rope",
    "q8_matmul",
    "residual_norm",
    "rms_norm",
)


def status() -> list[dict[str, Any]]:
    """What every op runs if it is called now.

    Returns:
        One row an op: ``op``; ``kernel``, "SIMD (...)" with the instruction set, "reference" or
        "MLX"; ``device``; ``row_stable``, whether a row's bits depend on that row alone.
    """
    implementation = chosen()
    kernel = {
        "native": f"SIMD ({_ext.instruction_set()})",
        "reference": "reference",
        "mlx": "MLX",
    }[implementation]
    device = "gpu" if mx.default_device() == mx.gpu else "cpu"
    return [
        {
            "op": op,
            "kernel": kernel,
            "device": device,
            "row_stable": implementation == "native" or op in _ELEMENTWISE,
        }
        for op in sorted(_ELEMENTWISE + _REDUCING)
    ]
