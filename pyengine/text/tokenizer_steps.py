"""The steps of a tokenizer.json that change text, judged before any of them runs.

Building a tokenizer already normalises its added tokens: a chain of replacements that each double
the text would fill the memory at load.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_GROWTH = 64  # times; Gemma 4's one step, " " to U+2581, makes one byte three
MAX_STEPS = 64
MAX_STEP_CHARS = 1 << 20
MAX_ADDED_CHARS = 1 << 23  # thousands of added tokens take about one million
MAX_ADDED_BYTES = 32 << 20  # once they are normalised
# How many times as many bytes of UTF-8 a step may leave, found over all of Unicode. Replace and
# Prepend say it themselves; the map inside Precompiled may hold anything, so it is not here.
GROWTH = {
    **{"NFC": 3, "NFD": 3, "NFKC": 11, "NFKD": 11, "Lowercase": 2, "BertNormalizer": 9},
    **dict.fromkeys(["Strip", "StripAccents", "Nmt"], 1),
    # Before each piece, which may be one byte, these two put a space
    **{"ByteLevel": 4, "Metaspace": 8},
    **dict.fromkeys(["BertPreTokenizer", "CharDelimiterSplit", "Digits", "FixedLength"], 1),
    **dict.fromkeys(["Punctuation", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"], 1),
}
_ESCAPED_LETTER = re.compile(r"\\+u00(?:5f|6[0-9a-f]|7[0-9a])", re.IGNORECASE)


def check_steps(text: str, path: Path) -> None:
    """Refuse a tokenizer.json whose steps could make a text much longer, or take very long.

    Raises:
        ValueError: They could, or cannot be judged.
    """
    where = f"[tokenizer] {path} must"
    # An escaped key would hide from the search for it; no writer of JSON escapes letters
    if any(found[0].count("\\") % 2 for found in _ESCAPED_LETTER.finditer(text)):
        raise ValueError(f"{where} write letters as they are but has one as \\u00...")
    growth = 1
    for key in ("normalizer", "pre_tokenizer"):
        found = [s for value in _values(text, key, MAX_STEP_CHARS, where) for s in _steps(value)]
        if len(found) > MAX_STEPS:
            raise ValueError(f"{where} have at most {MAX_STEPS} steps but has {len(found)}.")
        for step in found:
            growth *= _growth(step, where)
        if growth > MAX_GROWTH:
            raise ValueError(
                f"{where} make a text at most {MAX_GROWTH} times as long but its {key} could make "
                "it longer; is this a Gemma 4 tokenizer?"
            )
    added = 0
    for tokens in _values(text, "added_tokens", MAX_ADDED_CHARS, where):
        contents = [t.get("content") for t in tokens if isinstance(t, dict)]
        added += sum(len(c.encode("utf-8", "replace")) for c in contents if isinstance(c, str))
    if added * growth > MAX_ADDED_BYTES:
        raise ValueError(
            f"{where} have added tokens of at most {MAX_ADDED_BYTES >> 20} MB but they could "
            f"become {added * growth >> 20} MB."
        )


def _values(text: str, key: str, limit: int, where: str) -> Iterator[Any]:
    """Each object or list that the file has under a key, wherever that stands.

    The rest, tens of megabytes of vocabulary, is not parsed for it.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    place = -1
    while (place := text.find(f'"{key}"', place + 1)) >= 0:
        begin = re.compile(r"\s*:\s*(?=[\[{])").match(text, place + len(key) + 2)
        if begin is None:  # a piece of the vocabulary
            continue
        try:
            yield decoder.raw_decode(text[begin.end() : begin.end() + limit])[0]
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where} hold {key} in at most {limit} characters of JSON but does not."
            ) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without a key that two readers could read differently."""
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a key comes twice")
    return out


def _steps(value: Any) -> Iterator[dict[str, Any]]:
    """The steps of a chain, in whatever chains they stand."""
    inside = [value]
    while inside:
        step = inside.pop()
        if isinstance(step, list):
            inside += step
        elif isinstance(step, dict) and step.get("type") == "Sequence":
            inside += [step.get("normalizers", []), step.get("pretokenizers", [])]
        elif isinstance(step, dict):
            yield step


def _growth(step: dict[str, Any], where: str) -> int:
    kind, pattern = step.get("type"), step.get("pattern")
    if isinstance(pattern, dict) and "Regex" in pattern:
        # Gemma's cut at single characters; an expression of a stranger's could take for ever
        raise ValueError(
            f"{where} cut text without regular expressions but has one; is this a Gemma 4 "
            "tokenizer?"
        )
    if kind == "Prepend":
        return 1 + _bytes(step.get("prepend"))
    if kind == "Replace":
        old = _bytes(pattern.get("String")) if isinstance(pattern, dict) else 0
        new = _bytes(step.get("content"))
        return max(1, -(-new // old)) if old else 1 + new
    if kind not in GROWTH:
        raise ValueError(
            f"{where} be made of steps whose effect is known but has {str(kind)[:40]!r}; is this a "
            "Gemma 4 tokenizer?"
        )
    return GROWTH[kind]


def _bytes(text: Any) -> int:
    return len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0
