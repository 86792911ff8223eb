"""Which ops failed on this machine, kept from process to process.

One small JSON file per machine, system and build, in the user's cache folder: what was found on
another says nothing here. A file that cannot be what it should be is left out, with a line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyengine.doctor import machine
from pyengine.ops.dispatch import OPS
from pyengine.untrusted import parse, read_text, write_whole

Tell = Callable[[str], None]
FORMAT = 1
SHOWN = 200  # characters of a reason that are kept


@dataclass
class Record:
    """What is known of the ops on a device here.

    Attributes:
        failed: Op to why, and the case that showed it.
        checked: Digests of the cases that were examined on first use.
    """

    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    checked: list[str] = field(default_factory=list)


def folder() -> Path:
    """Where the user's programs keep what can be made again."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if given and Path(given).is_absolute():
        home = Path(given)
    elif sys.platform == "darwin":
        home = Path.home() / "Library" / "Caches"
    else:
        home = Path.home() / ".cache"
    return home / "pyengine"


def path(device: str) -> Path:
    return folder() / f"ops-{machine.digest(machine.key(device))}.json"


def read(device: str, tell: Tell) -> Record:
    """What is kept for a device here; nothing where there is no file, or none that can be right."""
    file = path(device)
    try:
        if not file.is_file():
            return Record()
        return _record(parse(read_text(file, "doctor", 1 << 20), f"[doctor] {file}"), device)
    except (ValueError, OSError) as error:
        text = str(error).removeprefix("[doctor] ").replace(str(file), "it").rstrip(".")
        tell(f"{file} is ignored: {text}.")
        return Record()


def _record(value: Any, device: str) -> Record:
    """A record as it is written, and no other.

    Raises:
        ValueError: It is not one of this device.
    """
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"it must have format {FORMAT}")
    if value.get("key") != machine.key(device):
        raise ValueError("it is of another machine, system or build")
    failed, checked = value.get("failed"), value.get("checked")
    if not isinstance(failed, dict) or not isinstance(checked, list):
        raise ValueError("it must have `failed` and `checked`")
    if not all(isinstance(name, str) for name in checked):
        raise ValueError("`checked` must hold digests")
    for op, why in failed.items():
        texts = isinstance(why, dict) and all(isinstance(text, str) for text in why.values())
        if op not in OPS or not texts or set(why) != {"verdict", "case", "detail"}:
            raise ValueError("`failed` must say of each op why")
    return Record(failed, checked)


def update(
    device: str,
    rows: Iterable[dict[str, Any]],
    tell: Tell,
    *,
    checked: str = "",
    whole: bool = False,
) -> Record:
    """Keep what the doctor found: an op that failed is added; one that did well is taken out if the
    case that had shown its failure was among those examined, or `whole` says that all were."""
    record = read(device, tell)
    before = (dict(record.failed), list(record.checked))
    for row in rows:
        op, known = row["op"], record.failed.get(row["op"])
        if row["verdict"] != "ok":
            first = row["failed"][0]
            why = {name: str(first[name])[:SHOWN] for name in ("verdict", "case", "detail")}
            record.failed[op] = why
        elif known is not None and (whole or known["case"] in row["shapes"]):
            del record.failed[op]
    if checked and checked not in record.checked:
        record.checked.append(checked)
    if (record.failed, record.checked) != before:
        _write(device, record, tell)
    return record


def _write(device: str, record: Record, tell: Tell) -> None:
    file = path(device)
    whole = {"format": FORMAT, "key": machine.key(device), **vars(record)}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(whole, indent=1) + "\n")
    except OSError as error:  # a read-only home: the next process finds out again
        tell(f"{file} could not be written: {error.strerror}.")
