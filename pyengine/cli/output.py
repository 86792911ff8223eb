"""Files that commands write: checked before the work, whole or absent after it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


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
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"[{command}] output must be writable but {path} is not.") from error


def write_json(path: Path, value: dict[str, Any], mode: int) -> None:
    """Write to a temporary name, then rename: a file is whole or absent."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2)
            file.write("\n")
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException as error:
        os.unlink(name)
        if isinstance(error, OSError) and error.filename is None:  # a write does not say to what
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
