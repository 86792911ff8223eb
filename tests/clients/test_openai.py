"""OpenAI's own Python client: chat, completions and responses, over a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="needs the openai client")

from serving import Server  # noqa: E402
from telling import BROKEN, CONTEXT, RAIN, SAYS, WEATHER, needs, telling_server  # noqa: E402

FOX = [{"role": "user", "content": "fox"}]
TOOLS: Any = [{"type": "function", "function": WEATHER}]
ASK: dict[str, Any] = {"model": "teller", "temperature": 0}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with telling_server(tmp_path_factory.mktemp("pair"), key="sesame") as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0)


def user(word: str) -> Any:
    return [{"role": "user", "content": word}]


def test_chat_whole_and_streamed(client: Any) -> None:
    said = client.chat.completions.create(messages=FOX, **ASK)
    assert said.choices[0].message.content == SAYS["fox"]
    assert said.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(messages=FOX, **ASK) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        assert stream.get_final_completion().choices[0].message.content == SAYS["fox"]
    assert "".join(deltas) == SAYS["fox"]


def test_thoughts_by_effort(client: Any, server: Server) -> None:
    """The template opens the thought; what the model says first is in it."""
    ask = {"messages": user("ponder"), **ASK}
    plain = client.chat.completions.create(**ask)
    thought = client.chat.completions.create(reasoning_effort="high", **ask)
    assert plain.choices[0].message.content == "a dog It sleeps."
    message = thought.choices[0].message
    assert message.model_extra["reasoning_content"] == "a dog"
    assert message.content == " It sleeps."


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_and_their_results(client: Any, streamed: bool) -> None:
    messages = user("rain")
    ask = {"messages": messages, "tools": TOOLS, **ASK}
    if streamed:
        with client.chat.completions.stream(**ask) as stream:
            for _ in stream:
                pass
            said = stream.get_final_completion()
    else:
        said = client.chat.completions.create(**ask)
    choice = said.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "I look."
    calls = choice.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [{"town": "Bonn"}] * 2
    assert {call.function.name for call in calls} == {"weather"} and len({c.id for c in calls}) == 2
    messages.append(choice.message.to_dict())
    messages += [{"role": "tool", "tool_call_id": c.id, "content": "wet"} for c in calls]
    said = client.chat.completions.create(messages=messages, tools=TOOLS, **ASK)
    assert said.choices[0].message.content == RAIN


def test_raw_deltas_of_calls(client: Any) -> None:
    """Index, id, type, name and no arguments first, then the arguments."""
    chunks = client.chat.completions.create(
        messages=user("rain"),
        tools=TOOLS,
        stream=True,
        stream_options={"include_usage": True},
        **ASK,
    )
    told = [c for chunk in chunks for x in chunk.choices for c in x.delta.tool_calls or []]
    assert [call.index for call in told] == [0, 0, 1, 1]
    for opened, filled in (told[:2], told[2:]):
        assert (opened.type, opened.function.name, opened.function.arguments) == (
            *("function", "weather", ""),
        )
        assert opened.id and filled.id is None and filled.function.name is None
        assert json.loads(filled.function.arguments) == {"town": "Bonn"}


def test_one_call_and_none(client: Any) -> None:
    ask = {"messages": user("rain"), "tools": TOOLS, **ASK}
    one = client.chat.completions.create(parallel_tool_calls=False, **ask).choices[0]
    assert len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls"
    with pytest.raises(openai.BadRequestError, match="must name one of the tools but got 'time'"):
        named: Any = {"type": "function", "function": {"name": "time"}}
        client.chat.completions.create(tool_choice=named, **ask)


@needs("llguidance", "grammar")
def test_structured_outputs(client: Any) -> None:
    """By the client's own models; a strict tool and one that is required."""
    import pydantic

    class Weather(pydantic.BaseModel):
        town: str

    said = client.chat.completions.parse(messages=user("plainly"), response_format=Weather, **ASK)
    assert said.choices[0].message.parsed == Weather(town="Bonn")
    response = client.responses.parse(input="plainly", text_format=Weather, **ASK)
    assert response.output_parsed == Weather(town="Bonn")
    form: Any = {"type": "json_object"}
    said = client.chat.completions.create(messages=user("plainly"), response_format=form, **ASK)
    assert json.loads(said.choices[0].message.content) == {"town": "Bonn"}
    tool: Any = {"type": "function", "function": {**WEATHER, "strict": True}}
    for choice in ("auto", "required", {"type": "function", "function": {"name": "weather"}}):
        said = client.chat.completions.create(
            messages=user("once"), tools=[tool], tool_choice=choice, **ASK
        )
        [call] = said.choices[0].message.tool_calls
        assert json.loads(call.function.arguments) == {"town": "Bonn"}


