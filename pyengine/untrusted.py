"""The small files of a checkpoint: found inside their folder, read up to a limit, parsed as JSON.

A checkpoint is data from somewhere else. Whatever is wrong with a file is one ValueError whose
message begins with what was being done, in brackets.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

# The largest of these, the index of a model of many shards, is some megabytes. Both bounds
# together keep what is read within 100 MB of memory and a second.
MAX_BYTES = 8 << 20
MAX_VALUES = 500_000
MAX_DEPTH = 128
MAX_PATH = 4096
SHOWN = 80
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # git's hash of a file, or SHA-256
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can spell and UTF-8 not


def within(folder: Path, name: str, doing: str) -> Path:
    """``folder / name``, which may not be a way out of the folder.

    Symlinks are followed: what they lead to must be there and lie in the folder too. A folder of
    the Hugging Face cache is the exception: its files are links to the ``blobs`` of the same
    repository. Where ``blobs`` is a link itself, to another disk, what lies behind it counts only
    under the name of a blob, which is a hash: no other file of the machine is called so.

    Raises:
        ValueError: The path leads elsewhere, or to nothing.
    """
    path = folder / name
    try:
        if len(name) > MAX_PATH:  # following it would take long
            raise OSError
        real, home = path.resolve(), folder.resolve()
        if path.is_symlink():
            path.stat()  # from Python 3.13 on resolving a circle of links is no error
    except (OSError, RuntimeError, ValueError):  # absent; a circle of links; a null byte
        raise ValueError(f"[{doing}] {shown(name)} in {folder} leads nowhere.") from None
    blobs = [
        place.parent.parent / "blobs"
        for place in (home, *list(home.parents)[:2])
        if place.parent.name == "snapshots"
    ]
    inside = any(real.is_relative_to(place) for place in (home, *blobs))
    moved = _BLOB.fullmatch(real.name) and real.parent in [place.resolve() for place in blobs]
    if not inside and not moved:
        raise ValueError(f"[{doing}] {path} must lie inside its folder but leads to {real}.")
    return path


def optional(folder: Path, name: str, doing: str) -> Path | None:
    """A file that may be absent, which is None; :func:`within` its folder.

    Raises:
        ValueError: What has that name is a link to nothing, or no regular file.
    """
    path = within(folder, name, doing)
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"[{doing}] {path} cannot be read: {reason}.") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"[{doing}] {path} must be a file but is {_file_kind(mode)}.")
    return path


def _file_kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"


def read_bytes(path: Path, doing: str, limit: int = MAX_BYTES) -> bytes:
    """The whole of a file that may not be larger than ``limit``.

    Raises:
        ValueError: It cannot be read, or is larger.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"[{doing}] {path} cannot be read: {error.strerror}.") from error
    if len(data) > limit:
        raise ValueError(f"[{doing}] {path} must be at most {limit >> 20} MB but is larger.")
    return data


def read_text(path: Path, doing: str, limit: int = MAX_BYTES) -> str:
    """A UTF-8 file; errors as :func:`read_bytes`."""
    try:
        return read_bytes(path, doing, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"[{doing}] {path} must be UTF-8 text but is not.") from error


def read_object(path: Path, doing: str) -> dict[str, Any]:
    """The JSON object in a file; errors as :func:`read_bytes`."""
    value = parse(read_text(path, doing), f"[{doing}] {path}")
    if not isinstance(value, dict):
        raise ValueError(f"[{doing}] {path} must hold a JSON object but got {kind(value)}.")
    return value


def parse(text: str, where: str) -> Any:
    """JSON from a foreign hand: what another reader could take otherwise, or what is too deep or
    too much to hold, is an error like any other.

    Raises:
        ValueError: The text is no JSON, names a key of an object twice, nests deeper than
            ``MAX_DEPTH`` or holds more than ``MAX_VALUES`` values.
    """
    # Every value has a mark of its own, so that memory is bounded before it is taken
    if sum(map(text.count, ",:[{")) > MAX_VALUES:
        raise ValueError(f"{where} must hold at most {MAX_VALUES} values but holds more.")
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if _is_deep(value):
            raise RecursionError
    except RecursionError:
        raise ValueError(f"{where} must be JSON but is nested too deeply.") from None
    except _Repeated as error:
        raise ValueError(f"{where} must name each key once but {error} comes twice.") from None
    except ValueError as error:
        raise ValueError(f"{where} must be JSON but is not: {error}.") from None
    return value


class _Repeated(ValueError):
    """A key of an object that came before."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ: of two equal ones another reader might take the other."""
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Repeated(shown(key))
            seen.add(key)
    return values


def _is_deep(value: Any) -> bool:
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH + 1):
        inner = (v.values() if isinstance(v, dict) else v for v in level)
        level = [x for xs in inner for x in xs if isinstance(x, (dict, list))]
        if not level:
            return False
    return True


def kind(value: Any) -> str:
    """A JSON value's type, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def shown(value: object) -> str:
    """A value for a message: as Python writes it, and short."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more than 4300 digits
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 4]} ..."


def write_whole(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """A file that is whole or absent: written under a name of its own, then renamed. Text is UTF-8.

    Nothing that lies in the folder is opened; what had the name before is replaced. The process's
    umask narrows ``mode``.
    """
    partial = path.with_name(f".{path.name[:32]}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    handle = os.open(partial, flags, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a write does not say to what
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
