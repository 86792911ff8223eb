"""Which implementation the ops run."""

import os
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import mlx.core as mx

from pyengine import _ext
from pyengine.untrusted import shown

from . import workbench

Implementation = Literal["native", "mlx", "reference", "workbench"]
Result = TypeVar("Result")

VARIABLE = "PYENGINE_OPS"  # of the environment: what runs until `use` says otherwise
INSTRUCTIONS = "PYENGINE_INSTRUCTIONS"  # likewise: the set that a processor's kernels use
THREADS = "PYENGINE_THREADS"  # likewise: how many threads share a processor's kernel, at most
_IMPLEMENTATIONS = ("native", "mlx", "reference", "workbench")
_gpu_rules = False  # set by tests: a processor then calls what a GPU would

# Every op: a file each, beside those that all of them use; each has a Metal kernel
OPS = tuple(
    sorted(
        {path.stem for path in Path(__file__).parent.glob("*.py")}
        - {"__init__", "dispatch", "example", "recorded", "sizes", "workbench"}
    )
)
WRITERS = {"copy_pages", "move_rows", "prepare_qkv"}  # which change an arena in place


def _from_environment() -> Implementation:
    """What the variable names, "native" where it is not set.

    Raises:
        ValueError: It names none that a user may want.
    """
    return cast(Implementation, _one_of(VARIABLE, ("native", "mlx", "reference")) or "native")


def _one_of(variable: str, offered: Sequence[str]) -> str | None:
    """What a variable of the environment names, None where it is not set.

    Raises:
        ValueError: It names something else.
    """
    name = os.environ.get(variable)
    if name and name not in offered:
        raise ValueError(
            f"[use] {variable} must be one of {', '.join(offered)} but got {shown(name)}."
        )
    return name or None


if _set := _one_of(INSTRUCTIONS, _ext.instruction_sets()):
    _ext.use_instruction_set(_set)
if _count := os.environ.get(THREADS):
    if not _count.isdecimal() or not 1 <= int(_count[:9]) <= 256:
        raise ValueError(
            f"[use] {THREADS} must be a number between 1 and 256 but got {shown(_count)}."
        )
    _ext.set_threads(int(_count))
_chosen: Implementation = _from_environment()
_aside: frozenset[str] = frozenset()  # of native ops, those that run MLX's own


def use(implementation: Implementation) -> None:
    """Switch every op of the engine to one implementation.

    Args:
        implementation: "native" for our kernels; "mlx" for MLX's own (quantised matmuls, fast norms
            and attention), the way on should one of ours fail on a GPU: none has met an Apple one;
            "reference" for the plain MLX definitions that ours are tested against, slower;
            "workbench" for our Metal kernels run on the processor, slowly, from a checkout only.
            Only our kernels are row-stable, so only with them is speculative text exact.

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
        otherwise: Makes it of the same arguments with MLX's own kernels, where these are chosen and
            on a GPU past the limits of ours; the reference, if None.
        **kwargs: More of them.
    """
    # A round is recorded by hundreds of calls
    implementation = runs(reference.__name__.removesuffix("_reference")) if _aside else _chosen
    if implementation == "reference":
        return reference(*args, **kwargs)
    if implementation == "native" and not borrows():
        return cast(Result, out)
    launches: list[_ext.Launch] | None = None
    if implementation != "mlx":
        launches, inputs = _ext.launches_of(out)
    if implementation == "mlx" or (implementation == "native" and launches is None):
        # Some of MLX's own crash where there is nothing to compute
        plain = reference if otherwise is None or _some_empty(args) else otherwise
        return plain(*args, **kwargs)
    if implementation == "native" or not launches:  # the workbench leaves the rest to the processor
        return cast(Result, out)
    made = workbench.run(launches, *inputs)
    if isinstance(out, mx.array):
        return cast(Result, made[0].reshape(out.shape))
    return cast(Result, [a.reshape(b.shape) for a, b in zip(made, out, strict=True)])


def _some_empty(args: Sequence[Any]) -> bool:
    """Whether an array has no elements, among arguments or in lists of them."""
    return any(
        a.size == 0 if isinstance(a, mx.array) else _some_empty(a)
        for a in args
        if isinstance(a, (mx.array, list, tuple))
    )


def chosen() -> Implementation:
    """What was chosen with :func:`use`."""
    return _chosen


def set_aside(names: Iterable[str]) -> None:
    """Let these ops, and no others, run MLX's own kernels while "native" is chosen."""
    global _aside
    _aside = frozenset(names) & set(OPS)


def runs(op: str) -> Implementation:
    """What one op runs."""
    return "mlx" if _chosen == "native" and op in _aside else _chosen


def exact() -> bool:
    """Whether every op is row-stable, so that speculative greedy text is plain decoding's."""
    return _chosen in ("native", "workbench") and not _aside


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
    return _chosen == "native" and not _aside & WRITERS and mx.default_device() == mx.cpu


def status() -> list[dict[str, Any]]:
    """What every op runs if it is called now, with arguments within the limits of its kernel.

    Returns:
        One row per op: ``op``; ``kernel``, "SIMD (...)" with the instruction set, "Metal",
        "Metal (workbench)", "MLX" or "reference"; ``device``; ``row_stable``, whether a row's bits
        depend on that row alone.
    """
    device = "gpu" if mx.default_device() == mx.gpu else "cpu"
    kernel = {
        "native": "Metal" if device == "gpu" else f"SIMD ({_ext.instruction_set()})",
        "workbench": "Metal (workbench)",
        "mlx": "MLX",
        "reference": "reference",
    }
    return [
        {
            "op": op,
            "kernel": kernel[runs(op)],
            "device": device,
            "row_stable": runs(op) not in ("mlx", "reference") or _elementwise(op),
        }
        for op in OPS
    ]


def _elementwise(op: str) -> bool:
    """Whether the op has no reduction in plain MLX, which cannot choose an order by the number of
    rows. The module of such an op says so."""
    return getattr(import_module(f"{__package__}.{op}"), "ELEMENTWISE", False)
