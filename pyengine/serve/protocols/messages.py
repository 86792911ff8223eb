"""Anthropic's messages, ``/v1/messages``, and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pyengine.serve.protocols.ask import Ask, Limits, Refused, Wish, admit
from pyengine.serve.protocols.choices import cached_tokens, own_usage
from pyengine.serve.protocols.faces import approximate, named_event
from pyengine.serve.protocols.fields import Body, Object, Part, checked, only
from pyengine.task import Result, Step
from pyengine.text.tool_calls import ToolCall
from pyengine.untrusted import kind, shown

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

PATH = "/v1/messages"
KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# Claude Code's line for the accounts: another one in each request, in front of all that is the same
_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n?")
REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


class Thinking(Part):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class ToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Edit(Part):
    """Thoughts of earlier turns: the published templates leave them out."""

    type: Literal["clear_thinking_20251015"]


class ContextManagement(Object):
    edits: list[Edit] = Field(default_factory=list)


class Format(Object):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Object):
    effort: str | None = None
    format: Format | None = None


class Tool(Part):
    name: str
    type: Literal["custom"] | None = None
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


class MessagesBody(Body):
    messages: list[dict[str, Any]]
    max_tokens: int | None = None
    system: Any = None
    stop_sequences: list[str] = Field(default_factory=list)
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    speed: Annotated[Any, only("standard")] = None
    # They change nothing here
    cache_control: dict[str, Any] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None


class Messages:
    """The protocol: bodies in, objects out."""

    path = PATH

    def __init__(self, pair: Pair, limits: Limits) -> None:
        self._pair, self._limits = pair, limits

    def read(self, given: Mapping[str, Any]) -> Ask:
        """What is asked.

        Raises:
            Refused, ValueError: The request cannot be served; the message says why.
        """
        body = checked(MessagesBody, given)
        if body.max_tokens is None:
            raise Refused(400, "[serve] max_tokens must be given but is missing.")
        return admit(self._pair, self._wish(body), self._limits)

    def reply(self, ask: Ask) -> MessageReply:
        return MessageReply(ask)

    def _wish(self, body: MessagesBody) -> Wish:
        thinking, choice = body.thinking, body.tool_choice
        return Wish(
            model=body.model,
            prompts=[_conversation(body)],
            place="messages",
            sampling=body.sampling(),
            # It must be given, so clients name the most of the model that they have in mind
            max_tokens=min(body.max_tokens or 0, self._limits.length),
            stop=body.stop_sequences,
            block_size=body.block_size,
            streamed=body.stream,
            variables=body.chat_template_kwargs,
            thinking=None if thinking is None else thinking.type != "disabled",
            thinking_budget=None if thinking is None else thinking.budget_tokens,
            tools=[_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools)],
            tool_choice=_choice(choice),
            parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
            form=body.form(_form(body.output_config)),
            own=thinking is None or thinking.display != "omitted",
        )


def _form(output: OutputConfig | None) -> dict[str, Any] | None:
    """In OpenAI's words."""
    if output is None or output.format is None:
        return None
    return {"type": "json_schema", "json_schema": {"schema": output.format.schema_}}


def _choice(choice: ToolChoice | None) -> str | dict[str, Any]:
    """In OpenAI's words."""
    if choice is None:
        return "auto"
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """In OpenAI's form, which templates read."""
    made = checked(Tool, tool, where)
    function: dict[str, Any] = {"name": made.name, "parameters": made.input_schema}
    if made.description is not None:
        function["description"] = made.description
    if made.strict is not None:
        function["strict"] = made.strict
    return {"type": "function", "function": function}


def _conversation(body: MessagesBody) -> list[dict[str, Any]]:
    """In the form that templates read: results of tools are messages of their own."""
    messages: list[dict[str, Any]] = []
    texts = [] if body.system is None else _texts(body.system, "system")
    words = [{**text, "text": _BILLING.sub("", text["text"], count=1)} for text in texts]
    if any(text["text"] for text in words):
        messages.append({"role": "system", "content": [text for text in words if text["text"]]})
    for number, message in enumerate(body.messages):
        where, role = f"messages[{number}]", message.get("role")
        if role not in ("user", "assistant", "system"):
            said = shown(role)
            raise Refused(
                400, f"[serve] {where}.role must be user, assistant or system but got {said}."
            )
        blocks = _blocks(message.get("content"), f"{where}.content")
        if role == "assistant":
            messages.append(_assistant(blocks, where))
        else:
            messages += _others(role, blocks, where)
    if body.messages and body.messages[-1].get("role") == "assistant":
        raise Refused(400, "[serve] messages must not end with the assistant's, to be continued.")
    return messages


