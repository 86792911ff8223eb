"""Tools that a caller offers, and what the model may do with them; OpenAI's form, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyengine.arguments import flag
from pyengine.text.tool_calls import NAME
from pyengine.untrusted import shown

Tool = Mapping[str, Any]
ToolChoice = str | Mapping[str, Any]

CHOICES = ("auto", "none", "required")


@dataclass(frozen=True)
class ToolUse:
    """What an answer may do with tools; made by :func:`tool_use`, which checks it.

    Attributes:
        tools: As the template shows them, without keys that are None.
        choice: "auto", "none" or "required".
        name: The only function that may be called; ``choice`` is "required" then.
        parallel: Whether an answer may hold several calls.
    """

    tools: tuple[dict[str, Any], ...] = ()
    choice: str = "auto"
    name: str | None = None
    parallel: bool = True

    @property
    def shown(self) -> list[dict[str, Any]]:
        """The tools that the model is shown; none where it may call none."""
        return [] if self.choice == "none" else list(self.tools)

    @property
    def strict(self) -> list[str]:
        """Names of the tools whose calls must follow their parameters' schema."""
        functions = [tool["function"] for tool in self.shown]
        return [function["name"] for function in functions if function.get("strict")]


def tool_use(tools: Any, choice: Any, parallel: Any) -> ToolUse:
    """The arguments ``tools``, ``tool_choice`` and ``parallel_tool_calls``, checked.

    Raises:
        ValueError: One of them is of no known form; the message names the fault.
    """
    flag("generate", "parallel_tool_calls", parallel)
    if tools is not None and (not isinstance(tools, Sequence) or isinstance(tools, (str, bytes))):
        raise ValueError(f"[generate] tools must be a list but got {shown(tools)}.")
    ready = tuple(_tool(tool, f"[generate] tools[{i}]") for i, tool in enumerate(tools or ()))
    names = [tool["function"]["name"] for tool in ready]
    repeated = [name for i, name in enumerate(names) if name in names[:i]]
    if repeated:
        raise ValueError(f"[generate] tools must differ in name but two are {repeated[0]}.")
    if isinstance(choice, Mapping):
        return ToolUse(ready, "required", _named(choice, names), parallel)
    if choice not in CHOICES:
        raise ValueError(
            "[generate] tool_choice must be auto, none, required or a function but got "
            f"{shown(choice)}."
        )
    if choice == "required" and not ready:
        raise ValueError("[generate] tool_choice required must go with tools but there are none.")
    return ToolUse(ready, choice, None, parallel)


def _named(choice: Mapping[str, Any], names: list[str]) -> str:
    """The name in ``{"type": "function", "function": {"name": ...}}``."""
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise ValueError(
            "[generate] tool_choice must be of type function and hold a function with a name but "
            f"got {shown(dict(choice))}."
        )
    if name not in names:
        raise ValueError(
            f"[generate] tool_choice must name one of the tools but got {shown(name)}."
        )
    return name


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        said = tool.get("type") if isinstance(tool, Mapping) else tool
        raise ValueError(f"{where} must be an object of type function but got {shown(said)}.")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise ValueError(f"{where}.function must be an object but got {shown(function)}.")
    where += ".function"
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{where}.name must be 1 to 128 letters, digits, or signs of _.:/- but got "
            f"{shown(name)}."
        )
    description = function.get("description", "")
    if description is not None and not isinstance(description, str):
        raise ValueError(f"{where}.description must be text but got {shown(description)}.")
    if function.get("strict") is not None:
        flag("generate", where.removeprefix("[generate] ") + ".strict", function["strict"])
    if function.get("parameters") is not None:
        _check_parameters(function["parameters"], where + ".parameters")
    # A template prints a description that is None as "None"
    return {**tool, "function": {key: v for key, v in function.items() if v is not None}}


def _check_parameters(schema: Any, where: str) -> None:
    """What a template reads of a JSON Schema; the rest of it is the caller's."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"{where} must be a JSON Schema's object but got {shown(schema)}.")
    properties = schema.get("properties", {})
    if not isinstance(properties, Mapping):
        raise ValueError(f"{where}.properties must be an object but got {shown(properties)}.")
    for key, value in properties.items():
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}.properties.{key} must be an object but got {shown(value)}.")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise ValueError(f"{where}.required must be a list of names but got {shown(required)}.")
