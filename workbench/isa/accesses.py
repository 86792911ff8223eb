"""Instructions that load, store or shuffle."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .operands import Step, register_of, scalar, scalar64, unknown, vector, vector64
from .program import Instruction
from .simdgroup import EXEC, LANES, Array, Simdgroup

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


def device_step(i: Instruction) -> Step:
    match = re.match(r"global_(load|store)_(\w+?)(_d16)?(_hi)?$", i.name)
    if not match or match[2] not in _SIZES:
        raise unknown(i)
    size, half, high = _SIZES[match[2]], bool(match[3]), bool(match[4])
    offset = int(i.options.get("offset", "0"))
    if match[1] == "store":
        address, data, base = i.operands[0], register_of(i.operands[1])[1], i.operands[2]
        at = _address(address, base, offset)

        def store(w: Simdgroup) -> None:
            if w.S[EXEC]:
                indices = w.memory.indices(at(w)[w.mask], size)
                w.memory.written[indices] = True
                w.memory.bytes[indices] = _store_bytes(w, data, size, high)

        return store
    target, address, base = register_of(i.operands[0])[1], i.operands[1], i.operands[2]
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


def scratch_step(i: Instruction) -> Step:
    """Registers that found no place: memory of each lane."""
    match = re.match(r"buffer_(load|store)_(dword(?:x\d)?)$", i.name)
    if not match:
        if i.name == "buffer_gl0_inv":
            return lambda w: None
        raise unknown(i)
    register, size = register_of(i.operands[0])[1], _SIZES[match[2]]
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
    target = register_of(i.operands[0])[1]
    if i.name == "ds_bpermute_b32":
        lane, value = vector(i.operands[1]), vector(i.operands[2])
        return lambda w: w.set_v(target, value(w)[lane(w) >> np.uint32(2) & np.uint32(31)])
    swapped = re.match(r"swizzle\(SWAP,(\d+)\)", i.options["offset"])
    if not swapped:
        raise unknown(i)
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


def threadgroup_step(i: Instruction) -> Step:
    if i.name in ("ds_bpermute_b32", "ds_swizzle_b32"):
        return _shuffle(i)
    atomic = re.match(r"ds_(add|sub|max|min|and|or)(_rtn)?_(u32|b32)$", i.name)
    if atomic:
        return _threadgroup_atomic(i, _ATOMIC[atomic[1]], bool(atomic[2]))
    match = re.match(r"ds_(read|write)(2?)(st64)?_([bu]\d+)(_d16)?(_hi)?$", i.name)
    if not match:
        raise unknown(i)
    size, high = _SIZES[match[4]], bool(match[6])
    if match[2]:
        unit = size * (64 if match[3] else 1)
        offsets = [int(i.options.get(f"offset{n}", "0")) * unit for n in (0, 1)]
    else:
        offsets = [int(i.options.get("offset", "0"))]
    span = np.arange(size)
    if match[1] == "write":
        address, datas = vector(i.operands[0]), [register_of(o)[1] for o in i.operands[1:]]

        def write(w: Simdgroup) -> None:
            at = address(w)[w.mask].astype(np.int64)[:, None] + span
            for offset, data in zip(offsets, datas, strict=True):
                w.memory.threadgroup[at + offset] = _store_bytes(w, data, size, high)

        return write
    target, address = register_of(i.operands[0])[1], vector(i.operands[1])

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
                w.V[register_of(i.operands[0])[1]][lane] = old

    return step
