"""What a round sends where ranks share a target: messages and bytes per rank, and what they bound.

No timing: bytes over a link's bandwidth, and its latency times the messages that wait for each
other.

Run: python bench/ranks.py [--rows 6] [--json]
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.json:
        print(json.dumps([row(name, size, given.rows) for name in PUBLISHED for size in SIZES]))
    else:
        print("\n".join(table(given.rows)))


if __name__ == "__main__":
    main()
