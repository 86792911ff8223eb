"""Whether a command may write its file, asked before the work."""

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
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"[{command}] output must be writable but {path} is not.") from error
