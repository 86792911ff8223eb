"""A pair that speaks letters of one token each, and answers worked out token by token.

The rule (:func:`by_rule`) knows of no blocks. Drafts are all right unless told to err: a round of
block b commits b tokens.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from text_fakes import LengthCache, ScriptAssistant, ScriptTarget, script_pair

from pyengine.text.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Speaker(ScriptTarget):
    """Says a script; the further on, the surer, so that no two log-probabilities are the same."""

    @functools.cached_property
    def rows(self) -> mx.array:  # type: ignore[override]
        sure = np.array([height(place) for place in range(len(self.script))], np.float32)
        return (
            mx.array(np.eye(self.config.vocab_size, dtype=np.float32)[self.script])
            * (mx.array(sure)[:, None])
        )

    def new_cache(self) -> LengthCache:
        return LengthCache(self.before_call)


class Knowing(ScriptAssistant):
    """Knows the script, but where ``errs`` tells it to err: never, if it is 0."""

    errs = 0

    def forward(self, embedding: mx.array, hidden: mx.array, caches: Any) -> Any:
        place = hidden + 1
        rows = self.target.rows[place[0] % len(self.target.script)]
        if self.errs:
            rows = mx.where(place % self.errs == 0, mx.roll(rows, 1, axis=-1), rows)
        return rows, place


def height(place: int) -> float:
    return 5 + 0.25 * place


def logprob(place: int, vocab: int = 400) -> float:
    """Of the script's token there: all others have logit 0."""
    return -math.log1p((vocab - 1) * math.exp(-height(place)))


def speaking(tok: Tokenizer, script: list[int], context: int = 4096, errs: int = 0) -> Any:
    pair = script_pair(tok, script)
    pair.target = Speaker(pair.target.script, tok.vocab_size, context, 0.0)
    pair.assistant = Knowing(pair.target)
    pair.assistant.errs = errs
    return pair


def letter(tok: Tokenizer, text: str) -> list[int]:
    """Ids of letters, a token each."""
    ids = [tok.id_of(c) for c in text]
    assert None not in ids
    return [i for i in ids if i is not None]


@dataclass
class End:
    """An answer by the plain rule: one token after another, no blocks."""

    tokens: list[int]
    text: str
    thinking: str | None
    reason: str


def by_rule(
    script: list[int],
    pieces: dict[int, str],
    limit: int,
    stop_ids: set[int],
    stops: tuple[str, ...] = (),
    marks: tuple[int, int] = (-1, -1),
) -> End:
    """``pieces`` spells the tokens; ``marks`` open and close a thought."""
    tokens: list[int] = []
    text, thought, inside = "", None, False
    for token in script:
        tokens.append(token)
        if token in stop_ids:
            return End(tokens, text, named(thought), "stop")
        if token == marks[0]:
            thought, inside = "", True
        elif token == marks[1]:
            inside = False
        elif inside:
            assert thought is not None
            thought += pieces[token]
        else:
            for c in pieces[token]:
                text += c
                ended = [s for s in stops if text.endswith(s)]
                if ended:
                    cut = len(text) - max(map(len, ended))
                    return End(tokens, text[:cut], named(thought), "stop")
        if len(tokens) == limit:
            return End(tokens, text, named(thought), "length")
    raise AssertionError("the script is too short")


def named(thought: str | None) -> str | None:
    """A thought's first line names its channel."""
    return None if thought is None else thought.partition("\n")[2]
