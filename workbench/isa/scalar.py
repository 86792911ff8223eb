"""Instructions on what all lanes share: counters, masks, branches, waits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .operands import Step, register_of, scalar, scalar64, unknown
from .program import Instruction
from .simdgroup import EXEC, NAMED, Simdgroup

BARRIER = "barrier"  # what a step returns there


def signed_int(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


_LOGIC: dict[str, Callable[[int, int], int]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
    "nand": lambda a, b: ~(a & b),
    "nor": lambda a, b: ~(a | b),
    "xnor": lambda a, b: ~(a ^ b),
}
# name -> result and the condition bit, None where it stays
_SCALAR: dict[str, Callable[..., tuple[int, Any]]] = {
    "s_add_u32": lambda a, b: (a + b, a + b >> 32),
    "s_sub_u32": lambda a, b: (a - b, a < b),
    "s_add_i32": lambda a, b: (a + b, not -(2**31) <= signed_int(a) + signed_int(b) < 2**31),
    "s_sub_i32": lambda a, b: (a - b, not -(2**31) <= signed_int(a) - signed_int(b) < 2**31),
    "s_mul_i32": lambda a, b: (a * b, None),
    "s_mul_hi_u32": lambda a, b: (a * b >> 32, None),
    "s_mul_hi_i32": lambda a, b: (signed_int(a) * signed_int(b) >> 32, None),
    "s_lshl_b32": lambda a, b: (a << (b & 31), (a << (b & 31)) & 0xFFFFFFFF != 0),
    "s_lshr_b32": lambda a, b: (a >> (b & 31), a >> (b & 31) != 0),
    "s_ashr_i32": lambda a, b: (signed_int(a) >> (b & 31), signed_int(a) >> (b & 31) != 0),
    "s_min_u32": lambda a, b: (min(a, b), a < b),
    "s_max_u32": lambda a, b: (max(a, b), a > b),
    "s_min_i32": lambda a, b: (min(signed_int(a), signed_int(b)), signed_int(a) < signed_int(b)),
    "s_max_i32": lambda a, b: (max(signed_int(a), signed_int(b)), signed_int(a) > signed_int(b)),
    "s_bfm_b32": lambda a, b: (((1 << (a & 31)) - 1) << (b & 31), None),
    "s_pack_ll_b32_b16": lambda a, b: (a & 0xFFFF | b << 16, None),
    "s_mov_b32": lambda a: (a, None),
    "s_not_b32": lambda a: (~a, ~a & 0xFFFFFFFF != 0),
    "s_abs_i32": lambda a: (abs(signed_int(a)), a != 0),
    "s_brev_b32": lambda a: (int(f"{a:032b}"[::-1], 2), None),
    "s_bcnt1_i32_b32": lambda a: (a.bit_count(), a != 0),
    "s_ff1_i32_b32": lambda a: ((a & -a).bit_length() - 1, None),
    "s_flbit_i32_b32": lambda a: (32 - a.bit_length() if a else -1, None),
    "s_sext_i32_i16": lambda a: ((a & 0xFFFF) - (a >> 15 & 1 << 16 if a >> 15 & 1 else 0), None),
    **{
        f"s_lshl{n}_add_u32": lambda a, b, n=n: ((a << n) + b, (a << n) + b >> 32 != 0)
        for n in (1, 2, 3, 4)
    },
}
_SCALAR_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "lg": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_CONDITIONS: dict[str, Callable[[Simdgroup], bool]] = {
    "s_branch": lambda w: True,
    "s_cbranch_scc0": lambda w: not w.scc,
    "s_cbranch_scc1": lambda w: bool(w.scc),
    "s_cbranch_vccz": lambda w: w.S[NAMED["vcc_lo"]] == 0,
    "s_cbranch_vccnz": lambda w: w.S[NAMED["vcc_lo"]] != 0,
    "s_cbranch_execz": lambda w: w.S[EXEC] == 0,
    "s_cbranch_execnz": lambda w: w.S[EXEC] != 0,
}
# What stands in assembly for the machine's own sake
_NOTHING = {"s_clause", "s_inst_prefetch", "s_nop", "s_denorm_mode", "s_round_mode"}
_NOTHING |= {"s_waitcnt_vscnt", "s_setprio", "s_waitcnt_depctr"}


def _wait(i: Instruction) -> Step:
    match = re.search(r"vmcnt\((\d+)\)", " ".join(i.operands))
    if not match:
        return lambda w: None
    left = int(match[1])
    return lambda w: w.wait(left)


def scalar_step(i: Instruction) -> Step:
    name, operands = i.name, i.operands
    if name in _NOTHING:
        return lambda w: None
    if name == "s_waitcnt":
        return _wait(i)
    if name == "s_barrier":
        return lambda w: BARRIER
    if name == "s_endpgm":
        return lambda w: setattr(w, "pc", len(w.visits))
    if name in _CONDITIONS:
        condition, target = _CONDITIONS[name], i.target

        def branch(w: Simdgroup) -> None:
            if condition(w):
                w.pc = target

        return branch
    compare = re.match(r"s_cmpk?_(\w+)_([ui])(32|64)$", name)
    if compare:
        return _scalar_compare(i, *compare.groups())
    if name.startswith("s_load_dword"):
        return _scalar_load(i)
    saves = re.match(r"s_(\w+)_saveexec_b32$", name)
    logic = re.match(r"s_(and|or|xor|andn2|orn2|nand|nor|xnor)_b(32|64)$", name)
    if name in _SCALAR_SPECIAL:
        return _SCALAR_SPECIAL[name](i)
    target = register_of(operands[0])[1]
    if saves:
        combine, source = _LOGIC[saves[1]], scalar(operands[1])

        def save(w: Simdgroup) -> None:
            old, value = w.S[EXEC], source(w)
            w.set_s(target, old)
            w.set_exec(combine(value, old) & 0xFFFFFFFF)
            w.scc = int(w.S[EXEC] != 0)

        return save
    if logic:
        combine = _LOGIC[logic[1]]
        wide = logic[2] == "64"
        a, b = ((scalar64 if wide else scalar)(text) for text in operands[1:])

        def combined(w: Simdgroup) -> None:
            value = combine(a(w), b(w)) & (0xFFFFFFFFFFFFFFFF if wide else 0xFFFFFFFF)
            w.set_s(target, value)
            if wide:
                w.set_s(target + 1, value >> 32)
            w.scc = int(value != 0)

        return combined
    if name not in _SCALAR:
        raise unknown(i)
    function = _SCALAR[name]
    gets = [scalar(text) for text in operands[1:]]

    def step(w: Simdgroup) -> None:
        value, condition = function(*(g(w) for g in gets))
        w.set_s(target, value)
        if condition is not None:
            w.scc = int(condition)

    return step


def _scalar_compare(i: Instruction, how: str, kind: str, bits: str) -> Step:
    compare = _SCALAR_COMPARE[how]
    a, b = ((scalar64 if bits == "64" else scalar)(text) for text in i.operands)

    def step(w: Simdgroup) -> None:
        x, y = a(w), b(w)
        w.scc = int(compare(signed_int(x), signed_int(y)) if kind == "i" else compare(x, y))

    return step


def _scalar_load(i: Instruction) -> Step:
    match = re.match(r"s_load_dword(?:x(\d+))?$", i.name)
    assert match
    words, target = int(match[1] or 1), register_of(i.operands[0])[1]
    base = scalar64(i.operands[1])
    offset = scalar(i.operands[2])

    def step(w: Simdgroup) -> None:
        at = np.array([base(w) + offset(w) + int(i.options.get("offset", "0"), 0)], np.uint64)
        indices = w.memory.indices(at, 4 * words)[0]
        w.memory.read[indices] = True
        for r, word in enumerate(w.memory.bytes[indices].view(np.uint32)):
            w.set_s(target + r, int(word))

    return step


def _scalar_carry(subtract: bool) -> Callable[[Instruction], Step]:
    def make(i: Instruction) -> Step:
        target, a, b = register_of(i.operands[0])[1], scalar(i.operands[1]), scalar(i.operands[2])

        def step(w: Simdgroup) -> None:
            total = a(w) - b(w) - w.scc if subtract else a(w) + b(w) + w.scc
            w.set_s(target, total)
            w.scc = int(total < 0 if subtract else total >> 32 > 0)

        return step

    return make


def _scalar_extract(signed: bool) -> Callable[[Instruction], Step]:
    def make(i: Instruction) -> Step:
        target, a, b = register_of(i.operands[0])[1], scalar(i.operands[1]), scalar(i.operands[2])

        def step(w: Simdgroup) -> None:
            field = b(w)
            width = field >> 16 & 0x7F
            value = a(w) >> (field & 31) & ((1 << width) - 1)
            if signed and width and value >> (width - 1):
                value -= 1 << width
            w.set_s(target, value)
            w.scc = int(value != 0)

        return step

    return make


def _scalar_select(wide: bool) -> Callable[[Instruction], Step]:
    def make(i: Instruction) -> Step:
        read = scalar64 if wide else scalar
        target, a, b = register_of(i.operands[0])[1], read(i.operands[1]), read(i.operands[2])

        def step(w: Simdgroup) -> None:
            value = a(w) if w.scc else b(w)
            w.set_s(target, value)
            if wide:
                w.set_s(target + 1, value >> 32)

        return step

    return make


def _scalar_shift64(i: Instruction) -> Step:
    target, a, b = register_of(i.operands[0])[1], scalar64(i.operands[1]), scalar(i.operands[2])
    left = i.name == "s_lshl_b64"

    def step(w: Simdgroup) -> None:
        value = (a(w) << (b(w) & 63) if left else a(w) >> (b(w) & 63)) & 0xFFFFFFFFFFFFFFFF
        w.set_s(target, value)
        w.set_s(target + 1, value >> 32)
        w.scc = int(value != 0)

    return step


def _scalar_move64(i: Instruction) -> Step:
    target, a = register_of(i.operands[0])[1], scalar64(i.operands[1])

    def step(w: Simdgroup) -> None:
        value = a(w)
        w.set_s(target, value)
        w.set_s(target + 1, value >> 32)

    return step


def _scalar_immediate(i: Instruction) -> Step:
    target, number = register_of(i.operands[0])[1], int(i.operands[1], 0)
    number = number - (1 << 16) if number >> 15 == 1 else number
    if i.name == "s_movk_i32":
        return lambda w: w.set_s(target, number)
    if i.name == "s_mulk_i32":
        return lambda w: w.set_s(target, w.S[target] * number)

    def add(w: Simdgroup) -> None:
        total = signed_int(w.S[target]) + number
        w.set_s(target, total)
        w.scc = int(not -(2**31) <= total < 2**31)

    return add


def _bit(i: Instruction) -> Step:
    a, b = scalar(i.operands[0]), scalar(i.operands[1])
    wanted = int(i.name == "s_bitcmp1_b32")

    def step(w: Simdgroup) -> None:
        w.scc = int((a(w) >> (b(w) & 31) & 1) == wanted)

    return step


_SCALAR_SPECIAL: dict[str, Callable[[Instruction], Step]] = {
    "s_addc_u32": _scalar_carry(False),
    "s_subb_u32": _scalar_carry(True),
    "s_bfe_u32": _scalar_extract(False),
    "s_bfe_i32": _scalar_extract(True),
    "s_cselect_b32": _scalar_select(False),
    "s_cselect_b64": _scalar_select(True),
    "s_lshl_b64": _scalar_shift64,
    "s_lshr_b64": _scalar_shift64,
    "s_mov_b64": _scalar_move64,
    "s_addk_i32": _scalar_immediate,
    "s_mulk_i32": _scalar_immediate,
    "s_movk_i32": _scalar_immediate,
    "s_bitcmp0_b32": _bit,
    "s_bitcmp1_b32": _bit,
}
