"""Every field of OpenAI's requests is honoured or refused by name; none is ignored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from reading import read_request
from serving import GAME, Server
from text_fakes import script_pair, write_tokenizers

from pyengine.serve.protocols.ask import Limits, Refused
from pyengine.text.tokenizer import load_tokenizer
from pyengine.untrusted import parse

CHAT, TEXT = True, False
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a town"}}

# A value of each field, of the kind that a client would send to get something
ASKED: dict[str, Any] = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": "auto",
    "functions": [],
    "moderation": {},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_options": {},
    "reasoning_effort": "very",
    "response_format": {"type": "yaml"},
    "tool_choice": "any",
    "verbosity": "low",
    "web_search_options": {},
    "best_of": 3,
    "suffix": "the end",
}
# What a client sends that asks for nothing, or that only labels the request
NOTHING: dict[str, Any] = {
    "n": 1,
    "modalities": ["text"],
    "parallel_tool_calls": True,
    "prompt_cache_retention": "24h",
    "reasoning_effort": "high",
    "response_format": {"type": "text"},
    "service_tier": "priority",
    "store": True,
    "tool_choice": "auto",
    "verbosity": "medium",
    "user": "someone",
    "metadata": {"a": "b"},
    "safety_identifier": "someone",
    "prompt_cache_key": "a key",
    "audio": None,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return script_pair(load_tokenizer(folder), "jumps over")


@pytest.fixture(scope="module")
def server(pair: Any) -> Iterator[Server]:
    with Server(pair) as made:
        yield made


def ask(pair: Any, chat: bool = CHAT, limits: Limits | None = None, **body: Any) -> Any:
    given = {"messages": GAME} if chat else {"prompt": "fox"}
    return read_request(pair, {**given, **body}, limits or Limits(), chat)


def refusal(pair: Any, chat: bool = CHAT, **body: Any) -> Refused:
    with pytest.raises((Refused, ValueError)) as caught:
        ask(pair, chat, **body)
    error = caught.value  # the engine's own are answered with 400 as well
    return error if isinstance(error, Refused) else Refused(400, str(error))


@pytest.mark.parametrize("name", ASKED)
def test_a_field_this_engine_has_not_is_refused_by_name(pair: Any, name: str) -> None:
    for chat in (CHAT, TEXT):
        refused = refusal(pair, chat, **{name: ASKED[name]})
        assert refused.status == 400 and name in str(refused)


def test_every_field_of_the_official_client_is_honoured_or_refused(pair: Any) -> None:
    pytest.importorskip("openai", reason="needs the openai client")
    from openai.types import completion_create_params as text
    from openai.types.chat import completion_create_params as chat

    honoured = {"messages", "prompt", "model", "echo", "stop", "stream_options", "logit_bias"}
    honoured |= {"logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "seed"}
    honoured |= {"temperature", "top_p", "presence_penalty", "frequency_penalty", "tools", "n"}
    labels = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
    for module, way in ((chat, CHAT), (text, TEXT)):
        fields = {*module.CompletionCreateParamsBase.__annotations__}
        assert {"model", "n", "logit_bias"} <= fields
        left = fields - honoured - labels
        assert len(left) > 1
        for name in left:
            assert name in str(refusal(pair, way, **{name: ASKED.get(name, {"some": "thing"})}))


def test_what_asks_for_nothing_is_taken(server: Server) -> None:
    answer = server.post(json={"messages": GAME, **NOTHING})
    assert answer.status_code == 200, answer.text


def test_values_are_compared_with_their_types(pair: Any) -> None:
    """True is no 1 and 1 is no true, though Python's equality says so."""
    for name, value in (("n", True), ("n", 1.0), ("parallel_tool_calls", 1), ("store", 0)):
        assert f"{name} must be" in str(refusal(pair, **{name: value}))
    for name in ("user", "safety_identifier", "prompt_cache_key", "model"):
        assert f"{name} must be a string but got 5" in str(refusal(pair, **{name: 5}))
    assert "metadata must be an object" in str(refusal(pair, metadata="x"))


def test_every_field_has_its_type(pair: Any) -> None:
    """One that is not of its type is named before it is looked into."""
    words = {bool: "true or false", int: "a whole number", dict: "an object", str: "a string"}
    values: list[tuple[Any, str]] = [([], "a list"), (2.5, "2.5"), ("x", words[str])]
    fields = {
        "model": str,
        "stream": bool,
        "stream_options": dict,
        "logit_bias": dict,
        "block_size": int,
        "max_tokens": int,
    }
    chat = {"chat_template_kwargs": dict, "max_completion_tokens": int, "top_logprobs": int}
    for is_chat, own in ((True, {**chat, "logprobs": bool}), (False, {"echo": bool})):
        for name, kind in {**fields, **own}.items():
            for value, said in (*values, (True, words[bool])):
                if type(value) is not kind:
                    refused = str(refusal(pair, is_chat, **{name: value}))
                    assert refused.startswith(f"[serve] {name} must be {words[kind]} but got ")
                    assert refused.endswith(f" {said}."), refused
    for value in ({}, "x", 1):
        assert "tools must be a list but got" in str(refusal(pair, tools=value))
    assert "logprobs must be a whole number but got" in str(refusal(pair, False, logprobs=True))


