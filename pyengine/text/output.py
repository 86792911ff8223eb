"""Tokens in, text out: whole characters, stop strings cut, thoughts apart."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import NoneType

from pyengine.text.tokenizer import Tokenizer


class Reader:
    """Text of a generation as its tokens come.

    What the model writes between the marks of its template's channel is a thought, not text: stop
    strings do not count in it, and the channel's name, its first line, is left out.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stops: tuple[str, ...]) -> None:
        self._text = tokenizer.detokenizer()
        self._thought = tokenizer.detokenizer()
        self._scanner = StopScanner(stops)
        self._marks = tokenizer.channel_ids()
        turn = _open_turn(prompt, tokenizer.turn_ids())
        marks = [i for i, token in enumerate(turn) if token in self._marks]
        self._thinks = bool(marks) and turn[marks[-1]] == self._marks[0]
        self._naming = self._thinks and "\n" not in tokenizer.decode(turn[marks[-1] :])
        self.has_thought = self._thinks

    @property
    def thinks(self) -> bool:
        """Whether what comes next is a thought."""
        return self._thinks

    def add(self, token: int) -> tuple[str, str, bool]:
        """Text that is certain, thoughts, and whether a stop string came up with this token."""
        if token in self._marks:
            return "", self._turn(opens=token == self._marks[0]), False
        if self._thinks:
            thought = self._thought.add(token)
            if self._naming:
                _, line_end, thought = thought.partition("\n")
                self._naming = not line_end
            return "", thought, False
        text, found = self._scanner.add(self._text.add(token))
        return text, "", found

    def finish(self) -> tuple[str, str, bool]:
        """What was held back, once no more tokens come; the same three."""
        thought = self._end_thought()
        text, found = self._scanner.add(self._text.finish())
        return text if found else text + self._scanner.finish(), thought, found

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


def _open_turn(prompt: Sequence[int], turn_ids: tuple[int, ...]) -> Sequence[int]:
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
        text = self._held + piece
        starts = [(text.find(stop), stop) for stop in self._stops]
        found = [(at + len(stop), at) for at, stop in starts if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
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
