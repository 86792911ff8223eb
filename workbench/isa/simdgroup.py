"""What a simdgroup has: registers, memory that it shares, and its place in the program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .program import Program

Array = np.ndarray[Any, Any]

LANES = np.arange(32, dtype=np.uint32)
NAMED = {"vcc_lo": 106, "vcc_hi": 107, "m0": 124, "null": 125, "exec_lo": 126, "exec_hi": 127}
EXEC = NAMED["exec_lo"]
_BASE = 1 << 33  # address of the first buffer
_GAP = 4096  # between buffers, at least


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
