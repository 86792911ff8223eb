"""A pair that gives the answers it is told, for prompts of any length; its tokens are the embedded
pair's, and its template has a channel for thoughts."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from text_fakes import LengthCache, ScriptTarget, script_pair

import pyengine
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

NANO = Path(pyengine.__file__).parent / "nano" / "target"
THINKS = "{%- if enable_thinking %}{{ '<|channel>thought\\n' }}{% endif %}"
CONTEXT = 1 << 16


def thinking_tokenizer(folder: Path) -> Tokenizer:
    """The embedded pair's, with a template that opens a thought where one is asked for."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    source = (NANO / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(source + THINKS, encoding="utf-8")
    return load_tokenizer(folder)


class Teller(ScriptTarget):
    """Answers by the last word of ``answers`` that a prompt holds; "" is for those without.

    All answers stand in one script, since a recorded round keeps its rows; an answer is a place.
    """

    def __init__(self, tokenizer: Tokenizer, answers: dict[str, str]) -> None:
        script: list[int] = []
        self.places: dict[str, int] = {}
        for word, answer in answers.items():
            self.places[word] = len(script)
            script += tokenizer.encode(answer + "<turn|>")
        super().__init__(script, tokenizer.vocab_size, CONTEXT, None)
        self.tokenizer = tokenizer
        self.prompts: list[str] = []

    def prefill(self, ids: list[int], cache: LengthCache, **kwargs: Any) -> Any:
        """A chunk of a prompt; the last one counts."""
        told = [*getattr(cache, "told", []), *ids]
        super().prefill(ids, cache, **kwargs)
        text = self.tokenizer.decode(told)
        held = [word for word in self.places if word in text]
        word = max(held, key=lambda word: text.rfind(word) if word else -1)
        place = self.places[word]
        cache.told, cache.prompt = told, mx.array(len(told) - place, mx.int32)  # type: ignore[attr-defined]
        self.prompts.append(text)
        return self.rows[place], mx.array([[place]], mx.int32)


def telling(tokenizer: Tokenizer, answers: dict[str, str] | str) -> Any:
    """A pair; one answer is for all prompts."""
    answers = {"": answers} if isinstance(answers, str) else answers
    target = Teller(tokenizer, answers)
    pair: SimpleNamespace = script_pair(tokenizer, "", name="teller")
    pair.target = pair.assistant.target = target
    return pair
