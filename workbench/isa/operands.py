"""Operands of instructions, as functions that read them from a simdgroup."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .program import Instruction
from .simdgroup import NAMED, Simdgroup

Step = Callable[[Simdgroup], object]  # an instruction, carried out

_OPERAND = re.compile(r"(-)?(\|)?(?:([vs])(\d+)|([vs])\[(\d+):(\d+)\]|([\w.+-]+))\|?$")


def unknown(i: Instruction) -> NotImplementedError:
    """The error of an instruction that the compiler has not made of a kernel before."""
    text = " ".join([i.name, ", ".join(i.operands), *(f"{k}:{v}" for k, v in i.options.items())])
    return NotImplementedError(f"[isa] instruction must be one known here but got {text.strip()}.")


def _number(text: str) -> int | None:
    """A literal's 32 bits."""
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
        return int(text, 0) & 0xFFFFFFFF
    if re.fullmatch(r"-?\d+\.\d+", text):
        return int(np.float32(float(text)).view(np.uint32))
    return None


def register_of(text: str) -> tuple[str, int]:
    """Kind and number of a register, or of the first of several."""
    match = _OPERAND.match(text)
    if match and (match[3] or match[5]):
        return (match[3] or match[5]), int(match[4] or match[6])
    if text in NAMED:
        return "s", NAMED[text]
    raise NotImplementedError(f"[isa] operand `{text}` is unknown")


def scalar(text: str) -> Callable[[Simdgroup], int]:
    number = _number(text)
    if number is not None:
        return lambda w: number
    kind, register = register_of(text)
    assert kind == "s"
    return lambda w: w.S[register]


def scalar64(text: str) -> Callable[[Simdgroup], int]:
    number = _number(text)
    if number is not None:
        signed = number - (1 << 32) if text.startswith("-") else number
        return lambda w: signed & 0xFFFFFFFFFFFFFFFF
    _, register = register_of(text)
    return lambda w: w.S[register] | w.S[register + 1] << 32


def vector(text: str) -> Callable[[Simdgroup], Any]:
    """32 bits of each lane."""
    number = _number(text)
    if number is not None:
        constant = np.full(32, number, np.uint32)
        return lambda w: constant
    kind, register = register_of(text)
    if kind == "v":
        return lambda w: w.V[register]
    return lambda w: np.full(32, w.S[register], np.uint32)


def vector64(text: str) -> Callable[[Simdgroup], Any]:
    number = _number(text)
    if number is not None:
        signed = number - (1 << 32) if text.startswith("-") else number
        constant = np.full(32, signed & 0xFFFFFFFFFFFFFFFF, np.uint64)
        return lambda w: constant
    kind, register = register_of(text)
    if kind == "v":
        shift = np.uint64(32)
        return lambda w: w.V[register] | w.V[register + 1].astype(np.uint64) << shift
    return lambda w: np.full(32, w.S[register] | w.S[register + 1] << 32, np.uint64)


def floats(text: str) -> Callable[[Simdgroup], Any]:
    """As float32, with the operand's signs."""
    match = _OPERAND.match(text)
    literal = _number(text)
    if literal is not None or match is None:
        get = vector(text)
        return lambda w: get(w).view(np.float32)
    bare = text.replace("|", "")
    get = vector(bare[1:] if match[1] else bare)
    if match[2]:
        inner = get
        get = lambda w: inner(w) & np.uint32(0x7FFFFFFF)  # noqa: E731
    if match[1]:
        unsigned = get
        return lambda w: (unsigned(w) ^ np.uint32(0x80000000)).view(np.float32)
    return lambda w: get(w).view(np.float32)
