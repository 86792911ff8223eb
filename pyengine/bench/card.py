"""A card: one machine's figures with all they depend on, as JSON that may be shared."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyengine.bench.bandwidth import Bandwidth
from pyengine.bench.gemma_mtp import Row
from pyengine.bench.kernels import Shapes

VERSION = 1


def make_card(
    report: dict[str, Any],
    kernels: Sequence[Row],
    shapes: Shapes,
    bandwidth: Bandwidth,
    command: Sequence[str],
    quick: bool,
) -> dict[str, Any]:
    """Everything a card says, ready for JSON; no path of the machine but those of the command.

    Args:
        report: Of :func:`pyengine.bench.report.make_report`.
        kernels: Of :func:`pyengine.bench.kernels.time_kernels`.
        shapes: Of which model these are.
        bandwidth: The machine's.
        command: The words that were typed after ``pyengine``.
        quick: Whether the run was a short one.
    """
    kept = ("started_at", "machine", "versions", "commit", "sampler", "prompts")
    pair = {key: value for key, value in report["pair"].items() if key not in ("path", "manifest")}
    summary, rows = report["summary"], report["rows"]
    settings = {key: value for key, value in report["settings"].items() if key != "command"}
    return {
        "card": "pyengine",
        "card_version": VERSION,
        "command": typed(command),
        **{key: report[key] for key in kept},
        "pair": pair,
        "settings": {**settings, "quick": quick},
        "decoding": [_decoding(own, rows) for own in summary if own["drafter"] != "dflash"],
        "dflash": [_decoding(own, rows) for own in summary if own["drafter"] == "dflash"],
        "bandwidth": bandwidth._asdict(),
        "kernel_shapes": str(shapes),
        "kernels": [{**row, "share": row["gb_s"] / bandwidth.gb_s} for row in kernels],
    }


def _decoding(summary: Row, rows: Sequence[Row]) -> Row:
    """One block size over all prompts: the summary, the slowest and fastest repeat."""
    setting = summary["block_size"], summary["drafter"]
    own = [row for row in rows if (row["block_size"], row["drafter"]) == setting]
    repeats = [pooled([row["samples"][i] for row in own]) for i in range(_repeats(own))]
    figures = ("tok_s", "speedup_vs_ar", "acceptance_rate", "tokens_per_round")
    depths = ("drafted_by_depth", "accepted_by_depth", "acceptance_by_depth")
    return {
        "block_size": summary["block_size"],
        **{key: summary[key] for key in (*figures, "round_cost_in_plain_steps")},
        "tok_s_slowest_repeat": min(repeats),
        "tok_s_fastest_repeat": max(repeats),
        **{key: summary[key] for key in depths},
        "peak_memory_bytes": summary["peak_memory_bytes"],
    }


def _repeats(rows: Sequence[Row]) -> int:
    return min(len(row["samples"]) for row in rows)


def pooled(samples: Sequence[Row]) -> float:
    """Tokens per second of one repeat of every prompt."""
    seconds = sum(sample["decode_s"] for sample in samples)
    tokens = sum(sample["tok_s"] * sample["decode_s"] for sample in samples)
    return tokens / seconds if seconds else 0.0


def typed(words: Sequence[str]) -> str:
    """A command as it can be pasted, the user's home folder written as ``~``."""
    home = str(Path.home())
    line = shlex.join(["pyengine", *words])
    return line.replace(home, "~") if home != "/" else line


def stem(card: dict[str, Any]) -> str:
    """The name of a card's files: chip, pair and day."""
    parts = (card["machine"]["chip"], card["pair"]["name"], card["started_at"][:10])
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")[:60] for part in parts)


def heading(card: dict[str, Any]) -> list[str]:
    """Title and the lines under it: what every figure of the card depends on."""
    machine, versions, pair = card["machine"], card["versions"], card["pair"]
    on = "GPU" if "gpu" in machine["device"] else "processor"
    commit = f" at {card['commit'][:7]}" if card["commit"] else ""
    lines = [
        (
            machine["model"],
            f"{machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB memory",
            machine["os"],
            card["started_at"][:10],
            f"load average at the start {machine['load_average'][0]:.2f}",
        ),
        (
            f"{pair['name']}, {_storage(pair)}",
            f"pyengine {versions['pyengine']}{commit}",
            f"MLX {versions['mlx']} on the {on}",
            f"Python {versions['python']}",
        ),
    ]
    return [f"pyengine on {machine['chip']}", *("  ·  ".join(filter(None, s)) for s in lines)]


def _storage(pair: dict[str, Any]) -> str:
    mode = pair["quantization"]["target"]
    return f"{mode['bits']} bit" if mode else str(pair["dtype"])
