"""Of processes that share a target: are they alike, how long do messages take, what does it bound.

Every rank calls :func:`examine`; the first one has the report.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx

from pyengine import _ext
from pyengine.checkpoint import memory
from pyengine.checkpoint.config_json import read_assistant_config, read_target_config
from pyengine.checkpoint.manifest import bundle_parts, check_folder
from pyengine.checkpoint.safetensors import sampled
from pyengine.checkpoint.weights import assistant_layout, check_tensors, target_layout
from pyengine.doctor import machine
from pyengine.ranks import cost
from pyengine.ranks.group import HEADER, Ranks
from pyengine.ranks.launched import backend
from pyengine.ranks.start import begin

SAME = ("pyengine", "mlx", "sources", "weights")  # on every rank, or loading is refused
RUNS = 50  # of small messages
LARGE, LARGE_RUNS = 1 << 21, 5  # float32 numbers of a rank
BLOCK, ACCEPTANCES = 6, (0.4, 0.8)  # that a bound is told for
LABEL = "bounds: bytes of weights, and the quickest messages that were seen here; not a speed"

Bandwidth = Callable[[str], tuple[float, bool, str]]
Tell = Callable[[str], None]


def examine(ranks: Ranks, bundle: Path, bandwidth: Bandwidth, tell: Tell) -> dict[str, Any]:
    """The group, and a bundle on every host of it. Evaluates, and waits for the others.

    Args:
        ranks: The group.
        bundle: A pair's folder, on each host.
        bandwidth: GB/s of a chip's memory, whether its maker says so, and where that is from.
        tell: Called with what begins, on rank 0.

    Returns:
        ``backend``, ``ranks``; ``hosts`` by rank; ``link``: what messages took here; ``bounds`` of
        tok/s, where all hosts have the pair; ``problems`` and ``hints``, each a sentence.
    """
    begin(ranks)
    if ranks.leads:
        tell("hosts")
    hosts = [json.loads(text) for text in ranks.said(json.dumps(facts(bundle, bandwidth)))]
    if ranks.leads:
        tell("messages")
    link = measure(ranks)
    report: dict[str, Any] = {
        "backend": backend(),
        "ranks": ranks.size,
        "bundle": str(bundle),
        "hosts": hosts,
        "link": link,
        "problems": unlike(hosts),
        "hints": [],
    }
    others = [host for host in hosts if host["python"] != hosts[0]["python"]]
    if others:
        names = ", ".join({host["python"] for host in others})
        report["hints"].append(
            f"ranks run several versions of Python: {hosts[0]['python']}, {names}"
        )
    if not any("fault" in host for host in hosts):
        add_bounds(report, bundle)
    return report


def facts(bundle: Path, bandwidth: Bandwidth) -> dict[str, Any]:
    """What this host has and is."""
    found: dict[str, Any] = {
        "host": platform.node(),
        "pyengine": metadata.version("pyengine-mlx"),
        "mlx": metadata.version("mlx"),
        "sources": _ext.built_from[:12],
        "python": platform.python_version(),
        "os": platform.platform(),
        "chip": machine.chip(),
        "available_bytes": memory.available_bytes(),
    }
    gb_s, published, source = bandwidth(found["chip"])
    found["bandwidth"] = {"gb_s": gb_s, "published": published, "source": source}
    try:
        found["weights"] = sampled(bundle_parts(check_folder(bundle, "bundle"))["target"])
    except (ValueError, OSError) as error:
        found["fault"] = str(error)[:500]
    return found


def unlike(hosts: list[dict[str, Any]]) -> list[str]:
    """A sentence per host and thing that differs from rank 0's, or that it cannot read."""
    found = []
    for rank, host in enumerate(hosts):
        name = f"rank {rank} ({host['host']})"
        if "fault" in host:
            found.append(f"{name}: {host['fault']}")
        for what in SAME:
            first, own = hosts[0].get(what, ""), host.get(what, "")
            if first and own and first != own:
                found.append(f"{name} must have rank 0's {what} {first[:12]} but has {own[:12]}.")
    return found


def measure(ranks: Ranks) -> dict[str, Any]:
    """Messages between the processes: medians, as this rank sees them. Evaluates."""

    # As many in a row as there are ranks: of one that is ahead a single message may come early
    def took(message: Callable[[], Any], runs: int, count: int) -> list[float]:
        times = []
        for _ in range(runs + 1):
            start = time.perf_counter()
            for _ in range(count):
                with ranks.waiting():
                    mx.eval(message())
            times.append((time.perf_counter() - start) / count)
        return times[1:]

    def us(message: Callable[[], Any]) -> dict[str, float]:
        times = took(message, RUNS, ranks.size)
        return {"median": 1e6 * statistics.median(times), "least": 1e6 * min(times)}

    small, header = mx.zeros(64), mx.zeros(HEADER, mx.int32)
    large = mx.zeros(LARGE)
    mx.eval(small, header, large)
    gathered, told = us(lambda: ranks.gathered(small)), us(lambda: ranks.told(header))
    passed = (ranks.size - 1) * large.nbytes  # what a rank sends of its own and of others
    rates = [
        passed / seconds / 1e9
        for seconds in took(lambda: ranks.gathered(large), LARGE_RUNS, ranks.size)
    ]
    return {
        "gather_us": gathered,
        "told_us": told,
        "gb_s": {"median": statistics.median(rates), "most": max(rates)},
        "large_bytes": large.nbytes,
        "clock": f"messages between processes, {backend()}",
    }


