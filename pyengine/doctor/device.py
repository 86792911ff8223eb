"""What the doctor examines: a GPU, the processor, or our Metal kernels on the processor.

The three differ in how a kernel is compiled, how it is run, and in what its results are compared
with. All that Metal alone can do goes through two functions of the extension.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from pyengine import _ext, ops
from pyengine.checkpoint.memory import available_bytes
from pyengine.ops.sizes import Limits

THREADGROUP_BYTES = 32768  # of memory that a threadgroup may have, on every Apple GPU
Results = list[mx.array]
Run = Callable[[], Results]


class Refused(Exception):
    """A kernel cannot be compiled or started; the text is the compiler's."""

    def __init__(self, library: str, kernel: str, log: str) -> None:
        super().__init__(log)
        self.library, self.kernel = library, kernel


@dataclass
class Compiled:
    """What is known of the compiled kernels of a call."""

    seconds: float = 0.0
    threads: int | None = None  # the fewest that one of the pipelines allows
    threadgroup_bytes: int = 0


class Device(Protocol):
    """Where ops run. ``expected`` names what they are compared with."""

    name: str
    kernel: str
    expected: str
    bits: bool  # whether that gives the same bits where an op promises them
    clock: str | None  # what times are of; None where they would mean nothing
    chain: int  # calls that are timed together
    stride: int  # of the rows that are run alone
    probes: int  # writes of the probe for hazards

    def check(self) -> None:
        """Whether it is there.

        Raises:
            RuntimeError: It is not.
        """

    def limits(self) -> Limits: ...

    def compile(self, run: Run) -> Compiled | None:
        """Compile what a call launches; None where nothing is compiled for it.

        Raises:
            Refused: A kernel does not compile, or would not be started.
        """

    def run(self, run: Run) -> Results:
        """Results of a call, evaluated, into memory that held something else."""

    def right(self, run: Run) -> Results:
        """What they should be, evaluated."""


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh results of our ops begin as 0xAA: one that was never written shows."""
    _ext.poison_outputs(True)
    try:
        yield
    finally:
        _ext.poison_outputs(False)


@contextmanager
def using(implementation: str, device: mx.DeviceType | None = None) -> Iterator[None]:
    before, place = ops.dispatch.chosen(), mx.default_device()
    ops.use(implementation)  # type: ignore[arg-type]
    if device is not None:
        mx.set_default_device(device)
    try:
        yield
    finally:
        ops.use(before)
        mx.set_default_device(place)


def evaluated(run: Run) -> Results:
    results = run()
    mx.eval(results)
    return results


class Processor:
    """Our processor kernels, which are compiled already, against the plain definitions."""

    name, expected = "processor", "plain definitions in MLX"
    kernel = "SIMD kernels"
    bits, chain, stride, probes = False, 1, 7, 200
    clock: str | None = "processor"

    def check(self) -> None:
        pass

    def limits(self) -> Limits:
        return Limits(6e6)

    def compile(self, run: Run) -> Compiled | None:
        return None

    def run(self, run: Run) -> Results:
        with using("native", mx.cpu), poisoned():
            return evaluated(run)

    def right(self, run: Run) -> Results:
        with using("reference", mx.cpu):
            return evaluated(run)


class Metal:
    """Our Metal kernels on a GPU against our processor kernels."""

    name, expected = "gpu", "processor kernels"
    kernel = "Metal kernels"
    bits, chain, stride, probes = True, 20, 1, 1000
    clock: str | None = "gpu"

    def check(self) -> None:
        if not mx.metal.is_available():
            raise RuntimeError(
                "[doctor] --device gpu must have a GPU with Metal but there is none."
            )

    def limits(self) -> Limits:
        """All of a matrix where a sixteenth of the memory holds it."""
        return Limits((available_bytes() or 1 << 33) / 16)

    def compile(self, run: Run) -> Compiled | None:
        with using("native", mx.gpu):
            launches = launches_of(run())
        if launches is None:
            return None
        found = Compiled()
        for launch in launches:
            try:
                threads, memory, seconds = _ext.compile_launch(launch)
            except RuntimeError as error:
                raise Refused(launch.library, launch.kernel, str(error)) from None
            check_fit(launch, threads, memory)
            found.seconds += seconds
            found.threads = min(threads, found.threads or threads)
            found.threadgroup_bytes = max(found.threadgroup_bytes, memory)
        return found

    def run(self, run: Run) -> Results:
        with using("native", mx.gpu), poisoned():
            return evaluated(run)

    def right(self, run: Run) -> Results:
        with using("native", mx.cpu):
            return evaluated(run)


class Workbench:
    """Our Metal kernels on the processor, from a checkout, against our processor kernels."""

    name, expected = "workbench", "processor kernels"
    kernel = "Metal kernels on the processor"
    bits, chain, stride, probes = True, 1, 15, 3
    clock: str | None = None

    def check(self) -> None:
        from pyengine.ops import workbench

        workbench.load()

    def limits(self) -> Limits:
        return Limits(4e6, 128)

    def compile(self, run: Run) -> Compiled | None:
        from pyengine.ops import workbench

        workbench.load()
        from workbench.library import load
        from workbench.toolchain import CompileError

        with using("native", mx.cpu):
            launches = launches_of(run())
        if launches is None:
            return None
        found = Compiled(threads=1024)
        for launch in launches:
            began = time.perf_counter()
            try:
                load(launch.library, launch.kernel, launch.constants, checked=False)
            except CompileError as error:
                raise Refused(launch.library, launch.kernel, str(error)) from None
            memory = sum(size for _, size in launch.threadgroup_memory)
            check_fit(launch, 1024, memory)
            found.seconds += time.perf_counter() - began
            found.threadgroup_bytes = max(found.threadgroup_bytes, memory)
        return found

    def run(self, run: Run) -> Results:
        with using("workbench", mx.cpu):
            return evaluated(run)

    def right(self, run: Run) -> Results:
        with using("native", mx.cpu):
            return evaluated(run)


DEVICES: dict[str, Callable[[], Device]] = {
    Processor.name: Processor,
    Metal.name: Metal,
    Workbench.name: Workbench,
}


def default() -> str:
    """The device that ops run on here."""
    return Metal.name if mx.default_device() == mx.gpu else Processor.name


def launches_of(results: Sequence[mx.array]) -> list[Any] | None:
    """What a GPU launches for a lazy result of our op; None where it runs MLX's instead."""
    try:
        launches: list[Any] | None = _ext.launches_of(list(results))[0]
    except ValueError:
        return None
    return launches


def check_fit(launch: Any, threads: int, memory: int) -> None:
    """What a driver would drop without a word.

    Raises:
        Refused: More threads or memory than the pipeline allows.
    """
    wanted = math.prod(launch.threadgroup)
    if wanted > threads:
        text = f"{launch.kernel} starts {wanted} threads but its pipeline allows {threads}"
        raise Refused(launch.library, launch.kernel, text)
    if memory > THREADGROUP_BYTES:
        text = f"{launch.kernel} takes {memory} bytes of threadgroup memory of {THREADGROUP_BYTES}"
        raise Refused(launch.library, launch.kernel, text)
