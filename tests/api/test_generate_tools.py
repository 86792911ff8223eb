"""Tool calls through the whole of ``generate``: real ids of the embedded pair, spoken by a fake."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from text_fakes import saying, script_pair, write_tokenizers

import pyengine
from pyengine.generation import generate, stream
from pyengine.streams import Engine
from pyengine.task import Result
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

NANO = Path(pyengine.__file__).parent / "nano" / "target"
GEMMA = os.environ.get("PYENGINE_TEMPLATES")
Q = '<|"|>'
F = f"<|tool_call>call:f{{a:{Q}x; y{Q}}}<tool_call|>"
G = "<|tool_call>call:g{n:[1,2]}<tool_call|>"
CUT = f"<|tool_call>call:f{{a:{Q}x"
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "g", "description": "Gees."}},
]
# Ends as the embedded pair's does, and has a channel for thoughts
THINKS = """\
{{ bos_token }}{% for t in tools or [] %}<|tool>{{ t.function.name }}<tool|>{% endfor %}
{%- for m in messages %}<|turn>{{ m.role }}
{{ m.content }}<turn|>
{% endfor %}<|turn>model
{% if enable_thinking %}<|channel>thought
{% endif %}{# <|tool_response> #}"""


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer(NANO)


def with_template(folder: Path, source: str) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    (folder / "chat_template.jinja").write_text(source, encoding="utf-8")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return with_template(tmp_path_factory.mktemp("thinks"), THINKS)


def answer(tok: Tokenizer, script: str, prompt: Any = "So?", **settings: Any) -> Result:
    return generate(prompt, pair=script_pair(tok, script), **{"tools": TOOLS, **settings})


def made(result: Any) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in result.tool_calls]


BLOCKS = pytest.mark.parametrize("block_size", [1, 2, 4, 13])


@BLOCKS
def test_a_call_comes_whole_beside_the_text(tok: Tokenizer, block_size: int) -> None:
    result = answer(tok, f"One moment.{F}", block_size=block_size)
    assert (result.text, result.finish_reason, result.warning) == (
        *("One moment.", "tool_calls", None),
    )
    assert made(result) == [("f", {"a": "x; y"})]
    assert tok.encode(f"One moment.{F}<turn|>") == result.tokens


@BLOCKS
def test_several_calls_come_in_order(tok: Tokenizer, block_size: int) -> None:
    result = answer(tok, f"{F}{G} and {F}.", block_size=block_size)
    assert [name for name, _ in made(result)] == ["f", "g", "f"]
    assert len({call.id for call in result.tool_calls}) == 3
    assert (result.text, result.finish_reason) == (" and .", "tool_calls")


def test_the_mark_that_hands_over_ends_the_text(tok: Tokenizer) -> None:
    result = answer(tok, f"{F}<|tool_response>response:f{{}}<tool_response|>Done.")
    assert (result.text, result.finish_reason) == ("", "tool_calls")
    assert result.tokens[-1] == tok.id_of("<|tool_response>")
    lone = answer(tok, "Hm.<|tool_response>x")
    assert (lone.text, lone.finish_reason, lone.tool_calls) == ("Hm.", "stop", [])


@BLOCKS
@pytest.mark.parametrize("many", [False, True])
def test_steps_hold_each_call_once_and_whole(tok: Tokenizer, block_size: int, many: bool) -> None:
    pair = script_pair(tok, f"a{F}b{G}c{CUT}")
    asked: dict[str, Any] = {"tools": TOOLS, "block_size": block_size}
    running = Engine(pair).submit("So?", **asked) if many else stream("So?", pair=pair, **asked)
    steps = list(running.steps())
    calls = [call for step in steps for call in step.tool_calls]
    assert calls == running.result.tool_calls and [call.name for call in calls] == ["f", "g"]
    assert "".join(step.text for step in steps) == running.result.text == f"abc{CUT}"
    before = [json.loads(call.arguments) for call in calls]
    assert before == [{"a": "x; y"}, {"n": [1, 2]}]
    # A call belongs to the step of its last token
    closing = tok.id_of("<tool_call|>")
    assert [step.tokens.count(closing) for step in steps] == [len(s.tool_calls) for s in steps]


