"""Runs one threadgroup of a kernel's gfx1030 assembly, counting what its simdgroups execute.

A simdgroup's registers are rows of numpy arrays with a column per lane. Only what the compiler
makes of our kernels is known here; anything else is refused by name. Times and caches do not
exist: a load is there at once, and what is counted is how many were asked for before a wait.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Step = Callable[["Simdgroup"], object]

LANES = np.arange(32, dtype=np.uint32)
NAMED = {"vcc_lo": 106, "vcc_hi": 107, "m0": 124, "null": 125, "exec_lo": 126, "exec_hi": 127}
EXEC = NAMED["exec_lo"]
_BASE = 1 << 33  # address of the first buffer
_GAP = 4096  # between buffers, at least
_BARRIER = "barrier"
_ENDLESS = 5_000_000

_LABEL = re.compile(r"^(\.LBB\d+_\d+|counted):")
_INSTRUCTION = re.compile(r"^\s+([a-z]\w*)\s*([^;]*)")
_OPERAND = re.compile(r"(-)?(\|)?(?:([vs])(\d+)|([vs])\[(\d+):(\d+)\]|([\w.+-]+))\|?$")
_OPTION = re.compile(r"\b(offset\d?|row_mask|bank_mask):(\S+)")


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
            operands = tuple(part.strip() for part in _split(rest) if part.strip())
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


def _split(text: str) -> Iterator[str]:
    """At commas outside of brackets; `offset:swizzle(..)` is an option and gone."""
    yield from re.split(r",(?![^(\[]*[)\]])", text)


class Memory:
    """A threadgroup's memory: buffers, one after the other with gaps between, and its own."""

    def __init__(self, buffers: Sequence[Array | int]) -> None:
        """Of arrays, or of sizes in bytes: zeros."""
        sizes = [buffer if isinstance(buffer, int) else buffer.nbytes for buffer in buffers]
        ends = np.cumsum([(size + _GAP) // _GAP * _GAP + _GAP for size in sizes])
        self.starts = np.concatenate([[0], ends[:-1]])
        self.ends = self.starts + sizes
        self.bytes = np.zeros(int(ends[-1]), np.uint8)
        for i, buffer in enumerate(buffers):
            if not isinstance(buffer, int):
                self.buffer(i)[:] = buffer.reshape(-1).view(np.uint8)
        self.read = np.zeros(len(self.bytes), bool)
        self.written = np.zeros(len(self.bytes), bool)
        self.threadgroup = np.zeros(1 << 16, np.uint8)

    def buffer(self, i: int) -> Array:
        """Its bytes."""
        return self.bytes[self.starts[i] : self.ends[i]]

    def address(self, i: int) -> int:
        return _BASE + int(self.starts[i])

    def buffers_at(self, addresses: Array) -> Array:
        """Which buffer each address is in, or behind."""
        places = (addresses - np.uint64(_BASE)).astype(np.int64)
        return np.searchsorted(self.starts, places, side="right") - 1

    def indices(self, addresses: Array, size: int) -> Array:
        """Where the `size` bytes at each address lie in `bytes`.

        Raises:
            IndexError: Some are in no buffer.
        """
        places = (addresses - np.uint64(_BASE)).astype(np.int64)
        buffers = np.searchsorted(self.starts, places, side="right") - 1
        wrong = (buffers < 0) | (places + size > self.ends[buffers])
        if wrong.any():
            at = int(addresses[int(np.argmax(wrong))])
            raise IndexError(f"[isa] {size} bytes at {at:#x} are in no buffer")
        indices: Array = places[:, None] + np.arange(size)
        return indices

    def touched(self, i: int) -> int:
        """Bytes of a buffer that were read or written, each once."""
        part = slice(self.starts[i], self.ends[i])
        return int((self.read[part] | self.written[part]).sum())


@dataclass
class Counts:
    """What the simdgroups of a threadgroup executed."""

    executed: Counter[str] = field(default_factory=Counter)  # by name of instruction
    in_flight: list[int] = field(default_factory=list)  # loads before each first wait


class Simdgroup:
    """One simdgroup's registers, and where it stands."""

    def __init__(self, program: Program, memory: Memory, watched: Sequence[int]) -> None:
        self.memory = memory
        self.watched = watched  # buffers whose loads are counted while they are under way
        self.V = np.zeros((256, 32), np.uint32)
        self.S = [0] * 128
        self.scc = 0
        self.pc = 0
        self.scratch = np.zeros((program.scratch_bytes + 16, 32), np.uint8)
        self.loads: list[bool] = []  # under way, oldest first; whether of a watched buffer
        self.most = 0  # watched loads under way at a wait, since there were none
        self.in_flight: list[int] = []
        self.visits = [0] * len(program.instructions)
        self.set_exec(0xFFFFFFFF)

    def set_exec(self, value: int) -> None:
        self.S[EXEC] = value
        self.mask = mask_of(value)
        self.full = value == 0xFFFFFFFF

    def set_s(self, register: int, value: int) -> None:
        if register == EXEC:
            self.set_exec(value & 0xFFFFFFFF)
        elif register != NAMED["null"]:
            self.S[register] = value & 0xFFFFFFFF

    def set_v(self, register: int, value: Any) -> None:
        if self.full:
            self.V[register] = value
        else:
            np.copyto(self.V[register], value, where=self.mask, casting="unsafe")

    def wait(self, left: int) -> None:
        """Until at most `left` loads are under way."""
        if len(self.loads) <= left:
            return
        self.most = max(self.most, sum(self.loads))
        self.loads = self.loads[len(self.loads) - left :]
        if self.most and not any(self.loads):
            self.in_flight.append(self.most)
            self.most = 0


def mask_of(value: int) -> Array:
    return (np.uint32(value) >> LANES & np.uint32(1)).astype(bool)


def bits_of(lanes: Any) -> int:
    return int.from_bytes(np.packbits(np.broadcast_to(lanes, 32), bitorder="little"), "little")


# Operands


def _number(text: str) -> int | None:
    """A literal's 32 bits."""
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
        return int(text, 0) & 0xFFFFFFFF
    if re.fullmatch(r"-?\d+\.\d+", text):
        return int(np.float32(float(text)).view(np.uint32))
    return None


def _register(text: str) -> tuple[str, int]:
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
    kind, register = _register(text)
    assert kind == "s"
    return lambda w: w.S[register]


def scalar64(text: str) -> Callable[[Simdgroup], int]:
    number = _number(text)
    if number is not None:
        signed = number - (1 << 32) if text.startswith("-") else number
        return lambda w: signed & 0xFFFFFFFFFFFFFFFF
    _, register = _register(text)
    return lambda w: w.S[register] | w.S[register + 1] << 32


def vector(text: str) -> Callable[[Simdgroup], Any]:
    """32 bits of each lane."""
    number = _number(text)
    if number is not None:
        constant = np.full(32, number, np.uint32)
        return lambda w: constant
    kind, register = _register(text)
    if kind == "v":
        return lambda w: w.V[register]
    return lambda w: np.full(32, w.S[register], np.uint32)


def vector64(text: str) -> Callable[[Simdgroup], Any]:
    number = _number(text)
    if number is not None:
        signed = number - (1 << 32) if text.startswith("-") else number
        constant = np.full(32, signed & 0xFFFFFFFFFFFFFFFF, np.uint64)
        return lambda w: constant
    kind, register = _register(text)
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


# Vector instructions: name -> (kind of operands, function)


def _shift_left(a: Any, by: Any) -> Any:
    return a << (by & 31)


def _signed(a: Any) -> Any:
    return a.view(np.int32)


def _fma(a: Any, b: Any, c: Any) -> Any:
    """Exact product, sum rounded to odd in float64, so that rounding again to float32 is right."""
    x = a.astype(np.float64) * b
    y = c.astype(np.float64)
    total = x + y
    big = np.where(np.abs(x) >= np.abs(y), x, y)
    small = np.where(np.abs(x) >= np.abs(y), y, x)
    error = small - (total - big)
    bits = total.view(np.int64)
    inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(inexact, bits + towards, bits).view(np.float64).astype(np.float32)


def _high(a: Any, b: Any) -> Any:
    return (a.astype(np.uint64) * b >> np.uint64(32)).astype(np.uint32)


def _extract(a: Any, offset: Any, width: Any) -> Any:
    return a >> (offset & 31) & ((np.uint32(1) << (width & 31)) - np.uint32(1))


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
    target = EXEC if to_exec else _register(i.operands[0])[1]
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
        raise NotImplementedError(f"[isa] instruction `{i.name}` is unknown")
    target, a, classes = _register(i.operands[0])[1], floats(i.operands[1]), vector(i.operands[2])

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


def _vector_step(i: Instruction) -> Step:
    name, operands = i.name, i.operands
    if name.startswith("v_cmp"):
        return _compare(i)
    if name in _SPECIAL:
        return _SPECIAL[name](i)
    target = _register(operands[0])[1]
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
    raise NotImplementedError(f"[isa] instruction `{name}` is unknown")


def _set_v64(w: Simdgroup, register: int, value: Any) -> None:
    w.set_v(register, value.astype(np.uint32))
    w.set_v(register + 1, (value >> np.uint64(32)).astype(np.uint32))


def _fmac(i: Instruction) -> Step:
    target = _register(i.operands[0])[1]
    a, b = floats(i.operands[1]), floats(i.operands[2])
    return lambda w: w.set_v(target, _fma(a(w), b(w), w.V[target].view(np.float32)).view(np.uint32))


def _select(i: Instruction) -> Step:
    target = _register(i.operands[0])[1]
    signed = any(mark in text for text in i.operands[1:3] for mark in ("|v", "-v", "|s", "-s"))
    a, b = ((floats if signed else vector)(text) for text in i.operands[1:3])
    chosen = scalar(i.operands[3])
    return lambda w: w.set_v(target, np.where(mask_of(chosen(w)), b(w), a(w)).view(np.uint32))


def _carry(subtract: int, reverse: bool, with_carry: bool) -> Callable[[Instruction], Step]:
    def make(i: Instruction) -> Step:
        target, out = _register(i.operands[0])[1], _register(i.operands[1])[1]
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
        target = _register(i.operands[0])[1]
        a, b, c = vector(i.operands[2]), vector(i.operands[3]), vector64(i.operands[4])
        if signed:
            return lambda w: _set_v64(
                w, target, (_signed(a(w)).astype(np.int64) * _signed(b(w))).view(np.uint64) + c(w)
            )
        return lambda w: _set_v64(w, target, a(w).astype(np.uint64) * b(w) + c(w))

    return make


def _read_lane(first: bool) -> Callable[[Instruction], Step]:
    def make(i: Instruction) -> Step:
        target, source = _register(i.operands[0])[1], vector(i.operands[1])
        if first:
            return lambda w: w.set_s(target, int(source(w)[int(np.argmax(w.mask))]))
        lane = scalar(i.operands[2])
        return lambda w: w.set_s(target, int(source(w)[lane(w) & 31]))

    return make


def _write_lane(i: Instruction) -> Step:
    target, value, lane = _register(i.operands[0])[1], scalar(i.operands[1]), scalar(i.operands[2])

    def step(w: Simdgroup) -> None:
        w.V[target][lane(w) & 31] = value(w)

    return step


def _keep(i: Instruction) -> Step:
    """A step of division whose result v_div_fixup does not need."""
    target = _register(i.operands[0])[1]
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


# Memory

_SIZES = {
    **{"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2},
    **{"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16},
    **{"u8": 1, "u16": 2, "b8": 1, "b16": 2, "b32": 4, "b64": 8, "b96": 12, "b128": 16},
}


def _words(data: Array, size: int) -> Array:
    """Bytes of each lane [lanes, size] as registers [registers, lanes]."""
    if size < 4:
        padded = np.zeros((len(data), 4), np.uint8)
        padded[:, :size] = data
        data = padded
    return np.ascontiguousarray(data).view(np.uint32).T


def _store_bytes(w: Simdgroup, register: int, size: int, high: bool) -> Array:
    """The bytes of each active lane [lanes, size]."""
    words = np.ascontiguousarray(w.V[register : register + (size + 3) // 4].T)
    data = words.view(np.uint8).reshape(32, -1)
    return data[:, 2 : 2 + size][w.mask] if high else data[:, :size][w.mask]


def _address(address: str, base: str, offset: int) -> Callable[[Simdgroup], Array]:
    by = np.uint64(offset & 0xFFFFFFFFFFFFFFFF)
    if base == "off":
        whole = vector64(address)
        return lambda w: whole(w) + by
    low, high = vector(address), scalar64(base)
    return lambda w: low(w).astype(np.uint64) + (np.uint64(high(w)) + by)


def _device(i: Instruction) -> Step:
    match = re.match(r"global_(load|store)_(\w+?)(_d16)?(_hi)?$", i.name)
    if not match or match[2] not in _SIZES:
        raise NotImplementedError(f"[isa] instruction `{i.name}` is unknown")
    size, half, high = _SIZES[match[2]], bool(match[3]), bool(match[4])
    offset = int(i.options.get("offset", "0"))
    if match[1] == "store":
        address, data, base = i.operands[0], _register(i.operands[1])[1], i.operands[2]
        at = _address(address, base, offset)

        def store(w: Simdgroup) -> None:
            if w.S[EXEC]:
                indices = w.memory.indices(at(w)[w.mask], size)
                w.memory.written[indices] = True
                w.memory.bytes[indices] = _store_bytes(w, data, size, high)

        return store
    target, address, base = _register(i.operands[0])[1], i.operands[1], i.operands[2]
    at = _address(address, base, offset)
    signed = match[2] in ("sbyte", "sshort")

    def load(w: Simdgroup) -> None:
        if not w.S[EXEC]:
            w.loads.append(False)
            return
        addresses = at(w)[w.mask]
        indices = w.memory.indices(addresses, size)
        w.memory.read[indices] = True
        w.loads.append(bool(np.isin(w.memory.buffers_at(addresses), w.watched).any()))
        words = _words(w.memory.bytes[indices], size)
        if signed:
            bits = 32 - 8 * size
            words = (words << np.uint32(bits)).view(np.int32) >> np.int32(bits)
            words = words.view(np.uint32)
        for r, word in enumerate(words):
            if half:
                old = w.V[target][w.mask]
                word = old & 0xFFFF | word << np.uint32(16) if high else old & 0xFFFF0000 | word
            w.V[target + r][w.mask] = word

    return load


def _scratch(i: Instruction) -> Step:
    """Registers that found no place: memory of each lane."""
    match = re.match(r"buffer_(load|store)_(dword(?:x\d)?)$", i.name)
    if not match:
        if i.name == "buffer_gl0_inv":
            return lambda w: None
        raise NotImplementedError(f"[isa] instruction `{i.name}` is unknown")
    register, size = _register(i.operands[0])[1], _SIZES[match[2]]
    last = i.operands[-1].split()
    soffset, offset = scalar(last[0]), int(i.options.get("offset", "0"))
    index = vector(i.operands[1]) if "offen" in last else None

    def places(w: Simdgroup) -> Array:
        base = np.zeros(32, np.int64) if index is None else index(w).astype(np.int64)
        return (base + soffset(w) + offset)[w.mask][None, :] + np.arange(size)[:, None]

    if match[1] == "store":

        def store(w: Simdgroup) -> None:
            data = _store_bytes(w, register, size, False)
            w.scratch[places(w), np.flatnonzero(w.mask)[None, :]] = data.T

        return store

    def load(w: Simdgroup) -> None:
        w.loads.append(False)
        data = w.scratch[places(w), np.flatnonzero(w.mask)[None, :]].T
        for r, word in enumerate(_words(data, size)):
            w.V[register + r][w.mask] = word

    return load


def _shuffle(i: Instruction) -> Step:
    target = _register(i.operands[0])[1]
    if i.name == "ds_bpermute_b32":
        lane, value = vector(i.operands[1]), vector(i.operands[2])
        return lambda w: w.set_v(target, value(w)[lane(w) >> np.uint32(2) & np.uint32(31)])
    swapped = re.match(r"swizzle\(SWAP,(\d+)\)", i.options["offset"])
    if not swapped:
        raise NotImplementedError(f"[isa] `{i.options['offset']}` is unknown")
    source, by = vector(i.operands[1]), LANES ^ np.uint32(int(swapped[1]))
    return lambda w: w.set_v(target, source(w)[by])


_ATOMIC: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "max": max,
    "min": min,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
}


def _threadgroup(i: Instruction) -> Step:
    if i.name in ("ds_bpermute_b32", "ds_swizzle_b32"):
        return _shuffle(i)
    atomic = re.match(r"ds_(add|sub|max|min|and|or)(_rtn)?_(u32|b32)$", i.name)
    if atomic:
        return _threadgroup_atomic(i, _ATOMIC[atomic[1]], bool(atomic[2]))
    match = re.match(r"ds_(read|write)(2?)(st64)?_([bu]\d+)(_d16)?(_hi)?$", i.name)
    if not match:
        raise NotImplementedError(f"[isa] instruction `{i.name}` is unknown")
    size, high = _SIZES[match[4]], bool(match[6])
    if match[2]:
        unit = size * (64 if match[3] else 1)
        offsets = [int(i.options.get(f"offset{n}", "0")) * unit for n in (0, 1)]
    else:
        offsets = [int(i.options.get("offset", "0"))]
    span = np.arange(size)
    if match[1] == "write":
        address, datas = vector(i.operands[0]), [_register(o)[1] for o in i.operands[1:]]

        def write(w: Simdgroup) -> None:
            at = address(w)[w.mask].astype(np.int64)[:, None] + span
            for offset, data in zip(offsets, datas, strict=True):
                w.memory.threadgroup[at + offset] = _store_bytes(w, data, size, high)

        return write
    target, address = _register(i.operands[0])[1], vector(i.operands[1])

    def read(w: Simdgroup) -> None:
        at = address(w)[w.mask].astype(np.int64)[:, None] + span
        to = target
        for offset in offsets:
            for word in _words(w.memory.threadgroup[at + offset], size):
                if match[5]:
                    old = w.V[to][w.mask]
                    word = old & 0xFFFF | word << np.uint32(16) if high else old & 0xFFFF0000 | word
                w.V[to][w.mask] = word
                to += 1

    return read


def _threadgroup_atomic(i: Instruction, function: Callable[[int, int], int], returns: bool) -> Step:
    address, value = (vector(text) for text in i.operands[returns : returns + 2])
    offset = int(i.options.get("offset", "0"))

    def step(w: Simdgroup) -> None:
        words = w.memory.threadgroup.view(np.uint32)
        at, values = address(w), value(w)
        for lane in np.flatnonzero(w.mask):
            place = (int(at[lane]) + offset) // 4
            old = int(words[place])
            words[place] = function(old, int(values[lane])) & 0xFFFFFFFF
            if returns:
                w.V[_register(i.operands[0])[1]][lane] = old

    return step


# Scalar instructions


def _int(value: int) -> int:
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
    "s_add_i32": lambda a, b: (a + b, not -(2**31) <= _int(a) + _int(b) < 2**31),
    "s_sub_i32": lambda a, b: (a - b, not -(2**31) <= _int(a) - _int(b) < 2**31),
    "s_mul_i32": lambda a, b: (a * b, None),
    "s_mul_hi_u32": lambda a, b: (a * b >> 32, None),
    "s_mul_hi_i32": lambda a, b: (_int(a) * _int(b) >> 32, None),
    "s_lshl_b32": lambda a, b: (a << (b & 31), (a << (b & 31)) & 0xFFFFFFFF != 0),
    "s_lshr_b32": lambda a, b: (a >> (b & 31), a >> (b & 31) != 0),
    "s_ashr_i32": lambda a, b: (_int(a) >> (b & 31), _int(a) >> (b & 31) != 0),
    "s_min_u32": lambda a, b: (min(a, b), a < b),
    "s_max_u32": lambda a, b: (max(a, b), a > b),
    "s_min_i32": lambda a, b: (min(_int(a), _int(b)), _int(a) < _int(b)),
    "s_max_i32": lambda a, b: (max(_int(a), _int(b)), _int(a) > _int(b)),
    "s_bfm_b32": lambda a, b: (((1 << (a & 31)) - 1) << (b & 31), None),
    "s_pack_ll_b32_b16": lambda a, b: (a & 0xFFFF | b << 16, None),
    "s_mov_b32": lambda a: (a, None),
    "s_not_b32": lambda a: (~a, ~a & 0xFFFFFFFF != 0),
    "s_abs_i32": lambda a: (abs(_int(a)), a != 0),
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


def _scalar_step(i: Instruction) -> Step:
    name, operands = i.name, i.operands
    if name in _NOTHING:
        return lambda w: None
    if name == "s_waitcnt":
        return _wait(i)
    if name == "s_barrier":
        return lambda w: _BARRIER
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
    target = _register(operands[0])[1]
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
        raise NotImplementedError(f"[isa] instruction `{name}` is unknown")
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
        w.scc = int(compare(_int(x), _int(y)) if kind == "i" else compare(x, y))

    return step


def _scalar_load(i: Instruction) -> Step:
    match = re.match(r"s_load_dword(?:x(\d+))?$", i.name)
    assert match
    words, target = int(match[1] or 1), _register(i.operands[0])[1]
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
        target, a, b = _register(i.operands[0])[1], scalar(i.operands[1]), scalar(i.operands[2])

        def step(w: Simdgroup) -> None:
            total = a(w) - b(w) - w.scc if subtract else a(w) + b(w) + w.scc
            w.set_s(target, total)
            w.scc = int(total < 0 if subtract else total >> 32 > 0)

        return step

    return make


def _scalar_extract(signed: bool) -> Callable[[Instruction], Step]:
    def make(i: Instruction) -> Step:
        target, a, b = _register(i.operands[0])[1], scalar(i.operands[1]), scalar(i.operands[2])

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
        target, a, b = _register(i.operands[0])[1], read(i.operands[1]), read(i.operands[2])

        def step(w: Simdgroup) -> None:
            value = a(w) if w.scc else b(w)
            w.set_s(target, value)
            if wide:
                w.set_s(target + 1, value >> 32)

        return step

    return make


def _scalar_shift64(i: Instruction) -> Step:
    target, a, b = _register(i.operands[0])[1], scalar64(i.operands[1]), scalar(i.operands[2])
    left = i.name == "s_lshl_b64"

    def step(w: Simdgroup) -> None:
        value = (a(w) << (b(w) & 63) if left else a(w) >> (b(w) & 63)) & 0xFFFFFFFFFFFFFFFF
        w.set_s(target, value)
        w.set_s(target + 1, value >> 32)
        w.scc = int(value != 0)

    return step


def _scalar_move64(i: Instruction) -> Step:
    target, a = _register(i.operands[0])[1], scalar64(i.operands[1])

    def step(w: Simdgroup) -> None:
        value = a(w)
        w.set_s(target, value)
        w.set_s(target + 1, value >> 32)

    return step


def _scalar_immediate(i: Instruction) -> Step:
    target, number = _register(i.operands[0])[1], int(i.operands[1], 0)
    number = number - (1 << 16) if number >> 15 == 1 else number
    if i.name == "s_movk_i32":
        return lambda w: w.set_s(target, number)
    if i.name == "s_mulk_i32":
        return lambda w: w.set_s(target, w.S[target] * number)

    def add(w: Simdgroup) -> None:
        total = _int(w.S[target]) + number
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


def _step(i: Instruction) -> Step:
    for prefix, make in (
        ("v_", _vector_step),
        ("ds_", _threadgroup),
        ("global_", _device),
        ("buffer_", _scratch),
        ("s_", _scalar_step),
    ):
        if i.name.startswith(prefix):
            return make(i)
    raise NotImplementedError(f"[isa] instruction `{i.name}` is unknown")


# Running


def run(
    program: Program,
    buffers: Sequence[Array | int],
    *,
    group: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    groups: tuple[int, int, int],
    watched: Sequence[int],
) -> tuple[Counts, Memory]:
    """Run one threadgroup to its end.

    Args:
        buffers: Each as an array, or its size in bytes if it is all zeros, in the kernel's order.
        group: Which threadgroup of the grid.
        threadgroup: Its threads.
        groups: Threadgroups in the grid.
        watched: Indices of the buffers whose loads are counted in `Counts.in_flight`.

    Raises:
        NotImplementedError: The assembly has an instruction that is not known here.
        IndexError: An access lies in no buffer.
    """
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)
        return _run(program, buffers, group, threadgroup, groups, watched)


def _run(
    program: Program,
    buffers: Sequence[Array | int],
    group: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    groups: tuple[int, int, int],
    watched: Sequence[int],
) -> tuple[Counts, Memory]:
    arguments = len(buffers)
    memory = Memory([*buffers, np.zeros(2 * arguments + 6, np.uint32)])
    addresses = np.array([memory.address(n) for n in range(arguments)], np.uint64)
    dispatch = np.array([*threadgroup, *groups], np.uint32)
    given = np.concatenate([addresses.view(np.uint8), dispatch.view(np.uint8)])
    memory.buffer(arguments)[:] = given
    steps = [_step(i) for i in program.instructions]
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    simdgroups = [Simdgroup(program, memory, watched) for _ in range((threads + 31) // 32)]
    for n, simdgroup in enumerate(simdgroups):
        _start(simdgroup, program, memory.address(arguments), group, threadgroup, n)
    waiting = simdgroups
    while waiting:
        waiting = [w for w in waiting if _until_barrier(w, steps)]
    counts = Counts()
    for simdgroup in simdgroups:
        for i, visits in zip(program.instructions, simdgroup.visits, strict=True):
            counts.executed[i.name] += visits
        counts.in_flight += simdgroup.in_flight
    return counts, memory


def _until_barrier(w: Simdgroup, steps: list[Step]) -> bool:
    """Whether it came to a barrier and not to its end."""
    visits, end = w.visits, len(steps)
    budget = _ENDLESS
    while w.pc < end:
        pc = w.pc
        visits[pc] += 1
        w.pc = pc + 1
        if steps[pc](w) is _BARRIER:
            return True
        budget -= 1
        if not budget:
            raise RuntimeError("[isa] a simdgroup must end but ran 5 million instructions")
    return False


def _start(
    w: Simdgroup,
    program: Program,
    arguments: int,
    group: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    number: int,
) -> None:
    """Fills registers as the kernel descriptor says."""
    about, at = program.about, 0
    for name, words in (
        ("private_segment_buffer", 4),
        ("dispatch_ptr", 2),
        ("queue_ptr", 2),
        ("kernarg_segment_ptr", 2),
        ("dispatch_id", 2),
        ("flat_scratch_init", 2),
        ("private_segment_size", 1),
    ):
        if about.get(f"user_sgpr_{name}"):
            if name == "kernarg_segment_ptr":
                w.S[at], w.S[at + 1] = arguments & 0xFFFFFFFF, arguments >> 32
            at += words
    for axis, name in enumerate("xyz"):
        if about.get(f"system_sgpr_workgroup_id_{name}"):
            w.S[at] = group[axis]
            at += 1
    thread = LANES + np.uint32(32 * number)
    x, y = np.uint32(threadgroup[0]), np.uint32(threadgroup[1])
    w.V[0], w.V[1], w.V[2] = thread % x, thread // x % y, thread // (x * y)
    last = threadgroup[0] * threadgroup[1] * threadgroup[2] - 32 * number
    if last < 32:
        w.set_exec((1 << last) - 1)