def _blocks(content: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not (isinstance(content, list) and all(isinstance(block, dict) for block in content)):
        raise Refused(400, f"[serve] {where} must be a string or a list of blocks.")
    return content


def _texts(content: Any, where: str) -> list[dict[str, Any]]:
    """Blocks that may be text alone."""
    return [_text(block, where) for block in _blocks(content, where)]


def _text(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    if block.get("type") != "text" or not isinstance(block.get("text"), str):
        said = shown(block.get("type"))
        raise Refused(400, f"[serve] {where} must hold text here but got a block of type {said}.")
    return {"type": "text", "text": block["text"]}


def _assistant(blocks: Sequence[Mapping[str, Any]], where: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for number, block in enumerate(blocks):
        at = f"{where}.content[{number}]"
        if block.get("type") == "thinking":
            thoughts.append(_string(block, "thinking", at))
        elif block.get("type") == "tool_use":
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise Refused(400, f"[serve] {at}.input must be an object.")
            function = {"name": _string(block, "name", at), "arguments": arguments}
            calls.append({"id": _string(block, "id", at), "type": "function", "function": function})
        else:
            texts.append(_text(block, at))
    message: dict[str, Any] = {"role": "assistant", "content": texts or ""}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _others(role: str, blocks: Sequence[Mapping[str, Any]], where: str) -> Iterator[dict[str, Any]]:
    """Results of tools, then what the user says."""
    texts = []
    for number, block in enumerate(blocks):
        at = f"{where}.content[{number}]"
        if block.get("type") == "tool_result":
            result = block.get("content")
            yield {
                "role": "tool",
                "tool_call_id": _string(block, "tool_use_id", at),
                "content": "" if result is None else _texts(result, f"{at}.content"),
            }
        else:
            texts.append(_text(block, at))
    if texts or not blocks:
        yield {"role": role, "content": texts}


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise Refused(400, f"[serve] {where}.{name} must be a string but got {kind(value)}.")
    return value


class MessageReply:
    """One message, as an object or as events that put it together.

    Thoughts and text come in blocks of their own as they are made, calls at the end: the order of
    blocks is that of the whole message, wherever a round ends.
    """

    done = ""
    spell = staticmethod(named_event)

    def __init__(self, ask: Ask) -> None:
        self.ask, self._tells_thoughts = ask, ask.own
        self._id = f"msg_{uuid.uuid4().hex}"
        self._open: str | None = None  # the type of the block under way
        self._count = 0

    def whole(self, echoed: Mapping[int, Step], results: Sequence[Result]) -> dict[str, Any]:
        [result] = results
        content: list[dict[str, Any]] = []
        if result.thinking and self._tells_thoughts:
            content.append({"type": "thinking", "thinking": result.thinking, "signature": ""})
        if result.text:
            content.append({"type": "text", "text": result.text})
        for call in result.tool_calls:
            content.append({**_use(call), "input": json.loads(call.arguments)})
        end = self._end(result)
        return {**self._message(), "content": content, **end, "usage": usage_of(self.ask, result)}

    def start(self) -> Iterator[dict[str, Any]]:
        usage = {"input_tokens": len(self.ask.ids), "output_tokens": 0}
        yield {"type": "message_start", "message": {**self._message(), "usage": usage}}

    def chunks(self, index: int, step: Step) -> Iterator[dict[str, Any]]:
        if step.thinking and self._tells_thoughts:
            yield from self._block("thinking", {"thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": step.thinking})
        if step.text:
            yield from self._block("text", {"text": ""})
            yield self._delta({"type": "text_delta", "text": step.text})

    def end(self, index: int, result: Result) -> Iterator[dict[str, Any]]:
        for call in result.tool_calls:
            yield from self._stop()
            yield from self._block("tool_use", {**_use(call), "input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": call.arguments})
        yield from self._stop()
        end = self._end(result)
        usage = usage_of(self.ask, result)
        delta = {"type": "message_delta", "delta": end, "usage": usage, **approximate(self.ask)}
        if result.warning is not None:
            delta["warning"] = end.pop("warning")
        yield delta
        yield {"type": "message_stop"}

    def close(self, results: Sequence[Result]) -> Iterator[dict[str, Any]]:
        return iter(())

    def failed(self, error: Refused) -> Iterator[dict[str, Any]]:
        yield error_body(error)

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self.ask.pair.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            **approximate(self.ask),
        }

    def _end(self, result: Result) -> dict[str, Any]:
        stop = self.ask.stop_string(result)
        reason = "stop_sequence" if stop is not None else REASONS.get(result.finish_reason or "")
        warning = {} if result.warning is None else {"warning": result.warning}
        return {"stop_reason": reason or "end_turn", "stop_sequence": stop, **warning}

    def _block(self, name: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Begin a block unless one of its kind is under way."""
        if self._open == name:
            return
        yield from self._stop()
        self._open = name
        block = {"type": name, **block}
        yield {"type": "content_block_start", "index": self._count, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._count, "delta": delta}

    def _stop(self) -> Iterator[dict[str, Any]]:
        if self._open is not None:
            yield {"type": "content_block_stop", "index": self._count}
            self._open = None
            self._count += 1


def _use(call: ToolCall) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name}


def usage_of(ask: Ask, result: Result) -> dict[str, Any]:
    """Tokens, those known from earlier requests apart, and this engine's own figures."""
    known = cached_tokens(ask, [result]) if ask.cached_tokens else 0
    return {
        "input_tokens": len(ask.ids) - known,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": known,
        "output_tokens": len(result.tokens),
        **own_usage(ask, [result]),
    }


def error_body(error: Refused) -> dict[str, Any]:
    """An error in Anthropic's envelope."""
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    told = {"type": KINDS.get(error.status, usual), "message": str(error)}
    return {"type": "error", "error": told}
