"""Arguments from a caller's hand: one sentence for those of another type."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

from pyengine.untrusted import shown


def whole(op: str, name: str, value: Any) -> int:
    """A whole number, NumPy's too, as Python's.

    Raises:
        ValueError: It is none; True and False are none.
    """
    if not is_whole(value):
        raise ValueError(f"[{op}] {name} must be a whole number but got {shown(value)}.")
    return operator.index(value)


def number(op: str, name: str, value: Any) -> float:
    """A real number, NumPy's too, as Python's; NaN and infinity pass.

    Raises:
        ValueError: It is none, or too large for a float.
    """
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise ValueError(f"[{op}] {name} must be a number but got {shown(value)}.")


def flag(op: str, name: str, value: Any) -> bool:
    """True or False.

    Raises:
        ValueError: It is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"[{op}] {name} must be True or False but got {shown(value)}.")
    return value


def token_ids(op: str, name: str, value: Any, rule: str = "be token ids") -> list[int]:
    """Whole numbers; whether there are such ids is the model's to say.

    Raises:
        ValueError: It is no list of them.
    """
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes)):
        raise ValueError(f"[{op}] {name} must {rule} but got {shown(value)}.")
    ids = list(value)
    wrong = [i for i in ids if not is_whole(i)]
    if wrong:
        raise ValueError(f"[{op}] {name} must {rule} but got {shown(wrong[0])}.")
    return [operator.index(i) for i in ids]


class TooLong(ValueError):
    """A prompt that does not fit the context."""


def check_vocabulary(ids: Sequence[int], vocab: int) -> None:
    """Refuse a prompt with ids that are none of the model's.

    Raises:
        ValueError: An id is outside the vocabulary.
    """
    wrong = [i for i in ids if not 0 <= i < vocab]
    if wrong:
        raise ValueError(f"[generate] token ids must be 0 to {vocab - 1} but got {wrong[0]}.")


def check_length(ids: Sequence[int], context: int) -> None:
    """Refuse a prompt without tokens, and one that leaves no room in the context.

    Raises:
        ValueError: It is empty.
        TooLong: It does not fit.
    """
    if not ids:
        raise ValueError("[generate] prompt must not be empty.")
    if len(ids) >= context:
        raise TooLong(
            f"[generate] prompt must be shorter than the context of {context} tokens "
            f"but got {len(ids)}."
        )


def is_whole(value: Any) -> bool:
    """Whether it is an integer, and no flag or array that could pass as one."""
    if isinstance(value, bool):
        return False
    try:
        operator.index(value)
    except (TypeError, ValueError):
        return False
    return True
