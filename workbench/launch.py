"""What a launch is: the workbench runs any object with these attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

Role = Literal["in", "out", "inout", "bytes"]

# bfloat16 travels as its bits: numpy has no such type of its own.
DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(np.uint16),
    **{
        name: np.dtype(name)
        for name in (
            *("float32", "float16", "bool"),
            *("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        )
    },
}


class BufferLike(Protocol):
    """One argument of a kernel; see `Buffer`."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> str: ...
    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def data(self) -> bytes: ...


class LaunchLike(Protocol):
    """How a kernel is started; see `Launch`."""

    @property
    def library(self) -> str: ...
    @property
    def kernel(self) -> str: ...
    @property
    def constants(self) -> Mapping[int, bool | int | float]: ...
    @property
    def grid(self) -> Sequence[int]: ...
    @property
    def threadgroup(self) -> Sequence[int]: ...
    @property
    def buffers(self) -> Sequence[BufferLike]: ...
    @property
    def threadgroup_memory(self) -> Sequence[tuple[int, int]]: ...


@dataclass(frozen=True)
class Buffer:
    """One argument of a kernel.

    Args:
        name: How `run` finds the array; several launches share arrays by name.
        role: "in" (never written), "out" (starts unwritten), "inout" (starts as a copy of the
            array), or "bytes" (`data` itself, as for a parameter struct).
        shape: Of the array; unused for "bytes".
        dtype: A key of `DTYPES`; unused for "bytes".
        data: The bytes of role "bytes".
    """

    name: str
    role: Role
    shape: tuple[int, ...] = ()
    dtype: str = "uint8"
    data: bytes = b""


@dataclass(frozen=True)
class Launch:
    """How a kernel is started.

    Args:
        library: "embed" stands for metal/embed.metal; else the path of a .metal file.
        kernel: Host name of the kernel in that file, or `name<arguments>` for a kernel template
            that the file does not instantiate.
        constants: Function constants by index.
        grid: In threadgroups.
        threadgroup: In threads, at most 1024.
        buffers: In the order of their indices, from 0 without gaps.
        threadgroup_memory: (index, bytes) of each threadgroup argument.
    """

    library: str
    kernel: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    buffers: tuple[Buffer, ...]
    constants: Mapping[int, bool | int | float] = field(default_factory=dict)
    threadgroup_memory: tuple[tuple[int, int], ...] = ()
