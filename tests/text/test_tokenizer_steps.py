"""A tokenizer.json whose steps could fill the memory is refused before one of them runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from text_fakes import write_tokenizers

from pyengine.text.tokenizer import load_tokenizer
from pyengine.text.tokenizer_steps import MAX_GROWTH, check_steps

REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def doubling(count: int) -> list[dict[str, Any]]:
    return [
        {"type": "Replace", "pattern": {"String": old}, "content": 2 * new}
        for old, new in [("a", "b"), ("b", "a")] * (count // 2)
    ]


def normalizers(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(steps)}}


def splits(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
SPACES = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
LONG = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10_000}
ADDED = {"id": 9, "single_word": False, "lstrip": False, "rstrip": False, "normalized": True}
BOMBS: dict[str, tuple[dict[str, Any], str]] = {
    "doubling": (normalizers(*doubling(24), REPLACE), f"at most {MAX_GROWTH} times as long"),
    "in chains of chains": (
        normalizers(*(normalizers(step)["normalizer"] for step in doubling(24))),
        "times as long",
    ),
    "one long replacement": (normalizers(LONG, REPLACE), "times as long"),
    "of nothing": (
        normalizers({**LONG, "pattern": {"String": ""}, "content": "a" * 100}),
        "times as long",
    ),
    "before the text": (normalizers({"type": "Prepend", "prepend": "a" * 100}), "times as long"),
    "decomposed again and again": (normalizers(*[{"type": "NFKD"}] * 20), "times as long"),
    "bytes of bytes": (splits(*[BYTES] * 24), "its pre_tokenizer could make it longer"),
    "a space before each piece": (splits(*[SPACES] * 24), "its pre_tokenizer could make"),
    "both together": (
        {**normalizers(*doubling(4), REPLACE), **splits(BYTES)},
        "its pre_tokenizer could make",
    ),
    "a map of its own": (
        normalizers({"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        "effect is known but has 'Precompiled'",
    ),
    "no name": (normalizers({"pattern": {"String": "a"}, "content": "aa"}), "has 'None'"),
    "too many": (normalizers(*[{"type": "Strip"}] * 65), "at most 64 steps but has 65"),
    "an expression": (
        normalizers({**LONG, "pattern": {"Regex": "(a+)+$"}}),
        "without regular expressions",
    ),
    "long added tokens": (
        {
            **normalizers(*doubling(4), REPLACE),
            "added_tokens": [{**ADDED, "content": "a" * (1 << 20)}],
        },
        "added tokens of at most 32 MB but they could become 48 MB",
    ),
    "a long chain": (
        normalizers({"type": "Strip", "x": "a" * (1 << 20)}),
        "hold normalizer in at most 1048576 characters of JSON",
    ),
}
MEASURED = """
import resource, sys, time
from pathlib import Path
from pyengine.text.tokenizer import load_tokenizer
import tokenizers, sentencepiece
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begin = time.perf_counter()
try:
    load_tokenizer(Path(sys.argv[1]))
except ValueError as error:
    said = str(error)
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(used // (1 << 20 if sys.platform == "darwin" else 1 << 10), time.perf_counter() - begin, said)
"""


def spoiled(directory: Path, changes: dict[str, Any]) -> Path:
    write_tokenizers(directory)
    file = directory / "tokenizer.json"
    whole = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    for token in whole["added_tokens"]:  # what makes a chain run while the file is read
        token["normalized"] = True
    file.write_text(json.dumps(whole), encoding="utf-8")
    return directory


@pytest.mark.parametrize("name", BOMBS)
def test_steps_that_could_fill_the_memory_are_refused(tmp_path: Path, name: str) -> None:
    changes, message = BOMBS[name]
    spoiled(tmp_path, changes)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    megabytes, seconds, said = done.stdout.split(" ", 2)
    assert said.startswith("[tokenizer] ") and message in said
    assert int(megabytes) < 100 and float(seconds) < 5


def test_a_key_cannot_hide_from_the_search(tmp_path: Path) -> None:
    file = spoiled(tmp_path, normalizers(*doubling(24))) / "tokenizer.json"
    plain = file.read_text(encoding="utf-8")
    file.write_text(plain.replace('"normalizer"', '"n\\u006frmalizer"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"write letters as they are but has one as \\u00"):
        load_tokenizer(tmp_path)
    twice = plain.replace('"normalizers": [', '"normalizers": [], "normalizers": [')
    file.write_text(twice, encoding="utf-8")
    with pytest.raises(ValueError, match="hold normalizer in at most 1048576 characters of JSON"):
        load_tokenizer(tmp_path)
    # One after another: the reader may take either
    file.write_text(plain[:-1] + ', "normalizer": null}', encoding="utf-8")
    with pytest.raises(ValueError, match="times as long"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": REPLACE, "pre_tokenizer": None},
        normalizers({"type": "Prepend", "prepend": "\u2581"}, REPLACE),
        normalizers({"type": "NFC"}, {"type": "NFKC"}, {"type": "Strip"}),
        normalizers(*[{**REPLACE, "pattern": {"String": "\u2026"}, "content": "..."}] * 30),
        {**normalizers(REPLACE), **splits(SPACES, {"type": "Digits", "individual_digits": True})},
    ],
)
def test_steps_that_real_tokenizers_have_are_taken(changes: dict[str, Any]) -> None:
    assert check_steps(json.dumps(changes), Path("tokenizer.json")) is None  # not refused


def test_pieces_of_the_vocabulary_are_no_steps(tmp_path: Path) -> None:
    pieces = {"normalizer": 1, "pre_tokenizer": 2, "added_tokens": 3, "\\u0061": 4, "\x7f": 5}
    text = json.dumps({"model": {"vocab": pieces}, "normalizer": REPLACE, "pre_tokenizer": None})
    assert "\\\\u0061" in text
    check_steps(text, tmp_path)


def test_decoders_are_never_run(tmp_path: Path) -> None:
    """Decoding is done here, so what a file says of it neither counts nor costs."""
    chain = {"type": "Sequence", "decoders": doubling(24)}
    write_tokenizers(tmp_path)
    file = tmp_path / "tokenizer.json"
    plain = load_tokenizer(tmp_path)
    whole = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**whole, "decoder": chain}), encoding="utf-8")
    tok = load_tokenizer(tmp_path)
    ids = plain.encode("a banana " * 100)
    assert tok.decode(ids) == plain.decode(ids) == "a banana " * 100
