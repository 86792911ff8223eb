"""OpenAI's Responses API, ``/v1/responses``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from pyengine.serve.protocols.ask import (
    Ask,
    Effort,
    Limits,
    Refused,
    Wish,
    admit,
    wants_thoughts,
)
from pyengine.serve.protocols.choices import cached_tokens, own_usage
from pyengine.serve.protocols.faces import approximate, named_event
from pyengine.serve.protocols.fields import Body, Object, Part, checked, only
from pyengine.serve.protocols.kept import Store
from pyengine.serve.protocols.response_items import (
    Conversation,
    answer,
    new_call,
    new_message,
    new_reasoning,
    part_of,
)
from pyengine.serve.thinking import Thoughts
from pyengine.task import Result, Step

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair


class Reasoning(Part):
    """Whatever summary is asked for: thoughts are told whole, or there are none."""

    effort: Effort | None = None


class Text(Object):
    format: dict[str, Any] | None = None
    verbosity: Annotated[Any, only("medium", None)] = None


class StreamOptions(Object):
    include_obfuscation: Annotated[Any, only(False, None)] = None


class Tool(Part):
    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Namespace(Part):
    name: str
    tools: list[dict[str, Any]]


# What the server itself would have to run, or what has no form in a template: agents offer them
# always, and go on without. The model is not told of them.
LEFT_OUT = {
    *("web_search", "web_search_preview", "file_search", "code_interpreter", "image_generation"),
    *("mcp", "computer", "computer_use_preview", "local_shell", "shell", "apply_patch"),
    *("tool_search", "custom"),
}


class ToolChoice(Part):
    type: Literal["function"]
    name: str


class ResponsesBody(Body):
    input: Any = Field(default_factory=list)
    instructions: str | None = None
    previous_response_id: str | None = None
    max_output_tokens: int | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    reasoning: Reasoning | None = None
    thinking_budget: int | None = None
    text: Text | None = None
    store: bool = True
    stream_options: StreamOptions | None = None
    background: Annotated[Any, only(False)] = False
    # Nothing is encrypted: thoughts come as text
    include: list[Literal["reasoning.encrypted_content"]] = Field(default_factory=list)
    top_logprobs: Annotated[Any, only(0)] = 0
    truncation: Annotated[Any, only("disabled")] = "disabled"
    # They change nothing here
    max_tool_calls: int | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None
    client_metadata: dict[str, Any] | None = None


class Own(NamedTuple):
    """What a reply has to know of its request."""

    body: ResponsesBody
    messages: list[dict[str, Any]]  # without instructions, which concern one answer alone
    spaces: dict[str, tuple[str, str]]  # as new_call takes them


class Responses:
    """The protocol: bodies in, objects out."""

    path = "/v1/responses"

    def __init__(self, pair: Pair, limits: Limits) -> None:
        self._pair, self._limits = pair, limits
        self.store = Store(limits)

    def read(self, given: Mapping[str, Any]) -> Ask:
        """What is asked.

        Raises:
            Refused, ValueError: The request cannot be served; the message says why.
        """
        body = checked(ResponsesBody, given)
        before = body.previous_response_id
        known = [] if before is None else self.store.conversation(before)
        talk = Conversation(known, self.store)
        items = [{"role": "user", "content": body.input}] if _is_text(body.input) else body.input
        if not isinstance(items, list):
            raise Refused(400, "[serve] input must be a string or a list of items.")
        for number, item in enumerate(items):
            talk.add(item, f"input[{number}]")
        tools, spaces = _offered(body.tools)
        wish = Wish(
            model=body.model,
            prompts=[talk.with_instructions(body.instructions)],
            place="input",
            sampling=body.sampling(),
            max_tokens=body.max_output_tokens,
            block_size=body.block_size,
            streamed=body.stream,
            variables=body.chat_template_kwargs,
            thinking=wants_thoughts(body.reasoning.effort) if body.reasoning else None,
            thinking_budget=body.thinking_budget,
            tools=tools,
            tool_choice=_choice(body.tool_choice),
            parallel_tool_calls=body.parallel_tool_calls,
            form=body.form(_form(body.text)),
            own=Own(body, talk.messages, spaces),
        )
        return admit(self._pair, wish, self._limits)

    def reply(self, ask: Ask) -> ResponseReply:
        return ResponseReply(ask, self.store)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _offered(
    tools: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
    """The functions that the model is told of, and those of them that are in namespaces."""
    offered: list[dict[str, Any]] = []
    spaces: dict[str, tuple[str, str]] = {}
    for i, tool in enumerate(tools):
        if tool.get("type") == "namespace":
            space = checked(Namespace, tool, f"tools[{i}]")
            for j, inner in enumerate(space.tools):
                if inner.get("type") in LEFT_OUT:
                    continue
                made = _tool(inner, f"tools[{i}].tools[{j}]")
                name = made["function"]["name"]
                made["function"]["name"] = f"{space.name}.{name}"
                spaces[f"{space.name}.{name}"] = space.name, name
                offered.append(made)
        elif tool.get("type") not in LEFT_OUT:
            offered.append(_tool(tool, f"tools[{i}]"))
    return offered, spaces


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """In the form of chat completions, which templates read."""
    made = checked(Tool, tool, where)
    function = made.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _form(text: Text | None) -> dict[str, Any] | None:
    """In the form of chat completions, where a schema lies one level deeper."""
    if text is None or text.format is None or text.format.get("type") != "json_schema":
        return None if text is None else text.format
    schema = {key: value for key, value in text.format.items() if key != "type"}
    return {"type": "json_schema", "json_schema": schema}


def _choice(choice: Any) -> str | dict[str, Any]:
    """In the words of chat completions."""
    if not isinstance(choice, dict):
        return str(choice)
    return {
        "type": "function",
        "function": {"name": checked(ToolChoice, choice, "tool_choice").name},
    }


class ResponseReply:
    """One response, as an object or as events that put it together.

    Thoughts and text come in items of their own as they are made, calls at the end: the order of
    items is that of the whole response, wherever a round ends.
    """

    done = ""
    spell = staticmethod(named_event)

    def __init__(self, ask: Ask, store: Store) -> None:
        self.ask, self._store = ask, store
        self._own: Own = ask.own
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = 0  # of the next event
        self._output: list[dict[str, Any]] = []  # items that are done
        self._open: dict[str, Any] | None = None
        self._text: list[str] = []  # of the open item

    def whole(self, echoed: Mapping[int, Step], results: Sequence[Result]) -> dict[str, Any]:
        [result] = results
        for _ in self._items(result.thinking or "", result.text):
            pass
        for _ in self._end(result):
            pass
        return self._finished(result)

    def start(self) -> Iterator[dict[str, Any]]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response("in_progress"))

    def chunks(self, index: int, step: Step) -> Iterator[dict[str, Any]]:
        return self._items(step.thinking, step.text)

    def end(self, index: int, result: Result) -> Iterator[dict[str, Any]]:
        yield from self._end(result)
        finished = self._finished(result)
        yield self._event(f"response.{finished['status']}", response=finished)

    def close(self, results: Sequence[Result]) -> Iterator[dict[str, Any]]:
        return iter(())

    def failed(self, error: Refused) -> Iterator[dict[str, Any]]:
        told = {"code": "server_error" if error.status >= 500 else "invalid_prompt"}
        told["message"] = str(error)
        yield self._event("response.failed", response=self._response("failed", error=told))

    def _items(self, thinking: str, text: str) -> Iterator[dict[str, Any]]:
        """What a round adds to items of thoughts and of text."""
        for name, new, words in (
            ("reasoning", new_reasoning, thinking),
            ("message", new_message, text),
        ):
            if not words:
                continue
            if self._open is None or self._open["type"] != name:
                yield from self._close_item()
                yield self._begin(new())
                assert self._open is not None
                part = part_of(self._open, "")
                yield self._inside("response.content_part.added", part=part)
            self._text.append(words)
            if name == "reasoning":
                yield self._inside("response.reasoning_text.delta", delta=words)
            else:
                yield self._inside("response.output_text.delta", delta=words, logprobs=[])

    def _end(self, result: Result) -> Iterator[dict[str, Any]]:
        """The end of what is open, and the calls."""
        yield from self._close_item(result.finish_reason == "length")
        for call in result.tool_calls:
            yield self._begin(new_call(call, self._own.spaces))
            assert self._open is not None
            item = self._open
            place = {"item_id": item["id"], "output_index": len(self._output)}
            name = "response.function_call_arguments"
            yield self._event(f"{name}.delta", **place, delta=call.arguments)
            item["arguments"] = call.arguments
            own = {"name": item["name"], "arguments": call.arguments}
            yield self._event(f"{name}.done", **place, **own)
            yield self._done(item)

    def _begin(self, item: dict[str, Any]) -> dict[str, Any]:
        self._open, self._text = item, []
        added = {**item, "content": []} if "content" in item else dict(item)
        index = len(self._output)
        return self._event("response.output_item.added", output_index=index, item=added)

    def _close_item(self, is_cut: bool = False) -> Iterator[dict[str, Any]]:
        """End the item of thoughts or text that is under way."""
        if self._open is None:
            return
        item, text = self._open, "".join(self._text)
        if item["type"] == "reasoning":
            yield self._inside("response.reasoning_text.done", text=text)
        else:
            yield self._inside("response.output_text.done", text=text, logprobs=[])
        part = part_of(item, text)
        yield self._inside("response.content_part.done", part=part)
        item["content"] = [part]
        yield self._done(item, is_cut)

    def _done(self, item: dict[str, Any], is_cut: bool = False) -> dict[str, Any]:
        item["status"] = "incomplete" if is_cut else "completed"
        event = self._event(
            "response.output_item.done", output_index=len(self._output), item=dict(item)
        )
        self._output.append(item)
        self._open = None
        return event

    def _inside(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An event of the open item's content."""
        assert self._open is not None
        place = {"item_id": self._open["id"], "output_index": len(self._output), "content_index": 0}
        return self._event(kind, **place, **fields)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self._number = self._number, self._number + 1
        return {"type": kind, "sequence_number": number, **fields}

    def _finished(self, result: Result) -> dict[str, Any]:
        """The response, and what follows on it may find it from now on."""
        body, messages = self._own.body, self._own.messages
        is_cut = result.finish_reason == "length"
        response = self._response(
            "incomplete" if is_cut else "completed",
            incomplete_details={"reason": "max_output_tokens"} if is_cut else None,
            completed_at=int(time.time()),
            usage=usage_of(self.ask, result),
            **({} if result.warning is None else {"warning": result.warning}),
        )
        if body.store:
            self._store.keep([*messages, answer(result)], response)
        return response

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        body, sampling = self._own.body, self.ask.sampling
        effort = body.reasoning.effort if body.reasoning else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.ask.pair.name,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": effort, "summary": None},
            "store": body.store,
            "temperature": sampling.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice,
            "tools": body.tools,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
            **approximate(self.ask),
            **fields,
        }


def usage_of(ask: Ask, result: Result) -> dict[str, Any]:
    """Token counts of the protocol, and this engine's own figures."""
    thoughts = Thoughts(ask.pair.tokenizer, ask.ids)
    for token in result.tokens:
        thoughts.add(token)
    known = cached_tokens(ask, [result]) if ask.cached_tokens else 0
    return {
        "input_tokens": len(ask.ids),
        "input_tokens_details": {"cached_tokens": known, "cache_write_tokens": 0},
        "output_tokens": len(result.tokens),
        "output_tokens_details": {"reasoning_tokens": thoughts.count},
        "total_tokens": len(ask.ids) + len(result.tokens),
        **own_usage(ask, [result]),
    }
