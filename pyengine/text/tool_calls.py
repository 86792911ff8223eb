"""Tool calls as the model writes them: token ids in, a name and JSON arguments out.

``<|tool_call>call:NAME{key:value,...}<tool_call|>`` with strings between two ``<|"|>``. Both are
tokens of their own, so text that merely spells them is text, and a string needs no escapes.
"""

from __future__ import annotations

import json
import math
import re
import secrets
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from pyengine.untrusted import SURROGATE, shown

if TYPE_CHECKING:
    from pyengine.text.tokenizer import Tokenizer

MAX_DEPTH = 32  # of objects and lists; what can be given back in a message may have 64
MAX_TOKENS = 1 << 16  # of one call
NAME = re.compile(r"[\w.:/-]{1,128}")

_QUOTE = "\ud800"  # stands for the token <|"|>; no text holds it
_BLANK = re.compile(r"\s*")
_KEY = re.compile(rf'[^{{}}\[\],:"{_QUOTE}]+')
_WORD = re.compile(rf"[^\s{{}}\[\],:{_QUOTE}]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
# The first published templates write an argument that is null as Python does
_CONSTANTS = {"true": True, "false": False, "null": None, "None": None}
_JSON = json.JSONDecoder(strict=False)


class ToolCall(NamedTuple):
    """A call that the model asks its caller to make.

    Attributes:
        id: "call_" and 24 hex digits, different for every call.
        name: The function's, as the model wrote it: it may be none that was declared.
        arguments: A JSON object as compact text.
    """

    id: str
    name: str
    arguments: str


class CallReader:
    """Gathers the tokens of each call and reads it once it is closed.

    Attributes:
        mark: Id of the token that opens a call; None where the vocabulary lacks such marks.
        warning: What was wrong with the first call that could not be read.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._marks = tokenizer.call_ids()
        self.mark = self._marks[0] if self._marks else None
        self.warning: str | None = None
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # of the open call, its mark first
        self._count = 0

    @property
    def is_open(self) -> bool:
        return bool(self._tokens)

    def begin(self) -> None:
        """Open a call; :meth:`break_off` closes the one before."""
        assert self.mark is not None and not self._tokens
        self._tokens = [self.mark]
        self._count += 1

    def add(self, token: int) -> tuple[ToolCall | None, str]:
        """The call that this token closes; if it cannot be read, its text."""
        self._tokens.append(token)
        if token != self._marks[1]:
            return None, ""
        try:
            call = self._read(self._tokens[1:-1])
        except ValueError as error:
            return None, self._as_text(str(error))
        self._tokens = []
        return call, ""

    def break_off(self) -> str:
        """The text of a call that ends before it is closed; empty where none is open."""
        return self._as_text("must end with <tool_call|> but is cut") if self._tokens else ""

    def _as_text(self, fault: str) -> str:
        if self.warning is None:
            self.warning = f"[generate] tool call {self._count} {fault}; it is left as text."
        spelled = self._tokenizer.spelling
        parts = _parts(self._tokens, self._tokenizer)
        self._tokens = []
        return "".join(part if isinstance(part, str) else spelled(part) for part in parts)

    def _read(self, tokens: list[int]) -> ToolCall:
        if len(tokens) > MAX_TOKENS:
            raise ValueError(f"must have at most {MAX_TOKENS} tokens but has {len(tokens)}")
        parts, quote = list(_parts(tokens, self._tokenizer)), self._marks[2]
        others = [part for part in parts if isinstance(part, int) and part != quote]
        if others:
            found = self._tokenizer.spelling(others[0])
            raise ValueError(f"must hold no special token but holds {found}")
        name, arguments = _Parser(
            "".join(p if isinstance(p, str) else _QUOTE for p in parts)
        ).call()
        compact = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"))
        return ToolCall(f"call_{secrets.token_hex(12)}", name, compact)


def _parts(tokens: Sequence[int], tokenizer: Tokenizer) -> Iterator[str | int]:
    """Ordinary tokens as text, special ones as their ids."""
    for special, run in groupby(tokens, tokenizer.special_ids.__contains__):
        if special:
            yield from run
        else:
            yield tokenizer.decode(list(run))


class _Parser:
    """Reads ``call:NAME{...}``; what is wrong is a ValueError that ends the sentence of it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def call(self) -> tuple[str, dict[str, Any]]:
        head, brace, _ = self._text.partition("{")
        prefix, _, name = head.strip().partition(":")
        if not brace or prefix != "call" or not NAME.fullmatch(name):
            raise ValueError(f"must begin with call:NAME{{ but begins with {_said(self._text)}")
        self._at = len(head)
        arguments = self._object(1)
        self._blank()
        if self._at < len(self._text):
            raise self._expected("must end behind its arguments")
        return name, arguments

    def _value(self, depth: int) -> Any:
        self._blank()
        first = self._text[self._at : self._at + 1]
        if first == "{":
            return self._object(depth + 1)
        if first == "[":
            return self._list(depth + 1)
        if first in (_QUOTE, '"'):
            return self._string()
        word = _WORD.match(self._text, self._at)
        if word and word[0] in _CONSTANTS:
            value = _CONSTANTS[word[0]]
        elif word and _NUMBER.fullmatch(word[0]) and math.isfinite(float(word[0])):
            value = json.loads(word[0])
        else:
            raise self._expected("must have a string, finite number, true, false or null")
        self._at = word.end()
        return value

    def _object(self, depth: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in self._items("{", "}", depth):
            key = self._key()
            if key in values:
                raise ValueError(f"must name each argument once but repeats {shown(key)}")
            if not self._skip(":"):
                raise self._expected(f"must have a colon behind {shown(key)}")
            values[key] = self._value(depth)
        return values

    def _list(self, depth: int) -> list[Any]:
        return [self._value(depth) for _ in self._items("[", "]", depth)]

    def _items(self, opening: str, closing: str, depth: int) -> Iterator[None]:
        """Stops before each item, between the two brackets."""
        if depth > MAX_DEPTH:
            raise ValueError(f"must be nested at most {MAX_DEPTH} deep but is deeper")
        assert self._skip(opening)
        if self._skip(closing):
            return
        yield
        while self._skip(","):
            yield
        if not self._skip(closing):
            raise self._expected(f"must have a comma or {closing} behind a value")

    def _key(self) -> str:
        self._blank()
        if self._text[self._at : self._at + 1] in (_QUOTE, '"'):
            return self._string()
        found = _KEY.match(self._text, self._at)
        if not found or not found[0].strip():
            raise self._expected("must name an argument")
        self._at = found.end()
        return found[0].strip()

    def _string(self) -> str:
        """Between two marks; or JSON's, which models write too, most of all inside lists."""
        start = self._at + 1
        if self._text[self._at] == _QUOTE:
            end = self._text.find(_QUOTE, start)
            if end < 0:
                raise ValueError('must close each string with <|"|> but leaves one open')
            self._at = end + 1
            return self._text[start:end]
        try:
            value, end = _JSON.raw_decode(self._text, self._at)
        except ValueError:
            raise self._expected("must have a whole string") from None
        if SURROGATE.search(value):  # the mark among them
            raise self._expected("must hold Unicode text")
        self._at = end
        return str(value)

    def _blank(self) -> None:
        blank = _BLANK.match(self._text, self._at)
        assert blank is not None
        self._at = blank.end()

    def _skip(self, sign: str) -> bool:
        self._blank()
        there = self._text.startswith(sign, self._at)
        self._at += len(sign) if there else 0
        return there

    def _expected(self, rule: str) -> ValueError:
        rest = self._text[self._at :]
        return ValueError(f"{rule} but got {_said(rest)}" if rest else f"{rule} but ends")


def _said(text: str) -> str:
    return shown(text[:60].replace(_QUOTE, '<|"|>'))
