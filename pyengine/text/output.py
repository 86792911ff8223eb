"""Tokens in, text out: whole characters, stop strings cut, thoughts and tool calls apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import NoneType
from typing import NamedTuple

from pyengine.text.tokenizer import Tokenizer
from pyengine.text.tool_calls import CallReader, ToolCall


class Read(NamedTuple):
    """What a token made certain: text, thoughts, a call that is complete.

    ``found`` tells that a stop string came up; nothing counts that follows.
    """

    text: str = ""
    thought: str = ""
    found: bool = False
    call: ToolCall | None = None


class Reader:
    """Text of a generation as its tokens come.

    What the model writes between the marks of its template's channel is a thought, not text: stop
    strings do not count in it, and the channel's name, its first line, is left out. A tool call is
    none either: it comes whole, once it is closed and can be read, and else as text. It ends a
    thought, for a model may call before it closes one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: tuple[str, ...]) -> None:
        self._text = tokenizer.detokenizer()
        self._thought = tokenizer.detokenizer()
        self._scanner = StopScanner(stops)
        self._marks = tokenizer.channel_ids()
        turn = open_turn(prompt, tokenizer.turn_ids())
        marks = [i for i, token in enumerate(turn) if token in self._marks]
        self._thinks = bool(marks) and turn[marks[-1]] == self._marks[0]
        self._naming = self._thinks and "\n" not in tokenizer.decode(turn[marks[-1] :])
        self.has_thought = self._thinks
        self._calls = CallReader(tokenizer)

    @property
    def thinks(self) -> bool:
        """Whether what comes next is a thought."""
        return self._thinks

    @property
    def warning(self) -> str | None:
        """What was wrong with the first tool call that is text."""
        return self._calls.warning

    def add(self, token: int) -> Read:
        """What one more token makes certain."""
        if token == self._calls.mark:
            read = self._say(self._calls.break_off() + self._text.finish())
            self._calls.begin()
            return read._replace(thought=self._turn(opens=False))
        if token in self._marks:
            read = self._say(self._calls.break_off())
            return read._replace(thought=self._turn(opens=token == self._marks[0]))
        if self._calls.is_open:
            call, text = self._calls.add(token)
            return self._say(text)._replace(call=call)
        if self._thinks:
            thought = self._thought.add(token)
            if self._naming:
                _, line_end, thought = thought.partition("\n")
                self._naming = not line_end
            return Read(thought=thought)
        return self._say(self._text.add(token))

    def finish(self) -> Read:
        """What was held back, once no more tokens come."""
        read = self._say(self._text.finish() + self._calls.break_off())
        held = "" if read.found else self._scanner.finish()
        return read._replace(text=read.text + held, thought=self._end_thought())

    def _say(self, text: str) -> Read:
        certain, found = self._scanner.add(text)
        return Read(certain, found=found)

    def _turn(self, opens: bool) -> str:
        """Begin or end a thought; a line parts one from the next."""
        rest = self._end_thought()
        parted = "\n" if opens and self.has_thought else ""
        self._thinks = self._naming = opens
        self.has_thought = self.has_thought or opens
        return rest + parted

    def _end_thought(self) -> str:
        """What was held back of a thought; half a character of the channel's name is dropped."""
        held = self._thought.finish()
        return "" if self._naming else held


def open_turn(prompt: Sequence[int], turn_ids: tuple[int, ...]) -> Sequence[int]:
    """The turn that the prompt leaves to the model: what stands before it may speak of marks."""
    begin = next((i for i in range(len(prompt), 0, -1) if prompt[i - 1] in turn_ids), 0)
    return prompt[begin:]


class StopScanner:
    """Cuts a stream of text before the first stop string, wherever the pieces' borders fall.

    First is the one that is complete first; of two that end together, the longer. Text that may be
    the start of a stop string is held back until it is known.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Text that is certain, and whether a stop string came up; nothing follows then."""
        if not self._stops:
            return piece, False
        text = self._held + piece
        starts = [(text.find(stop), stop) for stop in self._stops]
        found = [(at + len(stop), at) for at, stop in starts if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], False

    def finish(self) -> str:
        """What was held back, once it is known that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` and is not all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The stop strings that were given.

    Raises:
        ValueError: One is empty, or no string.
    """
    if not isinstance(stop, (str, Iterable, NoneType)):
        raise ValueError(f"[generate] stop must be a string or several but got {stop!r}.")
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(f"[generate] stop must hold strings of text but got {text!r}.")
    return stops