def test_a_cut_call_is_text(tok: Tokenizer) -> None:
    full = tok.encode(F)
    for length in (1, 2, len(full) - 1):
        result = answer(tok, F, max_tokens=length)
        assert (result.tool_calls, result.finish_reason) == ([], "length")
        assert result.text == "".join(
            tok.spelling(t) if t in tok.special_ids else tok.decode([t]) for t in full[:length]
        )
        assert result.warning == (
            "[generate] tool call 1 must end with <tool_call|> but is cut; it is left as text."
        )
    whole = answer(tok, F, max_tokens=len(full))
    assert (len(whole.tool_calls), whole.finish_reason, whole.text) == (1, "length", "")


def test_a_broken_call_is_text(tok: Tokenizer) -> None:
    broken = "<|tool_call>call:f{a:}<tool_call|>"
    result = answer(tok, f"a{broken}b")
    assert (result.text, result.finish_reason, result.tool_calls) == (f"a{broken}b", "stop", [])
    assert result.warning is not None and "tool call 1 must have a string" in result.warning
    after = answer(tok, f"{broken}{F}")
    assert (after.text, after.finish_reason) == (broken, "tool_calls")
    assert len(after.tool_calls) == 1 and after.warning == result.warning


def test_a_call_begun_anew_is_read(tok: Tokenizer) -> None:
    result = answer(tok, f"{CUT}{F}")
    assert (result.text, made(result)) == (CUT, [("f", {"a": "x; y"})])
    assert result.warning is not None and "is cut" in result.warning


def test_what_only_looks_like_a_mark_is_text(tok: Tokenizer) -> None:
    letters = [
        token for part in ("<|tool", "_call>call:f{}<tool_call", "|>") for token in tok.encode(part)
    ]
    result = generate("So?", pair=script_pair(tok, letters), tools=TOOLS)
    assert result.text == "<|tool_call>call:f{}<tool_call|>"
    assert (result.finish_reason, result.tool_calls, result.warning) == ("stop", [], None)


def test_a_tokenizer_without_the_marks_has_no_calls(tmp_path: Path) -> None:
    write_tokenizers(tmp_path)
    other = load_tokenizer(tmp_path)
    for settings in ({}, {"tool_choice": "none"}, {"parallel_tool_calls": False}):
        result = answer(other, "call:fox{}", **settings)
        assert (result.text, result.finish_reason) == ("call:fox{}", "stop")
        assert (result.tool_calls, result.warning) == ([], None)


def test_calls_are_read_whether_or_not_tools_are_given(tok: Tokenizer) -> None:
    for prompt in ("So?", tok.encode("a")):
        result = answer(tok, F, prompt, tools=None)
        assert (result.finish_reason, len(result.tool_calls)) == ("tool_calls", 1)


# Thoughts


@BLOCKS
def test_thoughts_stay_apart(thinker: Tokenizer, block_size: int) -> None:
    script = f"<|channel>thought\nhm, f?<channel|>{F}<|channel>thought\ng?<channel|>{G}"
    result = answer(thinker, script, block_size=block_size)
    assert (result.thinking, result.text) == ("hm, f?\ng?", "")
    assert [name for name, _ in made(result)] == ["f", "g"]
    assert result.finish_reason == "tool_calls"


def test_a_call_ends_a_thought_that_is_not_closed(thinker: Tokenizer) -> None:
    for script, variables in (
        (f"<|channel>thought\nhm{F}text", {}),
        (f"hm{F}text", {"enable_thinking": True}),
        (f"hm{F}<channel|>text", {"enable_thinking": True}),
    ):
        result = answer(thinker, script, variables=variables)
        assert (result.thinking, result.text) == ("hm", "text"), script
        assert (made(result), result.finish_reason) == ([("f", {"a": "x; y"})], "tool_calls")


def test_a_thought_ends_a_call_that_is_not_closed(thinker: Tokenizer) -> None:
    result = answer(thinker, f"{CUT}<|channel>thought\nhm<channel|>text{F}")
    assert (result.thinking, result.text) == ("hm", f"{CUT}text")
    assert len(result.tool_calls) == 1


def test_half_a_character_does_not_jump_over_a_call(tok: Tokenizer) -> None:
    first, second = (tok.id_of(f"<0x{byte:02X}>") for byte in "ž".encode())
    script = [first, *tok.encode(CUT), *tok.encode(F), first, second]
    result = generate("So?", pair=script_pair(tok, script), tools=TOOLS)
    assert result.text == f"\ufffd{CUT}ž"


# Where the text ends


