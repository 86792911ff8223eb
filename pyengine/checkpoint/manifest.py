"""A bundle: a folder with a target and its drafters and, beside them, what they are.

The folders are called ``target``, ``assistant`` and ``dflash`` unless ``mtplx_pair.json`` names
others.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from pyengine.untrusted import optional, read_object, shown, within

MANIFEST = "mtplx_pair.json"
MAX_NAME = 200


def bundle_parts(path: Path) -> dict[str, Path]:
    """The folders of a bundle: "target" and "assistant", with "dflash" too, or in place of the
    latter; one without a manifest has the usual names.

    Raises:
        ValueError: The manifest is damaged, or a folder is missing or outside the bundle.
    """
    names = (MANIFEST, "target", "assistant", "dflash")
    if path.is_dir() and not any(os.path.lexists(path / name) for name in names):
        if optional(path, "config.json", "load"):
            raise ValueError(
                f"[load] {path} must be a bundle but is a checkpoint; it goes to target= or "
                "assistant=."
            )
        raise ValueError(
            f"[load] {path} must be a bundle with the folders target and assistant, or a "
            "checkpoint with config.json, but is neither."
        )
    manifest = read_manifest(path)
    has_dflash = _names(manifest, "dflash") or os.path.lexists(path / "dflash")
    has_assistant = _names(manifest, "assistant") or os.path.lexists(path / "assistant")
    parts = ["target"]
    if has_assistant or not has_dflash:
        parts.append("assistant")
    if has_dflash:
        parts.append("dflash")
    return {part: check_folder(_inside(path, manifest, part), part) for part in parts}


def read_manifest(path: Path) -> dict[str, Any]:
    """The object in a bundle's manifest; of its values, only the name is checked here.

    Empty where there is none: the folders are then called ``target`` and ``assistant``.
    """
    file = optional(path, MANIFEST, "load")
    if file is None:
        return {}
    manifest = read_object(file, "load")
    name = manifest.get("name", "-")
    if not is_name(name):
        raise ValueError(
            f"[load] `name` of {MANIFEST} must be a line of at most {MAX_NAME} characters but got "
            f"{shown(name)}."
        )
    return manifest


def is_name(value: object) -> bool:
    """Whether a pair may be called so: the name goes to terminals and into tables."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= MAX_NAME


def _names(manifest: dict[str, Any], part: str) -> bool:
    layout = manifest.get("layout", {})
    return isinstance(layout, dict) and part in layout


def _inside(bundle: Path, manifest: dict[str, Any], part: str) -> Path:
    """Folder of one part of a bundle, as the manifest names it; never outside the bundle."""
    layout = manifest.get("layout", {})
    name = layout.get(part, part) if isinstance(layout, dict) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"[load] `layout.{part}` of {MANIFEST} must name a folder.")
    for kind in (PurePosixPath(name), PureWindowsPath(name)):
        if kind.is_absolute() or kind.drive or kind.root or ".." in kind.parts:
            raise ValueError(
                f"[load] `layout.{part}` of {MANIFEST} must lie inside the bundle but got "
                f"{shown(name)}."
            )
    return within(bundle, name, "load")


def check_folder(path: Path, what: str) -> Path:
    """A folder that is there, as it is.

    Raises:
        ValueError: There is none; ``what`` is what it is for.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(f"[load] {what} must be a folder but {path} is a link that leads nowhere.")
    if not path.is_dir():
        raise ValueError(f"[load] {what} must be a folder but got {path}.")
    return path
