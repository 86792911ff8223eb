"""What a caller may ask of an answer's form, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pyengine.grammar.asked import MAX_BYTES, MAX_DEPTH, Source, source_of


def test_each_way_of_asking() -> None:
    assert source_of() is None
    assert source_of({"type": "text"}) is None
    assert source_of({"type": "json_object"}) == Source("json_schema", '{"type": "object"}')
    asked = {"name": "x", "schema": {"enum": ["é", 1]}, "strict": True}
    found = source_of({"type": "json_schema", "json_schema": asked})
    assert found is not None
    assert (found.kind, json.loads(found.text)) == ("json_schema", {"enum": ["é", 1]})
    assert source_of(regex="a+") == Source("regex", "a+")
    assert source_of(grammar='start: "a"') == Source("lark", 'start: "a"')
    assert source_of({"type": "text"}, regex="a") == Source("regex", "a")


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def doubled() -> dict[str, Any]:
    """Sixty levels that are each the next one twice."""
    schema: dict[str, Any] = {}
    for _ in range(60):
        schema = {"anyOf": [schema, schema]}
    return schema


def circle() -> dict[str, Any]:
    schema: dict[str, Any] = {}
    schema["items"] = schema
    return schema


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"response_format": "json"}, "response_format must be a dict whose type is text or json_"),
        ({"response_format": {}}, "response_format must be a dict whose type is"),
        ({"response_format": {"type": ["text"]}}, "response_format must be a dict whose type is"),
        ({"response_format": {"type": "xml"}}, "response_format must be a dict whose type is"),
        ({"response_format": {"type": "json_schema"}}, "its schema as json_schema.schema"),
        ({"schema": [1]}, "its schema as json_schema.schema"),
        ({"schema": {"enum": [object()]}}, "must be made of what JSON has"),
        ({"schema": {"const": float("nan")}}, "must be made of what JSON has"),
        ({"schema": nested(MAX_DEPTH)}, f"must be nested at most {MAX_DEPTH} deep"),
        ({"schema": doubled()}, f"must be nested at most {MAX_DEPTH} deep"),
        ({"schema": circle()}, f"must be nested at most {MAX_DEPTH} deep"),
        ({"schema": {"enum": ["a" * MAX_BYTES["json_schema"]]}}, "a schema must be at most"),
        ({"regex": ""}, "regex must be a string of text"),
        ({"regex": b"a"}, "regex must be a string of text"),
        ({"regex": "a" * (MAX_BYTES["regex"] + 1)}, "regex must be at most 16384 bytes but got"),
        ({"grammar": "start: /\ud800/"}, "grammar must be Unicode"),
        ({"grammar": 3}, "grammar must be a string of text"),
        ({"regex": "a", "grammar": 'start: "a"'}, "must have one of response_format, grammar"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(asked: dict[str, Any], said: str) -> None:
    if "schema" in asked:
        inner = {"name": "x", "schema": asked["schema"]}
        asked = {"response_format": {"type": "json_schema", "json_schema": inner}}
    with pytest.raises(ValueError, match=r"^\[grammar\] [^\n]*\.$") as caught:
        source_of(**asked)
    assert said in str(caught.value)


def test_a_schema_as_deep_as_may_be() -> None:
    inner = {"schema": nested(MAX_DEPTH - 1)}
    assert source_of({"type": "json_schema", "json_schema": inner}) is not None
