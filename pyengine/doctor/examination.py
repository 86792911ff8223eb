"""A whole examination: every op, or some, on a device; what failed is kept."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pyengine.checkpoint.published import PUBLISHED
from pyengine.doctor import device, machine, quarantine, runner, shapes
from pyengine.ops.dispatch import OPS
from pyengine.untrusted import shown

Tell = quarantine.Tell
WIDEST = ("31B", "26B-A4B")  # of the ops that both or one of them has


def examine(
    name: str,
    *,
    quick: bool,
    only: Collection[str],
    tell: Tell,
    on_op: runner.Progress,
) -> dict[str, Any]:
    """Examine ops at the embedded pair's shapes, and unless ``quick`` at those of the published.

    Returns:
        ``device``, ``compared_with``, ``shapes``, ``machine`` and ``ops``, see `runner.examine`.
        What failed runs MLX's own from now on, in later processes too.

    Raises:
        ValueError: There is no such op or device.
        RuntimeError: The device is not there, or no worker starts.
    """
    unknown = next((op for op in only if op not in OPS), None)
    if unknown is not None:
        raise ValueError(f"[doctor] --op must be one of {', '.join(OPS)} but got {shown(unknown)}.")
    kind = device.DEVICES[name]()
    kind.check()
    limits = kind.limits()
    cases = shapes.embedded(limits) + ([] if quick else shapes.real(limits))
    cases = [case for case in cases if not only or case.op in only]
    cases.sort(key=lambda case: case.op)
    rows = runner.examine(
        cases, name, timed=_timed(cases, kind), probes=True, shared=False, on_op=on_op
    )
    quarantine.update(name, rows, tell, whole=not quick)
    said = "embedded" if quick else f"embedded, {', '.join(PUBLISHED)}"
    return {
        "device": name,
        "kernel": kind.kernel,
        "compared_with": kind.expected,
        "shapes": said,
        "machine": machine.facts(),
        "key": machine.key(name),
        "ops": rows,
    }


def _timed(cases: list[shapes.Case], kind: device.Device) -> list[str]:
    """A GPU times all; elsewhere, where MLX's own take long, the widest of each op."""
    if kind.clock == "gpu":
        return [case.name for case in cases]
    if kind.clock is None:
        return []
    chosen: dict[str, str] = {}
    for case in cases:
        if case.op not in chosen or set(WIDEST) & set(case.where):
            chosen[case.op] = case.name
    return list(chosen.values())
