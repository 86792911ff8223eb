"""Ten JSON schemas of rising size, all of whose texts are short enough for a test."""

from __future__ import annotations

from typing import Any

WORD = {"type": "string", "maxLength": 12}
SMALL = {"type": "integer", "minimum": -5, "maximum": 999}
# Without a step the digits of a number may go on
CENTS = {"type": "number", "minimum": 0, "maximum": 50, "multipleOf": 0.25}


def record(**properties: Any) -> dict[str, Any]:
    """An object with these properties, all required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def listed(items: Any, least: int, most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


POINT = record(x=SMALL, y=CENTS)
PERSON = record(name=WORD, age=SMALL, tags=listed({"enum": ["red", "green", "blue"]}, 1, 3))

SCHEMAS: dict[str, Any] = {
    "constant": {"const": {"done": True}},
    "flag": {"type": "boolean"},
    "choice": {"enum": ["yes", "no", "it depends", None, 3]},
    "number": {"type": "integer", "minimum": 17, "maximum": 4711},
    "point": POINT,
    "date": record(
        day={"type": "string", "format": "date"}, at={"type": "string", "format": "time"}
    ),
    "person": PERSON,
    "optional": {
        "type": "object",
        "properties": {"a": WORD, "b": SMALL, "c": {"type": ["null", "boolean"]}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "union": {
        "anyOf": [
            record(kind={"const": "point"}, at=POINT),
            record(kind={"const": "people"}, who=listed(PERSON, 1, 2)),
            record(
                kind={"const": "code"}, code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"}
            ),
        ]
    },
    "order": record(
        number={"type": "integer", "minimum": 1, "maximum": 99999},
        customer={"$ref": "#/$defs/person"},
        lines=listed(record(item=WORD, count=SMALL, price=CENTS), 2, 3),
        address=record(street=WORD, city=WORD, zip={"type": "string", "pattern": "^[0-9]{5}$"}),
        paid={"type": "boolean"},
        state={"enum": ["open", "sent", "returned"]},
    )
    | {"$defs": {"person": PERSON}},
}
