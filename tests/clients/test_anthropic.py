"""Anthropic's own Python client, over a real socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

anthropic = pytest.importorskip("anthropic", reason="needs the anthropic client")

from serving import Server  # noqa: E402
from telling import BROKEN, RAIN, SAYS, WEATHER, needs, telling_server  # noqa: E402

TOOLS: Any = [
    {
        "name": WEATHER["name"],
        "description": WEATHER["description"],
        "input_schema": WEATHER["parameters"],
    }
]
ASK: dict[str, Any] = {"model": "teller", "max_tokens": 200, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with telling_server(tmp_path_factory.mktemp("pair"), key="sesame") as made:
        yield made


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return anthropic.Anthropic(base_url=server.url, api_key="sesame", max_retries=0)


def user(word: str) -> Any:
    return [{"role": "user", "content": word}]


def ask(client: Any, streamed: bool, **body: Any) -> Any:
    body = {**ASK, **body}
    if not streamed:
        return client.messages.create(**body)
    with client.messages.stream(**body) as stream:
        for _ in stream:
            pass
        return stream.get_final_message()


BOTH = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


@BOTH
def test_messages(client: Any, streamed: bool) -> None:
    said = ask(client, streamed, messages=user("fox"), system="Be brief.")
    assert [block.text for block in said.content] == [SAYS["fox"]]
    assert (said.stop_reason, said.stop_sequence, said.role) == ("end_turn", None, "assistant")
    assert said.usage.input_tokens + (said.usage.cache_read_input_tokens or 0) > 5
    cut = ask(client, streamed, messages=user("fox"), max_tokens=1)
    assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 1
    stop = ask(client, streamed, messages=user("fox"), stop_sequences=["over", "zz"])
    assert (stop.stop_reason, stop.stop_sequence) == ("stop_sequence", "over")


def test_text_comes_in_pieces(client: Any) -> None:
    with client.messages.stream(messages=user("fox"), **ASK) as stream:
        pieces = list(stream.text_stream)
    assert "".join(pieces) == SAYS["fox"] and len(pieces) > 1


@BOTH
def test_thinking(client: Any, streamed: bool) -> None:
    thinking = {"type": "enabled", "budget_tokens": 1024}
    said = ask(client, streamed, messages=user("ponder"), thinking=thinking)
    thought, text = said.content
    assert (thought.type, thought.thinking, text.text) == ("thinking", "a dog", " It sleeps.")
    # The turn goes back as it came
    messages = [*user("ponder"), {"role": "assistant", "content": said.content}, *user("fox")]
    assert ask(client, streamed, messages=messages).content[0].text == SAYS["fox"]
    off = ask(client, streamed, messages=user("ponder"), thinking={"type": "disabled"})
    assert [block.type for block in off.content] == ["text"]


@BOTH
def test_tools_and_their_results(client: Any, streamed: bool) -> None:
    said = ask(client, streamed, messages=user("rain"), tools=TOOLS)
    text, *calls = said.content
    assert said.stop_reason == "tool_use" and text.text == "I look."
    assert [(call.name, call.input) for call in calls] == [("weather", {"town": "Bonn"})] * 2
    results = [{"type": "tool_result", "tool_use_id": call.id, "content": "wet"} for call in calls]
    messages = [
        *user("rain"),
        {"role": "assistant", "content": said.content},
        {"role": "user", "content": results},
    ]
    said = ask(client, streamed, messages=messages, tools=TOOLS)
    assert [block.text for block in said.content] == [RAIN]
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    one = ask(client, streamed, messages=user("rain"), tools=TOOLS, tool_choice=choice)
    assert len(one.content) == 2


@BOTH
def test_a_broken_call_is_text_with_a_warning(client: Any, streamed: bool) -> None:
    said = ask(client, streamed, messages=user("broken"), tools=TOOLS)
    assert BROKEN in said.content[0].text and said.stop_reason == "end_turn"
    assert streamed or "call" in said.model_extra["warning"]


@needs("llguidance", "grammar")
def test_structured_outputs(client: Any) -> None:
    form = {"type": "json_schema", "schema": WEATHER["parameters"]}
    said = client.messages.create(messages=user("plainly"), output_config={"format": form}, **ASK)
    assert json.loads(said.content[0].text) == {"town": "Bonn"}
    for choice in ({"type": "any"}, {"type": "tool", "name": "weather"}):
        said = client.messages.create(messages=user("once"), tools=TOOLS, tool_choice=choice, **ASK)
        assert [block.input for block in said.content] == [{"town": "Bonn"}]


def test_tokens_are_counted(client: Any) -> None:
    body: Any = {"messages": user("fox"), "tools": TOOLS, "system": "Be brief."}
    counted = client.messages.count_tokens(model="teller", **body).input_tokens
    usage = client.messages.create(**ASK, **body).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens > 20


def test_errors_are_the_clients(client: Any, server: Server) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"messages\[0\].role must be user"):
        client.messages.create(messages=[{"role": "boss", "content": "x"}], **ASK)
    with pytest.raises(anthropic.NotFoundError, match="the model must be teller"):
        client.messages.create(messages=user("fox"), model="claude", max_tokens=5)
    stranger = anthropic.Anthropic(base_url=server.url, api_key="x", max_retries=0)
    with pytest.raises(anthropic.AuthenticationError, match="must carry the server's key"):
        stranger.messages.create(messages=user("fox"), **ASK)
    bearer = anthropic.Anthropic(base_url=server.url, auth_token="sesame", max_retries=0)
    assert bearer.messages.create(messages=user("fox"), **ASK).content[0].text == SAYS["fox"]
