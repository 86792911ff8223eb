"""Run one kernel on random inputs and say what it did: `python -m workbench --help`."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import strict
from .isa import command
from .launch import DTYPES, Buffer, Launch
from .library import METAL, preprocess
from .report import Report
from .rewrite import rewrite
from .run import run
from .toolchain import OVERLAY, CompileError

_EXAMPLE = """
shapes, one a buffer, in the order of their indices:
    NAME:in:DTYPE:4x256     random; also :inout: and :out:
    NAME:DTYPE=7,8          these numbers

example:
    python -m workbench metal/quantized_matmul.metal quantized_matmul_float32_8 --mode count \\
        --shapes x:in:float32:4x256 w:in:uint32:64x64 s:in:float32:64x4 b:in:float32:64x4 \\
            o:out:float32:4x64 M:uint32=4 N:uint32=64 K:uint32=256 \\
        --constants 0=4 1=1 2=true 3=64 --grid 1 --threadgroup 256 --memory 0=4096

What a GPU compiler makes of the kernels: python -m workbench isa --help

Without KERNEL the kernels of the file are listed; with --strict every kernel of the file is
compiled with all warnings, which are errors, and the text must be ASCII.
"""


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if the kernel has faults."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["isa"]:
        return command.main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m workbench",
        description="Compile a Metal kernel for the processor, run it on random inputs, check it.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, nargs="+", metavar="FILE", help=".metal; then KERNEL")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="BUFFER")
    parser.add_argument("--grid", default="1", help="threadgroups, as 8 or 8,2,1")
    parser.add_argument("--threadgroup", default="32", help="threads, as 256 or 32,8,1")
    parser.add_argument("--constants", nargs="+", default=[], metavar="INDEX=VALUE")
    parser.add_argument("--memory", nargs="+", default=[], metavar="INDEX=BYTES")
    parser.add_argument("--mode", choices=("fast", "check", "count"), default="check")
    parser.add_argument("--order", choices=("forward", "reverse", "random"), default="forward")
    parser.add_argument("--contract", choices=("off", "fast"), default="off")
    parser.add_argument("--include", nargs="+", default=[], metavar="FOLDER")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and of the random order")
    parser.add_argument("--strict", action="store_true", help="compile all of each FILE strictly")
    given = parser.parse_args(arguments)
    try:
        if given.strict:
            return _strict(given.file)
        if len(given.file) == 1:
            return _list(given.file[0])
        if len(given.file) > 2:
            parser.error("one FILE and one KERNEL")
        return _run(given)
    except (ValueError, CompileError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2


def _strict(files: list[Path]) -> int:
    found = [problem for path in files if (problem := strict.problems(path))]
    print("\n".join(found) or f"{len(files)} files compile without a warning")
    return 1 if found else 0


def _list(path: Path) -> int:
    unit = rewrite(preprocess(path.resolve(), [OVERLAY, METAL]), {})
    for name in sorted({*unit.hosts, *(k for k in unit.kernels if k not in unit.templates)}):
        print(name)
    for name, index in unit.constants.items():
        print(f"function constant {index}: {name}")
    return 0


def _run(given: argparse.Namespace) -> int:
    path, kernel = given.file
    random = np.random.default_rng(given.seed)
    pairs = [_buffer(text, random) for text in given.shapes]
    launch = Launch(
        library=str(path),
        kernel=str(kernel),
        grid=_three(given.grid),
        threadgroup=_three(given.threadgroup),
        buffers=tuple(buffer for buffer, _ in pairs),
        constants={int(k): _value(v) for k, v in map(_pair, given.constants)},
        threadgroup_memory=tuple((int(k), int(v)) for k, v in map(_pair, given.memory)),
    )
    outputs, report = run(
        launch,
        {buffer.name: array for buffer, array in pairs if array is not None},
        mode=given.mode,
        order=given.order,
        seed=given.seed,
        contract=given.contract,
        include=given.include,
        raising=False,
    )
    _print(outputs, report)
    return 1 if report.findings else 0


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"[workbench] must be INDEX=VALUE but got {text}.")
    return name, value


def _value(text: str) -> bool | int | float:
    if text in ("true", "false"):
        return text == "true"
    return float(text) if "." in text else int(text, 0)


def _three(text: str) -> tuple[int, int, int]:
    numbers = [int(part) for part in text.split(",")]
    first, second, third = numbers + [1] * (3 - len(numbers))
    return first, second, third


def _buffer(text: str, random: np.random.Generator) -> tuple[Buffer, np.ndarray[Any, Any] | None]:
    """A buffer and, if it needs one, its random content."""
    head, equals, numbers = text.partition("=")
    name, *about = head.split(":")
    if equals and len(about) == 1 and about[0] in DTYPES:
        values = np.array([_value(number) for number in numbers.split(",")], DTYPES[about[0]])
        return Buffer(name, "bytes", data=values.tobytes()), None
    if (
        equals
        or len(about) != 3
        or about[0] not in ("in", "out", "inout")
        or about[1] not in DTYPES
    ):
        raise ValueError(f"[workbench] buffer must be NAME:ROLE:DTYPE:SHAPE but got {text}.")
    role, dtype, shape = about[0], about[1], tuple(int(d) for d in about[2].split("x"))
    buffer = Buffer(name, role, shape, dtype)  # type: ignore[arg-type]
    return buffer, None if role == "out" else _content(dtype, shape, random)


def _content(
    dtype: str, shape: tuple[int, ...], random: np.random.Generator
) -> np.ndarray[Any, Any]:
    if dtype == "bfloat16":
        return (_content("float32", shape, random).view(np.uint32) >> 16).astype(np.uint16)
    kind = DTYPES[dtype]
    if kind.kind == "f":
        return random.standard_normal(shape).astype(kind)
    content: np.ndarray[Any, Any] = np.frombuffer(
        random.bytes(math.prod(shape) * kind.itemsize), np.uint8
    ).view(kind)
    return (content % 2 == 0 if kind.kind == "b" else content).reshape(shape)


def _print(outputs: dict[str, np.ndarray[Any, Any]], report: Report) -> None:
    for finding in report.findings:
        print(finding)
    for name, array in outputs.items():
        first = ", ".join(str(value) for value in array.ravel()[:4])
        print(f"{name} {array.dtype} {array.shape}: {first}, ...")
    print(f"threadgroup memory {report.threadgroup_bytes} bytes, {len(report.findings)} findings")
    if report.traffic:
        print(f"{'buffer':12} {'bytes':>12} {'read':>12} {'written':>12} {'read/bytes':>10}")
    for name, traffic in report.traffic.items():
        read, written = traffic.device_read_bytes, traffic.device_written_bytes
        ratio = read / traffic.size if traffic.size else 0
        print(f"{name:12} {traffic.size:12} {read:12} {written:12} {ratio:10.2f}")
    for site in report.sites:
        what = "write" if site.write else "read"
        lines = f"{site.lines_per_access:.2f} lines each"
        print(f"{site.where}: {site.accesses} simd {what}s of {site.buffer}, {lines}")


if __name__ == "__main__":
    sys.exit(main())
