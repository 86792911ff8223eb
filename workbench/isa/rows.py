"""What a kernel's source forces on a GPU compiler, as rows of numbers."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..launch import DTYPES, LaunchLike
from ..run import run
from . import machine
from .calls import matmul_calls, small_call
from .compile import program_of
from .program import Program
from .simdgroup import Memory

ROWS = (1, 2, 4, 6, 8, 16)
BITS = (8, 6, 4)
COLUMNS = 21504  # of the 31B's feed-forward layer
# The cost of a byte is the difference of these two: what comes before and after the loop is in
# both. Scales, biases and staged rows come round every 2048 k at most.
WIDTHS = (2048, 4096)
WEIGHTS = re.compile(r"(.*_)?w")  # names of buffers

ISSUE, SLOW_CYCLES = 1.2, 4  # see `cycles`

CAVEAT = (
    "Counted in what clang makes of the source for gfx1030, another GPU of 32 lanes per simdgroup."
    "\nIt is what the source forces on any compiler, not what a Mac does, and no time."
)

# Kind of an instruction by its name: the first pattern that fits
KINDS: tuple[tuple[str, str], ...] = (
    ("wait", r"s_waitcnt.*|s_clause|s_inst_prefetch|s_nop|s_denorm_mode|buffer_gl0_inv|s_endpgm"),
    ("fma", r"v_fma.*"),
    ("float", r"v_cvt_f32_f16"),  # Apple's GPUs read operands of 16 bits
    ("convert", r"v_cvt_.*"),
    ("shift", r"v_(lshl|lshr|ashr)rev_.*|v_bfe_.*|v_bfi_.*|v_perm_.*|v_alignbit_.*|v_bfrev_.*"),
    ("multiply", r"v_mul_(lo|hi)_.*|v_mul_u32_u24|v_mad_.*|v_mul_lo_u16"),
    ("special", r"v_(rcp|rsq|sqrt|div).*"),
    ("float", r"v_\w+_f32|v_cmpx?_class_f32"),
    ("integer", r"v_.*"),
    ("control", r"s_.*"),
    ("load", r"global_load.*"),
    ("store", r"global_store.*"),
    ("spill", r"buffer_.*"),
    ("shuffle", r"ds_(bpermute|swizzle)_b32"),
    ("threadgroup", r"ds_.*"),
)
# Those of Apple's second pipe, which runs beside the first
SLOW = ("convert", "shift", "multiply", "special")
# What gfx1030 does in one instruction and Apple's GPUs in two, and of which kind the other one is.
# They convert the low byte of either half of a register, and no other byte.
TWICE = {
    **{"v_cvt_f32_ubyte1": "shift", "v_cvt_f32_ubyte3": "shift"},
    **{"v_add3_u32": "integer", "v_or3_b32": "integer", "v_xor3_b32": "integer"},
    **{"v_and_or_b32": "integer", "v_lshl_or_b32": "shift", "v_add_lshl_u32": "shift"},
    **{"v_max3_f32": "float", "v_max3_u32": "integer", "v_min3_u32": "integer"},
    **{"v_max3_i32": "integer", "v_min3_i32": "integer", "v_med3_i32": "integer"},
}


@dataclass(frozen=True)
class Row:
    """What one kernel's source forces, at one number of bits and rows.

    Attributes:
        kernel: Its name without dtype and bits; the dtype is bfloat16 wherever there is a choice.
        bits: Of a weight; None if the kernel is no matmul.
        M: Rows; None if the call has none.
        registers: Of 32 bits, of each thread. The compiler may use 128, or what M1 has for a
            threadgroup of as many threads as the kernel says.
        spills: Bytes of memory per thread, for values that no register is found for.
        loads_in_flight: Loads of weights (of any input, if the kernel is no matmul) that a
            simdgroup has under way when it first waits for one: the median of all such waits.
        instructions_per_byte: Executed by the lanes of the first threadgroup, for each byte of
            weights that it loads: how many more for longer rows, so what comes once is left out,
            and what comes with every so many k is not. If the kernel is no matmul: all of them,
            for each byte that it loads or stores.
        cycles_per_byte: See :func:`cycles`.
        by_kind: instructions_per_byte by kind (`KINDS`).
    """

    kernel: str
    bits: int | None
    M: int | None
    registers: int
    spills: int
    loads_in_flight: int
    instructions_per_byte: float
    cycles_per_byte: float
    by_kind: dict[str, float]


def kinds_of(executed: Counter[str]) -> Counter[str]:
    """Executed instructions by kind, as many as Apple's GPUs need for them."""
    found: Counter[str] = Counter()
    for name, times in executed.items():
        kind = next(kind for kind, pattern in KINDS if re.fullmatch(pattern, name))
        if kind != "wait":
            found[kind] += times
            if name in TWICE:
                found[TWICE[name]] += times
    return found


