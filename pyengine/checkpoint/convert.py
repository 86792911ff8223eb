"""Checkpoints in, a bundle out: what ``pyengine convert`` does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.checkpoint.config_json import (
    ASSISTANT_TYPES,
    names_dflash,
    read_assistant_config,
    read_dflash_config,
    read_json,
    read_target_config,
)
from pyengine.checkpoint.defaults import read_generation
from pyengine.checkpoint.hub import locate
from pyengine.checkpoint.manifest import MANIFEST, MAX_NAME, bundle_parts, is_name
from pyengine.checkpoint.new_folder import new_folder
from pyengine.checkpoint.published import check_dflash, check_pair, published_name
from pyengine.checkpoint.quantize import Plan, plan_checkpoint, write_checkpoint
from pyengine.untrusted import optional, shown


@dataclass(frozen=True)
class Converted:
    """What was written: the folder, ``"pair"`` or the one part that it is, and its bytes."""

    path: Path
    kind: str
    name: str
    weight_bytes: int


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    assistant: str | Path | None = None,
    dflash: str | Path | None = None,
    bits: int = 8,
    group_size: int = 64,
    on_progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> Converted:
    """Quantise a checkpoint, or a pair of them into a bundle. Evaluates.

    Args:
        src: A Gemma 4 checkpoint folder, Hugging Face form; or a folder that holds a pair.
        dst: Folder to make; must not exist. It appears when it is whole.
        assistant: The assistant's checkpoint, when ``src`` is its target: both make one bundle.
        dflash: The checkpoint of a DFlash drafter of ``src``, which goes into the bundle too.
        bits: 4, 6 or 8.
        group_size: 32, 64 or 128.
        on_progress: Called with bytes written, bytes in all, and what comes next.

    Raises:
        ValueError: A checkpoint is damaged, a drafter is another target's, or an argument breaks a
            rule.
    """
    src, dst = locate(src), Path(dst)
    given = {"assistant": assistant, "dflash": dflash}
    parts = _parts(src, {part: locate(place) for part, place in given.items() if place is not None})
    manifest: dict[str, Any] | None = None
    kind, name = part_of(parts["target"]), src.name
    if len(parts) > 1:
        target_config = read_target_config(parts["target"])
        kind, name = "pair", dst.name
        if "assistant" in parts:
            assistant_config = read_assistant_config(parts["assistant"])
            check_pair(target_config, assistant_config)
            name = published_name(target_config, assistant_config) or name
        if "dflash" in parts:
            check_dflash(target_config, read_dflash_config(parts["dflash"]))
        if not is_name(name):
            raise ValueError(
                f"[convert] dst must have a printable name of at most {MAX_NAME} characters, which "
                f"becomes the pair's, but got {shown(name)}."
            )
        mode = {"group_size": group_size, "bits": bits, "mode": "affine"}
        manifest = {
            "name": name,
            "layout": {part: part for part in parts},
            **{part: {"quantization": mode, "source": parts[part].name} for part in parts},
        }
    plans: dict[str, Plan] = {}
    for part, folder in parts.items():
        # A pair loads if all of it has one dtype: the target's
        dtype = plans["target"].dtype if plans else None
        plans[part] = plan_checkpoint(folder, bits, group_size, dtype)
    if kind in ("pair", "target"):
        # Copied as it is, so refused here if loading would refuse it
        read_generation(
            parts["target"], parts.get("assistant"), read_target_config(parts["target"]), {}
        )
    total = sum(plan.nbytes for plan in plans.values())
    with new_folder(dst, total) as partial:
        done = 0
        for part, plan in plans.items():
            folder = partial / part if manifest else partial
            folder.mkdir(exist_ok=True)
            write_checkpoint(plan, folder, _shifted(on_progress, done, total, plan, part))
            done += plan.nbytes
        if manifest:
            text = json.dumps(manifest, indent=2) + "\n"
            (partial / MANIFEST).write_text(text, encoding="utf-8")
    on_progress(total, total, "done")
    return Converted(dst, kind, name, total)


def _parts(src: Path, drafters: dict[str, Path]) -> dict[str, Path]:
    """The folders to convert; a checkpoint alone is called target, whichever it is."""
    if drafters or optional(src, "config.json", "convert") or not src.is_dir():
        return {"target": src, **drafters}
    return bundle_parts(src)


def part_of(folder: Path) -> str:
    """Which part of a bundle a checkpoint could be; "target" where nothing says another."""
    config = read_json(folder) if folder.is_dir() else {}
    if names_dflash(config):
        return "dflash"
    return "assistant" if config.get("model_type") in list(ASSISTANT_TYPES) else "target"


def _shifted(
    on_progress: Callable[[int, int, str], None], before: int, total: int, plan: Plan, part: str
) -> Callable[[int, int, str], None]:
    """Progress of one part as progress of the whole."""

    def report(done: int, _: int, name: str) -> None:
        if done < plan.nbytes:
            on_progress(before + done, total, f"{part} {name}")

    return report
