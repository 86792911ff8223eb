"""Suites: every key known, every error with file and line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from pyengine.bench.suite import EMBEDDED, load_suite

GOOD = {"id": "a", "category": "chat", "prompt": "hi", "max_tokens": 5}


def write(directory: Path, *rows: Any) -> Path:
    path = directory / "suite.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def test_reads_cases_in_order(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    long = {**GOOD, "id": "b", "messages": messages, "notes": "n"}
    raw = {**GOOD, "id": "c", "category": "continuation"}
    a, b, c = load_suite(write(tmp_path, GOOD, "", long, raw))
    assert (a.id, a.content, a.raw, a.max_tokens) == ("a", "hi", False, 5)
    assert (b.content, b.raw, b.notes) == (messages, False, "n")
    assert c.raw and c.content == "hi"
    assert a.sha256 == c.sha256 == hashlib.sha256(b"hi").hexdigest() != b.sha256


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "must be JSON but is not"),
        ("[]", "must be an object but got a list."),
        ({**GOOD, "promt": ""}, "keys must be id, category, prompt, max_tokens, messages, notes "),
        ({"id": "a", "category": "b", "max_tokens": 1}, "must have 'prompt' but lacks it."),
        ({**GOOD, "max_tokens": "9"}, "max_tokens must be a whole number but got '9'."),
        ({**GOOD, "max_tokens": True}, "max_tokens must be a whole number but got True."),
        ({**GOOD, "max_tokens": 0}, "max_tokens must be at least 1 but got 0."),
        ({**GOOD, "id": 3}, "id must be a string but got 3."),
        ({**GOOD, "id": "a\x1b[31m"}, "id must be printable but got 'a\\x1b[31m'."),
        ({**GOOD, "prompt": " "}, "prompt must not be empty."),
        ({**GOOD, "messages": "hi"}, "messages must be a list but got 'hi'."),
        ({**GOOD, "messages": ["hi"]}, "message 1 must be an object but got a string."),
        ({**GOOD, "messages": [{"role": "x"}]}, "message 1 must have a role of system"),
        ({**GOOD, "id": "first"}, "id 'first' must be unique."),
    ],
)
def test_errors_name_the_line(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path, {**GOOD, "id": "first"}, "", line)
    with pytest.raises(ValueError) as error:
        load_suite(path)
    assert str(error.value).startswith(f"[suite] {path} line 3: {message}")


def test_files_that_are_no_suite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^\[suite\] .*absent cannot be read: No such file"):
        load_suite(tmp_path / "absent")
    with pytest.raises(ValueError, match="must hold at least one case but is empty"):
        load_suite(write(tmp_path, "\n"))
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be UTF-8 text but is not"):
        load_suite(path)


def test_embedded_suite_begins_with_flappy_bird() -> None:
    cases = load_suite(EMBEDDED)
    first = cases[0]
    assert (first.id, first.category) == ("flappy_html5_canvas", "long_coding")
    assert "single-file HTML5 canvas Flappy Bird" in first.prompt
    assert any(case.raw for case in cases)