@BLOCKS
def test_stop_strings_do_not_count_in_calls(tok: Tokenizer, block_size: int) -> None:
    result = answer(tok, f"a{F}b;c", stop=[";", "call:f"], block_size=block_size)
    assert (result.text, result.finish_reason, len(result.tool_calls)) == ("ab", "stop", 1)


def test_stop_strings_count_across_calls_and_in_what_is_no_call(tok: Tokenizer) -> None:
    assert answer(tok, f"aEN{F}Db", stop="END").text == "a"
    assert answer(tok, f"aEN{F}", stop="END").text == "aEN"
    result = answer(tok, f"a{CUT}{F}", stop=["call:f"])
    assert (result.text, result.finish_reason) == ("a<|tool_call>", "stop")
    assert result.tool_calls == []
    end = answer(tok, f"a{CUT}", stop=["call:f"])
    assert (end.text, end.finish_reason) == ("a<|tool_call>", "stop")


@BLOCKS
def test_one_call_may_be_all(tok: Tokenizer, block_size: int) -> None:
    result = answer(
        tok, f"aEN{F}b{G}", parallel_tool_calls=False, block_size=block_size, stop="END"
    )
    assert (result.text, made(result)) == ("aEN", [("f", {"a": "x; y"})])
    assert result.finish_reason == "tool_calls"
    assert result.tokens == tok.encode(f"aEN{F}")
    assert result.stats.generated_tokens >= len(result.tokens)


def test_one_call_ends_the_text_for_itself_at_the_last_token_too(tok: Tokenizer) -> None:
    length = len(tok.encode(F))
    result = answer(tok, f"{F}b", parallel_tool_calls=False, max_tokens=length)
    assert (result.finish_reason, len(result.tokens)) == ("tool_calls", length)


def test_many_texts_have_their_own_calls(tok: Tokenizer) -> None:
    results: Any = answer(tok, f"{F}{G}", ["a", "b", "c"])
    assert [made(r) for r in results] == [[("f", {"a": "x; y"}), ("g", {"n": [1, 2]})]] * 3
    assert len({call.id for r in results for call in r.tool_calls}) == 6
    engine = Engine(script_pair(tok, f"{F}{G}"))
    requests = [engine.submit("So?", tools=TOOLS, parallel_tool_calls=p) for p in (True, False)]
    for request in requests:
        list(request)
    assert [len(r.result.tool_calls) for r in requests] == [2, 1]


def test_an_abandoned_text_keeps_its_calls(tok: Tokenizer) -> None:
    with stream("So?", pair=script_pair(tok, f"{F}{G}{G}{G}"), tools=TOOLS) as running:
        for step in running.steps():
            if step.tool_calls:
                break
    assert made(running.result)[0] == ("f", {"a": "x; y"}) and running.result.finish_reason is None


def test_a_result_tells_its_calls_in_json(tok: Tokenizer) -> None:
    result = answer(tok, f"{F}{CUT}")
    back = json.loads(json.dumps(result.to_dict()))
    assert back["tool_calls"] == [
        {"id": result.tool_calls[0].id, "name": "f", "arguments": '{"a":"x; y"}'}
    ]
    assert back["warning"] == result.warning and result.warning
    plain = answer(tok, "a").to_dict()
    assert "tool_calls" not in plain and "warning" not in plain


# What may be asked


def shown(tok: Tokenizer, **settings: Any) -> str:
    """The prompt as the target saw it, its marks spelled."""
    pair = script_pair(tok, "a")
    generate("So?", pair=pair, max_tokens=1, **settings)
    return "".join(tok.spelling(token) for token in pair.target.prompt)


def test_tools_are_shown_by_the_template(tok: Tokenizer) -> None:
    with_tools = shown(tok, tools=TOOLS)
    assert "<|tool>declaration:f{" in with_tools and f"{Q}Gees.{Q}" in with_tools
    assert with_tools == shown(tok, variables={"tools": TOOLS})
    assert shown(tok, tools=[]) == shown(tok) == shown(tok, tools=TOOLS, tool_choice="none")


@BLOCKS
def test_none_keeps_the_model_from_calling(tok: Tokenizer, block_size: int) -> None:
    result = answer(
        tok, f"a{F}b", tool_choice="none", block_size=block_size, sampling={"temperature": 0}
    )
    assert result.tool_calls == [] and tok.id_of("<|tool_call>") not in result.tokens
    assert (result.finish_reason, result.warning) == ("stop", None)
    assert result.text.startswith("a") and "call:f{" in result.text


