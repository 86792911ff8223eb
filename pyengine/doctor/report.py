"""What the doctor found, as at most forty lines of text to paste into a bug report."""

from __future__ import annotations

from typing import Any

MOST_LINES, WIDTH = 40, 160


def lines(report: dict[str, Any]) -> list[str]:
    """The report of `pyengine doctor` for a reader: the machine, a line per op, what is wrong."""
    versions, machine = report["versions"], report["machine"]
    said = [f"{name} {value}" for name, value in versions.items()]
    top = [
        f"pyengine doctor: {', '.join(said)}",
        f"machine: {machine['chip']}, {machine['cores']} cores, {machine['os']}, "
        f"build {machine['os_build']}",
        _memory(machine),
        f"device: {report['device']} ({report['kernel']}), compared with the "
        f"{report['compared_with']}; shapes: {report['shapes']}",
    ]
    rows = [_op(row) for row in report["ops"]]
    heads = ("op", "verdict", "cases", "max error", "of bound", "compile", "threads", "time")
    table = [heads, *rows]
    # A failure is one long cell in place of the figures
    figures = [row for row in table if len(row) == len(heads)]
    widths = [max(len(row[i]) for row in (table if i < 3 else figures)) for i in range(7)]
    body = []
    for row in table:
        cells = [f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)]
        body.append("  ".join([*cells, *row[len(cells) :]]).rstrip())
    bottom = list(report["notes"])
    bottom += [f"{word[:-1]}: {line}" for word in ("hints", "problems") for line in report[word]]
    found = [_fitted(line) for line in (*top, *body, *bottom)]
    left = MOST_LINES - len(found)
    return found + _log(report["ops"], left)


def _memory(machine: dict[str, Any]) -> str:
    parts = []
    for key, name in (
        ("available_bytes", "free"),
        ("memory_bytes", "in all"),
        ("working_set_bytes", "working set"),
    ):
        if machine.get(key) is not None:
            parts.append(f"{machine[key] / 1e9:.1f} GB {name}")
    if "gpu" in machine:
        limit = machine["wired_limit_mb"]
        own = "the system's" if limit in (None, "0") else f"{limit} MB"
        parts.append(f"{machine['architecture']}, wired limit {own}: {machine['wired']}")
    else:
        parts.append(f"no Metal, {machine['instruction_set']}")
    return f"memory: {', '.join(parts) or 'unknown'}"


def _op(row: dict[str, Any]) -> tuple[str, ...]:
    """Cells of an op; where it failed its first failure stands in place of the figures."""
    start = (row["op"], row["verdict"], str(row["cases"]))
    if row["verdict"] != "ok":
        first = row["failed"][0]
        more = f" ({len(row['failed'])} cases)" if len(row["failed"]) > 1 else ""
        return (*start, f"{first['detail']}{more}; {first['case']}")
    made = row.get("compile")
    seconds = f"{made['seconds']:.1f} s" if made else "-"
    threads = str(made["threads"]) if made and made["threads"] else "-"
    error, bound = f"{row['max_error']:.1e}", f"{row['of_bound']:.2f}"
    if row["max_error"] == 0:
        error = "bits" if row["of_bound"] == 0 else "0"
    return (*start, error, bound, seconds, threads, _time(row))


def _time(row: dict[str, Any]) -> str:
    """Of the last case that was timed, which is the largest."""
    if not row.get("times"):
        return "-"
    one = row["times"][-1]
    speed = f", {one['gb_s']:.1f} GB/s" if "gb_s" in one else ""
    share = f" ({one['of_bandwidth']:.0%})" if "of_bandwidth" in one else ""
    return f"{one['us']:.0f} us{speed}{share}, MLX {one['mlx_us']:.0f} us [{one['clock']}]"


def _log(rows: list[dict[str, Any]], left: int) -> list[str]:
    """The head of the first log there is, as far as there is room."""
    for row in rows:
        for failure in row.get("failed", ()):
            text = str(failure.get("log") or "").strip()
            if text and left > 2:
                own = [line for line in text.splitlines() if line.strip()][: left - 1]
                return [f"log of {row['op']}:", *(_fitted(f"  {line}") for line in own)]
    return []


def _fitted(line: str) -> str:
    line = "".join(c if c.isprintable() else " " for c in line)
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..."
