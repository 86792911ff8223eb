"""Benches print the machine first, then a table, then one line of JSON."""

import json
import platform
import subprocess
from pathlib import Path

import mlx.core as mx
import timing

from pyengine import _ext


def machine() -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
    )
    return {
        "chip": models[0] if models else platform.processor() or platform.machine(),
        "os": platform.platform(),
        "mlx": mx.__version__,
        "commit": commit.stdout.strip() or "unknown",
        "instruction_set": _ext.instruction_set(),
        "threads": _ext.threads(),
    }


def pytest_report_header() -> str:
    return ", ".join(f"{key} {value}" for key, value in machine().items())


def pytest_terminal_summary(terminalreporter) -> None:
    if not timing.ROWS:
        return
    columns = list(dict.fromkeys(key for row in timing.ROWS for key in row))
    cells = [columns, *([str(row.get(key, "")) for key in columns] for row in timing.ROWS)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    terminalreporter.section("kernel against baseline (MLX)")
    for row in cells:
        terminalreporter.line("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
    terminalreporter.line(json.dumps({"machine": machine(), "rows": timing.ROWS}))
