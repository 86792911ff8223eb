"""What a round sends where ranks share a target: messages and bytes per rank, and what they bound.

No timing: bytes over a link's bandwidth, and its latency times the messages that wait for each
other. With --memory, in place of it: the most memory that each process of a group had resident
while it loaded that target and took part in a call, beside what `inspect --ranks` tells.

Run: python bench/ranks.py [--rows 6] [--memory TARGET] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from pyengine.checkpoint.inspect import inspect
from pyengine.checkpoint.published import PUBLISHED, published
from pyengine.ranks.cost import messages

SIZES = (2, 4)


class Link(NamedTuple):
    """Bytes per second each way, and seconds of a small message: assumed, not measured."""

    name: str
    bandwidth: float
    latency: float


LINKS = (Link("Thunderbolt 5, RDMA", 8e9, 10e-6), Link("10 GbE, TCP", 1.1e9, 60e-6))


def row(name: str, size: int, rows: int) -> dict[str, Any]:
    """Of one target call of a round, and its logits."""
    target, _ = published(name)
    own = messages(target, size, rows)
    found: dict[str, Any] = {
        "target": name,
        "ranks": size,
        "gathers": own.gathers,
        "messages": own.gathers + own.told,
        "bytes": own.nbytes,
    }
    for link in LINKS:
        steps = (own.gathers + 2 * own.told) * (size - 1)
        seconds = own.nbytes / link.bandwidth + steps * link.latency
        found[link.name] = seconds
    return found


def table(rows: int) -> list[str]:
    """Of all pairs, as docs/ranks.md has it."""
    links = [
        f"{link.name} ({link.bandwidth / 1e9:g} GB/s, {link.latency * 1e6:g} us), ms"
        for link in LINKS
    ]
    lines = [f"| target | ranks | messages | MB per rank | {' | '.join(links)} |"]
    lines.append("| --- | --: | --: | --: | --: | --: |")
    for name in PUBLISHED:
        for size in SIZES:
            own = row(name, size, rows)
            cells = [name, size, own["messages"], f"{own['bytes'] / 1e6:.1f}"]
            cells += [f"{own[link.name] * 1e3:.1f}" for link in LINKS]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def resident(size: int, *command: str) -> list[int]:
    """Bytes that each process of a group had resident at most, by rank. As Linux counts, at least
    those of this process, which must be small."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(size)]
    hosts = [[f"127.0.0.1:{own.getsockname()[1]}"] for own in held]
    for own in held:
        own.close()
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(hosts, file)
        file.flush()
        started = []
        for rank in range(size):
            group = {"MLX_RANK": str(rank), "MLX_HOSTFILE": file.name} if size > 1 else {}
            started.append(
                subprocess.Popen([sys.executable, "-c", *command], env={**os.environ, **group})
            )
        found = []
        for process in started:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"a rank ended with exit code {process.returncode}")
            found.append(usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
    return found


def memory_rows(target: str, sizes: tuple[int, ...] = (1, *SIZES)) -> list[dict[str, Any]]:
    """Of each rank: bytes of weights that are told, and bytes that were resident at most, beyond
    those of a process that reads none."""
    [none] = resident(1, "import pyengine, mlx.core as mx; mx.eval(mx.zeros(1))")
    program = "import sys, pyengine; pyengine.load(sys.argv[1]).logits([2, 5, 9, 17])"
    found = []
    for size in sizes:
        report = inspect(target, ranks=size)
        told = [own["weights"] for own in report.get("ranks", [])] or [report["memory"]["weights"]]
        for rank, most in enumerate(resident(size, program, target)):
            own = {"ranks": size, "rank": rank, "weights": told[rank], "resident": most - none}
            found.append(own)
    return found


def memory_table(rows: list[dict[str, Any]]) -> list[str]:
    """As docs/ranks.md has it."""
    lines = [
        "| ranks | rank | weights told, MB | resident at most, MB |",
        "| --: | --: | --: | --: |",
    ]
    for own in rows:
        figures = f"{own['weights'] / 1e6:.0f} | {own['resident'] / 1e6:.0f}"
        lines.append(f"| {own['ranks']} | {own['rank']} | {figures} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory", metavar="TARGET", type=Path)
    given = parser.parse_args()
    if given.memory is not None:
        rows = memory_rows(str(given.memory))
        print(json.dumps(rows) if given.json else "\n".join(memory_table(rows)))
    elif given.json:
        print(json.dumps([row(name, size, given.rows) for name in PUBLISHED for size in SIZES]))
    else:
        print("\n".join(table(given.rows)))


if __name__ == "__main__":
    main()
