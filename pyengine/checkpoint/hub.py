"""Names of the Hugging Face hub in place of folders. Needs the extra ``hub``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

# owner/name, with @revision where one is wanted: a branch, a tag, a commit, or a pull request as
# the hub spells it, refs/pr/1. A path that begins otherwise is only a path.
_NAME = re.compile(
    r"(?P<repo>(?P<owner>\w[\w.-]*)/\w[\w.-]*)(@(?P<revision>\w[\w.-]*(/\w[\w.-]*)*))?"
)
_PAGES = ("models", "datasets", "spaces")  # of the hub itself: no owner has these names
PATTERNS = ["*.json", "*.jinja", "*.model", "*.safetensors"]


def locate(place: str | Path) -> Path:
    """A folder: ``place`` itself if it is there, else the hub's repository of that name.

    Fetches what is not in the hub's cache yet. What looks like no name is returned as it is: a
    ``Path``, and a string with a slash too many, or none, or a ``.``, ``/`` or ``~`` in front.
    ``owner/name`` is a path too, and refused as one that is missing, where a folder ``owner`` is
    here or the owner is a page of the hub's, as in ``models/gemma``; a revision makes it a name.

    Raises:
        ValueError: The name is not a folder and cannot be fetched; the message says why.
    """
    path, name = Path(place), _NAME.fullmatch(str(place))
    if path.exists() or not name or isinstance(place, Path):
        return path
    owner, revision = name["owner"], name["revision"]
    missing = f"[hub] {place} must be a folder that is there, or owner/name on the hub, but"
    if owner in _PAGES:
        raise ValueError(f"{missing} {owner} is no owner there and {path.absolute()} is not here.")
    if Path(owner).is_dir() and not revision:
        raise ValueError(
            f"{missing} the folder {owner} is here without it; {place}@main asks the hub."
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"{missing} it is not here, and the hub needs huggingface_hub; run: {sys.executable} "
            '-m pip install "pyengine-mlx[hub]".'
        ) from None
    try:
        folder = snapshot_download(name["repo"], revision=revision, allow_patterns=PATTERNS)
    except Exception as error:  # the library's own kinds, and those of the one below it
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise ValueError(f"{missing} is neither: {reason}.") from error
    return Path(folder)
