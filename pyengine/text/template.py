"""The chat template of a checkpoint: found, and rendered in a box.

A template is a program that comes with the weights, so it runs in jinja's sandbox and its work and
its output are bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import jinja2

from pyengine.text.sandbox import Sandbox
from pyengine.untrusted import kind, optional, read_text

Message = dict[str, Any]

MAX_TEMPLATE_BYTES = 1 << 16  # Gemma 4's are about 17 KB; one of 256 KB can take 26 s to compile
MAX_FILE = 1 << 20
BYTE_ORDER_MARK = "\ufeff"
# What a message's thought is called; templates read the first.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


def template_of(directory: Path, config: dict[str, Any]) -> str | None:
    """Source of a checkpoint's template: chat_template.jinja, else tokenizer_config's, else None.

    In the latter it is a string, or a list of named ones of which the default is taken.

    Raises:
        ValueError: The file is no text, or tokenizer_config holds something else.
    """
    file = optional(directory, "chat_template.jinja", "tokenizer")
    if file:
        return read_text(file, "tokenizer", MAX_FILE)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ValueError(
            "[tokenizer] chat_template must be a string or a list of named strings "
            f"but got {kind(template)}."
        )
    return template


class ChatTemplate:
    """A checkpoint's jinja template in a sandbox with bounded work and memory.

    A template that cannot compile stops chats, not the pair: ``error`` is then the sentence that
    :meth:`render` raises, else None.
    """

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        # An editor's mark, not the author's text: it would stand before <bos>
        self.source = source.removeprefix(BYTE_ORDER_MARK)
        self.error: str | None = None
        self._tokens = tokens
        self._sandbox = Sandbox()
        self._lock = Lock()  # the meter is one rendering's
        size = len(source.encode("utf-8", "replace"))
        if size > MAX_TEMPLATE_BYTES:
            self.error = (
                f"[tokenizer] chat template must be at most {MAX_TEMPLATE_BYTES} bytes "
                f"but got {size}."
            )
            return
        try:
            self._template = self._sandbox.from_string(self.source)
        except jinja2.TemplateSyntaxError as error:
            self.error = (
                f"[tokenizer] chat template must be valid jinja but line {error.lineno} "
                f"is not: {_reason(error.message)}."
            )
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
            self.error = (
                f"[tokenizer] chat template must be valid jinja but is not: {_reason(error)}."
            )

    def render(self, messages: Sequence[Message], **kwargs: Any) -> str:
        """The conversation as the prompt that the template writes, as in transformers.

        Raises:
            ValueError: The template is not valid, refuses the messages, or goes beyond its bounds.
        """
        if self.error is not None:
            raise ValueError(self.error)
        defaults = {"add_generation_prompt": True, "tools": None, "documents": None}
        variables = {**defaults, **self._tokens, **kwargs}
        given = list(map(_with_thought, messages))
        try:
            with self._lock:
                self._sandbox.meter.begin(given, variables)
                return "".join(self._template.generate(messages=given, **variables))
        except Exception as error:  # a template is a program and may fail in any way
            raise ValueError(
                f"[tokenizer] chat template must render the messages but stopped: {_reason(error)}."
            ) from error


def _with_thought(message: Message) -> Message:
    """The message with its thought under the name that templates read, as in transformers."""
    thought = next((message[key] for key in THOUGHTS if message.get(key) is not None), None)
    if thought is None:
        return message
    return {"thinking": thought, **message, "reasoning_content": thought}


def _reason(error: object) -> str:
    said = " ".join(str(error)[:1000].split()).rstrip(".")[:200]
    return said or type(error).__name__
