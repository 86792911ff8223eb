"""Calls out of tokens: what is one, what is text, and that what is rendered is read again."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_fakes import write_tokenizers

import pyengine
from pyengine.text.prompt import encode_prompt
from pyengine.text.tokenizer import Tokenizer, load_tokenizer
from pyengine.text.tool_calls import MAX_DEPTH, MAX_TOKENS, CallReader, ToolCall

NANO = Path(pyengine.__file__).parent / "nano" / "target"
GEMMA = os.environ.get("PYENGINE_TEMPLATES")
Q = '<|"|>'


@pytest.fixture(scope="module")
def tok() -> Tokenizer:
    return load_tokenizer(NANO)


def read(tok: Tokenizer, ids: list[int]) -> tuple[ToolCall | None, str, str | None]:
    """Of the tokens behind the mark that opens a call: the call, its text, the warning."""
    reader = CallReader(tok)
    reader.begin()
    for token in ids[:-1]:
        assert reader.add(token) == (None, "") and reader.is_open
    call, text = reader.add(ids[-1])
    return call, text + reader.break_off(), reader.warning


def closed(tok: Tokenizer, text: str) -> list[int]:
    return tok.encode(text + "<tool_call|>")


# What the model writes between the marks, and the arguments it means
CALLS: dict[str, tuple[str, Any]] = {
    "none": ("call:f{}", {}),
    "a string": (f"call:f{{a:{Q}Brno{Q}}}", {"a": "Brno"}),
    "an empty string": (f"call:f{{a:{Q}{Q}}}", {"a": ""}),
    "signs in a string": (f"call:f{{a:{Q}x}}, {{b:1]\"' \\n\n\t<tool>{Q}}}", None),
    "numbers": ("call:f{a:0,b:-3,c:2.5,d:1e+22,e:1E-7,f:12345678901234567890}", None),
    "constants": ("call:f{a:true,b:false,c:null,d:None}", None),
    "nested": (
        f"call:f{{a:{{b:[{{c:[]}},{{}},[[{Q}x{Q}]]]}}}}",
        {"a": {"b": [{"c": []}, {}, [["x"]]]}},
    ),
    "blanks": (f" call:f {{ a : 1 ,\n b :[ 1 , {Q}x{Q} ] }} ", {"a": 1, "b": [1, "x"]}),
    "marked keys": (f"call:f{{{Q}a b:{Q}:1}}", {"a b:": 1}),
    "odd keys": ("call:f{two words:1,ž-ß.9:2,'q':3}", {"two words": 1, "ž-ß.9": 2, "'q'": 3}),
    "json": ('call:f{"a":"x\\n\\u017e","b":["y, z]"],"c":{"d":"\t"}}', None),
    "unicode": (f"call:f{{a:{Q}žluťoučký 🐎 中文{Q}}}", {"a": "žluťoučký 🐎 中文"}),
}
MEANT = {
    "signs in a string": {"a": "x}, {b:1]\"' \\n\n\t<tool>"},
    "numbers": {"a": 0, "b": -3, "c": 2.5, "d": 1e22, "e": 1e-7, "f": 12345678901234567890},
    "constants": {"a": True, "b": False, "c": None, "d": None},
    "json": {"a": "x\nž", "b": ["y, z]"], "c": {"d": "\t"}},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_read(tok: Tokenizer, name: str) -> None:
    written, meant = CALLS[name]
    meant = MEANT.get(name, meant)
    call, text, warning = read(tok, closed(tok, written))
    assert call is not None and (text, warning) == ("", None), warning
    assert call.name == "f" and re.fullmatch("call_[0-9a-f]{24}", call.id)
    assert json.loads(call.arguments) == meant
    assert call.arguments == json.dumps(meant, ensure_ascii=False, separators=(",", ":"))


def test_ids_differ(tok: Tokenizer) -> None:
    calls = [read(tok, closed(tok, "call:f{}"))[0] for _ in range(50)]
    assert len({call.id for call in calls if call}) == 50


@pytest.mark.parametrize("name", ["get_weather", "a-b.c", "google:mcp:make/file", "čas"])
def test_names_are_kept_as_written(tok: Tokenizer, name: str) -> None:
    call, _, _ = read(tok, closed(tok, f"call:{name}{{a:1}}"))
    assert call is not None and (call.name, call.arguments) == (name, '{"a":1}')


NO_VALUE = "must have a string, finite number, true, false or null but got "
# What is between the marks, and what the warning says of it
BROKEN = {
    "": "must begin with call:NAME{ but begins with ''",
    "f{}": "must begin with call:NAME{ but begins with 'f{}'",
    "call:{}": "must begin with call:NAME{ but begins with 'call:{}'",
    "call:a b{}": "must begin with call:NAME{ but begins with 'call:a b{}'",
    "call:f(a=1)": "must begin with call:NAME{ but begins with 'call:f(a=1)'",
    f"call:f{Q}{Q}{{}}": f"must begin with call:NAME{{ but begins with 'call:f{Q}{Q}{{}}'",
    "call:f{": "must name an argument but ends",
    "call:f{a:1": "must have a comma or } behind a value but ends",
    "call:f{a:1}}": "must end behind its arguments but got '}'",
    "call:f{} and": "must end behind its arguments but got 'and'",
    "call:f{a:1,}": "must name an argument but got '}'",
    "call:f{a:1 b:2}": "must have a comma or } behind a value but got 'b:2}'",
    "call:f{a=1}": "must have a colon behind 'a=1' but got '}'",
    "call:f{a}": "must have a colon behind 'a' but got '}'",
    "call:f{:1}": "must name an argument but got ':1}'",
    "call:f{a:}": NO_VALUE + "'}'",
    "call:f{a:Brno}": NO_VALUE + "'Brno}'",
    "call:f{a:'x'}": NO_VALUE + "\"'x'}\"",
    "call:f{a:01}": NO_VALUE + "'01}'",
    "call:f{a:.5}": NO_VALUE + "'.5}'",
    "call:f{a:NaN}": NO_VALUE + "'NaN}'",
    "call:f{a:-Infinity}": NO_VALUE + "'-Infinity}'",
    "call:f{a:True}": NO_VALUE + "'True}'",
    "call:f{a:[1,]}": NO_VALUE + "']}'",
    "call:f{a:[1}": "must have a comma or ] behind a value but got '}'",
    "call:f{a:1,a:2}": "must name each argument once but repeats 'a'",
    f"call:f{{a:1,{Q}a{Q}:2}}": "must name each argument once but repeats 'a'",
    f"call:f{{a:{Q}x}}": f"must close each string with {Q} but leaves one open",
    f"call:f{{a:{Q}x{Q}{Q}}}": f"must have a comma or }} behind a value but got '{Q}}}'",
    'call:f{a:"x}': "must have a whole string but got '\"x}'",
    'call:f{a:"\\ud800"}': "must hold Unicode text but got '\"\\\\ud800\"}'",
    f'call:f{{a:"x{Q}y"}}': f"must hold Unicode text but got '\"x{Q}y\"}}'",
    "call:f{a:1<turn|>}": "must hold no special token but holds <turn|>",
    f"call:f{{a:{Q}<bos>{Q}}}": "must hold no special token but holds <bos>",
}


@pytest.mark.parametrize("written", BROKEN)
def test_what_is_no_call_is_text_with_a_warning(tok: Tokenizer, written: str) -> None:
    call, text, warning = read(tok, closed(tok, written))
    assert call is None
    assert text == f"<|tool_call>{written}<tool_call|>"
    assert warning == f"[generate] tool call 1 {BROKEN[written]}; it is left as text."


def test_numbers_too_large_to_hold_are_text(tok: Tokenizer) -> None:
    for number in ("1e999", "-1e999", "9" * 5000):
        call, text, warning = read(tok, closed(tok, f"call:f{{a:{number}}}"))
        assert call is None and number in text and warning is not None
        assert "finite number, true, false or null but got" in warning and len(warning) < 300


def test_a_call_may_be_nested_only_so_deep(tok: Tokenizer) -> None:
    for opening, closing in (("[", "]"), ("{a:", "}")):
        deep = opening * (MAX_DEPTH - 1) + "1" + closing * (MAX_DEPTH - 1)
        call, _, _ = read(tok, closed(tok, f"call:f{{a:{deep}}}"))
        assert call is not None
        for count in (MAX_DEPTH, 10_000):
            deeper = opening * count + "1" + closing * count
            call, text, warning = read(tok, closed(tok, f"call:f{{a:{deeper}}}"))
            assert call is None and deeper in text
            assert warning == (
                "[generate] tool call 1 must be nested at most 32 deep but is deeper; it is left "
                "as text."
            )


def test_a_call_may_be_only_so_long(tok: Tokenizer) -> None:
    [x] = tok.encode("x")
    whole = tok.encode(f"call:f{{a:{Q}"), tok.encode(f"{Q}}}<tool_call|>")
    room = MAX_TOKENS - sum(map(len, whole)) + 1  # the mark that closes it does not count
    call, _, _ = read(tok, [*whole[0], *[x] * room, *whole[1]])
    assert call is not None and len(call.arguments) == room + len('{"a":""}')
    call, text, warning = read(tok, [*whole[0], *[x] * (room + 1), *whole[1]])
    assert call is None and text.count("x") == room + 1
    assert warning == (
        f"[generate] tool call 1 must have at most {MAX_TOKENS} tokens but has {MAX_TOKENS + 1}; "
        "it is left as text."
    )


def test_hostile_calls_take_no_time(tok: Tokenizer) -> None:
    """Each would take minutes where a step looks at all that follows."""
    for text in ("{" * 60_000, "call:" * 12_000, "call:f{" + "a:1,a" * 12_000, f"{Q}" * 60_000):
        call, text, _ = read(tok, closed(tok, f"call:f{{a:{text}"))
        assert call is None and len(text) > 50_000


def test_a_call_that_is_cut_is_text(tok: Tokenizer) -> None:
    reader = CallReader(tok)
    assert (reader.is_open, reader.break_off(), reader.warning) == (False, "", None)
    for number in (1, 2):
        reader.begin()
        for token in tok.encode(f"call:f{{a:{Q}x"):
            reader.add(token)
        assert reader.break_off() == f"<|tool_call>call:f{{a:{Q}x" and not reader.is_open
        assert reader.warning == (  # of the first
            "[generate] tool call 1 must end with <tool_call|> but is cut; it is left as text."
        ), number


def test_the_warning_counts_calls(tok: Tokenizer) -> None:
    reader = CallReader(tok)
    for text in ("call:f{}", "call:f", "call:g"):
        reader.begin()
        for token in closed(tok, text):
            reader.add(token)
    assert reader.warning is not None and "tool call 2 must begin" in reader.warning


def test_half_a_character_is_a_mark_of_that(tok: Tokenizer) -> None:
    half = [tok.id_of("<0xC5>")]
    assert None not in half
    ids = [*tok.encode(f"call:f{{a:{Q}"), *half, *tok.encode(f"{Q}}}<tool_call|>")]  # type: ignore
    call, _, _ = read(tok, ids)
    assert call is not None and json.loads(call.arguments) == {"a": "\ufffd"}


def test_without_the_marks_there_are_no_calls(tmp_path: Path) -> None:
    write_tokenizers(tmp_path)
    other = load_tokenizer(tmp_path)
    assert other.call_ids() == () and CallReader(other).mark is None


# What is rendered is read again


def templates() -> list[Any]:
    named = [pytest.param(NANO / "chat_template.jinja", id="embedded")]
    if GEMMA:
        published = sorted(Path(GEMMA).glob("gemma-4*.jinja"))
        assert published, f"PYENGINE_TEMPLATES must hold gemma-4*.jinja but {GEMMA} has none"
        return named + [pytest.param(path, id=path.stem) for path in published]
    skip = pytest.mark.skip(reason="needs PYENGINE_TEMPLATES, a folder of Gemma 4's templates")
    return [*named, pytest.param(None, id="published", marks=skip)]


@pytest.fixture(scope="module", params=templates())
def rendering(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("rendering")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, folder)
    shutil.copy(request.param, folder / "chat_template.jinja")
    return load_tokenizer(folder)


def rendered(tok: Tokenizer, calls: list[tuple[str, Any]], **more: Any) -> list[int]:
    asked = [
        {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    messages = [
        {"role": "user", "content": "What now?"},
        {"role": "assistant", "content": None, "tool_calls": asked, **more},
        *({"role": "tool", "tool_call_id": c["id"], "content": "done"} for c in asked),
    ]
    return encode_prompt(messages, tok, context=1 << 20, vocab=tok.vocab_size)


def calls_in(tok: Tokenizer, ids: list[int]) -> list[ToolCall]:
    reader, found = CallReader(tok), []
    for token in ids:
        if token == reader.mark:
            reader.begin()
        elif reader.is_open:
            call, _ = reader.add(token)
            found += [call] if call else []
    assert reader.warning is None, reader.warning
    return found


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [f"a {Q} b", "<tool_call|>", "<|tool_call>call:f{}", "}", "{'a': \"b\"}", "  \n", "\\", "true"]
)
KEYS = st.text("aBž_9-$.", min_size=1, max_size=4) | st.sampled_from(["two words", "'q'", "true"])
NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
LEAVES = TEXTS | NUMBERS | st.booleans() | st.none()
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)
NAMES = st.text("aBž_9-.:/", min_size=1, max_size=9)
CALLS_MADE = st.lists(
    st.tuples(NAMES, st.dictionaries(KEYS, VALUES, max_size=4)), min_size=1, max_size=3
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls=CALLS_MADE, as_text=st.booleans())
def test_what_is_rendered_is_read_again(
    rendering: Tokenizer, calls: list[tuple[str, dict[str, Any]]], as_text: bool
) -> None:
    given_back = [(name, json.dumps(own) if as_text else own) for name, own in calls]
    found = calls_in(rendering, rendered(rendering, given_back))
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls


def test_what_is_read_can_be_given_back(rendering: Tokenizer) -> None:
    """At every depth that is read, in the words that came."""
    value: Any = "x"
    for depth in range(MAX_DEPTH - 1):
        value = [value] if depth % 2 else {"a": value}
    first = calls_in(rendering, rendered(rendering, [("f", {"a": value})]))
    again = calls_in(rendering, rendered(rendering, [("f", first[0].arguments)]))
    assert json.loads(first[0].arguments) == {"a": value}
    assert again[0].arguments == first[0].arguments