def add_bounds(report: dict[str, Any], bundle: Path) -> None:
    """What each rank holds and reads, the messages of a step, and tok/s that these allow.

    seconds >= the slowest rank's bytes / its bandwidth + messages * their time + bytes sent / rate

    Messages count with the least time that was seen. The cache and all arithmetic are left out. Of
    a round, rank 0's drafts are added.
    """
    hosts, link, size = report["hosts"], report["link"], report["ranks"]
    parts = bundle_parts(bundle)
    config = read_target_config(parts["target"])
    layout = target_layout(config)
    matrices, storage = check_tensors(parts["target"], layout, config.quantization)
    nbytes = {path: sum(a.nbytes for a in matrix.arrays) for path, matrix in matrices.items()}
    other = memory.weight_bytes(parts["target"], layout) - sum(nbytes.values())
    reads = []
    for rank, host in enumerate(hosts):
        own = cost.kept(config, rank, size, nbytes, other)
        host |= {"weight_bytes": own.held, "read_bytes": own.read}
        reads.append(own.read / (host["bandwidth"]["gb_s"] * 1e9))
    drafted = 0.0
    if "assistant" in parts:
        small = read_assistant_config(parts["assistant"])
        drafted = memory.weight_bytes(parts["assistant"], assistant_layout(small))
        hosts[0]["weight_bytes"] += round(drafted)
        head, _ = check_tensors(parts["assistant"], assistant_layout(small), small.quantization)
        if small.num_centroids:  # of whose head a draft reads the nearest
            rest = 1 - small.num_centroids_used / small.num_centroids
            drafted -= rest * sum(a.nbytes for a in head["embed_tokens"].arrays)
    number = 4 if storage == "float32" else 2

    def bound(rows: int) -> dict[str, Any]:
        own = cost.messages(config, size, rows, number)
        told = own.gathers * link["gather_us"]["least"] + own.told * link["told_us"]["least"]
        found = {
            "rows": rows,
            "gathers": own.gathers,
            "told": own.told,
            "sent_bytes": own.nbytes,
            "weights_ms": 1e3 * max(reads),
            "messages_ms": told / 1e3,
            "sending_ms": own.nbytes / link["gb_s"]["most"] / 1e6,
            "drafts_ms": 1e-6 * (rows - 1) * drafted / hosts[0]["bandwidth"]["gb_s"],
        }
        total = sum(value for name, value in found.items() if name.endswith("_ms"))
        accepted = ACCEPTANCES if rows > 1 else (0.0,)
        rates = {f"{a:g}": 1e3 * (1 + a * (rows - 1)) / total for a in accepted}
        return {**found, "total_ms": total, "tok_s_at_acceptance": rates}

    report["bounds"] = {"label": LABEL, "steps": [bound(1)]}
    if "assistant" in parts:
        report["bounds"]["steps"].append(bound(BLOCK))


def lines(report: dict[str, Any]) -> list[str]:
    """The report for a reader."""
    link = report["link"]
    said = [
        f"pyengine doctor: {report['ranks']} ranks, backend {report['backend']}; "
        f"pair {report['bundle']}"
    ]
    for rank, host in enumerate(report["hosts"]):
        free, own = host["available_bytes"], host["bandwidth"]
        said.append(
            f"rank {rank}: {host['host']}, {host['chip']}, {host['os']}, pyengine "
            f"{host['pyengine']}, mlx {host['mlx']}, python {host['python']}, sources "
            f"{host['sources']}"
        )
        held = f", keeps {host['weight_bytes'] / 1e6:.1f} MB" if "weight_bytes" in host else ""
        said.append(
            f"  weights {host.get('weights', 'none')[:12]}{held}; memory: "
            + ("" if free is None else f"{free / 1e9:.1f} GB free, ")
            + f"{own['gb_s']:.1f} GB/s, {own['source']}"
        )
    rate, most = (1e3 * link["gb_s"][which] for which in ("median", "most"))
    said.append(
        f"link: {_us(link, 'gather')}, {_us(link, 'told')}, {rate:.0f} MB/s per rank, at most "
        f"{most:.0f} [{link['clock']}]"
    )
    for step in report.get("bounds", {}).get("steps", ()):
        name = "plain step" if step["rows"] == 1 else f"round of block {step['rows']}"
        rates = ", ".join(
            f"{rate:.1f} tok/s" + (f" at acceptance {at}" if step["rows"] > 1 else "")
            for at, rate in step["tok_s_at_acceptance"].items()
        )
        drafts = f" + drafts {step['drafts_ms']:.2f}" if step["rows"] > 1 else ""
        said.append(
            f"bound, {name}: {rates}; ms: weights {step['weights_ms']:.2f} + {step['gathers']} "
            f"gathers and {step['told']} told {step['messages_ms']:.2f} + "
            f"{step['sent_bytes'] / 1e6:.2f} MB {step['sending_ms']:.2f}{drafts}"
        )
    if "bounds" in report:
        said.append(f"  {report['bounds']['label']}")
    said += [f"{word[:-1]}: {line}" for word in ("hints", "problems") for line in report[word]]
    return ["".join(c if c.isprintable() else " " for c in line) for line in said]


def _us(link: dict[str, Any], what: str) -> str:
    own = link[f"{what}_us"]
    return f"{what} {own['median']:.0f} us, at least {own['least']:.0f}"
