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

from pyengine.files import kind, optional, read_text
from pyengine.template_sandbox import MAX_CHARS, Sandbox

Message = dict[str, Any]

MAX_TEMPLATE_BYTES = 1 << 18  # Gemma 4's are about 17 KB


def template_of(directory: Path, config: dict[str, Any]) -> str | None:
    """Source of a checkpoint's template: chat_template.jinja, else tokenizer_config's, else None.

    In the latter it is a string, or a list of named ones of which the default is taken.

    Raises:
        ValueError: The file is no text, or tokenizer_config holds something else.
    """
    file = optional(directory, "chat_template.jinja", "tokenizer")
    if file:
        return read_text(file, "tokenizer", MAX_TEMPLATE_BYTES)
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
    """A checkpoint's jinja template in a sandbox with bounded work and output."""

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        size = len(source.encode("utf-8", "replace"))
        if size > MAX_TEMPLATE_BYTES:
            raise ValueError(
                f"[tokenizer] chat template must be at most {MAX_TEMPLATE_BYTES} bytes "
                f"but got {size}."
            )
        self.source = source
        self._tokens = tokens
        self._sandbox = Sandbox()
        self._lock = Lock()  # the budget is one rendering's
        try:
            self._template = self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"[tokenizer] chat template must be valid jinja but line {error.lineno} "
                f"is not: {(error.message or '').rstrip('.')}."
            ) from error
        except (RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"[tokenizer] chat template must be valid jinja but is not: {_reason(error)}."
            ) from error

    def render(self, messages: Sequence[Message], **kwargs: Any) -> str:
        variables = {"add_generation_prompt": True, "tools": None, **self._tokens, **kwargs}
        out: list[str] = []
        size = 0
        try:
            with self._lock:
                self._sandbox.begin()
                for chunk in self._template.generate(messages=list(messages), **variables):
                    size += len(chunk)
                    if size > MAX_CHARS:
                        raise jinja2.TemplateRuntimeError("its output is too long")
                    out.append(chunk)
        except Exception as error:  # a template is a program and may fail in any way
            raise ValueError(
                f"[tokenizer] chat template must render the messages but stopped: {_reason(error)}."
            ) from error
        return "".join(out)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200] or type(error).__name__
