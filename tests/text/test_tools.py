"""Tools and what may be done with them: OpenAI's form, one sentence for each fault."""

from __future__ import annotations

from typing import Any

import pytest

from pyengine.text.tools import tool_use


def tool(name: Any = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
F = {"type": "function", "function": {"name": "f"}}


def test_without_tools_nothing_is_shown() -> None:
    for tools in (None, [], ()):
        use = tool_use(tools, "auto", True)
        assert (use.shown, use.choice, use.name, use.parallel, use.strict) == (
            *([], "auto", None, True, []),
        )


def test_tools_are_shown_as_they_are() -> None:
    tools = [tool(description="Does it.", parameters=SCHEMA), tool("server:g.h/i-j", response={})]
    assert tool_use(tools, "auto", False).shown == tools
    assert tool_use(tuple(tools), "required", True).shown == tools
    assert tool_use(tools, "none", True).shown == []


def test_what_is_none_is_left_out() -> None:
    tools = [tool(description=None, parameters=None, strict=None)]
    assert tool_use(tools, "auto", True).shown == [tool()]


def test_one_function_may_be_chosen() -> None:
    use = tool_use([tool("g"), tool()], F, True)
    assert (use.choice, use.name, len(use.shown)) == ("required", "f", 2)


def test_strict_tools_are_named() -> None:
    tools = [tool(strict=True), tool("g", strict=False), tool("h")]
    assert tool_use(tools, "auto", True).strict == ["f"]
    assert tool_use(tools, "none", True).strict == []


NAMED = "tools[0].function.name must be 1 to 128 letters, digits, or signs of _.:/- but got "
PARAMETERS = "tools[0].function.parameters"
FAULTS: list[tuple[Any, Any, Any, str]] = [
    ({}, "auto", True, "tools must be a list but got {}."),
    ("f", "auto", True, "tools must be a list but got 'f'."),
    ([5], "auto", True, "tools[0] must be an object of type function but got 5."),
    ([tool], "auto", True, "tools[0] must be an object of type function but got <function tool"),
    ([{}], "auto", True, "tools[0] must be an object of type function but got None."),
    ([{"type": "x"}], "auto", True, "tools[0] must be an object of type function but got 'x'."),
    ([F, {"type": "function"}], "auto", True, "tools[1].function must be an object but got None."),
    ([tool(None)], "auto", True, NAMED + "None."),
    ([tool("")], "auto", True, NAMED + "''."),
    ([tool("a b")], "auto", True, NAMED + "'a b'."),
    ([tool("a{")], "auto", True, NAMED + "'a{'."),
    ([tool("a\n")], "auto", True, NAMED + "'a\\n'."),
    ([tool("a" * 129)], "auto", True, NAMED + "'aaa"),
    ([tool(description=5)], "auto", True, "tools[0].function.description must be text but got 5."),
    ([tool(strict=1)], "auto", True, "tools[0].function.strict must be True or False but got 1."),
    (
        [tool(parameters=[])],
        "auto",
        True,
        f"{PARAMETERS} must be a JSON Schema's object but got [].",
    ),
    (
        *([tool(parameters={"properties": ["a"]})], "auto", True),
        f"{PARAMETERS}.properties must be an object but got ['a'].",
    ),
    (
        *([tool(parameters={"properties": {"a": 1}})], "auto", True),
        f"{PARAMETERS}.properties.a must be an object but got 1.",
    ),
    (
        *([tool(parameters={"required": "a"})], "auto", True),
        f"{PARAMETERS}.required must be a list of names but got 'a'.",
    ),
    ([F, F], "auto", True, "tools must differ in name but two are f."),
    ([F], "any", True, "tool_choice must be auto, none, required or a function but got 'any'."),
    ([F], None, True, "tool_choice must be auto, none, required or a function but got None."),
    ([F], ["f"], True, "tool_choice must be auto, none, required or a function but got ['f']."),
    (None, "required", True, "tool_choice required must go with tools but there are none."),
    (
        *([F], {"type": "function", "function": "f"}, True),
        "tool_choice must be of type function and hold a function with a name but got {'type'",
    ),
    (
        *([F], {"function": {"name": "f"}}, True),
        "tool_choice must be of type function and hold a function with a name but got {'function'",
    ),
    ([tool("g")], F, True, "tool_choice must name one of the tools but got 'f'."),
    ([F], "auto", None, "parallel_tool_calls must be True or False but got None."),
]


@pytest.mark.parametrize(("tools", "choice", "parallel", "said"), FAULTS)
def test_each_fault_is_a_sentence(tools: Any, choice: Any, parallel: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        tool_use(tools, choice, parallel)
    assert str(caught.value).startswith(f"[generate] {said}")
    assert str(caught.value).endswith(".")
