"""Items of the Responses API: a conversation's, in the form that templates read, and an answer's.

An assistant's turn is one message with thoughts, text and calls, which clients send as items.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pyengine.serve.protocols.ask import Refused
from pyengine.serve.protocols.fields import Part, checked
from pyengine.serve.protocols.kept import Store
from pyengine.task import Result
from pyengine.text.tool_calls import ToolCall
from pyengine.untrusted import kind, shown

SYSTEM = ("system", "developer")
TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


class MessageItem(Part):
    role: Literal["user", "assistant", "system", "developer"]
    content: Any


class CallItem(Part):
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class OutputItem(Part):
    call_id: str
    output: Any


class ReasoningItem(Part):
    summary: list[Any] | None = None
    content: list[Any] | None = None


class Conversation:
    """Messages that are put together from items."""

    def __init__(self, known: Sequence[dict[str, Any]], store: Store) -> None:
        self.messages = list(known)
        self._store = store
        self._turn: dict[str, Any] | None = None  # the assistant's, while its items come

    def add(self, item: Any, where: str) -> None:
        """One item more.

        Raises:
            Refused: It is of a kind that is not known here; the message names its place.
        """
        if not isinstance(item, dict):
            raise Refused(400, f"[serve] {where} must be an object but got {kind(item)}.")
        name = item.get("type") or ("message" if "role" in item else "item_reference")
        if name == "item_reference":
            at = f"{where}.id"
            if not isinstance(item.get("id"), str):
                raise Refused(400, f"[serve] {at} must be a string but got {kind(item.get('id'))}.")
            item = self._store.item(item["id"], at)
            name = item["type"]
        if name == "message":
            self._message(checked(MessageItem, item, where), where)
        elif name == "reasoning":
            made = checked(ReasoningItem, item, where)
            thoughts = texts(made.content or made.summary or [], f"{where}.content")
            self._own("content", "tool_calls")["reasoning_content"] = "\n".join(thoughts)
        elif name == "function_call":
            call = checked(CallItem, item, where)
            name = call.name if call.namespace is None else f"{call.namespace}.{call.name}"
            function = {"name": name, "arguments": call.arguments}
            calls = self._own().setdefault("tool_calls", [])
            calls.append({"id": call.call_id, "type": "function", "function": function})
        elif name == "function_call_output":
            result = checked(OutputItem, item, where)
            self._turn = None
            said = "\n".join(texts(result.output, f"{where}.output"))
            self.messages.append({"role": "tool", "tool_call_id": result.call_id, "content": said})
        else:
            raise Refused(400, f"[serve] {where}.type {shown(name)} is not known here.")

    def with_instructions(self, instructions: str | None) -> list[dict[str, Any]]:
        """All messages, those of the system in front as one."""
        first = next((i for i, m in enumerate(self.messages) if m["role"] not in SYSTEM), None)
        system = self.messages[:first]
        words = [instructions] if instructions else []
        words += [message["content"] for message in system]
        head = [{"role": "system", "content": "\n\n".join(words)}] if words else []
        return [*head, *self.messages[len(system) :]]

    def _message(self, message: MessageItem, where: str) -> None:
        text = "\n".join(texts(message.content, f"{where}.content"))
        if message.role == "assistant":
            self._own("content", "tool_calls")["content"] = text
        else:
            self._turn = None
            role = "system" if message.role == "developer" else message.role
            self.messages.append({"role": role, "content": text})

    def _own(self, *without: str) -> dict[str, Any]:
        """The assistant's turn under way; another one if that has these parts."""
        if self._turn is None or any(self._turn.get(name) for name in without):
            self._turn = {"role": "assistant", "content": ""}
            self.messages.append(self._turn)
        return self._turn


def texts(content: Any, where: str) -> list[str]:
    """The words of a string or of a list of parts.

    Raises:
        Refused: A part is no text.
    """
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        raise Refused(400, f"[serve] {where} must be a string or a list but got {kind(content)}.")
    said = []
    for number, part in enumerate(content):
        name = part.get("type") if isinstance(part, dict) else kind(part)
        if name not in TEXTS or not isinstance(part.get("text"), str):
            raise Refused(
                400, f"[serve] {where}[{number}] must be text but got a part of type {shown(name)}."
            )
        said.append(part["text"])
    return said


def answer(result: Result) -> dict[str, Any]:
    """The assistant's message that an answer is, for the requests that follow on it."""
    message: dict[str, Any] = {"role": "assistant", "content": result.text}
    if result.thinking:
        message["reasoning_content"] = result.thinking
    if result.tool_calls:
        message["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in result.tool_calls
        ]
    return message


def new_reasoning() -> dict[str, Any]:
    return {**_new("reasoning", "rs"), "summary": [], "content": []}


def new_message() -> dict[str, Any]:
    return {**_new("message", "msg"), "role": "assistant", "content": []}


def new_call(call: ToolCall, spaces: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """``spaces``: of functions in namespaces, by the names that the model knows them by, namespace
    and name."""
    item = {**_new("function_call", "fc"), "call_id": call.id, "name": call.name, "arguments": ""}
    if call.name in spaces:
        item["namespace"], item["name"] = spaces[call.name]
    return item


def part_of(item: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The content of an item of text."""
    if item["type"] == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _new(name: str, prefix: str) -> dict[str, Any]:
    return {"id": f"{prefix}_{uuid.uuid4().hex}", "type": name, "status": "in_progress"}
