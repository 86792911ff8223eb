"""What each kernel's source makes a GPU compiler do: `python -m workbench isa --help`."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from . import gcn, gcn_run
from .launch import DTYPES, LaunchLike
from .run import run
from .toolchain import CompileError

ROWS = (1, 2, 4, 6, 8, 16)
BITS = (8, 6, 4)
COLUMNS = 21504  # of the 31B's feed-forward layer
# The cost of a byte is the difference of these two: what comes before and after the loop is in
# both. Scales, biases and staged rows come round every 2048 k at most.
WIDTHS = (2048, 4096)
GROUP_SIZE = 64
WEIGHTS = re.compile(r"(.*_)?w(_\d)?")

# Lanes that issue at once do not always: see `cycles`.
ISSUE = 1.2
SLOW_CYCLES = 4

CAVEAT = (
    "Counted in what clang makes of the source for gfx1030, another GPU with 32 lanes per simdgroup.\n"
    "It shows what the source forces on any compiler; it is not what a Mac does, and no time."
)

# Kind of an instruction by its name: the first pattern that fits
KINDS: tuple[tuple[str, str], ...] = (
    ("wait", r"s_waitcnt.*|s_clause|s_inst_prefetch|s_nop|s_denorm_mode|buffer_gl0_inv|s_endpgm"),
    ("fma", r"v_fma.*"),
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
}


@dataclass(frozen=True)
class Row:
    """What one kernel's source forces, at one number of bits and rows.

    Attributes:
        kernel: Its name without dtype and bits; the dtype is bfloat16 wherever there is a choice.
        bits: Of a weight; None if the kernel is no matmul.
        M: Rows; None if the call has none.
        registers: Of 32 bits, of each thread. The compiler may use what M1 has for as many threads.
        spills: Bytes of memory per thread, for values that no register is found for.
        loads_in_flight: Loads of weights (of any input, if the kernel is no matmul) of a simdgroup
            under way when it first waits for one: the median of all such waits.
        instructions_per_byte: Executed by the lanes of a threadgroup, for each byte of weights that
            it loads. Prologue and epilogue are left out, rows on their way to threadgroup memory are
            not. If the kernel is no matmul: all, for each byte that it loads or stores.
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

    Conversions, shifts, extracts and integer multiplications take 4 cycles on a pipe of their own.
    All others take one, and so does handing out each of the slow ones; of 128 lanes 1.2 cycles on
    average, since too few simdgroups are ready. The slower of the two pipes decides.

    Source: philipturner/metal-benchmarks, README.md (MIT).
    """
    slow = SLOW_CYCLES * sum(by_kind.get(kind, 0.0) for kind in SLOW)
    return max(ISSUE * sum(by_kind.values()), slow)


# Calls


def matmul_calls(columns: int) -> dict[str, Callable[[int, int, int], Any]]:
    """By op: its lazy result for M rows of width K and a number of bits."""
    import mlx.core as mx

    from pyengine import ops

    def rows(M: int, K: int) -> mx.array:
        return mx.zeros((M, K), mx.bfloat16)

    def matrix(N: int, K: int, bits: int, *stack: int) -> tuple[mx.array, mx.array, mx.array]:
        factors = mx.zeros((*stack, N, K // GROUP_SIZE), mx.bfloat16)
        return mx.zeros((*stack, N, K * bits // 32), mx.uint32), factors, factors

    def matmul(M: int, K: int, bits: int) -> Any:
        return ops.quantized_matmul(rows(M, K), *matrix(columns, K, bits), GROUP_SIZE, bits)

    def matmuls(M: int, K: int, bits: int) -> Any:
        parts = [matrix(columns // n, K, bits) for n in (2, 4, 4)]
        return ops.quantized_matmuls(rows(M, K), parts, GROUP_SIZE, bits)

    def gated(M: int, K: int, bits: int) -> Any:
        both = [matrix(columns, K, bits) for _ in range(2)]
        return ops.quantized_gated_matmul(rows(M, K), *both, GROUP_SIZE, bits)

    def expert(M: int, K: int, bits: int) -> Any:
        """All tokens use the one expert."""
        stack, up = (matrix(704, K, bits, 1) for _ in range(2))
        ids = mx.zeros((M, 1), mx.int32)
        return ops.quantized_expert_matmul(rows(M, K), stack, ids, GROUP_SIZE, bits, up=up)

    def head(M: int, K: int, bits: int) -> Any:
        """A slice has four tiles at least."""
        return ops.quantized_filter_logits(rows(M, K), *matrix(128, K, bits), GROUP_SIZE, bits)

    def dense(M: int, K: int, bits: int) -> Any:
        return ops.dense_matmul(rows(M, K), mx.zeros((columns, K), mx.bfloat16))

    return {
        "quantized_matmul": matmul,
        "quantized_matmuls": matmuls,
        "quantized_gated_matmul": gated,
        "quantized_expert_matmul": expert,
        "quantized_filter_logits": head,
        "dense_matmul": dense,
    }


def attention() -> Any:
    """A block of six against a full layer of the 31B."""
    import mlx.core as mx

    from pyengine import ops

    T, H, K, D, C = 6, 32, 4, 512, 1024
    q = mx.ones((1, T, H, D), mx.bfloat16)
    k, v = (mx.ones((1, K, C, D), mx.bfloat16) for _ in range(2))
    return ops.block_attention(q, k, v, mx.array(C - T, mx.int32), scale=1.0)


def small_call(op: str) -> tuple[Any, int | None]:
    """The SMALL call of its bench, whose first threadgroup has work, and its rows."""
    if op == "block_attention":
        return attention(), 6
    import timing  # of the bench folder

    bench: Any = importlib.import_module(f"bench_{op}")
    kept: list[Any] = []

    def compare(_: Any, kernel: Any, baseline: Any, turns: Any, **rest: Any) -> None:
        kept.append(kernel(*turns[0]))

    def check(*_: Any, **rest: Any) -> None:
        pass

    replaced = {"compare": compare, "check": check, "cold_copies": lambda nbytes: 1}
    own = {name: getattr(timing, name) for name in replaced}
    vars(timing).update(replaced)
    try:
        getattr(bench, f"test_{op}")(None, **bench.SMALL)
    finally:
        vars(timing).update(own)
    return kept[0], bench.SMALL.get("T")


# Rows


def matmul_row(call: Callable[[int, int, int], Any], M: int, bits: int) -> Row:
    """Of the first launch, which reads the weights."""
    from pyengine import _ext

    executed: list[Counter[str]] = []
    loaded: list[int] = []
    for K in WIDTHS:
        launches, _ = _ext.launches_of(call(M, K, bits))
        assert launches
        launch = launches[0]
        weights = [i for i, b in enumerate(launch.buffers) if WEIGHTS.fullmatch(b.name)]
        program = gcn.program(launch)
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
        program = gcn.program(launch)
        counts, memory = _run(program, launch, arrays, read)
        of_arrays = [n for n, b in enumerate(launch.buffers) if b.role != "bytes"]
        moved = sum(memory.touched(n) for n in of_arrays)
        executed = {kind: 32.0 * n for kind, n in kinds_of(counts.executed).items()}
        yield _row(launch, None, T, program, counts, executed, moved)


def _run(
    program: gcn_run.Program,
    launch: LaunchLike,
    arrays: dict[str, Any],
    watched: Sequence[int],
) -> tuple[gcn_run.Counts, gcn_run.Memory]:
    buffers: list[Any] = []
    for buffer in launch.buffers:
        if buffer.role == "bytes":
            buffers.append(np.frombuffer(buffer.data, np.uint8))
        elif buffer.name in arrays:
            buffers.append(np.ascontiguousarray(arrays[buffer.name]))
        else:  # zeros
            buffers.append(prod(buffer.shape) * DTYPES[buffer.dtype].itemsize)
    return gcn_run.run(
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
    program: gcn_run.Program,
    counts: gcn_run.Counts,
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
    root = Path(__file__).parents[1]
    sys.path += [str(root / part) for part in ("bench",) if str(root / part) not in sys.path]
    from pyengine.ops import dispatch

    wanted = [op for op in dispatch.OPS if not kernels or op.startswith(tuple(kernels))]
    if not wanted:
        raise ValueError(f"[isa] kernel must start an op's name but got {', '.join(kernels)}.")
    calls = matmul_calls(columns)
    for op in wanted:
        if op in calls:
            for b in bits if op != "dense_matmul" else (16,):
                for M in rows:
                    yield matmul_row(calls[op], M, b)
        else:
            yield from rows_of(op)


def main(arguments: list[str]) -> int:
    """The command; prints each row when it is there."""
    parser = argparse.ArgumentParser(
        prog="python -m workbench isa",
        description="Compile kernels for a GPU of 32 lanes and count what a threadgroup executes.",
        epilog=f"""
{CAVEAT}

