"""What a caller asks of an answer's form, as the source of a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from pyengine.untrusted import SURROGATE, shown

Kind = Literal["json_schema", "regex", "lark"]

# What is read within some seconds. OpenAI takes 120,000 characters of names and values.
MAX_BYTES: dict[Kind, int] = {"json_schema": 1 << 17, "regex": 1 << 14, "lark": 1 << 16}
MAX_DEPTH = 64  # of a schema; the library's own bound is 127
FORMATS = ("text", "json_object", "json_schema")
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Source(NamedTuple):
    """A grammar as text: a JSON schema, a regular expression of the whole answer, or Lark."""

    kind: Kind
    text: str


def source_of(
    response_format: Any = None, grammar: str | None = None, regex: str | None = None
) -> Source | None:
    """The grammar that is asked for in one of three ways; None where the text is free.

    Raises:
        ValueError: Two are asked for at once, or one is of no known form or too large.
    """
    found = [] if response_format is None else [read_response_format(response_format)]
    found += [checked("lark", "grammar", grammar)] if grammar is not None else []
    found += [checked("regex", "regex", regex)] if regex is not None else []
    asked = [source for source in found if source is not None]
    if len(asked) > 1:
        raise ValueError(
            "[grammar] an answer must have one of response_format, grammar and regex but got "
            f"{len(asked)}."
        )
    return asked[0] if asked else None


def read_response_format(value: Any) -> Source | None:
    """OpenAI's ``response_format``; None where it asks for plain text.

    Raises:
        ValueError: It is of no known form, or its schema is too large.
    """
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in FORMATS:
        known = " or ".join(FORMATS)
        raise ValueError(
            f"[grammar] response_format must be a dict whose type is {known} but got "
            f"{shown(value)}."
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return schema_source(ANY_OBJECT)
    inner = value.get("json_schema")
    if not isinstance(inner, Mapping) or not isinstance(inner.get("schema"), (Mapping, bool)):
        raise ValueError(
            "[grammar] response_format must hold its schema as json_schema.schema but got "
            f"{shown(inner)}."
        )
    return schema_source(inner["schema"])


def schema_source(schema: Any) -> Source:
    """A JSON schema as a grammar.

    Raises:
        ValueError: It is no JSON, too deep or too large.
    """
    _check_depth([schema])
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError):
        raise ValueError(
            "[grammar] a schema must be made of what JSON has but got another type."
        ) from None
    return checked("json_schema", "a schema", text)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inside = (v.values() if isinstance(v, Mapping) else v for v in level)
        level = [v for own in inside for v in own if isinstance(v, (Mapping, list, tuple))]
        if len(level) > MAX_BYTES["json_schema"]:  # each takes two characters
            break
        if not level:
            return
    raise ValueError(
        f"[grammar] a schema must be nested at most {MAX_DEPTH} deep and not be larger than "
        f"{MAX_BYTES['json_schema']} bytes."
    )


def checked(kind: Kind, name: str, text: Any) -> Source:
    """A grammar's text.

    Raises:
        ValueError: It is none, or too large.
    """
    if not isinstance(text, str) or not text:
        raise ValueError(f"[grammar] {name} must be a string of text but got {shown(text)}.")
    if SURROGATE.search(text):
        raise ValueError(f"[grammar] {name} must be Unicode but holds a lone surrogate.")
    size, most = len(text.encode()), MAX_BYTES[kind]
    if size > most:
        raise ValueError(f"[grammar] {name} must be at most {most} bytes but got {size}.")
    return Source(kind, text)


def check_installed() -> None:
    """Refuse grammars where the library is missing.

    Raises:
        ValueError: It is.
    """
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise ValueError(
            "[grammar] llguidance must be installed for grammars but is not: "
            'pip install "pyengine-mlx[grammar]".'
        ) from None
