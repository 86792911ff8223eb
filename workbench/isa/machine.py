"""Runs one threadgroup of a kernel's assembly and counts what its simdgroups execute.

A simdgroup's registers are rows of numpy arrays with a column per lane. Only what the compiler
makes of our kernels is known here; anything else is refused by name. There is no time and no cache:
a load is there at once, and what is counted is how many were asked for before a wait.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from .accesses import device_step, scratch_step, threadgroup_step
from .operands import Step, unknown
from .program import Instruction, Program
from .scalar import BARRIER, scalar_step
from .simdgroup import LANES, Array, Memory, Simdgroup
from .vector import vector_step

_ENDLESS = 5_000_000  # instructions between two barriers


@dataclass
class Counts:
    """What the simdgroups of a threadgroup executed."""

    executed: Counter[str] = field(default_factory=Counter)  # by name of instruction
    in_flight: list[int] = field(default_factory=list)  # loads before each first wait


def run(
    program: Program,
    buffers: Sequence[Array | int],
    *,
    group: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    groups: tuple[int, int, int],
    watched: Sequence[int],
) -> tuple[Counts, Memory]:
    """Run one threadgroup to its end.

    Args:
        buffers: Each as an array, or its size in bytes if it is all zeros, in the kernel's order.
        group: Which threadgroup of the grid.
        threadgroup: Its threads.
        groups: Threadgroups in the grid.
        watched: Indices of the buffers whose loads are counted in `Counts.in_flight`.

    Raises:
        NotImplementedError: An instruction is not known here.
        IndexError: An access lies in no buffer.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        return _run(program, buffers, group, threadgroup, groups, watched)


def _run(
    program: Program,
    buffers: Sequence[Array | int],
    group: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    groups: tuple[int, int, int],
    watched: Sequence[int],
) -> tuple[Counts, Memory]:
    arguments = len(buffers)
    memory = Memory([*buffers, np.zeros(2 * arguments + 6, np.uint32)])
    addresses = np.array([memory.address(n) for n in range(arguments)], np.uint64)
    dispatch = np.array([*threadgroup, *groups], np.uint32)
    given = np.concatenate([addresses.view(np.uint8), dispatch.view(np.uint8)])
    memory.buffer(arguments)[:] = given
    steps = [_step(i) for i in program.instructions]
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    simdgroups = [Simdgroup(program, memory, watched) for _ in range((threads + 31) // 32)]
    for n, simdgroup in enumerate(simdgroups):
        _start(simdgroup, program, memory.address(arguments), group, threadgroup, n)
    waiting = simdgroups
    while waiting:
        waiting = [w for w in waiting if _until_barrier(w, steps)]
    counts = Counts()
    for simdgroup in simdgroups:
        for i, visits in zip(program.instructions, simdgroup.visits, strict=True):
            counts.executed[i.name] += visits
        counts.in_flight += simdgroup.in_flight
    return counts, memory


def _until_barrier(w: Simdgroup, steps: list[Step]) -> bool:
    """Whether it came to a barrier and not to its end."""
    visits, end = w.visits, len(steps)
    budget = _ENDLESS
    while w.pc < end:
        pc = w.pc
        visits[pc] += 1
        w.pc = pc + 1
        if steps[pc](w) is BARRIER:
            return True
        budget -= 1
        if not budget:
            raise RuntimeError("[isa] a simdgroup must end but ran 5 million instructions")
    return False


def _start(
    w: Simdgroup,
    program: Program,
    arguments: int,
    group: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    number: int,
) -> None:
    """Fills registers as the kernel descriptor says."""
    about, at = program.about, 0
    for name, words in (
        ("private_segment_buffer", 4),
        ("dispatch_ptr", 2),
        ("queue_ptr", 2),
        ("kernarg_segment_ptr", 2),
        ("dispatch_id", 2),
        ("flat_scratch_init", 2),
        ("private_segment_size", 1),
    ):
        if about.get(f"user_sgpr_{name}"):
            if name == "kernarg_segment_ptr":
                w.S[at], w.S[at + 1] = arguments & 0xFFFFFFFF, arguments >> 32
            at += words
    for axis, name in enumerate("xyz"):
        if about.get(f"system_sgpr_workgroup_id_{name}"):
            w.S[at] = group[axis]
            at += 1
    thread = LANES + np.uint32(32 * number)
    x, y = np.uint32(threadgroup[0]), np.uint32(threadgroup[1])
    w.V[0], w.V[1], w.V[2] = thread % x, thread // x % y, thread // (x * y)
    last = threadgroup[0] * threadgroup[1] * threadgroup[2] - 32 * number
    if last < 32:
        w.set_exec((1 << last) - 1)


def _step(i: Instruction) -> Step:
    """An instruction as a function; one that is not known here may be there, but not be reached."""
    try:
        for prefix, make in (
            ("v_", vector_step),
            ("ds_", threadgroup_step),
            ("global_", device_step),
            ("buffer_", scratch_step),
            ("s_", scalar_step),
        ):
            if i.name.startswith(prefix):
                return make(i)
        raise unknown(i)
    except NotImplementedError as error:
        return _raises(error)


def _raises(error: NotImplementedError) -> Step:
    def step(_: Simdgroup) -> None:
        raise error

    return step
