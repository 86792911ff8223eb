"""Bodies of requests as pydantic models, and one sentence for what is wrong with one.

A field that no model knows is refused by name: nothing that a request asks for is silently
ignored. What is an object inside of a message is read leniently, since clients send back what
servers of all kinds gave them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from pyengine.serve.protocols.ask import Refused
from pyengine.untrusted import kind, shown

RULES = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "an object",
    "string_type": "a string",
}
_ID = re.compile(r"0|[1-9][0-9]{0,18}")


class Object(BaseModel):
    """An object of a request with no fields but its own, each of its own type."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class Part(BaseModel):
    """An object that a client may have got elsewhere and sends back: other fields ask nothing."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


def _without_auto(value: Any) -> Any:
    """ "auto" is what is taken where nothing is named."""
    return None if value == "auto" else value


BlockSize = Annotated[int | None, BeforeValidator(_without_auto)]


class Body(Object):
    """What requests of all protocols may hold: the model, the sampling, and this engine's own."""

    model: str | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    verify: str | None = None
    block_size: BlockSize = None
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    regex: str | None = None
    grammar: str | None = None

    def sampling(self) -> dict[str, Any]:
        """The fields of Sampling that the request names."""
        given = {name: getattr(self, name) for name in SAMPLING}
        return {name: value for name, value in given.items() if value is not None}

    def form(self, response_format: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the answer is held to, as the engine's arguments."""
        given = {"response_format": response_format, "regex": self.regex, "grammar": self.grammar}
        return without_nulls(given)


NUMBERS = ("temperature", "top_p", "top_k", "min_p", "seed")
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
SAMPLING = (*NUMBERS, *PENALTIES, "verify")
TOLD = {*NUMBERS, *PENALTIES}  # a wrong value of these is shown, whatever it is

T = TypeVar("T", bound=BaseModel)


def checked(model: type[T], value: Any, where: str = "") -> T:
    """A value as a model; ``where`` is its place in the request.

    Raises:
        Refused: It is none; the message names the field.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise Refused(400, f"[serve] {_sentence(first, where)}") from None


def only(*values: Any) -> BeforeValidator:
    """A field that the protocol has and this engine has not: these values ask nothing of it."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(v) and value == v for v in values):
            words = " or ".join(map(shown, values))
            raise wrong(f"must be {words} here but got {shown(value)}")
        return value

    return BeforeValidator(check)


def wrong(message: str) -> PydanticCustomError:
    """For validators: the rest of a sentence that begins with the field's name."""
    return PydanticCustomError("refused", "{message}", {"message": message})


def _bias(values: Any) -> Any:
    if isinstance(values, dict):
        for key, value in values.items():
            if not _ID.fullmatch(key):
                raise wrong(f"must name token ids but got {shown(key)}")
            if not is_number(value):
                raise wrong(f"must map token ids to numbers but {key} goes to {shown(value)}")
        return {key: float(value) for key, value in values.items()}
    return values


Bias = Annotated[dict[str, float], BeforeValidator(_bias)]


def is_number(value: object) -> bool:
    """Whether it is one that a float can hold; JSON's may be longer."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def _sentence(error: ErrorDetails, where: str) -> str:
    *path, name = error["loc"]
    field, holder = _spelled((*path, name), where), _spelled(path, where)
    value, what = error["input"], error["type"]
    if what == "extra_forbidden":
        if holder:
            return f"{holder} holds {shown(name)}, not known here."
        return f"{shown(name)} is not known here."
    if what == "missing":
        return f"{field} must be given but is missing."
    if what == "refused":
        return f"{field} {error['msg']}."
    if what == "literal_error":
        return f"{field} must be {error['ctx']['expected']} here but got {shown(value)}."
    rule = RULES.get(what, "of another kind")
    said = shown(value) if name in TOLD or kind(value) == "a number" else kind(value)
    return f"{field} must be {rule} but got {said}."


def _spelled(path: Any, where: str) -> str:
    """A place in a body as JavaScript would write it."""
    for step in path:
        if isinstance(step, int):
            where += f"[{step}]"
        else:
            where += f".{step}" if where else str(step)
    return where


def without_nulls(body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say something: null is a field that was not given."""
    return {key: value for key, value in body.items() if value is not None}
