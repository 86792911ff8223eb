"""The Responses API: items in, items and events out, and answers that are kept for others."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import Server
from teller import Teller, telling, thinking_tokenizer

from pyengine.serve.protocols.ask import Limits, Refused
from pyengine.serve.protocols.kept import Store
from pyengine.serve.protocols.responses import Responses
from pyengine.text.tokenizer import Tokenizer

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "description": "of a town",
    "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
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
        "rain": f"Let me see.{CALL}{CALL}<|tool_response>",
        "wet": "It rains.",
    }
    with Server(telling(tok, answers)) as made:
        yield made


def read(tok: Tokenizer, **body: Any) -> Any:
    return Responses(telling(tok, "x"), Limits()).read({"input": "fox", **body})


def post(server: Server, **body: Any) -> dict[str, Any]:
    answer = server.post(PATH, json={"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def events(server: Server, **body: Any) -> list[dict[str, Any]]:
    answer = server.post(PATH, json={"temperature": 0, "stream": True, **body})
    found = []
    for part in answer.text.split("\n\n"):
        if part and not part.startswith(":"):
            name, data = part.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def bare(response: dict[str, Any]) -> Any:
    """An answer without what differs from one to the next."""
    items = [
        {key: value for key, value in item.items() if key not in ("id", "call_id")}
        for item in response["output"]
    ]
    counts = ("input_tokens", "output_tokens", "total_tokens", "output_tokens_details")
    usage = {key: response["usage"][key] for key in counts}
    own = ("id", "created_at", "completed_at", "output", "usage")
    rest = {key: value for key, value in response.items() if key not in own}
    return rest, items, usage


@pytest.mark.parametrize(
    ("body", "kinds", "status"),
    [
        ({"input": "fox"}, ["message"], "completed"),
        ({"input": "think"}, ["reasoning", "message"], "completed"),
        ({"input": "fox", "max_output_tokens": 2}, ["message"], "incomplete"),
        (
            {"input": "rain", "tools": [WEATHER]},
            ["message", "function_call", "function_call"],
            "completed",
        ),
    ],
)
def test_answers_whole_and_streamed(server: Server, body: Any, kinds: Any, status: str) -> None:
    whole = post(server, **body)
    told = events(server, **body)
    streamed = told[-1]["response"]
    assert bare(whole) == bare(streamed)
    assert [item["type"] for item in whole["output"]] == kinds
    assert whole["status"] == status and told[-1]["type"] == f"response.{status}"
    reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert whole["incomplete_details"] == reason
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert done == streamed["output"]
    # What the deltas make
    texts: dict[str, str] = {}
    for event in told:
        if event["type"].endswith(".delta"):
            texts[event["item_id"]] = texts.get(event["item_id"], "") + event["delta"]
    for item in done:
        want = item.get("arguments") or item["content"][0]["text"]
        assert texts[item["id"]] == want


def test_the_order_of_events(server: Server) -> None:
    told = [event["type"].removeprefix("response.") for event in events(server, input="think")]
    joined = [a for a, b in zip(told, [*told[1:], None], strict=True) if a != b]

    def item(name: str) -> list[str]:
        begin = ["output_item.added", "content_part.added"]
        return [*begin, f"{name}.delta", f"{name}.done", "content_part.done", "output_item.done"]

    want = ["created", "in_progress", *item("reasoning_text"), *item("output_text"), "completed"]
    assert joined == want


def test_calls_are_told_by_themselves(server: Server) -> None:
    told = events(server, input="rain", tools=[WEATHER])
    deltas = [event for event in told if "function_call_arguments" in event["type"]]
    assert [event["output_index"] for event in deltas] == [1, 1, 2, 2]
    assert [json.loads(event["arguments"]) for event in deltas[1::2]] == [{"town": "Bonn"}] * 2
    assert {event["name"] for event in deltas[1::2]} == {"weather"}


def test_a_namespace_qualifies_its_functions(tok: Tokenizer) -> None:
    """The model knows them by both names; a call has them apart, and may be given back so. What the
    server would have to run is left out."""
    call = CALL.replace("call:weather", "call:sky.weather")
    space = {"type": "namespace", "name": "sky", "description": "above", "tools": [
        {"type": "custom", "name": "look"}, WEATHER]}  # fmt: skip
    tools = [WEATHER, space, {"type": "web_search"}, {"type": "custom", "name": "patch"}]
    answers = {"fox": f"See.{call}{CALL}<|tool_response>", "wet": "It rains."}
    with Server(telling(tok, answers)) as server:
        for told in (post, lambda *a, **k: events(*a, **k)[-1]["response"]):
            answer = told(server, input="fox", tools=tools)
            calls = [item for item in answer["output"] if item["type"] == "function_call"]
            assert [(c["name"], c.get("namespace")) for c in calls] == [
                ("weather", "sky"),
                ("weather", None),
            ]
            results = [
                {"type": "function_call_output", "call_id": c["call_id"], "output": "wet"}
                for c in calls
            ]
            items = [{"role": "user", "content": "fox"}, *answer["output"], *results]
            assert post(server, input=items, tools=tools)["output"][0]["content"][0]["text"] == (
                "It rains."
            )
        prompt = server.app.state.worker._engine.pair.target.prompts[-1]
    assert "sky.weather" in prompt and "web_search" not in prompt and "patch" not in prompt
    with pytest.raises(Refused, match=r"tools\[0\].tools\[0\].type must be 'function'"):
        read(tok, tools=[{**space, "tools": [{"type": "spell", "name": "x"}]}])
    with pytest.raises(Refused, match=r"tools\[0\].type must be 'function'"):
        read(tok, tools=[{"type": "spell", "name": "x"}])


def test_an_answer_is_followed_by_another(server: Server) -> None:
    """By its id, and by its items: the conversation is the same, instructions are not kept."""
    first = post(server, input="rain", tools=[WEATHER], instructions="Be brief.")
    calls = [item for item in first["output"] if item["type"] == "function_call"]
    results = [
        {"type": "function_call_output", "call_id": call["call_id"], "output": "wet"}
        for call in calls
    ]
    by_id = post(server, previous_response_id=first["id"], input=results, tools=[WEATHER])
    given = [{"role": "user", "content": "rain"}, *first["output"], *results]
    by_items = post(server, input=given, tools=[WEATHER])
    references = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
    by_reference = post(server, input=[given[0], *references, *results], tools=[WEATHER])
    for other in (by_id, by_items, by_reference):
        assert other["output"][0]["content"][0]["text"] == "It rains."
    prompts = server.app.state.worker._engine.pair.target.prompts
    assert prompts[-1] == prompts[-2] == prompts[-3]
    assert "Be brief." in prompts[-4] and "Be brief." not in prompts[-1]
    again = post(server, previous_response_id=by_id["id"], input="fox")
    assert again["previous_response_id"] == by_id["id"]
    assert "It rains." in prompts[-1] and prompts[-1].index("rain") < prompts[-1].index("wet")


def test_an_answer_that_is_not_kept_is_not_found(server: Server) -> None:
    for name in (post(server, input="fox", store=False)["id"], "resp_nowhere"):
        answer = server.post(PATH, json={"input": "fox", "previous_response_id": name})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (404, "previous_response_id")
        assert "must name an answer that is kept but" in error["message"]
    answer = server.post(PATH, json={"input": [{"type": "item_reference", "id": "msg_x"}]})
    assert answer.status_code == 404 and "input[0].id" in answer.json()["error"]["message"]


def test_an_answer_is_fetched_and_deleted(server: Server) -> None:
    """By the official client too, and whether it was streamed or not."""
    whole = post(server, input="rain", tools=[WEATHER])
    streamed = events(server, input="rain", tools=[WEATHER])[-1]["response"]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    for given in (whole, streamed):
        path = f"{PATH}/{given['id']}"
        assert httpx.get(server.url + path).json() == given
        assert client.responses.retrieve(given["id"]).output_text == "Let me see."
        client.responses.delete(given["id"])
        for lost in (httpx.get(server.url + path), httpx.delete(server.url + path)):
            error = lost.json()["error"]
            assert (lost.status_code, error["code"], error["param"]) == (404, "not_found", None)
            assert "the path must name an answer that is kept but" in error["message"]
        call = given["output"][-1]
        later = {"input": [{"type": "item_reference", "id": call["id"]}]}
        assert server.post(PATH, json=later).status_code == 404


def test_the_oldest_answers_are_forgotten() -> None:
    def keep(store: Store, number: int, text: str = "x") -> None:
        store.keep([{"text": text}], {"id": f"r{number}", "output": [{"id": f"i{number}"}]})

    def there(store: Store) -> list[int]:
        found = []
        for number in range(6):
            try:
                store.conversation(f"r{number}")
                assert store.item(f"i{number}", "x") == {"id": f"i{number}"}
                found.append(number)
            except Refused as error:
                assert error.status == 404
                with pytest.raises(Refused, match="must name an item that is kept"):
                    store.item(f"i{number}", "x")
        return found

    store = Store(Limits(kept=3))
    for number in range(5):
        keep(store, number)
    assert there(store) == [2, 3, 4]
    size = len(json.dumps([[{"text": "x" * 100}], {"id": "r0", "output": [{"id": "i0"}]}]))
    store = Store(Limits(kept_bytes=2 * size))
    for number in range(5):
        keep(store, number, "x" * 100)
    assert there(store) == [3, 4]
    keep(store, 5, "x" * 1000)  # larger than all there may be
    assert there(store) == []


def test_messages_of_the_system_come_first_as_one(tok: Tokenizer) -> None:
    items = [
        {"role": "developer", "content": "Use metres."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "fox"}]},
    ]
    text = tok.decode(read(tok, input=items, instructions="Be brief.").ids)
    assert text.count("system") == 1
    assert text.index("Be brief.") < text.index("Use metres.") < text.index("fox")


def test_a_turn_of_the_assistant_is_one_message(tok: Tokenizer) -> None:
    call = {"type": "function_call", "name": "weather", "arguments": "{}"}
    items = [
        {"role": "user", "content": "fox"},
        {"type": "reasoning", "id": "x", "summary": [], "content": [
            {"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "See."}]},
        {**call, "call_id": "a"},
        {**call, "call_id": "b"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "function_call_output", "call_id": "b",
         "output": [{"type": "input_text", "text": "2"}]},
        {"role": "assistant", "content": "Done."},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "so"}]},
        {**call, "call_id": "c"},
    ]  # fmt: skip
    messages = read(tok, input=items).own.messages
    assert [message["role"] for message in messages] == [
        *("user", "assistant", "tool", "tool", "assistant", "assistant"),
    ]
    assert messages[1]["reasoning_content"] == "hm" and messages[1]["content"] == "See."
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["a", "b"]
    assert messages[5]["reasoning_content"] == "so" and len(messages[5]["tool_calls"]) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input": 3}, "input must be a string or a list of items"),
        ({"input": ["x"]}, "input[0] must be an object but got a string"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type 'web_search_call' is"),
        ({"input": [{"role": "boss", "content": "x"}]}, "input[0].role must be 'user', "),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0] must be text but got a part of type 'input_image'",
        ),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "[0].call_id must be given"),
        ({"tools": [{"type": "spell"}]}, "tools[0].type must be 'function' here"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type must be 'function' here"),
        ({"background": True}, "background must be False here but got True"),
        ({"truncation": "auto"}, "truncation must be 'disabled' here but got 'auto'"),
        ({"include": ["message.output_text.logprobs"]}, "include[0] must be"),
        ({"conversation": "x"}, "'conversation' is not known here"),
        ({"prompt": {"id": "x"}}, "'prompt' is not known here"),
        ({"text": {"verbosity": "low"}}, "text.verbosity must be 'medium' or None here"),
        ({"reasoning": {"effort": "very"}}, "reasoning.effort must be"),
        ({"max_output_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_output_tokens": 10**6}, "max_tokens must be at most 8192 here"),
    ],
)
def test_what_is_wrong_is_said(tok: Tokenizer, body: Any, message: str) -> None:
    with pytest.raises((Refused, ValueError)) as caught:
        read(tok, **body)
    assert message in str(caught.value), str(caught.value)


def test_every_field_of_the_official_client_is_known_or_refused(tok: Tokenizer) -> None:
    pytest.importorskip("openai", reason="needs the openai client")
    from openai.types import responses

    fields = {*responses.response_create_params.ResponseCreateParamsBase.__annotations__}
    assert {"input", "reasoning"} <= fields
    taken = set()
    for name in fields:
        try:
            read(tok, **{name: "something strange"})
            taken.add(name)
        except (Refused, ValueError) as error:
            assert name in str(error), str(error)
    labels = {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    assert taken == labels | {"service_tier", "instructions", "input"}


def test_reasoning_is_the_templates(tok: Tokenizer) -> None:
    on = read(tok, reasoning={"effort": "low", "summary": "auto"}, thinking_budget=7)
    assert tok.decode(on.ids).endswith("thought\n") and on.thinking_budget == 7
    for body in ({}, {"reasoning": {"effort": "none"}}, {"reasoning": {}}):
        assert read(tok, **body).ids != on.ids


def test_thoughts_are_counted(server: Server) -> None:
    usage = post(server, input="think")["usage"]
    thought = server.app.state.worker._engine.pair.tokenizer.encode("thought\na dog")
    assert usage["output_tokens_details"]["reasoning_tokens"] == len(thought)
    assert usage["output_tokens"] > len(thought) + 2


def test_a_failure_on_the_way_is_an_event(server: Server) -> None:
    target: Teller = server.app.state.worker._engine.pair.target

    def fail(rows: int) -> None:
        raise KeyError("a secret of the machine")

    target.before_call = fail
    try:
        last = events(server, input="fox")[-1]
    finally:
        target.before_call = lambda rows: None
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    told = {"code": "server_error", "message": "[serve] the generation failed."}
    assert last["response"]["error"] == told
