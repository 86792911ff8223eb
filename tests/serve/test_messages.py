"""Anthropic's protocol: what is read from a body, and what is told, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Server
from teller import Teller, telling, thinking_tokenizer

from pyengine.serve.protocols.ask import Limits, Refused
from pyengine.serve.protocols.messages import Messages
from pyengine.text.tokenizer import Tokenizer

PATH = "/v1/messages"
FOX = [{"role": "user", "content": "fox"}]
WEATHER = {
    "name": "weather",
    "description": "of a town",
    "input_schema": {"type": "object", "properties": {"town": {"type": "string"}}},
}
CALL = '<|tool_call>call:weather{town:<|"|>Bonn<|"|>}<tool_call|>'


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return thinking_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def server(tok: Tokenizer) -> Iterator[Server]:
    answers = {
        "fox": "jumps over",
        "think": "<|channel>thought\na dog<channel|>It sleeps.",
        "rain": f"Let me see.{CALL}<|tool_response>",
        "broken": "<|tool_call>call:weather{town:<|turn>",
    }
    with Server(telling(tok, answers)) as made:
        made.tok = tok  # type: ignore[attr-defined]
        yield made


def ask(tok: Tokenizer, limits: Limits | None = None, **body: Any) -> Any:
    given = {"messages": FOX, "max_tokens": 9, **body}
    return Messages(telling(tok, "x"), limits or Limits()).read(given)


def refusal(tok: Tokenizer, **body: Any) -> str:
    with pytest.raises((Refused, ValueError)) as caught:
        ask(tok, **body)
    return str(caught.value)


def says(word: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": word}]


def post(server: Server, **body: Any) -> dict[str, Any]:
    answer = server.post(PATH, json={"max_tokens": 99, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def events(server: Server, **body: Any) -> list[dict[str, Any]]:
    answer = server.post(PATH, json={"max_tokens": 99, "temperature": 0, "stream": True, **body})
    found = []
    for part in answer.text.split("\n\n"):
        if part and not part.startswith(":"):
            name, data = part.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found


def put_together(told: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a stream's events make."""
    message: dict[str, Any] = {}
    pieces: dict[int, str] = {}
    for event in told:
        if event["type"] == "message_start":
            message = event["message"]
        elif event["type"] == "content_block_start":
            assert event["index"] == len(message["content"])
            message["content"].append(event["content_block"])
        elif event["type"] == "content_block_delta":
            block, delta = message["content"][event["index"]], event["delta"]
            if delta["type"] == "input_json_delta":
                pieces[event["index"]] = pieces.get(event["index"], "") + delta["partial_json"]
                block["input"] = json.loads(pieces[event["index"]])
            else:
                key = delta["type"].removesuffix("_delta")
                block[key] += delta[key]
        elif event["type"] == "message_delta":
            message |= event["delta"] | {"usage": event["usage"]}
    return message


@pytest.mark.parametrize(
    ("body", "content", "reason"),
    [
        ({"messages": FOX}, [{"type": "text", "text": "jumps over"}], "end_turn"),
        (
            {"messages": says("think")},
            [
                {"type": "thinking", "thinking": "a dog", "signature": ""},
                {"type": "text", "text": "It sleeps."},
            ],
            "end_turn",
        ),
        ({"messages": FOX, "max_tokens": 1}, None, "max_tokens"),
        (
            {"messages": FOX, "stop_sequences": ["zz", "p"]},
            [{"type": "text", "text": "jum"}],
            "stop_sequence",
        ),
        (
            {"messages": says("rain"), "tools": [WEATHER]},
            [
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "name": "weather", "input": {"town": "Bonn"}},
            ],
            "tool_use",
        ),
    ],
)
def test_answers_whole_and_streamed(server: Server, body: Any, content: Any, reason: str) -> None:
    whole, streamed = post(server, **body), put_together(events(server, **body))
    for message in (whole, streamed):
        for block in message["content"]:
            if block["type"] == "tool_use":
                assert block.pop("id").startswith("call_")
        assert message["stop_reason"] == reason and message["role"] == "assistant"
        assert message["stop_sequence"] == ("p" if reason == "stop_sequence" else None)
        if content is not None:
            assert message["content"] == content
    for key in ("content", "model", "type"):
        assert whole[key] == streamed[key]
    counts = ("input_tokens", "output_tokens", "cache_read_input_tokens")
    assert [whole["usage"][key] for key in counts] == [streamed["usage"][key] for key in counts]
    assert whole["usage"]["output_tokens"] > 0


def test_the_order_of_events(server: Server) -> None:
    told = [event["type"] for event in events(server, messages=says("think"))]
    joined = [a for a, b in zip(told, [*told[1:], None], strict=True) if a != b]
    block = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert joined == ["message_start", *block, *block, "message_delta", "message_stop"]


def test_thoughts_may_be_left_out(server: Server) -> None:
    body = {"thinking": {"type": "adaptive", "display": "omitted"}}
    # The template has opened the thought: the script's own mark begins another
    for message in (
        post(server, messages=says("think"), **body),
        put_together(events(server, messages=says("think"), **body)),
    ):
        assert [block["type"] for block in message["content"]] == ["text"]


def test_a_call_that_cannot_be_read_is_text_with_a_warning(server: Server) -> None:
    body = {"messages": says("broken"), "tools": [WEATHER]}
    whole = post(server, **body)
    assert whole["content"][0]["type"] == "text" and "call:weather" in whole["content"][0]["text"]
    assert whole["stop_reason"] == "end_turn" and whole["warning"]
    [delta] = [e for e in events(server, **body) if e["type"] == "message_delta"]
    assert delta["warning"] == whole["warning"]


