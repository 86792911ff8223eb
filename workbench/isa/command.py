"""The command `python -m workbench isa`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from ..toolchain import CompileError
from .rows import BITS, CAVEAT, COLUMNS, ROWS, Row, table


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
    except (ValueError, CompileError, RuntimeError, NotImplementedError) as error:
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
