"""Before a model runs: set failed ops aside, and on a GPU that is new examine what it will run."""

from __future__ import annotations

import hashlib
import math
import threading
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyengine import ops
from pyengine.doctor import device, quarantine, runner, shapes
from pyengine.ops.sizes import Limits

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

Tell = Callable[[str], None]
EXAMINED_ON = ("gpu",)  # a processor's kernels are compiled, and tested where they are built

_lock = threading.Lock()
_asked: set[str] = set()  # devices and cases that this process has dealt with
_told: set[str] = set()  # the ops that it has named


def warn(line: str) -> None:
    """What a library does with a line for its user."""
    warnings.warn(line, RuntimeWarning, stacklevel=2)


def ready(
    pair: Pair, tell: Tell = warn, on_op: runner.Progress = lambda done, total, op: None
) -> None:
    """Deal with a pair before it runs, once in a process; nothing where ops are not native.

    An op that failed on this machine, now or earlier, runs MLX's own from here on; one line says
    so. On a GPU the pair's own shapes are examined if they never were: compiled, compared with the
    processor's kernels, and row by row.
    """
    if ops.dispatch.chosen() != "native":
        return
    name = device.default()
    new = name in EXAMINED_ON
    # Of the true shapes: how much is scaled down depends on the memory that is free
    digest = _digest(shapes.of_loaded(pair, Limits(math.inf))) if new else ""
    with _lock:
        if f"{name} {digest}" in _asked:
            return
        _asked.add(f"{name} {digest}")
        record = quarantine.read(name, tell)
        if new and digest not in record.checked:
            cases = shapes.of_loaded(pair, device.DEVICES[name]().limits())
            try:
                rows = runner.examine(cases, name, timed=(), probes=False, shared=True, on_op=on_op)
            except (RuntimeError, OSError) as error:
                tell(f"The ops could not be checked on this device: {error}")
            else:
                record = quarantine.update(name, rows, tell, checked=digest)
        set_aside(record, tell)


def set_aside(record: quarantine.Record, tell: Tell) -> None:
    """Let what failed run MLX's own, and say so in a line, once."""
    global _told
    ops.dispatch.set_aside(record.failed)
    if record.failed and set(record.failed) != _told:
        _told = set(record.failed)
        names = ", ".join(sorted(record.failed))
        verb = "runs" if len(record.failed) == 1 else "run"
        tell(
            f"{names} failed pyengine doctor on this machine and {verb} as MLX's own: slower, and "
            "exactness is not promised. `pyengine doctor` says why and checks again."
        )


def _digest(cases: list[shapes.Case]) -> str:
    """Of what is examined."""
    text = "\n".join(sorted(case.name for case in cases))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