def test_a_conversation_with_tools_is_read_as_the_template_wants_it(tok: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "rain?", "cache_control": {}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "xyz"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "t1", "name": "weather", "input": {"town": "Bonn"}},
                {"type": "tool_use", "id": "t2", "name": "weather", "input": {"town": "Ulm"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t2", "content": "dry"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t1",
                    "content": [{"type": "text", "text": "wet"}],
                },
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    system = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]
    given = ask(tok, messages=messages, system=system, tools=[WEATHER])
    text = tok.decode(given.ids)
    for part in ("Be", "brief.", "of a town", "rain?", "I look.", "Bonn", "Ulm", "wet", "dry"):
        assert part in text, text
    assert text.index("I look.") < text.index("dry") < text.index("wet") < text.index("And?")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"max_tokens": None}, "max_tokens must be given but is missing"),
        ({"messages": "x"}, "messages must be a list but got a string"),
        ({"messages": [{"role": "boss", "content": "x"}]}, "messages[0].role must be user"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be a string or"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "of type 'image'"),
        (
            {"messages": [*FOX, {"role": "assistant", "content": "The"}]},
            "must not end with the assistant's",
        ),
        ({"top_k": "x"}, "top_k must be a whole number but got 'x'"),
        ({"mcp_servers": []}, "'mcp_servers' is not known here"),
        ({"container": "x"}, "'container' is not known here"),
        ({"speed": "fast"}, "speed must be 'standard' here but got 'fast'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type must"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema must be given"),
        ({"tools": ["x"]}, "tools[0] must be an object but got a string"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type must be"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type must be"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "budget must be at least 1"),
        ({"output_config": {"task_budget": 3}}, "output_config holds 'task_budget', not known"),
        ({"stop_sequences": [""]}, "stop must hold strings of text"),
        ({"system": [{"type": "image"}]}, "system must hold text here"),
    ],
)
def test_what_is_wrong_is_said(tok: Tokenizer, body: Any, message: str) -> None:
    given = {"messages": FOX, "max_tokens": 9, **body}
    given = {key: value for key, value in given.items() if value is not None}
    with pytest.raises((Refused, ValueError)) as caught:
        Messages(telling(tok, "x"), Limits()).read(given)
    assert message in str(caught.value), str(caught.value)


def test_what_asks_for_nothing_is_taken(tok: Tokenizer) -> None:
    plain = ask(tok).ids
    for body in (
        {"metadata": {"user_id": "x"}},
        {"service_tier": "auto"},
        {"cache_control": {"type": "ephemeral"}},
        {"output_config": {"effort": "high"}},
        {"speed": "standard"},
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"system": "x-anthropic-billing-header: cc_version=2.1; cch=eb6c6;"},
        {"tools": []},
    ):
        assert ask(tok, **body).ids == plain


def test_a_line_for_the_accounts_is_no_word_to_the_model(tok: Tokenizer) -> None:
    """Else no two prompts of Claude Code would begin alike."""
    line = "x-anthropic-billing-header: cc_version=2.1; cch=eb6c6;"
    want = ask(tok, system="Be brief.").ids
    assert ask(tok, system=f"{line}\nBe brief.").ids == want
    blocks = [{"type": "text", "text": text} for text in (line, "Be brief.")]
    assert ask(tok, system=blocks).ids == want
    inside = ask(tok, messages=[{"role": "user", "content": line}])
    assert "cch=eb6c6" in tok.decode(inside.ids)


def test_thinking_is_the_templates(tok: Tokenizer) -> None:
    on = ask(tok, thinking={"type": "enabled", "budget_tokens": 1024})
    assert on.thinking_budget == 1024 and tok.decode(on.ids).endswith("thought\n")
    assert ask(tok, thinking={"type": "adaptive"}).ids == on.ids
    assert ask(tok, thinking={"type": "disabled"}).ids == ask(tok).ids != on.ids


def test_tokens_are_counted(server: Server) -> None:
    body: dict[str, Any] = {"messages": says("rain"), "tools": [WEATHER], "system": "Be brief."}
    counted = server.post(f"{PATH}/count_tokens", json=body)
    assert counted.json() == {"input_tokens": post(server, **body)["usage"]["input_tokens"]}
    wrong = server.post(f"{PATH}/count_tokens", json={**body, "stream": 3})
    assert wrong.status_code == 400 and wrong.json()["type"] == "error"


def test_errors_have_the_protocols_envelope(server: Server) -> None:
    for body, status, kind in (
        ({"messages": []}, 400, "invalid_request_error"),
        ({"messages": FOX, "model": "gpt"}, 404, "not_found_error"),
    ):
        answer = server.post(PATH, json={"max_tokens": 9, **body})
        told = answer.json()
        assert answer.status_code == status
        assert told["type"] == "error" and told["error"]["type"] == kind
        assert told["error"]["message"].startswith("[")
    assert server.post(f"{PATH}/nowhere", json={}).json()["type"] == "error"


def test_a_failure_on_the_way_is_an_event(server: Server) -> None:
    target: Teller = server.app.state.worker._engine.pair.target

    def fail(rows: int) -> None:
        raise KeyError("a secret of the machine")

    target.before_call = fail
    try:
        last = events(server, messages=FOX)[-1]
        answer = server.post(PATH, json={"messages": FOX, "max_tokens": 9})
    finally:
        target.before_call = lambda rows: None
    assert last == {
        "type": "error",
        "error": {"type": "api_error", "message": "[serve] the generation failed."},
    }
    assert answer.status_code == 500 and answer.json() == last
