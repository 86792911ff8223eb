"""Calls of tools as a grammar: ``<|tool_call>call:NAME{key:value,...}<tool_call|>``.

The schemas of parameters are written out for Gemma's own syntax: bare keys in alphabetical order,
as its template sorts them, strings between two ``<|"|>`` tokens, no white space. An object has the
properties that are declared, and only where none are any others.

Source: what the published chat templates write, and :mod:`pyengine.text.tool_calls` reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pyengine.grammar.asked import Kind, Source, check_installed, checked
from pyengine.text.tools import ToolUse
from pyengine.untrusted import shown

if TYPE_CHECKING:
    from pyengine.text.tokenizer import Tokenizer

TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
# Keywords that say nothing of a value's form, or that nothing checks
NOTES = frozenset(
    {"$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default"}
    | {"examples", "deprecated", "readOnly", "writeOnly", "format", "nullable", "strict"}
    | {"discriminator", "x-guidance"}
)
WITH_TYPES = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern"}),
    "number": frozenset(
        {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
    ),
}
FORMS = frozenset({"type", "enum", "const", "anyOf", "oneOf", "allOf", "$ref"})
KNOWN = NOTES.union(FORMS, *WITH_TYPES.values())
BARE = re.compile(r'[^\s{}\[\],:"<>][^{}\[\],:"<>]*(?<!\s)')
# No more digits than a double has, so that each is finite
INTEGER = r"/-?(0|[1-9][0-9]{0,15})/"
NUMBER = r"/-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,16})?([eE][+-]?[0-9]{1,2})?/"
TEXT = r"/(?s:.)*/"


def tools_source(use: ToolUse, tokenizer: Tokenizer, form: Source | None) -> Source | None:
    """The grammar of an answer that has to call, or that calls strict tools; else ``form``, the
    form that is asked of an answer.

    Raises:
        ValueError: A strict tool's parameters say what the grammar cannot, or the form is a grammar
            of its own.
    """
    required = use.choice == "required"
    if not required and not use.strict and (form is None or not use.shown):
        return form
    check_installed()
    marks = tokenizer.call_ids()
    if not marks:
        raise ValueError(
            "[grammar] the pair must have the marks of tool calls in its vocabulary but has none."
        )
    text = _Calls(use, marks).written("" if required else _words(form), use.parallel)
    return checked("lark", "the grammar of all tools", text)


def _words(form: Source | None) -> str:
    """What may stand in an answer that need not call, as a Lark expression."""
    if form is None:
        return TEXT
    write: dict[Kind, Any] = {"json_schema": lambda text: f"%json {text}", "regex": _regex}
    if form.kind not in write:
        raise ValueError("[grammar] a grammar must not go with tools: it would have to hold them.")
    return str(write[form.kind](form.text))


class _Calls:
    """The rules of calls, one for each schema, in the order in which they are met."""

    def __init__(self, use: ToolUse, marks: tuple[int, ...]) -> None:
        self._use = use
        self._open, self._close, self._quote = (f"<[{mark}]>" for mark in marks)
        self._rules: list[str] = []
        self._refs: dict[tuple[str, str], str] = {}  # by tool and pointer
        self._any: str | None = None
        self._tool: Mapping[str, Any] = {}

    def written(self, words: str, parallel: bool) -> str:
        functions = [tool["function"] for tool in self._use.shown]
        named = [f for f in functions if self._use.name in (None, f["name"])]
        call = self._rule(" | ".join(map(self._call, named)))
        calls = f"{call}+" if parallel else call
        if not words:
            start = calls
        elif words == TEXT:
            start = f"{words} ({calls})?"
        else:
            start = f"({words}) | {calls}"
        return "\n".join([f"start: {start}", *self._rules])

    def _call(self, function: Mapping[str, Any]) -> str:
        self._tool = function
        head = _literal(f"call:{function['name']}")
        parameters = function.get("parameters") or {"type": "object", "properties": {}}
        return f"{self._open} {head} {self._object(parameters)} {self._close}"

    def _rule(self, body: str) -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _value(self, schema: Any) -> str:
        """An expression for the values of a schema."""
        if schema is True or schema == {}:
            return self._anything()
        if not isinstance(schema, Mapping):
            raise self._wrong(f"must hold schemas but hold {shown(schema)}")
        self._check(schema)
        if "$ref" in schema:
            return self._ref(schema["$ref"])
        if "const" in schema:
            return self._constant(schema["const"])
        if "enum" in schema:
            return self._either(map(self._constant, self._list(schema, "enum")))
        for key in ("anyOf", "oneOf"):
            if key in schema:
                return self._either(map(self._value, self._list(schema, key)))
        if "allOf" in schema:
            parts = self._list(schema, "allOf")
            if len(parts) != 1:
                raise self._wrong("must have one schema in allOf but have several")
            return self._value(parts[0])
        types = schema.get("type", _types_of(schema))
        types = [types] if isinstance(types, str) else types
        if not isinstance(types, (list, tuple)) or not set(map(str, types)) <= set(TYPES):
            raise self._wrong(f"must have a known type but have {shown(types)}")
        if schema.get("nullable") is True and "null" not in types:
            types = [*types, "null"]
        return self._either([self._typed(kind, schema) for kind in types])

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str:
        if kind == "object":
            return self._object(schema)
        if kind == "array":
            return self._array(schema)
        if kind == "string":
            return f"{self._quote} {self._string(schema)} {self._quote}"
        bounds = {key: schema[key] for key in WITH_TYPES["number"] if key in schema}
        if kind in ("integer", "number") and not bounds:
            return INTEGER if kind == "integer" else NUMBER
        return f"%json {json.dumps({'type': kind, **bounds})}"

    def _object(self, schema: Mapping[str, Any]) -> str:
        self._check(schema)
        if "$ref" in schema:
            return self._ref(schema["$ref"])
        properties, required = schema.get("properties") or {}, schema.get("required") or []
        if not isinstance(properties, Mapping) or not isinstance(required, (list, tuple)):
            raise self._wrong("must have properties by name and a list of those required")
        missing = [key for key in required if key not in properties]
        if missing:
            raise self._wrong(f"must declare what they require but lack {shown(missing[0])}")
        more = schema.get("additionalProperties", "properties" not in schema)
        if not properties and more is not False:
            return self._map(self._value(more))
        # From the last property on: with a comma before it, and as the first
        others, first = '""', '""'
        for key in sorted(properties, key=lambda key: (key.lower(), key), reverse=True):
            pair = f"{self._key(key)} {_literal(':')} {self._rule(self._value(properties[key]))}"
            absent = key not in required
            longer = self._rule(f'"," {pair} {others}' + (f" | {others}" if absent else ""))
            first = self._rule(f"{pair} {others}" + (f" | {first}" if absent else ""))
            others = longer
        return f'"{{" {first} "}}"'

    def _array(self, schema: Mapping[str, Any]) -> str:
        least, most = self._bounds(schema, "minItems", "maxItems")
        item = self._rule(self._value(schema.get("items", True)))
        if most == 0:
            return '"[" "]"'
        inside, end = item, "" if most is None else str(most - 1)
        if most != 1:
            inside += f' ("," {item}){{{max(least - 1, 0)},{end}}}'
        return f'"[" {inside} "]"' if least else f'"[" ({inside})? "]"'

    def _string(self, schema: Mapping[str, Any]) -> str:
        pattern = schema.get("pattern")
        if pattern is None:
            least, most = self._bounds(schema, "minLength", "maxLength")
            bounded = (least, most) != (0, None)
            return f"/(?s:.){{{least},{'' if most is None else most}}}/" if bounded else TEXT
        if not isinstance(pattern, str):
            raise self._wrong(f"must have patterns of text but have {shown(pattern)}")
        # A pattern may match anywhere
        before = "" if pattern.startswith("^") else "(?s:.*)"
        anchored = pattern.endswith("$") and not pattern.endswith("\\$")
        after = "" if anchored else "(?s:.*)"
        core = pattern.removeprefix("^")
        return _regex(f"{before}({core[:-1] if anchored else core}){after}")

    def _constant(self, value: Any) -> str:
        """One value as the template writes it."""
        if isinstance(value, str):
            inner = _literal(value) if value else ""
            return f"{self._quote} {inner} {self._quote}"
        if isinstance(value, Mapping):
            pairs = [
                f"{self._key(key)} {_literal(':')} {self._constant(value[key])}"
                for key in sorted(value, key=lambda key: (key.lower(), key))
            ]
            return " ".join(['"{"', ' "," '.join(pairs), '"}"'])
        if isinstance(value, (list, tuple)):
            return " ".join(['"["', ' "," '.join(map(self._constant, value)), '"]"'])
        return _literal(json.dumps(value))

    def _key(self, key: str) -> str:
        if BARE.fullmatch(key):
            return _literal(key)
        return f"{self._quote} {_literal(key) if key else ''} {self._quote}"

    def _ref(self, pointer: Any) -> str:
        """A rule for what a pointer of these parameters leads to; it may lead to itself."""
        at = self._tool["name"], str(pointer)
        if at not in self._refs:
            schema: Any = self._tool.get("parameters")
            for step in str(pointer).removeprefix("#").split("/")[1:]:
                step = step.replace("~1", "/").replace("~0", "~")
                schema = schema.get(step) if isinstance(schema, Mapping) else None
            if schema is None or not str(pointer).startswith("#"):
                raise self._wrong(f"must refer to what they hold but refer to {shown(pointer)}")
            self._refs[at] = f"s{len(self._refs)}"
            body = self._value(schema)
            self._rules.append(f"{self._refs[at]}: {body}")
        return self._refs[at]

    def _anything(self) -> str:
        """A rule for any value."""
        if self._any is None:
            self._any = "any"
            text = f"{self._quote} {TEXT} {self._quote}"
            words = " | ".join(map(_literal, ("true", "false", "null")))
            inside = self._map("any")
            listed = self._array({"items": True})
            self._rules.append(f"any: {text} | {NUMBER} | {words} | {inside} | {listed}")
        return self._any

    def _map(self, value: str) -> str:
        """An object whose keys nobody declares."""
        pair = self._rule(f"/[A-Za-z_][A-Za-z0-9_.-]{{0,63}}/ {_literal(':')} {self._rule(value)}")
        return f'"{{" ({pair} ("," {pair})*)? "}}"'

    def _either(self, expressions: Iterable[str]) -> str:
        return self._rule(" | ".join(dict.fromkeys(expressions)))

    def _list(self, schema: Mapping[str, Any], key: str) -> list[Any]:
        found = schema[key]
        if not isinstance(found, (list, tuple)) or not found:
            raise self._wrong(f"must have a list in {key} but have {shown(found)}")
        return list(found)

    def _bounds(self, schema: Mapping[str, Any], least: str, most: str) -> tuple[int, int | None]:
        low, high = schema.get(least, 0), schema.get(most)
        whole = type(low) is int and (high is None or type(high) is int)
        if not whole or low < 0 or (high is not None and high < low):
            raise self._wrong(f"must have whole numbers in order in {least} and {most}")
        return low, high

    def _check(self, schema: Mapping[str, Any]) -> None:
        """Refuse what a strict tool asks and the grammar would leave out."""
        unknown = next(self._left_out(schema), None)
        if self._tool.get("strict") and unknown is not None:
            raise self._wrong(f"must do without {unknown} where the tool is strict")

    def _left_out(self, schema: Mapping[str, Any]) -> Iterator[str]:
        yield from (str(key) for key in schema if key not in KNOWN)
        if "pattern" in schema:
            yield from (key for key in ("minLength", "maxLength") if key in schema)
        chosen = [key for key in FORMS if key in schema and key != "type"]
        yield from chosen[1:]

    def _wrong(self, said: str) -> ValueError:
        return ValueError(f"[grammar] parameters of the tool {self._tool['name']} {said}.")


def _types_of(schema: Mapping[str, Any]) -> list[str]:
    """Types that keywords speak of, where none is named; all where none does."""
    found = [kind for kind, keys in WITH_TYPES.items() if keys & set(schema)]
    return found or list(TYPES)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(pattern: str) -> str:
    from llguidance import regex_to_lark

    return f"/{regex_to_lark(pattern, 'dw')}/"