def test_what_needs_a_grammar_says_so(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    named = {"type": "function", "function": {"name": "g"}}
    strict = [{"type": "function", "function": {"name": "f", "strict": True}}]
    pair = script_pair(tok, "a")
    for settings in ({"tool_choice": "required"}, {"tool_choice": named}, {"tools": strict}):
        asked: Any = {"tools": TOOLS, **settings}
        for ask in (Engine(pair).submit, functools.partial(stream, pair=pair)):
            with pytest.raises(ValueError, match="llguidance must be installed for grammars"):
                ask("a", **asked)
    assert answer(tok, "a", tools=strict, tool_choice="none").text == "a"


def test_tools_need_a_template_that_shows_them(tok: Tokenizer, tmp_path: Path) -> None:
    ids = tok.encode("a")
    for prompt, settings, kind in ((ids, {}, "token ids"), ("a", {"raw": True}, "raw")):
        with pytest.raises(ValueError) as caught:
            answer(tok, "a", prompt, **settings)
        assert str(caught.value) == (
            f"[generate] tools must go with a prompt for the chat template but it is {kind}."
        )
    blind = with_template(tmp_path, "{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match="with a chat template that shows them but this pair has"):
        answer(blind, "a")
    with pytest.raises(ValueError, match="tools must be given once but are among variables too"):
        answer(tok, "a", variables={"tools": TOOLS})


# Conversations given back


def test_the_page_s_example_runs(
    tok: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tools.md").read_text(encoding="utf-8")
    example = next(part for part in page.split("\n\n    ") if part.startswith("import json"))
    source = textwrap.dedent("    " + page[page.index(example) :].partition("\n\nThe ")[0])
    call = f"<|tool_call>call:weather{{town:{Q}Brno{Q}}}<tool_call|>"
    pair = saying(tok, f"One moment.{call}", "Yes.")
    monkeypatch.setattr(pyengine, "load", lambda bundle: pair)
    exec(source, {})
    assert capsys.readouterr().out == "Yes.\n" and len(pair.heard) == 2
    result = f"{{asked:{{town:{Q}Brno{Q}}},sky:{Q}rain{Q}}}<tool_response|>"
    assert pair.heard[1].endswith(f"One moment.{call}<|tool_response>response:weather{result}")


def history(arguments: Any) -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "fine"},
    ]


def prompt_of(tok: Tokenizer, messages: Any) -> str:
    pair = script_pair(tok, "a")
    generate(messages, pair=pair, max_tokens=1)
    return "".join(tok.spelling(token) for token in pair.target.prompt)


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(NANO / "chat_template.jinja", id="embedded"),
        *(
            pytest.param(path, id=path.stem)
            for path in sorted(Path(GEMMA or "/-").glob("g*.jinja"))
        ),
    ],
)
def test_arguments_may_be_text_or_an_object(tmp_path: Path, template: Path) -> None:
    tok = with_template(tmp_path, template.read_text(encoding="utf-8"))
    as_text, as_object = (prompt_of(tok, history(x)) for x in ('{"a": "x; y"}', {"a": "x; y"}))
    assert as_text == as_object and F in as_text
    result = f"<|tool_response>response:f{{value:{Q}fine{Q}}}<tool_response|>"
    # The earliest edition has turns of their own for results
    assert as_text.endswith(F + result) == ("tool_call_id" in template.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("fine", f"{{value:{Q}fine{Q}}}"),
        ("", f"{{value:{Q}{Q}}}"),
        ([{"type": "text", "text": "fine"}], f"{{value:{Q}fine{Q}}}"),
        ({"t": [1, None], "s": "<turn|>"}, f"{{s:{Q}<turn|>{Q},t:[1,null]}}"),
        ({}, "{}"),
    ],
)
def test_a_result_may_be_text_parts_or_an_object(
    tok: Tokenizer, content: Any, written: str
) -> None:
    messages = history({})
    messages[-1]["content"] = content
    assert prompt_of(tok, messages).endswith(f"<|tool_response>response:f{written}<tool_response|>")


def test_only_a_result_may_be_an_object(tok: Tokenizer) -> None:
    for role in ("user", "assistant"):
        with pytest.raises(ValueError, match="message 1 must have text as its content but got"):
            generate([{"role": role, "content": {}}], pair=script_pair(tok, "a"))