def test_tool_choice_none_hides_the_tools(pair: Any) -> None:
    """As if none had been given; the text of those is then nowhere in the prompt."""
    without = ask(pair).ids
    assert ask(pair, tools=[WEATHER], tool_choice="none").ids == without
    for choice in ({}, {"tool_choice": "auto"}, {"tool_choice": None}):
        given = {key: value for key, value in choice.items() if value is not None}
        shown = ask(pair, tools=[WEATHER], **given).ids
        assert shown != without and "of a town" in pair.tokenizer.decode(shown)
    named = {"type": "function", "function": {"name": "weather"}}
    for choice in ("any", True):
        said = str(refusal(pair, tools=[WEATHER], tool_choice=choice))
        assert "tool_choice must be auto" in said, said
    assert "must name one of the tools" in str(refusal(pair, tool_choice=named))


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("weather", "tools[0] must be an object of type function but got 'weather'"),
        ({"type": "custom", "custom": {"name": "x"}}, "of type function but got 'custom'"),
        ({"name": "weather"}, "of type function but got None"),
        ({"type": "function", "function": {}}, "tools[0].function.name must be"),
        ({"type": "function", "function": {"name": "x", "strict": 1}}, "strict must be True or"),
    ],
)
def test_tools_of_other_kinds_are_refused(pair: Any, tool: Any, message: str) -> None:
    assert message in str(refusal(pair, tools=[tool]))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options must go with stream"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage must be true"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "include_obfuscation"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "must not go with max_completion_tokens"),
        ({"top_logprobs": 1, "logprobs": False}, "top_logprobs must go with logprobs"),
    ],
)
def test_fields_that_say_nothing_together_are_refused(pair: Any, body: Any, message: str) -> None:
    assert message in str(refusal(pair, **body))


@pytest.mark.parametrize(
    "key", ["1_0", " 10", "10 ", "+10", "-1", "0x1", "010", "1e1", "\u0661", ""]
)
def test_logit_bias_keys_are_plain_decimal_ids(pair: Any, key: str) -> None:
    assert "logit_bias must name token ids but got" in str(refusal(pair, logit_bias={key: 1}))
    assert ask(pair, logit_bias={"10": 1, "0": -2.5}).sampling.logit_bias == {10: 1.0, 0: -2.5}


def test_logit_bias_values_are_numbers(pair: Any) -> None:
    for value in ("1", True, None, [1]):
        refused = refusal(pair, logit_bias={"3": value})
        assert "logit_bias must map token ids to numbers but 3 goes to" in str(refused)


def test_a_key_given_twice_is_refused_by_name(server: Server) -> None:
    head = {"content-type": "application/json"}
    messages = json.dumps(GAME)
    for extra, key in (
        ('"temperature": 0, "temperature": 1', "temperature"),
        ('"logit_bias": {"5": 1, "5": -1}', "5"),
    ):
        answer = server.post(content=f'{{"messages": {messages}, {extra}}}', headers=head)
        assert answer.status_code == 400
        assert f"must name each key once but '{key}'" in answer.json()["error"]["message"]
    with pytest.raises(ValueError, match="'role' comes twice"):
        parse('{"messages": [{"role": "user", "role": "system"}]}', "[serve] the request")


def test_another_model_is_not_found_unless_allowed(server: Server, pair: Any) -> None:
    answer = server.post(json={"messages": GAME, "model": "gpt-5"})
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error["message"] == "[serve] the model must be scripted but got 'gpt-5'."
    for body in ({}, {"model": None}, {"model": "scripted"}):
        assert server.post(json={"messages": GAME, **body}).status_code == 200
    assert ask(pair, limits=Limits(any_model=True), model="gpt-5").ids == ask(pair).ids


@pytest.mark.parametrize("text", ["fox " * 5000, "f" * 200_000])
def test_a_prompt_past_the_context_has_openais_code(server: Server, text: str) -> None:
    """Found after tokenising or by the bound before."""
    for path, param, body in (
        ("/v1/chat/completions", "messages", {"messages": [{"role": "user", "content": text}]}),
        ("/v1/completions", "prompt", {"prompt": text}),
        ("/v1/completions", "prompt", {"prompt": [5] * 5000}),
    ):
        answer = server.post(path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
        assert error["param"] == param and "the context of 4096 tokens" in error["message"]
        unread = text in str(body) and " " not in text
        assert ("characters, of which a token holds at most" in error["message"]) == unread


@pytest.mark.parametrize("media", ["Application/JSON", "application/json; charset=utf-8"])
def test_media_types_have_no_case(server: Server, media: str) -> None:
    content = json.dumps({"messages": GAME})
    assert server.post(content=content, headers={"content-type": media}).status_code == 200


def test_a_request_without_a_number_of_tokens_gets_the_servers(pair: Any) -> None:
    assert ask(pair, limits=Limits(max_tokens=77)).max_tokens == 77
    assert ask(pair, max_tokens=5).max_tokens == ask(pair, max_completion_tokens=5).max_tokens == 5


def test_what_earlier_prompts_began_with_can_be_kept_silent(pair: Any) -> None:
    """The figure tells one client what another has asked."""
    told = []
    for limits in (Limits(), Limits(cached_tokens=False)):
        with Server(pair, limits) as server:
            for body in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
                told.append("cached_tokens" in server.post(json={"messages": GAME, **body}).text)
    assert told == [True, True, False, False]
