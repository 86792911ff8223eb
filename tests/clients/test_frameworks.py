"""Libraries that people build on: each chats, streams, calls a tool, and hears of an error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Server
from telling import RAIN, SAYS, WEATHER, needs, telling_server

pytestmark = pytest.mark.clients
TOOL: dict[str, Any] = {"type": "function", "function": WEATHER}
KEY = "sesame"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with telling_server(tmp_path_factory.mktemp("pair"), key=KEY) as made:
        yield made


def user(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": word}]


@needs("litellm", "clients")
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_litellm(server: Server, provider: str) -> None:
    import litellm

    base = f"{server.url}/v1" if provider == "openai" else server.url
    ask: dict[str, Any] = {"model": f"{provider}/teller", "api_base": base, "api_key": KEY}
    ask |= {"num_retries": 0}
    said = litellm.completion(messages=user("fox"), **ask)
    assert said.choices[0].message.content == SAYS["fox"]
    pieces = litellm.completion(messages=user("fox"), stream=True, **ask)
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == SAYS["fox"]
    said = litellm.completion(messages=user("rain"), tools=[TOOL], **ask).choices[0]
    calls = said.message.tool_calls
    assert said.finish_reason == "tool_calls"
    assert [json.loads(call.function.arguments) for call in calls] == [{"town": "Bonn"}] * 2
    results = [{"role": "tool", "tool_call_id": call.id, "content": "wet"} for call in calls]
    messages = [*user("rain"), said.message.model_dump(), *results]
    said = litellm.completion(messages=messages, tools=[TOOL], **ask)
    assert said.choices[0].message.content == RAIN
    with pytest.raises(litellm.BadRequestError, match="max_tokens must be at least 1"):
        litellm.completion(messages=user("fox"), max_tokens=0, **ask)


@needs("langchain_openai", "clients")
@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_langchain(server: Server, responses: bool) -> None:
    import openai
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    settings: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": KEY, "model": "teller"}
    settings |= {"max_retries": 0, "use_responses_api": responses}
    model = ChatOpenAI(**settings)
    assert model.invoke("fox").text == SAYS["fox"]
    assert "".join(piece.text for piece in model.stream("fox")) == SAYS["fox"]
    bound = model.bind_tools([TOOL])
    said = bound.invoke("rain")
    assert [call["args"] for call in said.tool_calls] == [{"town": "Bonn"}] * 2
    results = [ToolMessage("wet", tool_call_id=call["id"]) for call in said.tool_calls]
    assert bound.invoke([HumanMessage("rain"), said, *results]).text == RAIN
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1"):
        ChatOpenAI(**settings, max_tokens=0).invoke("fox")


@needs("instructor", "clients")
@needs("llguidance", "grammar")
def test_instructor(server: Server) -> None:
    """By words, by a schema, and by a tool that is asked for by name."""
    import instructor
    import openai
    import pydantic
    from instructor.core.exceptions import InstructorRetryException

    class Weather(pydantic.BaseModel):
        town: str

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    with_json = instructor.from_openai(client, mode=instructor.Mode.MD_JSON)
    made = with_json.chat.completions.create(
        model="teller", messages=user("object"), response_model=Weather, max_retries=1
    )
    assert made.town == "Bonn"
    parts = with_json.chat.completions.create_partial(
        model="teller", messages=user("object"), response_model=Weather, max_retries=1
    )
    assert list(parts)[-1].town == "Bonn"
    for mode, word in ((instructor.Mode.TOOLS, "once"), (instructor.Mode.JSON_SCHEMA, "plainly")):
        made = instructor.from_openai(client, mode=mode).chat.completions.create(
            model="teller", messages=user(word), response_model=Weather, max_retries=1
        )
        assert made.town == "Bonn"
    with pytest.raises(InstructorRetryException, match="seed must be 0"):
        with_json.chat.completions.create(
            model="teller", messages=user("object"), response_model=Weather, max_retries=1, seed=-1
        )


@needs("pydantic_ai", "clients")
@needs("llguidance", "grammar")
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_pydantic_ai(server: Server, api: str) -> None:
    from pydantic_ai import Agent
    from pydantic_ai.exceptions import ModelHTTPError
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key=KEY)
    model = (OpenAIChatModel if api == "chat" else OpenAIResponsesModel)(
        "teller", provider=provider
    )
    agent = Agent(model, retries=0)
    towns = []

    @agent.tool_plain
    def weather(town: str) -> str:
        """Weather of a town."""
        towns.append(town)
        return "wet"

    async def streamed() -> str:
        async with agent.run_stream("fox") as stream:
            return "".join([piece async for piece in stream.stream_text(delta=True)])

    async def all_of_it() -> tuple[str, str, str]:  # in one loop, which its client keeps
        whole, pieces = (await agent.run("fox")).output, await streamed()
        return whole, pieces, (await agent.run("rain")).output

    assert asyncio.run(all_of_it()) == (SAYS["fox"], SAYS["fox"], RAIN)
    assert towns == ["Bonn", "Bonn"]
    with pytest.raises(ModelHTTPError, match="max_tokens must be at most 8192"):
        agent.run_sync("fox", model_settings={"max_tokens": 10**6})


@needs("agents", "clients")
@needs("llguidance", "grammar")
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_openai_agents(server: Server, api: str) -> None:
    import agents
    import openai

    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    agents.set_tracing_disabled(True)
    kind = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
    towns = []

    @agents.function_tool
    def weather(town: str) -> str:
        """Weather of a town."""
        towns.append(town)
        return "wet"

    settings: dict[str, Any] = {"name": "A", "model": kind("teller", client), "tools": [weather]}
    agent = agents.Agent(**settings)

    async def all_of_it() -> tuple[str, str]:
        whole = (await agents.Runner.run(agent, "fox")).final_output
        streamed = agents.Runner.run_streamed(agent, "rain")
        async for _ in streamed.stream_events():
            pass
        with pytest.raises(openai.BadRequestError, match="max_tokens must be at most 8192"):
            most = agents.ModelSettings(max_tokens=10**6)
            await agents.Runner.run(agents.Agent(**settings, model_settings=most), "fox")
        return whole, streamed.final_output

    assert asyncio.run(all_of_it()) == (SAYS["fox"], RAIN)
    assert towns == ["Bonn", "Bonn"]


@needs("smolagents", "clients")
@needs("llguidance", "grammar")
def test_smolagents(server: Server) -> None:
    """The model behind its agents; a tool is required unless told otherwise."""
    import openai
    import smolagents

    @smolagents.tool
    def weather(town: str) -> str:
        """Weather of a town.

        Args:
            town: The town's name.
        """
        return "wet"

    model = smolagents.OpenAIServerModel(
        "teller", api_base=f"{server.url}/v1", api_key=KEY, client_kwargs={"max_retries": 0}
    )
    messages = [smolagents.ChatMessage(role="user", content=user_text("fox"))]
    assert model.generate(messages).content == SAYS["fox"]
    pieces = model.generate_stream(messages)
    assert "".join(piece.content or "" for piece in pieces) == SAYS["fox"]
    for word, choice, count in (("rain", "auto", 2), ("once", "required", 1)):
        messages = [smolagents.ChatMessage(role="user", content=user_text(word))]
        said = model.generate(messages, tools_to_call_from=[weather], tool_choice=choice)
        assert [call.function.name for call in said.tool_calls] == ["weather"] * count
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at most 8192"):
        model.generate(messages, max_tokens=10**6)


def user_text(word: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": word}]
