"""The small files of a checkpoint: found inside their folder, read up to a limit, parsed as JSON.

A checkpoint is data from somewhere else. Whatever is wrong with a file is one ValueError whose
message begins with what was being done, in brackets.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20  # the largest of these, an index of shards, is a few megabytes
SHOWN = 80
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can spell and UTF-8 not


def within(folder: Path, name: str, doing: str) -> Path:
    """``folder / name``, which may not be a way out of the folder.

    Symlinks are followed: what they lead to must lie in the folder too. A folder of the Hugging
    Face cache is the exception: its files are links to the ``blobs`` of the same repository.

    Raises:
        ValueError: The path leads elsewhere.
    """
    path = folder / name
    try:
        real, home = path.resolve(), folder.resolve()
        if real.is_symlink():  # from Python 3.13 on a circle of links is no error
            raise OSError
    except (OSError, RuntimeError, ValueError):  # a circle of links; a null byte
        raise ValueError(f"[{doing}] {shown(name)} in {folder} leads nowhere.") from None
    homes = [home]
    for place in (home, *list(home.parents)[:2]):
        if place.parent.name == "snapshots":
            homes.append(place.parent.parent / "blobs")
    if not any(real.is_relative_to(home) for home in homes):
        raise ValueError(f"[{doing}] {path} must lie inside its folder but leads to {real}.")
    return path


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
    """JSON from a foreign hand: too deep and too long numbers are errors like any other."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} must be JSON but is nested too deeply.") from None
    except ValueError as error:
        raise ValueError(f"{where} must be JSON but is not: {error}.") from None


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
