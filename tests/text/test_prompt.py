"""Messages in the forms that clients send: calls, parts of a system message, the first token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from text_fakes import TEMPLATE, script_pair, write_tokenizers

from pyengine.generation import generate
from pyengine.task import prompt_ids
from pyengine.text.tokenizer import load_tokenizer

USER = {"role": "user", "content": "the fox"}
# As the published editions print calls, in short: the first two print a string as it stands, that
# of July 2026 refuses one. They take a system message's parts in different ways, too.
CALLS = """\
{%- for m in messages %}{% for call in m.tool_calls or [] %}
    {{- call.function.name }}({% if call.function.arguments is mapping %}
    {%- for k, v in call.function.arguments | dictsort %}{{ k }}={{ v }};{% endfor %}
    {%- else %}{{ ON_STRING }}{% endif %})
{%- endfor %}{% endfor %}"""
PRINTS = CALLS.replace("ON_STRING", "call.function.arguments")
REFUSES = CALLS.replace("ON_STRING", "raise_exception('arguments must be a mapping')")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("messages")
    write_tokenizers(directory)
    return directory


def pair_of(directory: Path, folder: Path, template: str, **config: Any) -> Any:
    shutil.copy(folder / "tokenizer.json", directory)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(template)
    return script_pair(load_tokenizer(directory), "jumps")


def calling(*arguments: Any) -> list[dict[str, Any]]:
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "f", "arguments": value}}
        for i, value in enumerate(arguments)
    ]
    return [USER, {"role": "assistant", "content": None, "tool_calls": calls}, USER]


@pytest.mark.parametrize("template", [PRINTS, REFUSES], ids=["prints strings", "refuses strings"])
def test_arguments_of_a_call_may_be_json(tmp_path: Path, folder: Path, template: str) -> None:
    pair = pair_of(tmp_path, folder, template)
    as_objects = calling({"b": "x", "a": [1, {"c": None}]}, {}, {}, {"k": True})
    as_json = calling('{"b": "x", "a": [1, {"c": null}]}', "{}", "", ' {"k": true}\n')
    kept = json.dumps(as_json)
    ids = prompt_ids(pair, as_json)
    assert ids == prompt_ids(pair, as_objects) and json.dumps(as_json) == kept
    assert pair.tokenizer.decode(ids) == "f(a=[1, {'c': None}];b=x;)f()f()f(k=True;)"
    generate(as_json, pair=pair, max_tokens=1)
    assert pair.target.prompt == ids
    # No arguments at all are those of a function that takes none
    bare = calling(None)
    assert pair.tokenizer.decode(prompt_ids(pair, bare)) == "f()"


@pytest.mark.parametrize(
    "value", ["{", "[1]", "null", '"a"', "5", "a=1", '{"a": 1} x', " ", [1], 5, True, "{}{}"]
)
def test_other_arguments_are_refused_by_name(tmp_path: Path, folder: Path, value: Any) -> None:
    pair = pair_of(tmp_path, folder, PRINTS)
    messages = [USER, *calling({}, value)]
    with pytest.raises(ValueError) as refused:
        prompt_ids(pair, messages)
    assert str(refused.value) == (
        "[generate] messages[2].tool_calls[1].function.arguments must be a JSON object but got "
        f"{value!r}."
    )


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ("f()", r"messages\[0\]\.tool_calls must be a list but got a string\.$"),
        ([5], r"messages\[0\]\.tool_calls\[0\] must be an object with a function but got 5\.$"),
        ([{"function": "f"}], r"tool_calls\[0\] must be an object with a function but got "),
        (
            [{"function": {"name": "f", "arguments": '{"a": ' * 70 + "1" + "}" * 70}}],
            r"function\.arguments must be nested at most 64 deep but is deeper\.$",
        ),
    ],
)
def test_calls_have_the_protocol_s_form(
    tmp_path: Path, folder: Path, calls: Any, reason: str
) -> None:
    pair = pair_of(tmp_path, folder, PRINTS)
    with pytest.raises(ValueError, match=reason):
        prompt_ids(pair, [{"role": "assistant", "content": "", "tool_calls": calls}])


def test_variables_are_nested_no_deeper_than_messages(tmp_path: Path, folder: Path) -> None:
    pair = pair_of(tmp_path, folder, TEMPLATE)
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match="variables must be nested at most 64 deep but is deeper"):
        prompt_ids(pair, [USER], variables={"tools": endless})


@pytest.mark.parametrize("config", [{}, {"bos_token": None}, {"bos_token": "<bos>"}])
@pytest.mark.parametrize(
    "template", [TEMPLATE, "{{ messages[0].content }}", "<bos>{{ messages[0].content }}"]
)
def test_chat_and_raw_begin_with_the_same_bos(
    tmp_path: Path, folder: Path, template: str, config: dict[str, Any]
) -> None:
    pair = pair_of(tmp_path, folder, template, **config)
    [first, *others] = prompt_ids(pair, "the fox", raw=True)
    for prompt in ("the fox", [USER]):
        ids = prompt_ids(pair, prompt)
        assert ids[0] == first == pair.tokenizer.id_of("<bos>") and first not in ids[1:]
    assert first not in others
    # A message cannot write it
    ids = prompt_ids(pair, "<bos>the fox")
    assert ids[0] == first and first not in ids[1:]


def test_a_vocabulary_without_bos_begins_with_none(tmp_path: Path, folder: Path) -> None:
    pair = pair_of(tmp_path, folder, "{{ messages[0].content }}")
    pair.tokenizer.bos_id = None
    assert prompt_ids(pair, "fox") == prompt_ids(pair, "fox", raw=True)


PARTS = [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief"}]
JOINED = """\
{%- for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content | trim }}
{%- else %}{% for part in m.content %}{{ part.text | trim + ' ' }}{% endfor %}{% endif %}|
{%- endfor %}"""
FIRST_AS_A_STRING = "{{ messages[0].content | trim }}|{% set messages = messages[1:] %}" + JOINED


@pytest.mark.parametrize("role", ["system", "developer"])
@pytest.mark.parametrize(
    ("template", "first", "later"),
    [
        ("{% for m in messages %}{{ m.content }}|{% endfor %}", "Be\nbrief|", "Be\nbrief|"),
        (JOINED, "ROLE:Be brief |", "ROLE:Be brief |"),
        (FIRST_AS_A_STRING, "Be\nbrief|", "ROLE:Be brief |"),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", '"Be\\nbrief"', '"Be\\nb'),
        ("{% for m in messages %}{{ m.content + '' }}|{% endfor %}", "Be\nbrief|", "Be\nbrief|"),
    ],
    ids=["prints", "takes parts", "first as a string", "json", "adds"],
)
def test_parts_of_a_system_message_stay_apart(
    tmp_path: Path, folder: Path, role: str, template: str, first: str, later: str
) -> None:
    """A template that takes parts gets them, as in transformers; any other gets lines."""
    pair = pair_of(tmp_path, folder, template)
    message = {"role": role, "content": PARTS}
    text = pair.tokenizer.decode(prompt_ids(pair, [message, USER]))
    assert text.startswith(first.replace("ROLE", role))
    text = pair.tokenizer.decode(prompt_ids(pair, [USER, message]))
    assert later.replace("ROLE", role) in text
    empty = {"role": role, "content": []}
    assert "[" not in pair.tokenizer.decode(prompt_ids(pair, [empty, USER]))


def test_the_embedded_pair_keeps_parts_of_a_system_message_apart() -> None:
    import pyengine

    pair = pyengine.load()
    ids = prompt_ids(pair, [{"role": "system", "content": PARTS}, USER])
    assert pair.tokenizer.decode(ids).startswith("system\nBe brief\nuser\nthe fox")
