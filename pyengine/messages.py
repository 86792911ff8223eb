"""Prompts: a string, messages or token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyengine.chat_template import Message
from pyengine.files import shown

if TYPE_CHECKING:
    from pyengine.pair import Pair

Prompt = str | Sequence[Message] | Sequence[int]

MAX_DEPTH = 64  # of objects and lists inside a message
ROLES = ("system", "developer", "user", "assistant", "model", "tool")


def prompt_ids(
    pair: Pair,
    prompt: Prompt,
    *,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt, as :func:`generate` reads it.

    Raises:
        ValueError: The prompt is empty, longer than the context, or of no known form.
    """
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray, memoryview)):
        raise ValueError(
            "[generate] prompt must be a string, messages or token ids but got "
            f"{type(prompt).__name__}."
        )
    taken = {"messages", "self"}.intersection(variables or {})
    if taken:
        raise ValueError(f"[generate] variables must not be named {min(taken)} but one is.")
    ids = _encode(pair, prompt, raw, dict(variables or {}))
    context = pair.target.context
    if not ids:
        raise ValueError("[generate] prompt must not be empty.")
    if len(ids) >= context:
        raise ValueError(
            f"[generate] prompt must be shorter than the context of {context} tokens "
            f"but got {len(ids)}."
        )
    return ids


def _encode(pair: Pair, prompt: Prompt, raw: bool, variables: dict[str, Any]) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("[generate] prompt must not be empty.")
        tokenizer = pair.tokenizer
        if raw or not tokenizer.has_chat_template:
            return tokenizer.encode(prompt, bos=True)
        return tokenizer.encode_chat([{"role": "user", "content": prompt}], **variables)
    ids = [item for item in prompt if isinstance(item, int) and not isinstance(item, bool)]
    messages = [item for item in prompt if isinstance(item, dict)]
    if len(ids) + len(messages) < len(prompt) or (ids and messages):
        raise ValueError("[generate] prompt must be a string, messages or token ids but is mixed.")
    if not messages:
        vocab = pair.target.config.vocab_size
        wrong = [i for i in ids if not 0 <= i < vocab]
        if wrong:
            raise ValueError(f"[generate] token ids must be 0 to {vocab - 1} but got {wrong[0]}.")
        return ids
    if raw:
        raise ValueError("[generate] raw must go with a string prompt but got messages.")
    for number, message in enumerate(messages, 1):
        check_message(message, f"[generate] message {number}")
    return pair.tokenizer.encode_chat([_with_text(message) for message in messages], **variables)


def _with_text(message: Message) -> Message:
    """A message a template can print: no content, beside tool calls, is none of its words.

    Gemma's templates print a system message as it is, so its parts must be one string.
    """
    if message.get("content") is None:
        return {**message, "content": ""}
    if message["role"] in ("system", "developer") and isinstance(message["content"], list):
        return {**message, "content": "".join(part["text"] for part in message["content"])}
    return message


def check_message(message: Message, where: str) -> None:
    """Refuse a message this engine cannot read; ``where`` begins the error.

    Raises:
        ValueError: The role is unknown, or the content is not text.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where} must have a role of {', '.join(ROLES)} but got {shown(role)}.")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"{where} must hold text only but got a part of type {shown(kind)}."
                )
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"{where} must have text as its content but got {shown(content)}.")
    inside: list[Any] = [message]
    for _ in range(MAX_DEPTH):
        inside = [x for v in inside if isinstance(v, (dict, list)) for x in _parts(v)]
    if inside:
        raise ValueError(f"{where} must be nested at most {MAX_DEPTH} deep but is deeper.")


def _parts(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
