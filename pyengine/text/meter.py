"""Counts what a chat template does, and stops it at limits that grow with its input.

*Work* is time: a unit is one step, 64 characters read or 1024 pairs of characters compared, which
take a quarter of a microsecond to one. *Built* is memory: characters of text, and a small object
counts as 16. What is freed again is not given back, so the count bounds whatever a template keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping, Sequence, ValuesView
from collections.abc import Set as AnySet
from itertools import chain
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.runtime import LoopContext, Macro
from jinja2.utils import Cycler, Joiner, Namespace

# Google's templates look back over all messages for each message, and ahead for a call's results:
# one to two units for each pair of messages, 25 million for 5,000 of them. The rest of those
# templates is one pass: some 60 units per message, and at most 1.3 per character, in deep schemas;
# templates of other families take ten, when they go through a text as if it were a list of parts.
# MOST_WORK is where even an honest template stops: what a client sends may not occupy a server for
# more than a minute or so.
BASE_WORK = 400_000
WORK_PER_MESSAGE = 500
WORK_PER_PAIR = 3
WORK_PER_CHAR = 16
MOST_WORK = 80_000_000

# A prompt of ordinary turns is copied six times on its way through them, a deep schema 18 times.
BASE_BUILT = 1 << 24
BUILT_PER_MESSAGE = 1_000
BUILT_PER_CHAR = 32

OBJECT = 16  # a small object, in characters
ITEM = 24  # a new object and its place in a list
KEPT = 256  # a loop or a macro that a container keeps
NUMBER = 400  # the longest float, written out
ESCAPED = 12  # the longest escape of a character: \ud83d\udc0e

MAX_BITS = 2048  # of an int; the largest float has 1024
MAX_NESTING = 1000


class Meter:
    """What one rendering may do and build, and what it has done and built so far."""

    def __init__(self) -> None:
        self.done = self.built = 0
        self.most_work, self.most_built = BASE_WORK, BASE_BUILT

    def begin(self, messages: Sequence[Any], variables: Mapping[str, Any]) -> None:
        """Set the limits that an input of this size deserves."""
        self.done, self.most_work = 0, MOST_WORK
        chars = self.walk([messages, dict(variables)])
        count = len(messages)
        work = count * (WORK_PER_MESSAGE + WORK_PER_PAIR * count) + chars * WORK_PER_CHAR
        self.most_work = min(BASE_WORK + work, MOST_WORK)
        self.most_built = BASE_BUILT + count * BUILT_PER_MESSAGE + chars * BUILT_PER_CHAR
        self.done = self.built = 0

    def work(self, units: int) -> None:
        self.done += units
        if self.done > self.most_work:
            raise TemplateRuntimeError("it does too much work")

    def build(self, chars: int) -> None:
        self.built += chars
        if self.built > self.most_built:
            raise TemplateRuntimeError("it builds too much")

    def walk(self, value: Any, level: int = 0, apart: int = 2) -> int:
        """Characters of a value written out, read to its last leaf as if nothing were shared.

        Each part takes ``apart`` more, and ``level`` more for every level that it is deep.
        """
        if isinstance(value, str):
            self.work(1 + len(value) // 64)
            return len(value)
        chars = 0
        open_: list[Iterator[Any]] = [iter((value,))]
        while open_:
            depth = len(open_)
            for item in open_[-1]:
                chars += apart + level * depth
                if isinstance(item, str):
                    self.work(1 + len(item) // 64)
                    plain = item.isprintable() and item.isascii()
                    chars += len(item) * (2 if plain else ESCAPED)
                    continue
                self.work(1)
                if isinstance(item, int):
                    chars += 6 + item.bit_length() // 3
                    continue
                inside = None if item is None or isinstance(item, float) else parts_of(item)
                if inside is None:
                    chars += len(item.name) + 200 if isinstance(item, Macro) else 60
                    continue
                if depth == MAX_NESTING:
                    raise TemplateRuntimeError("it nests values too deep")
                open_.append(inside)
                break
            else:
                open_.pop()
        return chars

    def text(self, value: Any) -> int:
        """Characters of ``str(value)``, which is built unless it is a string already."""
        chars = self.walk(value)
        if not isinstance(value, str):
            self.build(chars)
        return chars

    def members(self, value: Any) -> int:
        """Number of members, each of which is visited."""
        if isinstance(value, LoopContext):  # it would be used up, and shows more than it holds
            raise TemplateRuntimeError("it reads a loop as a list")
        number = size(value)
        self.work(1 + number)
        return number

    def listed(self, value: Any) -> int:
        """Number of members, of which a list is built."""
        number = self.members(value)
        self.build(OBJECT + number * (2 if isinstance(value, (list, tuple)) else ITEM))
        return number

    def literal(self, value: Any) -> Any:
        """A list, tuple or dict that the template spells: no longer than its source."""
        self.work(1 + len(value) // 16)
        self.build(OBJECT + len(value) * 4)
        for member in value.values() if isinstance(value, dict) else value:
            if isinstance(member, (LoopContext, Macro)):
                self.build(KEPT)
        return value

    def key(self, value: Any) -> Any:
        """A value to look up: an error may quote it, and a tuple is hashed to its last leaf."""
        if isinstance(value, str):
            if len(value) > 64:
                self.work(len(value) // 64)
                self.build(len(value) * ESCAPED)
        elif isinstance(value, int):
            if value.bit_length() > 63:
                raise TemplateRuntimeError("it looks up too large a number")
        elif isinstance(value, (tuple, AnySet)):
            raise TemplateRuntimeError("it looks up a tuple")
        return value

    def path(self, attribute: Any) -> int:
        """Number of parts of an attribute such as ``function.name``; commas part several."""
        if not isinstance(attribute, str):
            return 1
        self.key(attribute)
        parts = attribute.count(".") + attribute.count(",") + 1
        self.build(parts * ITEM)
        return parts

    def number(self, value: Any) -> None:
        """A number to calculate with."""
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TemplateRuntimeError("it makes too large a number")

    def search(self, text: str, part: Any) -> None:
        """Python's searches compare each character with each, at worst."""
        if isinstance(part, tuple):
            for each in part:
                self.search(text, each)
        elif isinstance(part, str):
            self.work(1 + len(text) // 64 + len(text) * len(part) // 1024)


def size(value: Any) -> int:
    """Number of members, or of characters; 0 of what has none."""
    try:
        return len(value)
    except TypeError:
        return 0


def parts_of(item: Any) -> Iterator[Any] | None:
    """What a value shows when it is written out or formatted; None where nothing is inside."""
    if isinstance(item, Namespace):
        item = item._Namespace__attrs
    if isinstance(item, Mapping):
        return chain(item, item.values())
    if isinstance(item, (list, tuple, AnySet, KeysView, ValuesView)):
        return iter(item)
    if isinstance(item, LoopContext):
        return iter((item.previtem, item.nextitem))
    if isinstance(item, Cycler):
        return iter(item.items)
    if isinstance(item, Joiner):
        return iter((item.sep,))
    owner = getattr(item, "__self__", None)  # of a method
    return iter((owner,)) if isinstance(owner, (str, list, tuple, dict)) else None
