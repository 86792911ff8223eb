"""The doctor's worker with faults planted: what tests start in its place.

Run: python faulty_worker.py OP=FAULT ...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from pyengine import _ext
from pyengine.doctor import device, worker

LOG = """program_source:1:1: note: in what follows
program_source:12:5: error: use of undeclared identifier 'lane'
"""
Op = Callable[..., Any]


def each(out: Any, f: Callable[[mx.array], mx.array]) -> Any:
    return f(out) if isinstance(out, mx.array) else [f(a) for a in out]


def wrong(native: Op) -> Op:
    """One number of a result is another."""

    def edited(a: mx.array) -> mx.array:
        place = (mx.arange(a.size) == a.size - 3).reshape(a.shape)
        return mx.where(place, a + 1, a).astype(a.dtype)

    return lambda *args: each(native(*args), edited)


def unstable(native: Op) -> Op:
    """Another last bit where there are six rows."""

    def edited(a: mx.array) -> mx.array:
        return (a * 1.015625).astype(a.dtype) if a.shape[0] == 6 else a

    return lambda *args: each(native(*args), edited)


def dropped(native: Op) -> Op:
    """From the first call on nothing is computed: results are as they were allocated."""

    def unseen(*args: Any) -> Any:
        _ext.rehearse(True)
        return native(*args)

    return unseen


def blank(native: Op) -> Op:
    """Numbers that nobody would miss as wrong."""

    def filled(a: mx.array) -> mx.array:
        kind = mx.uint16 if a.dtype.size == 2 else mx.uint32
        return mx.full(a.shape, 0xAAAA if a.dtype.size == 2 else 0xAAAAAAAA, kind).view(a.dtype)

    return lambda *args: each(native(*args), filled)


def stale(native: Op) -> Op:
    """A copy within the probe's arena copies what the one before should have."""
    kept: list[mx.array] = []

    def late(arena: mx.array, sources: mx.array, targets: mx.array) -> mx.array:
        if arena.shape[0] % 2 == 0:
            return native(arena, sources, targets)
        kept.append(sources)
        return native(arena, kept[max(0, len(kept) - 2)], targets)

    return late


def failing(native: Op) -> Op:
    def fail(*args: Any) -> Any:
        raise RuntimeError("[encode] the command buffer was ignored.\nmore of it")

    return fail


def aborting(native: Op) -> Op:
    def crash(*args: Any) -> Any:
        print("a fault of the device", file=sys.stderr, flush=True)
        os.abort()

    return crash


def faulting(native: Op) -> Op:
    return lambda *args: os.kill(os.getpid(), signal.SIGSEGV)


def endless(native: Op) -> Op:
    def spin(*args: Any) -> Any:
        while True:
            pass

    return spin


FAULTS: dict[str, Callable[[Op], Op]] = {
    f.__name__: f for f in (wrong, unstable, dropped, stale, failing, aborting, faulting, endless)
}


def refuse(names: Sequence[str]) -> None:
    """The compiler takes none of these ops' kernels."""
    compile = device.Processor.compile

    def refused(self: device.Processor, run: device.Run) -> device.Compiled | None:
        with device.using("native", mx.cpu):
            launches = device.launches_of(run()) or []
        for launch in launches:
            if launch.library in names:
                raise device.Refused(launch.library, launch.kernel, LOG)
        return compile(self, run)

    device.Processor.compile = refused  # type: ignore[method-assign]


def main() -> None:
    planted = dict(argument.split("=") for argument in sys.argv[1:])
    for op, fault in planted.items():
        if fault in FAULTS:
            setattr(_ext, op, FAULTS[fault](getattr(_ext, op)))
    refuse([op for op, fault in planted.items() if fault == "refused"])
    if "start" in planted:
        sys.exit("no MLX here")
    worker.main()


if __name__ == "__main__":
    main()
