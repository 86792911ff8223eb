"""Names of the Hugging Face hub in place of folders. Needs the extra ``hub``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

# owner/name, with @revision where one is wanted; a path that begins otherwise is only a path.
_NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[\w.-]+))?")
PATTERNS = ["*.json", "*.jinja", "*.model", "*.safetensors"]


def locate(place: str | Path) -> Path:
    """A folder: ``place`` itself if it is there, else the hub's repository of that name.

    Fetches what is not in the hub's cache yet. What looks like no name is returned as it is.

    Raises:
        ValueError: The name is not a folder and cannot be fetched; the message says why.
    """
    path, name = Path(place), _NAME.fullmatch(str(place))
    if path.exists() or not name:
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"[hub] {place} must be a folder, or a name for which huggingface_hub must be "
            f'installed; run: {sys.executable} -m pip install "pyengine-mlx[hub]".'
        ) from None
    try:
        folder = snapshot_download(name["repo"], revision=name["revision"], allow_patterns=PATTERNS)
    except Exception as error:  # the library's own kinds, and those of the one below it
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise ValueError(
            f"[hub] {place} must be a folder or a repository that can be fetched but is neither: "
            f"{reason}."
        ) from error
    return Path(folder)
