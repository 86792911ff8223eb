"""Prompt suites: one JSON object a line, every key known, every error with its line."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyengine.text.prompt import Prompt, check_message
from pyengine.text.template import Message
from pyengine.untrusted import SURROGATE, kind, parse, read_text, shown

EMBEDDED = Path(__file__).parent / "prompts" / "nano.jsonl"
CONTINUATION = "continuation"
MAX_SUITE = 64 << 20

_REQUIRED = {"id": str, "category": str, "prompt": str, "max_tokens": int}
_OPTIONAL = {"messages": list, "notes": str}


@dataclass(frozen=True)
class Case:
    """One prompt of a suite.

    Attributes:
        id: Unique in its suite.
        category: Free, except that the prompt of a ``continuation`` is continued as raw text.
        prompt: A user message; only a label when there are ``messages``.
        max_tokens: Upper bound on its new tokens.
        messages: A whole conversation, used in place of the prompt.
        notes: For the reader.
    """

    id: str
    category: str
    prompt: str
    max_tokens: int
    messages: tuple[Message, ...] = ()
    notes: str = ""

    @property
    def content(self) -> Prompt:
        """What :func:`pyengine.generate` is given."""
        return list(self.messages) or self.prompt

    @property
    def raw(self) -> bool:
        return self.category == CONTINUATION and not self.messages

    @property
    def sha256(self) -> str:
        """Hash of the prompt's UTF-8 text, or of the messages as JSON with sorted keys."""
        text = json.dumps(self.messages, sort_keys=True) if self.messages else self.prompt
        return hashlib.sha256(text.encode()).hexdigest()


def load_suite(path: Path) -> list[Case]:
    """Read a suite; blank lines are skipped.

    Raises:
        ValueError: The file cannot be read or a line is not a case; the message names the line.
    """
    lines = read_text(Path(path), "suite", MAX_SUITE).split("\n")
    cases: list[Case] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        case = _read_case(line, f"[suite] {path} line {number}")
        if case.id in seen:
            raise ValueError(f"[suite] {path} line {number}: id {shown(case.id)} must be unique.")
        seen.add(case.id)
        cases.append(case)
    if not cases:
        raise ValueError(f"[suite] {path} must hold at least one case but is empty.")
    return cases


def _read_case(line: str, where: str) -> Case:
    row = parse(line, f"{where}:")
    if not isinstance(row, dict):
        raise ValueError(f"{where}: must be an object but got {kind(row)}.")
    known = {**_REQUIRED, **_OPTIONAL}
    unknown = [key for key in row if key not in known]
    if unknown:
        raise ValueError(f"{where}: keys must be {', '.join(known)} but got {shown(unknown[0])}.")
    missing = [key for key in _REQUIRED if key not in row]
    if missing:
        raise ValueError(f"{where}: must have {missing[0]!r} but lacks it.")
    for key, value in row.items():
        wanted = known[key]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{where}: {key} must be {_say(wanted)} but got {shown(value)}.")
    _check_values(row, where)
    row["messages"] = tuple(row.get("messages", ()))
    return Case(**row)


def _check_values(row: dict[str, Any], where: str) -> None:
    for key in ("id", "category", "prompt"):
        if not row[key].strip():
            raise ValueError(f"{where}: {key} must not be empty.")
        if SURROGATE.search(row[key]):
            raise ValueError(f"{where}: {key} must be Unicode but holds a lone surrogate.")
        if key != "prompt" and not row[key].isprintable():  # a terminal obeys what it is sent
            raise ValueError(f"{where}: {key} must be printable but got {shown(row[key])}.")
    if row["max_tokens"] < 1:
        raise ValueError(
            f"{where}: max_tokens must be at least 1 but got {shown(row['max_tokens'])}."
        )
    for number, message in enumerate(row.get("messages", ()), 1):
        if not isinstance(message, dict):
            raise ValueError(
                f"{where}: message {number} must be an object but got {kind(message)}."
            )
        check_message(message, f"{where}: message {number}")


def _say(kind: type) -> str:
    return {str: "a string", int: "a whole number", list: "a list"}[kind]