def test_a_broken_call_is_text_with_a_warning(client: Any) -> None:
    said = client.chat.completions.create(messages=user("broken"), tools=TOOLS, **ASK).choices[0]
    assert said.finish_reason == "stop" and said.message.tool_calls is None
    assert BROKEN in said.message.content and "call" in said.model_extra["warning"]
    *_, last = client.chat.completions.create(
        messages=user("broken"), tools=TOOLS, stream=True, **ASK
    )
    assert last.choices[0].model_extra["warning"] == said.model_extra["warning"]


def test_several_and_text(client: Any) -> None:
    said = client.completions.create(prompt="fox", max_tokens=100, **ASK)
    assert said.choices[0].text == SAYS["fox"]
    pieces = client.completions.create(prompt="fox", stream=True, **ASK)
    assert "".join(piece.choices[0].text for piece in pieces) == SAYS["fox"]


def test_responses_whole_and_streamed(client: Any) -> None:
    said = client.responses.create(input="fox", **ASK)
    assert said.output_text == SAYS["fox"] and said.status == "completed"
    assert said.usage.output_tokens > 0 and said.error is None
    with client.responses.stream(input="fox", **ASK) as stream:
        deltas = [e.delta for e in stream if e.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output_text == SAYS["fox"]
    cut = client.responses.create(input="fox", max_output_tokens=1, **ASK)
    assert (cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_responses_reason(client: Any) -> None:
    said = client.responses.create(input="ponder", reasoning={"effort": "low"}, **ASK)
    thought, message = said.output
    assert thought.type == "reasoning" and thought.content[0].text == "a dog"
    assert message.content[0].text == " It sleeps."
    assert said.usage.output_tokens_details.reasoning_tokens > 0
    # A chain of them, by id
    next_one = client.responses.create(input="fox", previous_response_id=said.id, **ASK)
    assert next_one.output_text == SAYS["fox"]
    with pytest.raises(openai.NotFoundError, match="must name an answer that is kept"):
        client.responses.create(input="fox", previous_response_id="resp_none", **ASK)


@pytest.mark.parametrize("streamed", [False, True])
def test_responses_call_tools(client: Any, streamed: bool) -> None:
    ask = {"input": "rain", "tools": [{"type": "function", "strict": False, **WEATHER}], **ASK}
    if streamed:
        with client.responses.stream(**ask) as stream:
            told = [e for e in stream if e.type == "response.function_call_arguments.done"]
            said = stream.get_final_response()
        assert len(told) == 2
    else:
        said = client.responses.create(**ask)
    calls = [item for item in said.output if item.type == "function_call"]
    assert [json.loads(call.arguments) for call in calls] == [{"town": "Bonn"}] * 2
    results: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "wet"} for call in calls
    ]
    said = client.responses.create(input=results, previous_response_id=said.id, **ASK)
    assert said.output_text == RAIN


def test_errors_are_the_clients(client: Any, server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="messages must be a list of objects"):
        client.chat.completions.create(messages="hi", **ASK)
    with pytest.raises(openai.NotFoundError, match="the model must be teller"):
        client.responses.create(input="fox", model="gpt")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=user("fox " * CONTEXT), **ASK)
    assert caught.value.code == "context_length_exceeded"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="must carry the server's key"):
        stranger.models.list()
    assert [row.id for row in client.models.list()] == ["teller"]