examples:
    python -m workbench isa --kernel quantized_matmul --bits 8 4 --rows 1 6 16
    python -m workbench isa --kernel block_attention
    python -m workbench isa --json > isa.json      # all kernels, some minutes
""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kernel", nargs="+", default=[], help="starts of ops' names; default all")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, metavar="M")
    parser.add_argument("--bits", nargs="+", type=int, default=BITS, choices=BITS)
    parser.add_argument("--columns", type=int, default=COLUMNS, metavar="N", help="of a matrix")
    parser.add_argument("--json", action="store_true", help="a list of rows, each an object")
    given = parser.parse_args(arguments)
    try:
        rows = table(given.kernel, given.rows, given.bits, given.columns)
        if given.json:
            print(json.dumps([asdict(row) for row in rows], indent=1))
            return 0
        print(CAVEAT)
        print(
            f"\n{'kernel':28}{'bits':>5}{'M':>4}{'registers':>10}{'spills':>7}{'loads':>6}", end=""
        )
        print(f"{'instr/byte':>11}{'cycles/byte':>12}  by kind")
        for row in rows:
            print(_line(row), flush=True)
    except (ValueError, CompileError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _line(row: Row) -> str:
    parts = sorted(row.by_kind.items(), key=lambda part: -part[1])
    kinds = ", ".join(f"{kind} {n:.2f}" for kind, n in parts if n >= 0.005)
    return (
        f"{row.kernel:28}{row.bits or '':>5}{row.M or '':>4}{row.registers:10}{row.spills:7}"
        f"{row.loads_in_flight:6}{row.instructions_per_byte:11.2f}{row.cycles_per_byte:12.2f}"
        f"  {kinds}"
    )
