"""Conversations with calls: asked, answered, left open, forgotten whole, saved and taken up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from text_fakes import saying

import pyengine
from pyengine.chat import NO_RESULT, Chat
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

NANO = Path(pyengine.__file__).parent / "nano" / "target"
Q = '<|"|>'
F = f"<|tool_call>call:f{{a:{Q}x{Q}}}<tool_call|>"
G = "<|tool_call>call:g{}<tool_call|>"
TOOLS = [{"type": "function", "function": {"name": name}} for name in "fg"]


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer(NANO)


def say(chat: Chat, text: str) -> str:
    return "".join(chat.ask(text))


def given(chat: Chat, *results: Any) -> str:
    return "".join(step.text for step in chat.give(results))


def response(name: str, inside: str) -> str:
    return f"<|tool_response>response:{name}{inside}<tool_response|>"


def test_the_model_goes_on_with_the_results(tok: Tokenizer) -> None:
    pair = saying(tok, f"Let me see.{F}{G}", f"Again.{F}", "Rain.", "Bye.")
    chat = Chat(pair, tools=TOOLS)
    assert say(chat, "So?") == "Let me see."
    assert [(call.name, call.arguments) for call in chat.open_calls] == [
        *(("f", '{"a":"x"}'), ("g", "{}")),
    ]
    assert chat.open_calls == chat.result.tool_calls
    assert given(chat, {"t": 3}, "rain") == "Again."
    before = f"{F}{G}{response('f', '{t:3}')}{response('g', f'{{value:{Q}rain{Q}}}')}"
    assert "<|tool>declaration:f{" in pair.heard[1] and pair.heard[1].endswith(before)
    assert given(chat, "") == "Rain." and chat.open_calls == []
    assert pair.heard[2].endswith(f"{before}Again.{F}{response('f', f'{{value:{Q}{Q}}}')}")
    assert say(chat, "Thanks.") == "Bye."
    roles = " ".join(message["role"] for message in chat.turns)
    assert roles == "user assistant tool tool assistant tool assistant user assistant"


def test_results_are_one_for_each_call(tok: Tokenizer) -> None:
    chat = Chat(saying(tok, f"{F}{G}"), tools=TOOLS)
    for results in ([], ["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError) as caught:
            chat.give(results)
        assert "must be one for each open call, 0, but got" in str(caught.value)
    say(chat, "So?")
    for results in ([], ["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError) as caught:
            chat.give(results)
        assert str(caught.value) == (
            f"[chat] results must be one for each open call, 2, but got {len(results)}."
        )
    assert len(chat.open_calls) == 2


def test_calls_left_open_were_not_made(tok: Tokenizer) -> None:
    pair = saying(tok, f"{F}{G}", "Well.")
    chat = Chat(pair, tools=TOOLS)
    say(chat, "So?")
    assert say(chat, "Never mind.") == "Well."
    told = f"{{value:{Q}{NO_RESULT}{Q}}}"
    assert f"{F}{G}{response('f', told)}{response('g', told)}<turn|>" in pair.heard[1]
    assert chat.open_calls == []


def test_a_thought_before_a_call_is_given_back(tok: Tokenizer) -> None:
    chat = Chat(saying(tok, "a"), tools=TOOLS)
    say(chat, "So?")
    assert "reasoning_content" not in chat.turns[-1]
    thinks = Tokenizer(
        tok._pieces, {}, "{% for m in messages %}{{ m.content }}{% endfor %}{# tools channel #}"
    )
    chat = Chat(saying(thinks, f"<|channel>thought\nhm<channel|>{F}"), tools=TOOLS)
    say(chat, "So?")
    assert chat.turns[-1]["reasoning_content"] == "hm" and chat.result.thinking == "hm"


def test_calls_are_forgotten_with_their_question(tok: Tokenizer) -> None:
    pair = saying(tok, *[F, "Rain."] * 12)
    pair.target.context = 400
    chat = Chat(pair, max_tokens=40, tools=TOOLS)
    for turn in range(12):
        say(chat, f"the quick brown fox {turn}")
        assert given(chat, f"of {turn}") == "Rain."
        assert len(pair.target.prompt) <= 360
        assert len(chat.turns) + chat.forgotten == 4 * (turn + 1)
        assert chat.turns[0]["role"] == "user"
        assert f"fox {turn}<turn|>" in pair.heard[-1]
        assert pair.heard[-1].count("response:f{") == pair.heard[-1].count("call:f{")
    assert chat.forgotten and chat.forgotten % 4 == 0


def test_tools_are_checked_at_once(tok: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"tools\[0\] must be an object of type function"):
        Chat(saying(tok, "a"), tools=[{}])
    blind = Tokenizer(tok._pieces, {}, "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="tools must go with a chat template that shows them"):
        Chat(saying(blind, "a"), tools=TOOLS)


def talked(tok: Tokenizer) -> Chat:
    chat = Chat(saying(tok, F, "Rain.", f"{F}{G}"), system="Brief.", tools=TOOLS)
    say(chat, "So?")
    given(chat, {"t": 3})
    say(chat, "And now?")
    return chat


def test_a_conversation_with_calls_comes_back(tok: Tokenizer) -> None:
    chat = talked(tok)
    messages = json.loads(json.dumps(chat.messages))
    pair = saying(tok, "Done.")
    other = Chat(pair, tools=TOOLS)
    other.resume(messages)
    assert other.messages == chat.messages and other.open_calls == chat.open_calls
    assert given(other, "a", "b") == "Done."
    first = saying(tok, "Done.")
    chat.pair = first
    given(chat, "a", "b")
    assert first.heard == pair.heard


def changed(number: int, **to: Any) -> Any:
    def change(messages: list[dict[str, Any]]) -> None:
        messages[number].update(to)

    return change


def removed(number: int) -> Any:
    return lambda messages: messages.pop(number)


IN_TURN = "messages must be of user and assistant in turn, each call with its result between"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (removed(3), IN_TURN),  # the result
        (removed(2), IN_TURN),  # the call
        (removed(-1), IN_TURN),  # the last answer
        (changed(3, tool_call_id="x"), IN_TURN),
        (changed(3, role="user"), "message 4 must have a role and content alone but got"),
        (changed(3, role=["tool"]), "message 4 must have a role and content alone but got"),
        (changed(2, name="f"), "message 3 must have a role and content alone but got"),
        (changed(1, content={}), "message 2 must have text as its content but got {}."),
        (changed(3, content=[]), "message 4 must have text as its content but got []."),
        (changed(3, content={"a": "\ud800"}), "message 4 must have text as its content but got"),
        (changed(2, tool_calls={}), "message 3 must have calls with an id, name and arguments"),
        (changed(2, tool_calls=[5]), "message 3 must have calls with an id, name and arguments"),
        (
            changed(2, tool_calls=[{"id": "c", "function": {"name": "f"}}]),
            "message 3 must have calls with an id, name and arguments but got",
        ),
        (
            changed(2, tool_calls=[{"id": 1, "function": {"name": "f", "arguments": ""}}]),
            "message 3 must have calls with an id, name and arguments but got",
        ),
    ],
)
def test_what_is_no_conversation_is_refused(tok: Tokenizer, change: Any, said: str) -> None:
    messages = json.loads(json.dumps(talked(tok).messages))
    change(messages)
    chat = Chat(saying(tok, "a"))
    with pytest.raises(ValueError) as caught:
        chat.resume(messages)
    assert str(caught.value).startswith(f"[chat] {said}") and chat.messages == []
