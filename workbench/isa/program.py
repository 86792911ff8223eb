"""A kernel's assembly, read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LABEL = re.compile(r"^(\.LBB\d+_\d+|counted):")
_INSTRUCTION = re.compile(r"^\s+([a-z]\w*)\s*([^;]*)")
_OPTION = re.compile(r"\b(offset\d?):(\S+)")
_COMMA = re.compile(r",(?![^(\[]*[)\]])")  # outside of brackets


@dataclass(frozen=True)
class Instruction:
    """One line of assembly."""

    name: str  # without _e32 and _e64
    operands: tuple[str, ...]
    options: Mapping[str, str]
    target: int = -1  # of a branch


@dataclass(frozen=True)
class Program:
    """A kernel's instructions, and how its registers are filled when it starts."""

    instructions: tuple[Instruction, ...]
    registers: int  # of 32 bits, per lane
    scratch_bytes: int  # of memory per lane, for what found no register
    about: Mapping[str, int]  # the kernel descriptor


def parse(assembly: str) -> Program:
    """Read the assembly of a kernel named `counted`."""
    code = assembly[assembly.index("\ncounted:") :]
    about = {
        name: int(value) for name, value in re.findall(r"\.amdhsa_(\w+) (\d+)$", code, re.MULTILINE)
    }
    labels: dict[str, int] = {}
    found: list[Instruction] = []
    for line in code[: code.index("\n.Lfunc_end")].split("\n"):
        label = _LABEL.match(line)
        match = _INSTRUCTION.match(line)
        if label:
            labels[label[1]] = len(found)
        elif match:
            options = dict(_OPTION.findall(match[2]))
            rest = _OPTION.sub("", match[2])
            operands = tuple(part.strip() for part in _COMMA.split(rest) if part.strip())
            found.append(Instruction(re.sub(r"_e(32|64)$", "", match[1]), operands, options))
    whole = [
        Instruction(i.name, i.operands, i.options, labels[i.operands[0]])
        if i.name.startswith(("s_cbranch", "s_branch"))
        else i
        for i in found
    ]
    counted = re.search(r"; NumVgprs: (\d+)", code)
    assert counted
    return Program(tuple(whole), int(counted[1]), about["private_segment_fixed_size"], about)
