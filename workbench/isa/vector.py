"""Instructions on the lanes of a simdgroup: arithmetic, comparisons, selections."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .operands import Step, floats, register_of, scalar, unknown, vector, vector64
from .program import Instruction
from .simdgroup import EXEC, Simdgroup, bits_of, mask_of


def _shift_left(a: Any, by: Any) -> Any:
    return a << (by & 31)


def _signed(a: Any) -> Any:
    return a.view(np.int32)


_HALFWAY, _BELOW_FLOAT32 = np.int64(1 << 28), np.int64((1 << 29) - 1)


def _fma(a: Any, b: Any, c: Any) -> Any:
    """Rounded once. The product is exact in float64; the sum is not, but rounding it again, to
    float32, goes wrong only where it lies halfway between two of them."""
    x = a.astype(np.float64) * b
    total = x + c
    bits = total.view(np.int64)
    if not (bits & _BELOW_FLOAT32 == _HALFWAY).any():
        return total.astype(np.float32)
    y = c.astype(np.float64)
    big = np.where(np.abs(x) >= np.abs(y), x, y)
    error = np.where(np.abs(x) >= np.abs(y), y, x) - (total - big)
    inexact = np.isfinite(total) & (error != 0)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + towards, bits).view(np.float64).astype(np.float32)


def _high(a: Any, b: Any) -> Any:
    return (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32)


def _extract(a: Any, offset: Any, width: Any) -> Any:
    return a >> (offset & 31) & ((np.uint32(1) << (width & 31)) - np.uint32(1))


def _extract_signed(a: Any, offset: Any, width: Any) -> Any:
    left = (np.uint32(32) - (width & 31)).astype(np.uint32)
    shifted = (_extract(a, offset, width) << left).view(np.int32)
    return (shifted >> left.astype(np.int32)).view(np.uint32)


def _permute(a: Any, b: Any, selector: Any) -> Any:
    both = b | a.astype(np.uint64) << np.uint64(32)
    result = np.zeros(32, np.uint32)
    for i in range(4):
        which = selector >> np.uint32(8 * i) & np.uint32(255)
        byte = (both >> (which & 7).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & 255
        byte = np.where(which >= 13, 255, np.where(which == 12, 0, byte)).astype(np.uint32)
        result |= byte << np.uint32(8 * i)
    return result


def _to_unsigned(a: Any) -> Any:
    return np.clip(np.nan_to_num(np.trunc(a.astype(np.float64))), 0, 2**32 - 1).astype(np.uint32)


def _to_signed(a: Any) -> Any:
    clipped = np.clip(np.nan_to_num(np.trunc(a.astype(np.float64))), -(2**31), 2**31 - 1)
    return clipped.astype(np.int32).view(np.uint32)


_INTEGER: dict[str, Callable[..., Any]] = {
    "v_mov_b32": lambda a: a,
    "v_not_b32": lambda a: ~a,
    "v_add_nc_u32": lambda a, b: a + b,
    "v_sub_nc_u32": lambda a, b: a - b,
    "v_subrev_nc_u32": lambda a, b: b - a,
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_and_b32": lambda a, b: a & b,
    "v_or_b32": lambda a, b: a | b,
    "v_xor_b32": lambda a, b: a ^ b,
    "v_xnor_b32": lambda a, b: ~(a ^ b),
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_xor3_b32": lambda a, b, c: a ^ b ^ c,
    "v_and_or_b32": lambda a, b, c: a & b | c,
    "v_lshlrev_b32": lambda a, b: _shift_left(b, a),
    "v_lshrrev_b32": lambda a, b: b >> (a & 31),
    "v_ashrrev_i32": lambda a, b: (_signed(b) >> (a & 31).astype(np.int32)).view(np.uint32),
    "v_lshl_add_u32": lambda a, b, c: _shift_left(a, b) + c,
    "v_add_lshl_u32": lambda a, b, c: _shift_left(a + b, c),
    "v_lshl_or_b32": lambda a, b, c: _shift_left(a, b) | c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_bfe_u32": _extract,
    "v_bfe_i32": _extract_signed,
    "v_bfi_b32": lambda a, b, c: a & b | ~a & c,
    "v_alignbit_b32": lambda a, b, c: (
        (b | a.astype(np.uint64) << np.uint64(32)) >> (c & 31).astype(np.uint64)
    ).astype(np.uint32),
    "v_perm_b32": _permute,
    "v_bfrev_b32": lambda a: np.array([int(f"{x:032b}"[::-1], 2) for x in a], np.uint32),
    "v_mul_lo_u32": lambda a, b: a * b,
    "v_mul_hi_u32": _high,
    "v_mul_u32_u24": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "v_mad_u32_u24": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c,
    "v_min_u32": np.minimum,
    "v_max_u32": np.maximum,
    "v_min_i32": lambda a, b: np.minimum(_signed(a), _signed(b)).view(np.uint32),
    "v_max_i32": lambda a, b: np.maximum(_signed(a), _signed(b)).view(np.uint32),
    "v_max3_u32": lambda a, b, c: np.maximum(np.maximum(a, b), c),
    "v_min3_u32": lambda a, b, c: np.minimum(np.minimum(a, b), c),
    "v_max3_i32": lambda *abc: np.maximum.reduce([_signed(x) for x in abc]).view(np.uint32),
    "v_min3_i32": lambda *abc: np.minimum.reduce([_signed(x) for x in abc]).view(np.uint32),
    "v_med3_i32": lambda *abc: np.sort([_signed(x) for x in abc], axis=0)[1].view(np.uint32),
    "v_med3_u32": lambda *abc: np.sort(abc, axis=0)[1],
    "v_mbcnt_lo_u32_b32": lambda a, b: (
        b + np.array([(int(a[0]) & ((1 << lane) - 1)).bit_count() for lane in range(32)], np.uint32)
    ),
    **{
        f"v_cvt_f32_ubyte{i}": lambda a, i=i: (
            (a >> np.uint32(8 * i) & np.uint32(255)).astype(np.float32).view(np.uint32)
        )
        for i in range(4)
    },
    "v_cvt_f32_u32": lambda a: a.astype(np.float32).view(np.uint32),
    "v_cvt_f32_i32": lambda a: _signed(a).astype(np.float32).view(np.uint32),
    "v_cvt_f32_f16": lambda a: (
        (a & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    ),
}
_FLOAT: dict[str, Callable[..., Any]] = {
    "v_add_f32": lambda a, b: a + b,
    "v_sub_f32": lambda a, b: a - b,
    "v_subrev_f32": lambda a, b: b - a,
    "v_mul_f32": lambda a, b: a * b,
    "v_fma_f32": _fma,
    "v_fmaak_f32": _fma,
    "v_fmamk_f32": lambda a, k, c: _fma(a, k, c),
    "v_max_f32": np.fmax,
    "v_min_f32": np.fmin,
    "v_max3_f32": lambda a, b, c: np.fmax(np.fmax(a, b), c),
    "v_rcp_f32": lambda a: np.float32(1) / a,
    "v_rcp_iflag_f32": lambda a: np.float32(1) / a,
    "v_rsq_f32": lambda a: np.float32(1) / np.sqrt(a),
    "v_sqrt_f32": np.sqrt,
    "v_rndne_f32": np.rint,
    "v_floor_f32": np.floor,
    "v_trunc_f32": np.trunc,
    "v_ldexp_f32": lambda a, b: np.ldexp(a, b.view(np.int32)),
    # Division is a reciprocal and steps of Newton around it; here it is made at its end, right.
    "v_div_fixup_f32": lambda q, b, a: a / b,
}
_FROM_FLOAT: dict[str, Callable[..., Any]] = {
    "v_cvt_u32_f32": _to_unsigned,
    "v_cvt_i32_f32": _to_signed,
    "v_cvt_f16_f32": lambda a: a.astype(np.float16).view(np.uint16).astype(np.uint32),
}
# On 16 bits, which leave the upper half of the register alone
_SHORT: dict[str, Callable[..., Any]] = {
    "v_add_nc_u16": lambda a, b: a + b,
    "v_sub_nc_u16": lambda a, b: a - b,
    "v_mul_lo_u16": lambda a, b: a * b,
    "v_mad_u16": lambda a, b, c: a * b + c,
    "v_lshlrev_b16": lambda a, b: b << (a & 15),
    "v_lshrrev_b16": lambda a, b: b >> (a & 15),
    "v_min_u16": np.minimum,
    "v_max_u16": np.maximum,
}
_LONG: dict[str, Callable[..., Any]] = {
    "v_lshlrev_b64": lambda a, b: b << (a & 63).astype(np.uint64),
    "v_lshrrev_b64": lambda a, b: b >> (a & 63).astype(np.uint64),
    "v_ashrrev_i64": lambda a, b: (b.view(np.int64) >> (a & 63).astype(np.int64)).view(np.uint64),
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lg": lambda a, b: (a < b) | (a > b),
    "neq": lambda a, b: ~(a == b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "nlt": lambda a, b: ~(a < b),
    "nle": lambda a, b: ~(a <= b),
    "ngt": lambda a, b: ~(a > b),
    "nge": lambda a, b: ~(a >= b),
    "u": lambda a, b: np.isnan(a) | np.isnan(b),
    "o": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}
_TYPES = {"u32": np.uint32, "i32": np.int32, "u64": np.uint64, "i64": np.int64, "f32": np.float32}
_TYPES |= {"u16": np.uint16, "i16": np.int16}


def _compare(i: Instruction) -> Step:
    match = re.match(r"v_cmp(x?)_(\w+?)_(\w\d\d)$", i.name)
    if not match or match[2] == "class":
        return _class(i)
    to_exec, how, kind = match.groups()
    operands = i.operands if to_exec and len(i.operands) == 2 else i.operands[1:]
    target = EXEC if to_exec else register_of(i.operands[0])[1]
    read = floats if kind == "f32" else vector64 if kind.endswith("64") else vector
    a, b = (read(operand) for operand in operands)
    compare = _COMPARE[how]
    as_type = _TYPES[kind]
    short = kind.endswith("16")

    def step(w: Simdgroup) -> None:
        x, y = a(w), b(w)
        if short:
            x, y = x.astype(np.uint16), y.astype(np.uint16)
        w.set_s(target, bits_of(compare(x.view(as_type), y.view(as_type)) & w.mask))

    return step


def _class(i: Instruction) -> Step:
    """v_cmp_class_f32: whether a float is of one of ten classes."""
    if i.name != "v_cmp_class_f32":
        raise unknown(i)
    target, a, classes = register_of(i.operands[0])[1], floats(i.operands[1]), vector(i.operands[2])

    def step(w: Simdgroup) -> None:
        x, of = a(w), classes(w)
        minus, tiny = np.signbit(x), np.float32(1.17549435e-38)
        size = np.abs(x)
        kinds = [np.isnan(x), np.isnan(x)]
        inner = [np.isinf(x), np.isfinite(x) & (size >= tiny), (size > 0) & (size < tiny), x == 0]
        kinds += [part & minus for part in inner] + [part & ~minus for part in reversed(inner)]
        found = np.zeros(32, bool)
        for bit, part in enumerate(kinds):
            found |= part & (of >> np.uint32(bit) & 1).astype(bool)
        w.set_s(target, bits_of(found & w.mask))

    return step


def vector_step(i: Instruction) -> Step:
    name, operands = i.name, i.operands
    if name.startswith("v_cmp"):
        return _compare(i)
    if name in _SPECIAL:
        return _SPECIAL[name](i)
    target = register_of(operands[0])[1]
    for table, read in ((_INTEGER, vector), (_FLOAT, floats), (_FROM_FLOAT, floats)):
        if name in table:
            function = table[name]
            gets = [read(operand) for operand in operands[1:]]
            if len(gets) == 1:
                (a,) = gets
                return lambda w: w.set_v(target, function(a(w)).view(np.uint32))
            if len(gets) == 2:
                a, b = gets
                return lambda w: w.set_v(target, function(a(w), b(w)).view(np.uint32))
            return lambda w: w.set_v(target, function(*(g(w) for g in gets)).view(np.uint32))
    if name in _SHORT:
        short = _SHORT[name]
        parts = [vector(operand) for operand in operands[1:]]

        def narrow(w: Simdgroup) -> None:
            low = short(*(g(w).astype(np.uint16) for g in parts)).astype(np.uint32)
            w.set_v(target, w.V[target] & np.uint32(0xFFFF0000) | low)

        return narrow
    if name in _LONG:
        long = _LONG[name]
        by, value = vector(operands[1]), vector64(operands[2])
        return lambda w: _set_v64(w, target, long(by(w), value(w)))
    raise unknown(i)


def _set_v64(w: Simdgroup, register: int, value: Any) -> None:
    w.set_v(register, value.astype(np.uint32))
    w.set_v(register + 1, (value >> np.uint64(32)).astype(np.uint32))


def _fmac(i: Instruction) -> Step:
    target = register_of(i.operands[0])[1]
    a, b = floats(i.operands[1]), floats(i.operands[2])
    return lambda w: w.set_v(target, _fma(a(w), b(w), w.V[target].view(np.float32)).view(np.uint32))


def _select(i: Instruction) -> Step:
    target = register_of(i.operands[0])[1]
    signed = any(mark in text for text in i.operands[1:3] for mark in ("|v", "-v", "|s", "-s"))
    a, b = ((floats if signed else vector)(text) for text in i.operands[1:3])
    chosen = scalar(i.operands[3])
    return lambda w: w.set_v(target, np.where(mask_of(chosen(w)), b(w), a(w)).view(np.uint32))


def _carry(subtract: int, reverse: bool, with_carry: bool) -> Callable[[Instruction], Step]:
    def make(i: Instruction) -> Step:
        target, out = register_of(i.operands[0])[1], register_of(i.operands[1])[1]
        a, b = vector(i.operands[2]), vector(i.operands[3])
        given = scalar(i.operands[4]) if with_carry else lambda w: 0

        def step(w: Simdgroup) -> None:
            x, y = a(w).astype(np.int64), b(w).astype(np.int64)
            x, y = (y, x) if reverse else (x, y)
            carry = mask_of(given(w)).astype(np.int64)
            total = x - y - carry if subtract else x + y + carry
            w.set_v(target, (total & 0xFFFFFFFF).astype(np.uint32))
            w.set_s(out, bits_of((total < 0 if subtract else total >> 32 > 0) & w.mask))

        return step

    return make


def _multiply_add(signed: bool) -> Callable[[Instruction], Step]:
    def make(i: Instruction) -> Step:
        target = register_of(i.operands[0])[1]
        a, b, c = vector(i.operands[2]), vector(i.operands[3]), vector64(i.operands[4])
        if signed:
            return lambda w: _set_v64(
                w, target, (_signed(a(w)).astype(np.int64) * _signed(b(w))).view(np.uint64) + c(w)
            )
        return lambda w: _set_v64(w, target, a(w).astype(np.uint64) * b(w) + c(w))

    return make


def _read_lane(first: bool) -> Callable[[Instruction], Step]:
    def make(i: Instruction) -> Step:
        target, source = register_of(i.operands[0])[1], vector(i.operands[1])
        if first:
            return lambda w: w.set_s(target, int(source(w)[int(np.argmax(w.mask))]))
        lane = scalar(i.operands[2])
        return lambda w: w.set_s(target, int(source(w)[lane(w) & 31]))

    return make


def _write_lane(i: Instruction) -> Step:
    target, value, lane = (
        register_of(i.operands[0])[1],
        scalar(i.operands[1]),
        scalar(i.operands[2]),
    )

    def step(w: Simdgroup) -> None:
        w.V[target][lane(w) & 31] = value(w)

    return step


def _keep(i: Instruction) -> Step:
    """A step of division whose result v_div_fixup does not need."""
    target = register_of(i.operands[0])[1]
    return lambda w: w.set_v(target, 0)


_SPECIAL: dict[str, Callable[[Instruction], Step]] = {
    "v_fmac_f32": _fmac,
    "v_cndmask_b32": _select,
    "v_add_co_u32": _carry(0, False, False),
    "v_add_co_ci_u32": _carry(0, False, True),
    "v_sub_co_u32": _carry(1, False, False),
    "v_subrev_co_u32": _carry(1, True, False),
    "v_sub_co_ci_u32": _carry(1, False, True),
    "v_subrev_co_ci_u32": _carry(1, True, True),
    "v_mad_u64_u32": _multiply_add(False),
    "v_mad_i64_i32": _multiply_add(True),
    "v_readfirstlane_b32": _read_lane(True),
    "v_readlane_b32": _read_lane(False),
    "v_writelane_b32": _write_lane,
    "v_div_scale_f32": _keep,
    "v_div_fmas_f32": _keep,
}
