"""Code addresses to file:line, from the line table (DWARF 4) of a compiled kernel."""

from __future__ import annotations

import bisect
import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path

_ADVANCE_TO_SEQUENCE_END, _SET_ADDRESS = 1, 2


class LineTable:
    """Finds the source line of an address in a loaded object. Reads the file when first asked."""

    def __init__(self, path: Path, base: int) -> None:
        self._path = path
        self.base = base  # where the object is loaded

    @functools.cached_property
    def end(self) -> int:
        """The address behind the loaded object."""
        content = self._path.read_bytes()
        offset, size, count = _header(content, 0x20, 0x36)
        last = 0
        for i in range(count):
            kind = struct.unpack_from("<I", content, offset + i * size)[0]
            address, _, _, in_memory = struct.unpack_from("<4Q", content, offset + i * size + 16)
            if kind == 1:  # a part of the file that is loaded
                last = max(last, address + in_memory)
        return self.base + last

    @functools.cached_property
    def _rows(self) -> list[tuple[int, str]]:
        section = _section(self._path.read_bytes(), b".debug_line")
        rows: list[tuple[int, str]] = []
        while section:
            (length,) = struct.unpack_from("<I", section)
            rows.extend(_unit(section[: 4 + length]))
            section = section[4 + length :]
        return sorted(rows)

    def where(self, address: int) -> str:
        """file:line of the call that returns to `address`; empty if nothing is known of it.

        The file is named from the current directory if it lies below, else from the root.
        """
        position = bisect.bisect_right(self._rows, (address - 1 - self.base, "\uffff")) - 1
        if not address or position < 0:
            return ""
        where = self._rows[position][1]
        here = os.path.join(os.getcwd(), "")
        return where.removeprefix(here)


def _header(content: bytes, offset_at: int, size_at: int) -> tuple[int, int, int]:
    """Offset, entry size and count of a table that the ELF header names."""
    offset = struct.unpack_from("<Q", content, offset_at)[0]
    size, count = struct.unpack_from("<2H", content, size_at)
    return offset, size, count


def _section(content: bytes, wanted: bytes) -> bytes:
    offset, size, count = _header(content, 0x28, 0x3A)
    headers = [struct.unpack_from("<2I4Q", content, offset + i * size) for i in range(count)]
    names = headers[struct.unpack_from("<H", content, 0x3E)[0]]
    for name, _, _, _, begin, length in headers:
        start = names[4] + name
        if content[start : content.index(b"\0", start)] == wanted:
            return content[begin : begin + length]
    return b""


class _Reader:
    """Numbers and strings out of one line number program."""

    def __init__(self, content: bytes, at: int) -> None:
        self.content, self.at = content, at

    def fixed(self, code: str) -> int:
        value: int = struct.unpack_from(code, self.content, self.at)[0]
        self.at += struct.calcsize(code)
        return value

    def byte(self) -> int:
        self.at += 1
        return self.content[self.at - 1]

    def unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def signed(self) -> int:
        start = self.at
        value = self.unsigned()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if value >> (bits - 1) else value

    def string(self) -> str:
        end = self.content.index(b"\0", self.at)
        value = self.content[self.at : end].decode()
        self.at = end + 1
        return value


def _unit(content: bytes) -> Iterator[tuple[int, str]]:
    """(address, file:line) of every row of one compilation unit."""
    header = _Reader(content, 4)
    version = header.fixed("<H")
    assert version == 4, f"the line table has DWARF version {version}"
    program = header.fixed("<I") + header.at
    step = header.fixed("<B")
    header.at += 2  # operations of long instructions, default of statements
    line_base, line_range = header.fixed("<b"), header.fixed("<B")
    lengths = [0] + [header.fixed("<B") for _ in range(header.fixed("<B") - 1)]
    folders = [""]
    while folder := header.string():
        folders.append(folder)
    files = [""]
    while name := header.string():
        files.append(os.path.join(folders[header.unsigned()], name))
        header.unsigned(), header.unsigned()  # time and length

    def row() -> Iterator[tuple[int, str]]:
        if line:  # 0: code of no line, which counts as the line's before it
            yield address, f"{files[file]}:{line}"

    reader = _Reader(content, program)
    address, file, line = 0, 1, 1
    special = len(lengths)
    while reader.at < len(content):
        operation = reader.byte()
        if operation >= special:
            advance, ahead = divmod(operation - special, line_range)
            address += advance * step
            line += line_base + ahead
            yield from row()
        elif operation == 0:
            length = reader.unsigned()
            end = reader.at + length
            extended = reader.fixed("<B")
            if extended == _ADVANCE_TO_SEQUENCE_END:
                yield address, ""
                address, file, line = 0, 1, 1
            elif extended == _SET_ADDRESS:
                address = reader.fixed("<Q")
            reader.at = end
        elif operation == 1:
            yield from row()
        elif operation == 2:
            address += reader.unsigned() * step
        elif operation == 3:
            line += reader.signed()
        elif operation == 4:
            file = reader.unsigned()
        elif operation == 8:
            address += (255 - special) // line_range * step
        elif operation == 9:
            address += reader.fixed("<H")
        else:
            for _ in range(lengths[operation]):
                reader.unsigned()
