"""The chat template of a checkpoint: found, and rendered in a box.

A template is a program that comes with the weights, so it runs in jinja's sandbox and its work and
its output are bounded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = dict[str, Any]

MAX_TEMPLATE_BYTES = 1 << 20
MAX_RENDERED_CHARS = 1 << 24
MAX_TEMPLATE_WORK = 10_000_000  # calls, and elements of ranges and repeated strings


def template_of(directory: Path, config: dict[str, Any]) -> str | None:
    """Source of a checkpoint's template: chat_template.jinja, else tokenizer_config's, else None.

    In the latter it is a string, or a list of named ones of which the default is taken.

    Raises:
        ValueError: The file is no text, or tokenizer_config holds something else.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"[tokenizer] {file} must be UTF-8 text but is not.") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ValueError(
            "[tokenizer] chat_template must be a string or a list of named strings "
            f"but got {type(template).__name__}."
        )
    return template


class ChatTemplate:
    """A checkpoint's jinja template in a sandbox with bounded work and output."""

    def __init__(self, source: str, tokens: dict[str, str]) -> None:
        if len(source.encode()) > MAX_TEMPLATE_BYTES:
            raise ValueError(
                f"[tokenizer] chat template must be at most {MAX_TEMPLATE_BYTES} bytes "
                f"but got {len(source.encode())}."
            )
        self._tokens = tokens
        self._sandbox = _Sandbox()
        try:
            self._template = self._sandbox.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"[tokenizer] chat template must be valid jinja but line {error.lineno} "
                f"is not: {error.message}."
            ) from error

    def render(self, messages: Sequence[Message], **kwargs: Any) -> str:
        variables = {"add_generation_prompt": True, "tools": None, **self._tokens, **kwargs}
        self._sandbox.work = 0
        out: list[str] = []
        size = 0
        try:
            for chunk in self._template.generate(messages=list(messages), **variables):
                size += len(chunk)
                if size > MAX_RENDERED_CHARS:
                    raise jinja2.TemplateRuntimeError("its output is too long")
                out.append(chunk)
        except Exception as error:  # a template is a program and may fail in any way
            reason = str(error).strip().rstrip(".") or type(error).__name__
            raise ValueError(
                f"[tokenizer] chat template must render the messages but stopped: {reason}."
            ) from error
        return "".join(out)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, except that loops and repetition draw on a budget."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.work = 0
        self.filters["tojson"] = _to_json
        self.globals.update(
            raise_exception=_refuse,
            strftime_now=lambda form: datetime.now().strftime(form),
            range=self._range,
        )

    def spend(self, amount: int) -> None:
        self.work += amount
        if self.work > MAX_TEMPLATE_WORK:
            raise jinja2.TemplateRuntimeError("it does too much work")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.spend(1)
        return super().call(*args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateRuntimeError("it uses **")
        for value, count in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(count, int):
                self.spend(len(value) * max(count, 0))
        return super().call_binop(context, operator, left, right)

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.spend(len(numbers))
        return numbers


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
