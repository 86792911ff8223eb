"""OpenAI's chat completions, ``/v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, field_validator

from pyengine.sampling.sampler import Logprob
from pyengine.serve.protocols.ask import Ask, Effort, Limits, Refused, Wish, admit, wants_thoughts
from pyengine.serve.protocols.choices import (
    Choice,
    ChoicesBody,
    ChoicesReply,
    StreamOptions,
    spelled,
)
from pyengine.serve.protocols.fields import checked, only, wrong
from pyengine.task import Result, Step
from pyengine.text.tool_calls import ToolCall

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair


def _objects(value: Any) -> Any:
    if not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
        raise wrong("must be a list of objects")
    return value


class ChatStreamOptions(StreamOptions):
    include_rounds: bool = False


class ChatBody(ChoicesBody):
    stream_options: ChatStreamOptions | None = None
    messages: Annotated[list[dict[str, Any]], BeforeValidator(_objects)]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: list[Any] = Field(default_factory=list)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    reasoning_effort: Effort | None = None
    thinking_budget: int | None = None
    response_format: dict[str, Any] | None = None
    modalities: Annotated[Any, only(["text"])] = None
    verbosity: Annotated[Any, only("medium")] = None
    # They change nothing here
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    service_tier: str | None = None

    @field_validator("top_logprobs")
    @classmethod
    def _with_logprobs(cls, value: Any, info: Any) -> Any:
        if value is not None and not info.data.get("logprobs"):
            raise wrong("must go with logprobs")
        return value


class Chat:
    """The protocol: bodies in, objects out."""

    path = "/v1/chat/completions"

    def __init__(self, pair: Pair, limits: Limits) -> None:
        self._pair, self._limits = pair, limits

    def read(self, given: Mapping[str, Any]) -> Ask:
        """What is asked.

        Raises:
            Refused, ValueError: The request cannot be served; the message says why.
        """
        body = checked(ChatBody, given)
        if None not in (body.max_tokens, body.max_completion_tokens):
            raise Refused(400, "[serve] max_tokens must not go with max_completion_tokens.")
        sampling = body.sampling()
        if body.logprobs:
            sampling["logprobs"] = body.top_logprobs or 0
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        wish = Wish(
            model=body.model,
            prompts=[body.messages],
            place="messages",
            sampling=sampling,
            max_tokens=most,
            n=body.n,
            stop=body.stop,
            block_size=body.block_size,
            streamed=body.stream,
            with_usage=body.with_usage,
            variables=body.chat_template_kwargs,
            thinking=wants_thoughts(body.reasoning_effort),
            thinking_budget=body.thinking_budget,
            tools=body.tools,
            tool_choice=body.tool_choice,
            parallel_tool_calls=body.parallel_tool_calls,
            form=body.form(body.response_format),
            own=body.stream_options is not None and body.stream_options.include_rounds,
        )
        return admit(self._pair, wish, self._limits)

    def reply(self, ask: Ask) -> ChatReply:
        return ChatReply(ask)


class ChatChoice(Choice):
    def __init__(self, ask: Ask, index: int) -> None:
        super().__init__(ask, index)
        self._begun = False
        self._calls = 0  # that were told

    def whole(self, echoed: Step | None, result: Result) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": result.text}
        if result.thinking is not None:
            message["reasoning_content"] = result.thinking
        if result.tool_calls:
            message["tool_calls"] = list(map(_call, result.tool_calls))
            message["content"] = result.text or None
        return {
            "index": self.index,
            "finish_reason": result.finish_reason or "stop",
            "message": message,
            "logprobs": self._logprobs(result.logprobs or ()),
            **_warning(result),
        }

    def parts(self, step: Step) -> Iterator[dict[str, Any]]:
        if step.thinking:
            yield self.part({"delta": self._delta(reasoning_content=step.thinking)}, None)
        if step.text or step.logprobs:
            delta = self._delta(content=step.text)
            yield self.part({"delta": delta}, None, self._logprobs(step.logprobs))
        for call in step.tool_calls:
            place, self._calls = {"index": self._calls}, self._calls + 1
            opened = {**place, **_call(call._replace(arguments=""))}
            yield self.part({"delta": self._delta(tool_calls=[opened])}, None)
            arguments = {**place, "function": {"arguments": call.arguments}}
            yield self.part({"delta": self._delta(tool_calls=[arguments])}, None)

    def end(self, result: Result) -> dict[str, Any]:
        part = {"delta": self._delta(), **_warning(result)}
        return self.part(part, result.finish_reason or "stop")

    def _delta(self, **parts: Any) -> dict[str, Any]:
        """Clients put deltas together, so the role is told once."""
        begun, self._begun = self._begun, True
        return parts if begun else {"role": "assistant", **parts}

    def _logprobs(self, rows: Sequence[Logprob]) -> dict[str, Any] | None:
        return None if self.ask.sampling.logprobs is None else {"content": spelled(self.ask, rows)}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _warning(result: Result) -> dict[str, str]:
    return {} if result.warning is None else {"warning": result.warning}


def _round(step: Step) -> dict[str, Any]:
    """The round that made a step, for those who want to see it."""
    return {
        "drafted": step.drafted,
        "accepted": step.accepted,
        "tokens": step.tokens,
        "content": [piece.text for piece in step.pieces],
        "reasoning_content": [piece.thinking for piece in step.pieces],
        "sources": list(step.sources),
    }


class ChatReply(ChoicesReply):
    """With rounds, the first chunk that a round gives tells of it, ahead of the text it made."""

    prefix = "chatcmpl"
    whole_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    choice = ChatChoice

    def chunks(self, index: int, step: Step) -> Iterable[dict[str, Any]]:
        chunks = super().chunks(index, step)
        return self._with_round(index, step, chunks) if self.ask.own and step.tokens else chunks

    def _with_round(
        self, index: int, step: Step, chunks: Iterable[dict[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        first, *others = [*chunks] or [self._chunk(self.choices[index].part({"delta": {}}, None))]
        yield {**first, "pyengine": {"round": _round(step)}}
        yield from others
