"""A kernel's text as tokens that can be matched, split and replaced in place."""

from __future__ import annotations

import re
from collections.abc import Iterator

_TOKEN = re.compile(
    r"""
    (?P<gap>(?:[ \t\r\f\v\n]+|^[ \t]*\#[^\n]*$)+)
    | (?P<string>(?:u8|u|U|L)?"(?:\\.|[^"\\])*")
    | (?P<character>'(?:\\.|[^'\\])+')
    | (?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    | (?P<word>[A-Za-z_]\w*)
    | (?P<mark>::|->\*|->|<<=|>>=|\+\+|--|&&|\|\||[-+*/%&|^!=<>]=|<<|\.\.\.|.)
    """,
    re.MULTILINE | re.VERBOSE,
)
_LINE_MARKER = re.compile(r'\s*#\s*(?:line\s+)?(\d+)\s+"([^"]*)"')
_CLOSING = {"(": ")", "[": "]", "{": "}"}
_OPENING = {closing: opening for opening, closing in _CLOSING.items()}
_MARGIN = 8  # empty tokens at both ends, so that looking around needs no bounds checks


class Tokens:
    """Preprocessed source. `text[p]` is token p, `kind[p]` its kind, `gap[p]` what precedes it.

    White space and line markers live in the gaps and survive every replacement, so line numbers
    stay true. `>>` is two tokens, as templates want it.
    """

    def __init__(self, source: str) -> None:
        self.text: list[str] = [""] * _MARGIN
        self.kind: list[str] = [""] * _MARGIN
        self.gap: list[str] = [""] * _MARGIN
        gap = ""
        for match in _TOKEN.finditer(source):
            kind = match.lastgroup or ""
            if kind == "gap":
                gap += match.group()
            else:
                self.text.append(match.group())
                self.kind.append(kind)
                self.gap.append(gap)
                gap = ""
        self.first, self.end = _MARGIN, len(self.text)
        self.text += [""] * _MARGIN
        self.kind += [""] * _MARGIN
        self.gap += [gap] + [""] * (_MARGIN - 1)

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, self.end))

    def join(self) -> str:
        """The source as it is now."""
        return "".join(gap + text for gap, text in zip(self.gap, self.text, strict=True))

    def words(self, begin: int, end: int) -> str:
        """Tokens begin..end-1 with single blanks between."""
        return " ".join(text for text in self.text[begin:end] if text)

    def blank(self, begin: int, end: int) -> None:
        """Remove tokens begin..end-1; their gaps stay."""
        self.text[begin:end] = [""] * (end - begin)
        self.kind[begin:end] = [""] * (end - begin)

    def close(self, p: int) -> int:
        """Where the bracket that opens at p closes."""
        opening = self.text[p]
        closing = _CLOSING[opening]
        depth = 0
        for q in range(p, self.end):
            if self.text[q] == opening:
                depth += 1
            elif self.text[q] == closing:
                depth -= 1
                if depth == 0:
                    return q
        raise SyntaxError(f"{self.where(p)}: `{opening}` is never closed")

    def open(self, p: int) -> int:
        """Where the bracket that closes at p opens."""
        closing = self.text[p]
        opening = _OPENING[closing]
        depth = 0
        for q in range(p, self.first - 1, -1):
            if self.text[q] == closing:
                depth += 1
            elif self.text[q] == opening:
                depth -= 1
                if depth == 0:
                    return q
        raise SyntaxError(f"{self.where(p)}: `{closing}` was never opened")

    def close_angle(self, p: int) -> int:
        """Where the template list that opens at p closes; -1 if p is a comparison."""
        depth = 0
        q = p
        while q < self.end:
            text = self.text[q]
            if text == "<":
                depth += 1
            elif text == ">":
                depth -= 1
                if depth == 0:
                    return q
            elif text in ("(", "["):
                q = self.close(q)
            elif text in (";", "{", "}"):
                return -1
            q += 1
        return -1

    def open_angle(self, p: int) -> int:
        """Where the template list that closes at p opens."""
        depth = 0
        for q in range(p, self.first - 1, -1):
            depth += {">": 1, "<": -1}.get(self.text[q], 0)
            if depth == 0:
                return q
        return self.first

    def split(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The parts of begin..end-1 between commas that are in no bracket."""
        parts = []
        start = p = begin
        while p < end:
            text = self.text[p]
            if text in _CLOSING:
                p = self.close(p)
            elif text == "<" and self.kind[p - 1] == "word":
                q = self.close_angle(p)
                if 0 < q < end:
                    p = q
            elif text == ",":
                parts.append((start, p))
                start = p + 1
            p += 1
        if start < end:
            parts.append((start, end))
        return parts

    def attributes(self, begin: int, end: int, *, remove: bool) -> dict[str, str]:
        """Every [[name(argument)]] in begin..end-1."""
        found = {}
        p = begin
        while p < end - 1:
            if self.text[p] == "[" and self.text[p + 1] == "[":
                last = self.close(p)
                for a, _ in self.split(p + 2, last - 1):
                    has_argument = self.text[a + 1] == "("
                    argument = self.words(a + 2, self.close(a + 1)) if has_argument else ""
                    found[self.text[a]] = argument
                if remove:
                    self.blank(p, last + 1)
                p = last
            p += 1
        return found

    def where(self, p: int) -> str:
        """file:line of token p."""
        lines = 0
        for q in range(p, -1, -1):
            gap = self.gap[q]
            markers = list(_LINE_MARKER.finditer(gap))
            if markers:
                rest = gap[markers[-1].end() :]
                line = int(markers[-1][1]) + rest.count("\n") - 1 + lines
                return f"{markers[-1][2]}:{line}"
            lines += gap.count("\n")
        return f"line {lines + 1}"
