"""The report of a bench run, and what every figure in it depends on."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from pyengine import ops
from pyengine.bench.gemma_mtp import Row, now
from pyengine.bench.suite import Case
from pyengine.sampling.settings import Sampling
from pyengine.task import resolve_sampling

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair
    from pyengine.model.assistant import Assistant
    from pyengine.model.dflash import DFlash
    from pyengine.model.target import Target


def make_report(
    run_on: dict[str, Any],
    pair: Pair,
    cases: Sequence[Case],
    rows: list[Row],
    summary: list[Row],
    settings: dict[str, Any],
    sampling: Sampling,
    complete: bool = True,
    bench: str = "gemma-mtp",
) -> dict[str, Any]:
    """Everything needed to read and repeat a run, ready for JSON.

    ``run_on`` is the :func:`environment` taken before the run, so that its load average excludes
    the run. ``complete`` says that the run was not interrupted, ``bench`` which command ran.
    """
    used = resolve_sampling(pair, sampling)
    return {
        "bench": bench,
        "report_version": 1,
        **run_on,
        "pair": describe_pair(pair),
        "ops": ops.status(),
        "sampler": used.to_dict(),
        "settings": settings,
        "complete": complete,
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
            "dflash": _quantization(pair.dflash) if pair.dflash else None,
        },
        "manifest": pair.manifest,
    }


def _quantization(model: Target | Assistant | DFlash) -> dict[str, Any] | None:
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
            "model": _model(),
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
        return ask("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _model() -> str | None:
    """Which Mac it is, as macOS calls it; None for other machines."""
    return ask("sysctl", "-n", "hw.model") if platform.system() == "Darwin" else None


def _commit() -> str | None:
    """Commit of the checkout this package is imported from; None for an installed package.

    Local changes are told, and also when nobody can say whether there are any.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = ask("git", "-C", str(root), "rev-parse", "HEAD")
    changed = ask("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    if not commit:
        return None
    if changed is None:
        return f"{commit}, local changes unknown"
    return f"{commit} with local changes" if changed else commit


def ask(*command: str) -> str | None:
    """What a program prints; None where it fails, lasts too long or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
