"""Answers of a shape, by every way in which client libraries ask for them, and an agent that ends
with a call: `pytest -m clients`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server
from teller import telling, thinking_tokenizer
from telling import needs, telling_server

KEY = "sesame"
END = '<|tool_call>call:final_answer{answer:<|"|>It rains.<|"|>}<tool_call|><|tool_response>'
LOOK = '<|tool_call>call:weather{town:<|"|>Bonn<|"|>}<tool_call|><|tool_response>'

pytestmark = [pytest.mark.clients, needs("llguidance", "grammar")]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with telling_server(tmp_path_factory.mktemp("pair"), key=KEY) as made:
        yield made


def weather() -> Any:
    import pydantic

    class Weather(pydantic.BaseModel):
        town: str

    Weather.__name__ = "weather"  # which is what some clients call its tool
    return Weather


@needs("langchain_openai", "clients")
@pytest.mark.parametrize("responses", [False, True], ids=["chat", "responses"])
def test_langchain(server: Server, responses: bool) -> None:
    from langchain_openai import ChatOpenAI

    model = ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key=KEY,  # type: ignore[arg-type]
        model="teller",
        max_retries=0,
        use_responses_api=responses,
    )
    kind = weather()
    ways = {"json_schema": "plainly", "function_calling": "once", "json_mode": "plainly"}
    for method, word in ways.items():
        asked = model.with_structured_output(kind, method=method)  # type: ignore[arg-type]
        assert asked.invoke(word) == kind(town="Bonn"), method


@needs("pydantic_ai", "clients")
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_pydantic_ai(server: Server, api: str) -> None:
    from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{server.url}/v1", api_key=KEY)
    model = (OpenAIChatModel if api == "chat" else OpenAIResponsesModel)(
        "teller", provider=provider
    )
    kind = weather()

    async def all_of_it() -> list[Any]:  # in one loop, which its client keeps
        return [
            (await Agent(model, output_type=form, retries=0).run(word)).output
            for form, word in (
                (ToolOutput(kind, name="weather"), "once"),
                (NativeOutput(kind), "plainly"),
                (PromptedOutput(kind), "Say it plainly"),
            )
        ]

    assert asyncio.run(all_of_it()) == [kind(town="Bonn")] * 3


@needs("agents", "clients")
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_openai_agents(server: Server, api: str) -> None:
    import agents
    import openai

    client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    agents.set_tracing_disabled(True)
    model = agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
    kind = weather()
    agent = agents.Agent(name="A", model=model("teller", client), output_type=kind)
    assert agents.Runner.run_sync(agent, "plainly").final_output == kind(town="Bonn")


@needs("litellm", "clients")
def test_litellm(server: Server) -> None:
    import litellm

    said = litellm.completion(
        model="openai/teller",
        api_base=f"{server.url}/v1",
        api_key=KEY,
        messages=[{"role": "user", "content": "plainly"}],
        response_format=weather(),
    )
    assert json.loads(said.choices[0].message.content) == {"town": "Bonn"}


@needs("smolagents", "clients")
def test_an_agent_of_smolagents(tmp_path: Path) -> None:
    """It asks for a call each time, until one is its final answer."""
    import smolagents

    @smolagents.tool
    def weather(town: str) -> str:
        """Weather of a town.

        Args:
            town: The town's name.
        """
        return "wet"

    pair = telling(thinking_tokenizer(tmp_path), {"": LOOK, "wet": END})
    with Server(pair, key=KEY) as server:
        model = smolagents.OpenAIServerModel(
            "teller", api_base=f"{server.url}/v1", api_key=KEY, client_kwargs={"max_retries": 0}
        )
        agent = smolagents.ToolCallingAgent(tools=[weather], model=model, max_steps=3)
        assert agent.run("rain") == "It rains."


@needs("llm", "clients")
def test_llm(server: Server, tmp_path: Path) -> None:
    """The command, with a model of one's own in its file."""
    lines = ["- model_id: here", "  model_name: teller", "  supports_schema: true"]
    lines += [f"  api_base: {server.url}/v1", "  api_key_name: here"]
    (tmp_path / "extra-openai-models.yaml").write_text("\n".join(lines))
    (tmp_path / "keys.json").write_text(json.dumps({"here": KEY}))
    for more, want in ([], "jumps over the dog"), (["--schema", "town str"], '{"town": "Bonn"}'):
        done = subprocess.run(
            [sys.executable, "-m", "llm", "-m", "here", "plainly" if more else "fox", *more],
            env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == want
