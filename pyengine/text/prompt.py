"""Prompts: a string, messages or token ids in, token ids out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyengine.arguments import check_length, check_vocabulary
from pyengine.text.template import Message
from pyengine.untrusted import kind, parse, shown

if TYPE_CHECKING:
    from pyengine.text.tokenizer import Tokenizer

Prompt = str | Sequence[Message] | Sequence[int]

MAX_DEPTH = 64  # of objects and lists inside a message
ROLES = ("system", "developer", "user", "assistant", "model", "tool")


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer,
    *,
    context: int,
    vocab: int,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Token ids of a prompt, as :func:`pyengine.generate` reads it.

    Args:
        prompt: A string, messages or token ids.
        tokenizer: The pair's.
        context: The prompt must be shorter.
        vocab: V.
        raw: Continue a string as it stands.
        variables: Further variables of the chat template.
        tools: What the template shows the model, see :class:`pyengine.text.tools.ToolUse`.

    Raises:
        ValueError: The prompt is empty, longer than the context, or of no known form; or there are
            tools that no template shows.
    """
    if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray, memoryview)):
        raise ValueError(
            "[generate] prompt must be a string, messages or token ids but got "
            f"{type(prompt).__name__}."
        )
    taken = {"messages", "self"}.intersection(variables or {})
    if taken:
        raise ValueError(f"[generate] variables must not be named {min(taken)} but one is.")
    given = dict(variables or {})
    if tools:
        if raw or not (isinstance(prompt, str) or any(isinstance(x, dict) for x in prompt)):
            raise ValueError(
                "[generate] tools must go with a prompt for the chat template but it is "
                f"{'raw' if raw else 'token ids'}."
            )
        if given.get("tools"):
            raise ValueError("[generate] tools must be given once but are among variables too.")
        check_shows_tools(tokenizer)
        given["tools"] = list(tools)
    _check_depth(given, "[generate] variables")
    ids = _encode(prompt, tokenizer, vocab, raw, given)
    check_length(ids, context)
    return ids


def _encode(
    prompt: Prompt, tokenizer: Tokenizer, vocab: int, raw: bool, variables: dict[str, Any]
) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("[generate] prompt must not be empty.")
        if raw or not tokenizer.has_chat_template:
            return tokenizer.encode(prompt, bos=True)
        return _encode_chat(tokenizer, [{"role": "user", "content": prompt}], variables)
    ids = [item for item in prompt if isinstance(item, int) and not isinstance(item, bool)]
    messages = [item for item in prompt if isinstance(item, dict)]
    if len(ids) + len(messages) < len(prompt) or (ids and messages):
        raise ValueError("[generate] prompt must be a string, messages or token ids but is mixed.")
    if not messages:
        check_vocabulary(ids, vocab)
        return ids
    if raw:
        raise ValueError("[generate] raw must go with a string prompt but got messages.")
    for number, message in enumerate(messages, 1):
        check_message(message, f"[generate] message {number}")
    ready = [_for_template(tokenizer, message, i) for i, message in enumerate(messages)]
    return _encode_chat(tokenizer, ready, variables)


def _encode_chat(
    tokenizer: Tokenizer, messages: list[Message], variables: dict[str, Any]
) -> list[int]:
    """Begins with ``<bos>`` as a raw prompt does, whether or not the template writes it."""
    ids = tokenizer.encode_chat(messages, **variables)
    bos = tokenizer.bos_id
    return ids if not ids or bos in (None, ids[0]) else [bos, *ids]


def _for_template(tokenizer: Tokenizer, message: Message, number: int) -> Message:
    """A message in the form that chat templates are written for."""
    changed = dict(message)
    if message.get("content") is None:  # beside tool calls; it is none of the template's words
        changed["content"] = ""
    role, content = message["role"], message.get("content")
    in_parts = role in ("system", "developer") and isinstance(content, list)
    if in_parts and not (content and tokenizer.takes_parts(role, first=number == 0)):
        # The first published templates print a list here as Python writes it
        changed["content"] = "\n".join(part["text"] for part in content or [])
    if message.get("tool_calls") is not None:
        changed["tool_calls"] = _tool_calls(message["tool_calls"], f"messages[{number}].tool_calls")
    return changed


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Calls with their arguments as an object; clients of OpenAI's protocol send its JSON.

    Raises:
        ValueError: There is something else.
    """
    if not isinstance(calls, list):
        raise ValueError(f"[generate] {where} must be a list but got {kind(calls)}.")
    out = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise ValueError(
                f"[generate] {where}[{i}] must be an object with a function but got {shown(call)}."
            )
        arguments = _arguments(function.get("arguments"), f"{where}[{i}].function.arguments")
        out.append({**call, "function": {**function, "arguments": arguments}})
    return out


def _arguments(value: Any, where: str) -> dict[str, Any]:
    if value is None or value == "":  # a call of a function without any
        return {}
    found = value
    if isinstance(value, str):
        try:
            found = parse(value, where)
        except ValueError:
            found = None
    if not isinstance(found, dict):
        raise ValueError(f"[generate] {where} must be a JSON object but got {shown(value)}.")
    _check_depth(found, f"[generate] {where}")
    return found


def check_shows_tools(tokenizer: Tokenizer) -> None:
    """Refuse tools that the model would never see.

    Raises:
        ValueError: No chat template shows them.
    """
    if not tokenizer.shows_tools:
        raise ValueError(
            "[generate] tools must go with a chat template that shows them but this pair has none."
        )


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
            named = part.get("type") if isinstance(part, dict) else type(part).__name__
            if named != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"{where} must hold text only but got a part of type {shown(named)}."
                )
    elif isinstance(content, dict) and role == "tool":
        pass  # a result that a template writes as it writes arguments
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"{where} must have text as its content but got {shown(content)}.")
    _check_depth(message, where)


def _check_depth(value: dict[str, Any], where: str) -> None:
    inside: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inside = [x for v in inside if isinstance(v, (dict, list)) for x in _parts(v)]
    if inside:
        raise ValueError(f"{where} must be nested at most {MAX_DEPTH} deep but is deeper.")


def _parts(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
