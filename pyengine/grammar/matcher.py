"""A grammar followed through one text: what may come next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pyengine.grammar.compiled import Grammar, bits, reason
from pyengine.text.output import open_turn
from pyengine.text.tokenizer import Tokenizer

THINK = "<|think|>"  # written into a prompt whose answer may begin with a thought

Phase = Literal["start", "thought", "answer", "ended"]


class GrammarMatcher:
    """Masks of the tokens that may come next, as tokens are added and taken back.

    The grammar is of the answer alone. A thought before it is free, but has to end in an answer:
    stop ids are not allowed in it. An answer may begin with one where the prompt asks to think.

    Args:
        grammar: The compiled grammar.
        tokenizer: Knows the marks around a thought.
        prompt: Its open turn says whether a thought is under way, or over.
    """

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._grammar = grammar
        self._library = grammar.first.deep_copy()
        self._said: list[int] = []  # tokens that the library has seen
        self._stops = bits(grammar.stop_ids, grammar.words)
        self._marks = tokenizer.channel_ids()
        self._phases: list[Phase] = [_phase(prompt, tokenizer)]  # before each token, and now
        self._free = _all(grammar.vocab) & ~self._stops

    def fill(self, row: NDArray[np.uint32]) -> None:
        """Set the bits of the tokens that may come next, and no others; none after a stop id.

        Args:
            row: uint32 ``[ceil(V / 32)]``, contiguous; token t is bit t % 32 of number t // 32.

        Raises:
            RuntimeError: To follow the grammar takes too much from here on.
        """
        phase, own = self._phases[-1], self._grammar
        if phase in ("thought", "ended"):
            row[:] = self._free if phase == "thought" else 0
            return
        self._library.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if self._library.is_error():
            raise RuntimeError(
                "[grammar] the text must be one that can be followed but is not: "
                f"{reason(self._library.get_error())}."
            )
        if not (row & ~self._stops).any():
            row[:] = bits(own.stop_ids[:1], own.words)  # the text is the same whichever ends it
        elif phase == "start":
            row |= bits(self._marks[:1], own.words)

    def add(self, token: int) -> bool:
        """Go on behind a token; False, and nothing happens, where it may not come next."""
        phase = self._phases[-1]
        after = self._after(phase, token)
        if after is None:
            return False
        if phase != "thought" and after == "answer":
            if self._library.validate_tokens([token]) < 1:
                return False
            self._library.consume_token(token)
            self._said.append(token)
        self._phases.append(after)
        return True

    def take_back(self, count: int) -> None:
        """Forget so many of the newest tokens."""
        taken = self._phases[len(self._phases) - count - 1 :]
        mine = sum(before != "thought" and after == "answer" for before, after in pairwise(taken))
        del self._phases[len(self._phases) - count :]
        if mine:
            del self._said[-mine:]
        if self._library.is_error():  # which it does not leave
            self._library = self._grammar.first.deep_copy()
            self._library.consume_tokens(self._said)
        elif mine:
            self._library.rollback(mine)

    def _after(self, phase: Phase, token: int) -> Phase | None:
        """The phase behind a token; None where there is none whatever the grammar."""
        if phase == "thought":
            if token in self._grammar.stop_ids:
                return None
            return "answer" if token == self._marks[1] else "thought"
        if phase == "ended":
            return None
        if token in self._grammar.stop_ids:
            return "ended" if self._library.is_accepting() else None
        return "thought" if phase == "start" and token == self._marks[0] else "answer"


def _phase(prompt: Sequence[int], tokenizer: Tokenizer) -> Phase:
    marks = tokenizer.channel_ids()
    turn = open_turn(prompt, tokenizer.turn_ids())
    written = [token for token in turn if token in marks]
    if written:
        return "thought" if written[-1] == marks[0] else "answer"
    return "start" if marks and tokenizer.id_of(THINK) in prompt else "answer"


def _all(vocab: int) -> NDArray[np.uint32]:
    """A mask of the whole vocabulary."""
    row = np.full(-(-vocab // 32), 0xFFFFFFFF, np.uint32)
    if vocab % 32:
        row[-1] = (1 << vocab % 32) - 1
    return row
