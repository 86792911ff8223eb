"""Check what a macOS extension linked on Linux asks of a Mac.

    check_symbols.py EXTENSION.so LIBMLX.dylib CPYTHON.sym

Every undefined symbol must be one of libmlx.dylib's own exports, one that the linker found in the
system libraries, or one of CPython's (nanobind's list of `-U _PyX` lines). A linker told to look
names up at run time accepts any name; this is where a wrong one is caught.
"""

from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

MAGIC, ARM64 = 0xFEEDFACF, 0x0100000C
LOAD_DYLIB = (0xC, 0x80000018, 0x8000001F, 0x20)  # plain, weak, re-exported, lazy
LOAD_RPATH, SYMTAB = 0x8000001C, 0x2
STAB, PRIVATE, TYPE, EXTERNAL = 0xE0, 0x10, 0x0E, 0x01  # bits of a symbol's type
RUN_TIME_LOOKUP = (0, 0xFE)  # library ordinals: zig's linker and Apple's


@dataclass
class MachO:
    libraries: list[str] = field(default_factory=list)
    rpaths: list[str] = field(default_factory=list)
    undefined: list[tuple[str, int]] = field(default_factory=list)  # name, library ordinal
    exported: set[str] = field(default_factory=set)


def read(path: Path) -> MachO:
    data = path.read_bytes()
    magic, cpu, _, _, commands = struct.unpack_from("<5I", data)
    if (magic, cpu) != (MAGIC, ARM64):
        sys.exit(f"{path} must be a 64-bit arm64 Mach-O but is not.")
    out = MachO()
    at = 32
    for _ in range(commands):
        command, size = struct.unpack_from("<2I", data, at)
        if command in LOAD_DYLIB:
            out.libraries.append(_string(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command == LOAD_RPATH:
            out.rpaths.append(_string(data, at + struct.unpack_from("<I", data, at + 8)[0]))
        elif command == SYMTAB:
            _read_symbols(data, struct.unpack_from("<4I", data, at + 8), out)
        at += size
    return out


def _read_symbols(data: bytes, table: tuple[int, ...], out: MachO) -> None:
    symbols, count, strings, _ = table
    for i in range(count):
        name_at, kind, _, flags, value = struct.unpack_from("<IBBHQ", data, symbols + 16 * i)
        if kind & STAB or not kind & EXTERNAL:
            continue
        name = _string(data, strings + name_at)
        if kind & TYPE:
            if not kind & PRIVATE:
                out.exported.add(name)
        elif value == 0:
            out.undefined.append((name, flags >> 8))


def _string(data: bytes, at: int) -> str:
    return data[at : data.index(b"\0", at)].decode()


def problems(extension: MachO, libmlx: MachO, cpython: set[str]) -> list[tuple[str, str]]:
    """Each wrong name and what is wrong with it."""
    bad = []
    for name, ordinal in extension.undefined:
        if ordinal in RUN_TIME_LOOKUP:
            if name not in cpython and name not in libmlx.exported:
                bad.append((name, "neither CPython nor libmlx has it"))
        elif ordinal > len(extension.libraries):
            bad.append((name, f"is bound to no library ({ordinal})"))
        elif "libmlx" in extension.libraries[ordinal - 1] and name not in libmlx.exported:
            bad.append((name, "libmlx does not export it"))
    if not any("libmlx" in name for name in extension.libraries):
        bad.append(("libmlx.dylib", "is not among the libraries to load"))
    if "@loader_path/../mlx/lib" not in extension.rpaths:
        bad.append(("@loader_path/../mlx/lib", f"is not the rpath but {extension.rpaths}"))
    if "_PyInit__ext" not in extension.exported:
        bad.append(("_PyInit__ext", "is not exported"))
    return bad


def main(extension_path: Path, libmlx_path: Path, cpython_path: Path) -> int:
    extension, libmlx = read(extension_path), read(libmlx_path)
    lines = cpython_path.read_text().splitlines()
    cpython = {line.split()[1] for line in lines if line.startswith("-U")}
    bad = problems(extension, libmlx, cpython)
    for name, reason in bad:
        readable = subprocess.run(["c++filt", "-_", name], capture_output=True, text=True).stdout
        print(f"{readable.strip() or name}: {reason}")
    print(f"{len(extension.undefined)} undefined symbols, {len(bad)} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*(Path(name) for name in sys.argv[1:4])))
