"""Special tokens in a text: where they are spelled, and who may spell them.

A chat template prints text of users and tools between special tokens such as ``<turn|>``, and may
trim, join, cut and upper-case it on the way. Neither that text nor the rendered prompt tells
whether a ``<turn|>`` is the template's own. So while a template runs, each special token that
counts is one character that no input can hold: half a surrogate pair.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator

from pyengine.untrusted import SURROGATE

STAND_INS = range(0xD800, 0xE000)
_STAND_IN = re.compile(f"({SURROGATE.pattern})")
# What a template may write as a mark: <eos>, <|"|>, [gap]; no word, no blank, no sign of jinja's.
_WRITTEN = re.compile(r"[^\w\s'\"{}%][^\s{}%]+[^\w\s'\"{}%]")


class Spellings:
    """The spellings of all special tokens, found in one pass over a text, however many there are.

    Where several begin at one place, the longest counts, as in the tokenizer libraries.
    """

    def __init__(self, spellings: Iterable[str]) -> None:
        self._sorted = sorted(s for s in spellings if s)
        self._longest = max(map(len, self._sorted), default=0)
        self._shorter: dict[str, str | None] = {}  # the longest other one that each begins with
        open_ones: list[str] = []
        for spelling in self._sorted:
            while open_ones and not spelling.startswith(open_ones[-1]):
                open_ones.pop()
            self._shorter[spelling] = open_ones[-1] if open_ones else None
            open_ones.append(spelling)
        firsts = "".join(re.escape(first) for first in sorted({s[0] for s in self._sorted}))
        self._first = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def __iter__(self) -> Iterator[str]:
        return iter(self._sorted)

    def at(self, text: str, place: int) -> str | None:
        """The longest spelling that begins at this place."""
        # Whatever begins the text here also begins its nearest neighbour in alphabetical order
        near = bisect_right(self._sorted, text[place : place + self._longest])
        found = self._sorted[near - 1] if near else None
        while found is not None and not text.startswith(found, place):
            found = self._shorter[found]
        return found

    def split(self, text: str) -> list[str]:
        """Ordinary text and spellings in turn, ordinary text (it may be empty) first and last."""
        parts, start, place = [], 0, self._first.search(text)
        while place is not None:
            begin = end = place.start()
            found = self.at(text, begin)
            if found is not None:
                end += len(found)
                parts += [text[start:begin], found]
                start = end
            place = self._first.search(text, max(end, begin + 1))
        return [*parts, text[start:]]

    def broken(self, text: str) -> Iterator[str]:
        """The text cut behind the first character of each spelling, so that no part holds one.

        One of a single character is left as it is.
        """
        start = 0
        for place in self._first.finditer(text):
            if len(self.at(text, place.start()) or "") > 1:
                yield text[start : place.end()]
                start = place.end()
        yield text[start:]


class StandIns:
    """Single characters in place of special tokens while a template runs.

    They stand in the template's source, and go into what may spell special tokens. Text without
    them cannot make one, whatever a template does to it; and it reaches the template unchanged.
    """

    def __init__(self, spellings: Spellings) -> None:
        self._spellings = spellings
        self._characters: dict[str, str] = {}

    def copy(self) -> StandIns:
        """The same ones, and room for those of one conversation."""
        other = StandIns(self._spellings)
        other._characters = dict(self._characters)
        return other

    def of(self, spelling: str) -> str:
        """The character of a special token.

        Raises:
            ValueError: There are none left.
        """
        found = self._characters.get(spelling)
        if found is None:
            if len(self._characters) == len(STAND_INS):
                raise ValueError(
                    f"[tokenizer] a conversation must use at most {len(STAND_INS)} different "
                    "special tokens but uses more."
                )
            found = self._characters[spelling] = chr(STAND_INS[len(self._characters)])
        return found

    def in_text(self, text: str, only: Collection[str] | None = None) -> str:
        """The text with its special tokens replaced: all, or only these."""
        parts = self._spellings.split(text)
        for i in range(1, len(parts), 2):
            if only is None or parts[i] in only:
                parts[i] = self.of(parts[i])
        return "".join(parts)

    def in_template(self, source: str) -> str:
        """A template's source with the marks that it writes replaced.

        Raises:
            ValueError: It uses too many, or is no Unicode text.
        """
        if SURROGATE.search(source):
            raise ValueError(
                "[tokenizer] chat template must be Unicode but holds a lone surrogate."
            )
        marks = {s: s for s in self._spellings if _WRITTEN.fullmatch(s)}
        for quote in "\"'":  # in a string between such quotes
            marks |= {s.replace(quote, "\\" + quote): s for s in marks.values() if quote in s}
        parts = Spellings(marks).split(source)
        for i in range(1, len(parts), 2):
            parts[i] = self.of(marks[parts[i]])
        return "".join(parts)

    def split(self, rendered: str) -> list[str]:
        """Ordinary text and spellings in turn, as :meth:`Spellings.split` gives them."""
        spelling = {character: s for s, character in self._characters.items()}
        parts = _STAND_IN.split(rendered)
        for i in range(1, len(parts), 2):
            if parts[i] not in spelling:
                raise ValueError("[tokenizer] text must be Unicode but holds a lone surrogate.")
            parts[i] = spelling[parts[i]]
        return parts

    def built(self, rendered: str) -> str | None:
        """A mark that a template put together from pieces: it has no stand-in."""
        marks = [s for part in self.split(rendered)[::2] for s in self._spellings.split(part)[1::2]]
        return next(filter(_WRITTEN.fullmatch, marks), None)

    def restored(self, text: str) -> str:
        """The text with each stand-in spelled out."""
        return "".join(self.split(text))