def cycles(by_kind: dict[str, float]) -> float:
    """Cycles of one of a core's 128 lanes for these instructions, by rates published for M1 and M2.

    Conversions, shifts, extracts, integer multiplications and reciprocals take 4 cycles on a pipe
    of their own, which runs beside the one of all others. To issue an instruction of either takes
    one cycle, and 1.2 on average where no more than some 16 simdgroups take turns. The slower of
    the two decides: issuing, or the pipe of the slow ones.

    Source: the tables of philipturner/metal-benchmarks (MIT).
    """
    slow = SLOW_CYCLES * sum(by_kind.get(kind, 0.0) for kind in SLOW)
    return max(ISSUE * sum(by_kind.values()), slow)


def matmul_row(call: Callable[[int, int, int], Any], M: int, bits: int) -> Row | None:
    """Of the first launch, which reads the weights; None where no kernel takes so many rows."""
    from pyengine import _ext

    executed: list[Counter[str]] = []
    loaded: list[int] = []
    for K in WIDTHS:
        launches, _ = _ext.launches_of(call(M, K, bits))
        if launches is None:
            return None
        launch = launches[0]
        weights = [i for i, b in enumerate(launch.buffers) if WEIGHTS.fullmatch(b.name)]
        program = program_of(launch)
        counts, memory = _run(program, launch, {}, weights)
        executed.append(kinds_of(counts.executed))
        loaded.append(sum(memory.touched(i) for i in weights))
    step = {kind: 32.0 * (n - executed[0][kind]) for kind, n in executed[1].items()}
    return _row(launch, bits, M, program, counts, step, loaded[1] - loaded[0])


def rows_of(op: str) -> Iterator[Row]:
    """Of an op that is no matmul: one for each of its launches."""
    from pyengine import _ext
    from pyengine.ops.workbench import named

    result, T = small_call(op)
    launches, inputs = _ext.launches_of(result)
    assert launches
    arrays = named(launches, inputs)
    for i, launch in enumerate(launches):
        if i > 0:  # on what the ones before it leave
            arrays |= run(launches[:i], arrays)[0]
        read = [n for n, b in enumerate(launch.buffers) if b.role in ("in", "inout")]
        program = program_of(launch)
        counts, memory = _run(program, launch, arrays, read)
        of_arrays = [n for n, b in enumerate(launch.buffers) if b.role != "bytes"]
        moved = sum(memory.touched(n) for n in of_arrays)
        executed = {kind: 32.0 * n for kind, n in kinds_of(counts.executed).items()}
        yield _row(launch, None, T, program, counts, executed, moved)


def _run(
    program: Program,
    launch: LaunchLike,
    arrays: dict[str, Any],
    watched: Sequence[int],
) -> tuple[machine.Counts, Memory]:
    buffers: list[Any] = []
    for buffer in launch.buffers:
        if buffer.role == "bytes":
            buffers.append(np.frombuffer(buffer.data, np.uint8))
        elif buffer.name in arrays:
            buffers.append(np.ascontiguousarray(arrays[buffer.name]))
        else:  # zeros
            buffers.append(prod(buffer.shape) * DTYPES[buffer.dtype].itemsize)
    return machine.run(
        program,
        buffers,
        group=(0, 0, 0),
        threadgroup=tuple(launch.threadgroup),  # type: ignore[arg-type]
        groups=tuple(launch.grid),  # type: ignore[arg-type]
        watched=watched,
    )


def _row(
    launch: LaunchLike,
    bits: int | None,
    M: int | None,
    program: Program,
    counts: machine.Counts,
    executed: dict[str, float],
    nbytes: int,
) -> Row:
    by_kind = {kind: n / nbytes for kind, n in sorted(executed.items()) if n}
    return Row(
        kernel=re.sub(r"(_(bfloat16|float16|float32|uint16|uint32))?(_\d)?$", "", launch.kernel),
        bits=bits,
        M=M,
        registers=program.registers,
        spills=program.scratch_bytes,
        loads_in_flight=int(statistics.median_low(counts.in_flight or [0])),
        instructions_per_byte=round(sum(by_kind.values()), 3),
        cycles_per_byte=round(cycles(by_kind), 3),
        by_kind={kind: round(n, 3) for kind, n in by_kind.items()},
    )


def table(
    kernels: Sequence[str] = (),
    rows: Sequence[int] = ROWS,
    bits: Sequence[int] = BITS,
    columns: int = COLUMNS,
) -> Iterator[Row]:
    """Rows of the ops whose names start with one of `kernels`; of all if there is none.

    Raises:
        RuntimeError: The package ziglang is not installed.
        ValueError: No op has such a name.
    """
    from pyengine.ops import dispatch

    wanted = [op for op in dispatch.OPS if not kernels or op.startswith(tuple(kernels))]
    if not wanted:
        raise ValueError(f"[isa] kernel must start an op's name but got {', '.join(kernels)}.")
    calls = matmul_calls(columns)
    for op in wanted:
        if op in calls:
            for b in bits if op != "dense_matmul" else (16,):
                found = (matmul_row(calls[op], M, b) for M in rows)
                yield from (row for row in found if row is not None)
        else:
            yield from rows_of(op)
