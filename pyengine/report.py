"""The report of a bench run: machine and versions, tables for the reader, JSON for the record."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from pyengine import ops
from pyengine.bench import PLAIN, Row, now
from pyengine.files import write_whole
from pyengine.generate import resolve_sampling
from pyengine.sampling import Sampling
from pyengine.suite import Case

if TYPE_CHECKING:
    from rich.table import Table

    from pyengine.assistant import Assistant
    from pyengine.pair import Pair
    from pyengine.target import Target


def make_report(
    run_on: dict[str, Any],
    pair: Pair,
    cases: Sequence[Case],
    rows: list[Row],
    summary: list[Row],
    settings: dict[str, Any],
    sampling: Sampling,
) -> dict[str, Any]:
    """Everything needed to read and repeat a run, ready for JSON.

    ``run_on`` is the :func:`environment` from before the run, whose load is not the run's own.
    """
    used = resolve_sampling(pair, sampling)
    return {
        "bench": "gemma-mtp",
        "report_version": 1,
        **run_on,
        "pair": describe_pair(pair),
        "ops": ops.status(),
        "sampler": used.to_dict(),
        "settings": settings,
        "prompts": [{"id": c.id, "category": c.category, "sha256": c.sha256} for c in cases],
        "summary": summary,
        "rows": rows,
    }


def describe_pair(pair: Pair) -> dict[str, Any]:
    return {
        "name": pair.name,
        "path": str(pair.path),
        "verified": pair.verified,
        "embedded": pair.embedded,
        "dtype": str(pair.target.dtype).removeprefix("mlx.core."),
        "position": pair.assistant.position if pair.assistant else None,
        "quantization": {
            "target": _quantization(pair.target),
            "assistant": _quantization(pair.assistant) if pair.assistant else None,
        },
        "manifest": pair.manifest,
    }


def _quantization(model: Target | Assistant) -> dict[str, Any] | None:
    mode = model.config.quantization
    if mode is None:
        return None
    return {"bits": mode.bits, "group_size": mode.group_size, "overrides": dict(mode.overrides)}


def heading(run_on: dict[str, Any], pair: Pair) -> list[str]:
    """What every figure below it depends on, for the reader."""
    machine, versions = run_on["machine"], run_on["versions"]
    memory = machine["memory_bytes"] / 2**30
    return [
        f"{machine['chip']}, {machine['cores']} cores, {memory:.0f} GiB, {machine['os']}",
        f"pyengine {versions['pyengine']} at {run_on['commit'] or 'no checkout'}, "
        f"mlx {versions['mlx']} on {machine['device']}, python {versions['python']}",
        f"{pair.name}, {'verified' if pair.verified else 'unverified'} geometry, "
        f"load average {machine['load_average'][0]:.2f}",
    ]


def environment() -> dict[str, Any]:
    """Machine, versions and commit: a figure means nothing without them."""
    from pyengine import __version__

    return {
        "started_at": now(),
        "machine": {
            "chip": _chip(),
            "device": str(mx.default_device()),
            "architecture": platform.machine(),
            "os": platform.platform(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "load_average": list(os.getloadavg()),
        },
        "versions": {
            "pyengine": __version__,
            "mlx": metadata.version("mlx"),
            "python": platform.python_version(),
        },
        "commit": _commit(),
    }


def _chip() -> str:
    """The processor's own name, which says more than an architecture."""
    if platform.system() == "Darwin":
        return _ask("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str | None:
    """Commit of the checkout this package is imported from; None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _ask("git", "-C", str(root), "rev-parse", "HEAD")
    changed = _ask("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with local changes" if commit and changed else commit or None


def _ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def table(title: str, rows: Sequence[Row]) -> Table:
    """A case's rows or the summary, one line a block size."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    # Narrow enough for the headings to stand whole in 80 columns
    out = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for head in (
        "block",
        "verify",
        "tok/s",
        "acceptance",
        "tokens/round",
        "speedup_vs_ar",
        "round cost",
    ):
        out.add_column(head, justify="right")
    for row in rows:
        plain = row["block_size"] == PLAIN
        out.add_row(
            "plain" if plain else str(row["block_size"]),
            "-" if plain else row["verify"],
            _figure(row["tok_s"], ".1f"),
            "-" if plain else _figure(row["acceptance_rate"], ".3f"),
            _figure(row["tokens_per_round"], ".2f"),
            _figure(row["speedup_vs_ar"], ".2f"),
            _figure(row["round_cost_in_plain_steps"], ".2f"),
        )
    return out


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def check_output(path: Path) -> None:
    """Make sure a report can be written before an hour is spent on it.

    Raises:
        ValueError: The folder is missing or not writable, or the path is a folder.
    """
    if path.is_dir():
        raise ValueError(f"[bench] output must be a file but {path} is a folder.")
    if path.exists() and not path.is_file():  # the report's file would take a device's place
        raise ValueError(f"[bench] output must be a file but {path} is a device or a pipe.")
    if not path.parent.is_dir():
        raise ValueError(f"[bench] output must lie in a folder that exists but got {path}.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"[bench] output must be writable but {path} is not.") from error


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report as JSON; it is whole or absent."""
    write_whole(path, json.dumps(report, indent=2) + "\n")
