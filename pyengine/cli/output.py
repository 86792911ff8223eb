"""Whether a command may write its files, asked before the work."""

from __future__ import annotations

import tempfile
from pathlib import Path


def check_output(command: str, path: Path) -> None:
    """Make sure a file can be written before an hour is spent on what it will hold.

    Raises:
        ValueError: The folder is missing or not writable, or the path is a folder.
    """
    if path.is_dir():
        raise ValueError(f"[{command}] output must be a file but {path} is a folder.")
    if path.exists() and not path.is_file():  # the report's file would take a device's place
        raise ValueError(f"[{command}] output must be a file but {path} is a device or a pipe.")
    if not path.parent.is_dir():
        raise ValueError(f"[{command}] output must lie in a folder that exists but got {path}.")
    _check_writable(command, path, path.parent)


def check_folder(command: str, path: Path) -> None:
    """The same for a folder that will hold several.

    Raises:
        ValueError: It is missing, no folder, or not writable.
    """
    if not path.is_dir():
        raise ValueError(f"[{command}] output must be a folder that exists but got {path}.")
    _check_writable(command, path, path)


def _check_writable(command: str, path: Path, folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"[{command}] output must be writable but {path} is not.") from error
