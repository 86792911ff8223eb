"""Calls that a grammar permits: each is read, and its arguments follow the tool's schema."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
from schemas import CENTS, SMALL, WORD, listed, record

import pyengine
from pyengine.grammar.asked import Source
from pyengine.grammar.compiled import compile_grammar
from pyengine.grammar.matcher import GrammarMatcher
from pyengine.grammar.tools import tools_source
from pyengine.task import embedded_pair
from pyengine.text.tool_calls import CallReader
from pyengine.text.tools import tool_use

pytest.importorskip("llguidance", reason="the extra grammar is not installed")

PROMPT = [{"role": "user", "content": "Create a Flappy Bird game."}]
PARAMETERS: dict[str, Any] = {
    "nothing": {"type": "object", "properties": {}},
    "weather": record(
        town=WORD, days=SMALL, unit={"enum": ["C", "F", 3, None, True, ["a", {"b": 1}]]}
    ),
    "optional": {
        "type": "object",
        "properties": {"b": WORD, "A": {"type": "boolean"}, "c": {"type": ["null", "integer"]}},
        "required": ["b"],
    },
    "odd:name/of-a.tool_": record(
        **{"a key": WORD, 'with "quotes"': CENTS, "": {"const": "x{}"}, "ключ": {"type": "null"}}
    ),
    "nested": record(
        points=listed(record(x={"type": "number"}, y=CENTS), 1, 2),
        zip={"type": "string", "pattern": "^[0-9]{5}$"},
        code={"type": "string", "pattern": "^[a-c]/x?$"},
        either={"anyOf": [{"const": {"k": [1, 2]}}, listed({"type": "boolean"}, 0, 2)]},
    ),
    "tree": {
        **record(root={"$ref": "#/$defs/node"}),
        "$defs": {
            "node": record(
                value=SMALL, next={"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
            )
        },
    },
}


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": PARAMETERS[name], **more}}


TOOLS = [tool(name) for name in PARAMETERS]


def check(calls: Any) -> None:
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), PARAMETERS[call.name])


def call(name: str, seed: int, **more: Any) -> pyengine.Result:
    choice = {"type": "function", "function": {"name": name}}
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": seed}
    asked = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 400, "sampling": sampling, **more}
    return pyengine.generate(PROMPT, **asked)


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_named_function_is_called_with_valid_arguments(name: str) -> None:
    for seed in range(2):
        result = call(name, seed, parallel_tool_calls=False)
        assert [made.name for made in result.tool_calls] == [name]
        assert (result.finish_reason, result.warning, result.text) == ("tool_calls", None, "")
        check(result.tool_calls)


@pytest.mark.long
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_hundred_calls_of_each_function_are_valid(name: str) -> None:
    for seed in range(100):
        result = call(name, seed)
        if result.finish_reason == "length":  # which may be in the middle of one more call
            assert result.warning is None or "is cut" in result.warning
        else:
            assert result.warning is None and result.tool_calls
        check(result.tool_calls)


def test_required_calls_are_the_same_at_every_block_size() -> None:
    def ask(block: int) -> pyengine.Result:
        sampling = {"temperature": 1.0, "seed": 3, "verify": "coupled"}
        return call("weather", 3, tool_choice="required", sampling=sampling, block_size=block)

    plain = ask(1)
    assert plain.tool_calls
    check(plain.tool_calls)
    for block in (3, 6):
        assert ask(block).tokens == plain.tokens


def source(tools: list[Any], choice: Any = "auto", parallel: bool = True, form: Any = None) -> Any:
    return tools_source(tool_use(tools, choice, parallel), embedded_pair().tokenizer, form)


def follows(found: Source | None, text: str) -> bool:
    """Whether an answer, marks and all, is one of a grammar."""
    assert found is not None
    pair = embedded_pair()
    grammar = compile_grammar(pair, found)
    matcher = GrammarMatcher(grammar, pair.tokenizer, [2])
    tokens = [*pair.tokenizer.encode(text), grammar.stop_ids[0]]
    for token in tokens:
        row = np.zeros(grammar.words, np.uint32)
        matcher.fill(row)
        if not matcher.add(token):
            return False
    return True


def test_what_a_grammar_of_tools_leaves_free() -> None:
    weather = '<|tool_call>call:weather{days:3,town:<|"|>a{,<|"|>,unit:<|"|>C<|"|>}<tool_call|>'
    nothing = "<|tool_call>call:nothing{}<tool_call|>"
    tools = [tool("weather"), tool("nothing")]
    several, one = source(tools, "required"), source(tools, "required", False)
    assert follows(several, weather) and follows(several, weather + nothing)
    assert follows(one, nothing) and not follows(one, nothing + nothing)
    assert not follows(several, "words") and not follows(several, "words" + nothing)
    named = source(tools, {"type": "function", "function": {"name": "nothing"}})
    assert follows(named, nothing) and not follows(named, weather)
    strict = source([tool("weather", strict=True), tool("nothing")])
    assert follows(strict, "words") and follows(strict, "words" + weather + nothing)
    assert not follows(strict, weather.replace("3", "a"))
    form = Source("json_schema", '{"const": 7}')
    either = source(tools, form=form)
    assert follows(either, "7") and follows(either, weather) and not follows(either, "7" + weather)
    assert source(tools) is None and source([], form=form) == form
    assert source(tools, "none", form=form) == form


def test_tools_without_a_schema_take_anything() -> None:
    free = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    found = source(free, "required")
    text = '{a:<|"|>x<|"|>,b:{c:[1,-2.5,true,null],d:{}}}'
    assert follows(found, f"<|tool_call>call:f{text}<tool_call|>")
    assert not follows(found, "<|tool_call>call:f{a:}<tool_call|>")


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"type": "object", "patternProperties": {}}, "must do without patternProperties where"),
        (record(a={"not": {}}), "must do without not where the tool is strict"),
        (record(a={"type": "tuple"}), "must have a known type but have"),
        (
            record(a={"$ref": "#/$defs/no"}),
            "must refer to what they hold but refer to '#/$defs/no'",
        ),
        (record(a={"$ref": "http://x"}), "must refer to what they hold but refer to"),
        (record(a={"enum": []}), "must have a list in enum but have"),
        (record(a={"allOf": [{}, {}]}), "must have one schema in allOf"),
        (record(a={"type": "array", "minItems": 3, "maxItems": 2}), "whole numbers in order"),
        (record(a={"type": "string", "minLength": -1}), "whole numbers in order"),
        (record(a={"type": "string", "pattern": "("}), "must be one that can be followed"),
        ({"type": "object", "properties": {}, "required": ["x"]}, "but lack 'x'"),
        (record(a={"type": "array", "items": 3}), "must hold schemas but hold 3"),
    ],
)
def test_what_no_call_can_follow_is_refused(parameters: Any, said: str) -> None:
    function = {"name": "f", "parameters": parameters, "strict": True}
    with pytest.raises(ValueError) as caught:
        pyengine.generate(PROMPT, tools=[{"type": "function", "function": function}])
    assert str(caught.value).startswith("[grammar] ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_random_schemas_give_calls_that_are_read() -> None:
    """Walks through the grammar itself, for no model would go there."""
    rng, pair = random.Random(4), embedded_pair()

    def schema(depth: int) -> Any:
        kind = rng.randrange(7 if depth else 4)
        if kind == 0:
            return rng.choice(
                [WORD, {"type": "string", "pattern": "a|b+"}, {"enum": ["<", '"', ""]}]
            )
        if kind < 3:
            return rng.choice(
                [SMALL, CENTS, {"type": "boolean"}, {"type": "null"}, {"const": -1.5}]
            )
        if kind == 3:
            return {"enum": [1, "1", None, {"a": [True]}]}
        if kind == 4:
            return listed(schema(depth - 1), rng.randrange(2), 1 + rng.randrange(2))
        if kind == 5:
            return {"anyOf": [schema(depth - 1), schema(depth - 1)]}
        names = rng.sample(["a", "B", "c d", "Ж", "x{", "0"], 3)
        made = record(**{name: schema(depth - 1) for name in names})
        return made | {"required": names[: rng.randrange(4)]}

    for _ in range(25):
        parameters = record(first=schema(2), second=schema(3))
        function = {"name": "f", "parameters": parameters}
        found = source([{"type": "function", "function": function}], "required", False)
        grammar = compile_grammar(pair, found)
        matcher = GrammarMatcher(grammar, pair.tokenizer, [2])
        tokens: list[int] = []
        while len(tokens) < 3000:
            row = np.zeros(grammar.words, np.uint32)
            matcher.fill(row)
            ids = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
            token = int(rng.choice(ids))
            assert matcher.add(token)
            if token in grammar.stop_ids:
                break
            tokens.append(token)
        reader = CallReader(pair.tokenizer)
        assert tokens[0] == reader.mark
        reader.begin()
        *_, (made, text) = [reader.add(token) for token in tokens[1:]]
        assert made is not None, (reader.warning, text)
        jsonschema.validate(json.loads(made.arguments), parameters)
