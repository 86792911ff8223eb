"""Which implementation the ops run."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import mlx.core as mx

from pyengine import _ext
from pyengine.untrusted import shown

from . import workbench

Implementation = Literal["native", "reference", "workbench"]
Result = TypeVar("Result")

_IMPLEMENTATIONS = ("native", "reference", "workbench")
_chosen: Implementation = "native"
_gpu_rules = False  # set by tests: a processor then calls what a GPU would

# Every op: a file each, beside those that all of them use; each has a Metal kernel
OPS = tuple(
    sorted(
        {path.stem for path in Path(__file__).parent.glob("*.py")}
        - {"__init__", "dispatch", "workbench"}
    )
)


def use(implementation: Implementation) -> None:
    """Switch every op of the engine to one implementation.

    Args:
        implementation: "native" for our kernels; "reference" for the plain MLX definitions they are
            tested against, slower, and the way out should a kernel fail on a GPU: none has met an
            Apple one; "workbench" for our Metal kernels run on the processor, slowly, from a
            checkout only.

    Raises:
        ValueError: The implementation is not one of those.
        RuntimeError: "workbench" outside a checkout, or without what it needs.
    """
    global _chosen
    if not isinstance(implementation, str) or implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"[use] implementation must be one of {', '.join(_IMPLEMENTATIONS)} "
            f"but got {shown(implementation)}."
        )
    if implementation == "workbench":
        workbench.load()
    _chosen = implementation


def run(
    out: mx.array | list[mx.array],
    reference: Callable[..., Result],
    *args: Any,
    otherwise: Callable[..., Result] | None = None,
    **kwargs: Any,
) -> Result:
    """The result of an op, by the implementation that is chosen.

    Args:
        out: What ``_ext`` made of the arguments: lazy and checked; a list where it is several.
        reference: Makes the same of them in plain MLX.
        *args: Arguments of the reference.
        otherwise: Makes it on a GPU past the limits of our kernel, of the same arguments; the
            reference, if None.
        **kwargs: More of them.
    """
    if _chosen == "reference":
        return reference(*args, **kwargs)
    if _chosen == "native" and not borrows():
        return cast(Result, out)
    launches, inputs = _ext.launches_of(out)
    if _chosen == "native" and launches is None:
        return (otherwise or reference)(*args, **kwargs)
    if _chosen == "native" or not launches:  # the workbench leaves the rest to the processor
        return cast(Result, out)
    made = workbench.run(launches, *inputs)
    if isinstance(out, mx.array):
        return cast(Result, made[0].reshape(out.shape))
    return cast(Result, [a.reshape(b.shape) for a, b in zip(made, out, strict=True)])


def chosen() -> Implementation:
    """What was chosen with :func:`use`."""
    return _chosen


def borrows() -> bool:
    """Whether calls past the limits of our kernels run MLX's, whose bits go with the shape of the
    call: on a GPU. A processor's kernels have no such limits."""
    return _chosen == "native" and (_gpu_rules or mx.default_device() == mx.gpu)


def lazy() -> bool:
    """Whether all ops build graphs: those that the workbench runs evaluate at once."""
    return _chosen != "workbench"


def in_place() -> bool:
    """Whether an evaluated write to the cache is seen through every handle of it. On a processor
    it is: calls run one after the other, and a write is never a copy."""
    return _chosen == "native" and mx.default_device() == mx.cpu


def status() -> list[dict[str, Any]]:
    """What every op runs if it is called now, with arguments within the limits of its kernel.

    Returns:
        One row per op: ``op``; ``kernel``, "SIMD (...)" with the instruction set, "Metal",
        "Metal (workbench)" or "reference"; ``device``; ``row_stable``, whether a row's bits
        depend on that row alone.
    """
    device = "gpu" if mx.default_device() == mx.gpu else "cpu"
    kernel = {
        "native": "Metal" if device == "gpu" else f"SIMD ({_ext.instruction_set()})",
        "workbench": "Metal (workbench)",
        "reference": "reference",
    }
    return [
        {
            "op": op,
            "kernel": kernel[_chosen],
            "device": device,
            "row_stable": _chosen != "reference" or _elementwise(op),
        }
        for op in OPS
    ]


def _elementwise(op: str) -> bool:
    """Whether the reference has no reduction: MLX cannot choose its order by the number of rows.
    The module of such an op says so."""
    return getattr(import_module(f"{__package__}.{op}"), "ELEMENTWISE", False)
