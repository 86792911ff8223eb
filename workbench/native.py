"""The compiled runtime (runtime/*.cpp), as Python sees it."""

from __future__ import annotations

import ctypes
import functools

from .toolchain import runtime_object

MAX_SLOTS = 64  # buffers, then threadgroup arguments

_u32, _u64, _pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p


class LaunchStruct(ctypes.Structure):
    """workbench::Launch"""

    _fields_ = (
        ("grid", _u32 * 3),
        ("group", _u32 * 3),
        ("entry", _pointer),
        ("buffers", _pointer),
        ("code_begin", _u64),
        ("code_end", _u64),
        ("step_limit", _u64),
        ("threadgroup_limit", _u32),
        ("order", _u32),
        ("seed", _u32),
        ("checks", _u32),
        ("counts", _u32),
    )


class FindingStruct(ctypes.Structure):
    """workbench::Finding"""

    _fields_ = (
        ("kind", _u32),
        ("group", _u32),
        ("thread", _u32),
        ("other_group", _u32),
        ("other_thread", _u32),
        ("size", _u32),
        ("site", _u64),
        ("other_site", _u64),
        ("offset", ctypes.c_int64),
        ("region", _u32),
        ("times", _u32),
        ("text", ctypes.c_char * 160),
    )


TOTALS = (
    *("reads", "writes", "atomics", "read_bytes", "written_bytes"),
    *("simd_reads", "simd_writes", "read_sectors", "written_sectors"),
    *("read_lines", "written_lines", "group_read_sectors", "group_written_sectors"),
    *("distinct_read_sectors", "distinct_written_sectors"),
)


class TotalsStruct(ctypes.Structure):
    """workbench::Totals"""

    _fields_ = tuple((name, _u64) for name in TOTALS)


class SiteStruct(ctypes.Structure):
    """workbench::SiteTotals"""

    _fields_ = (
        *((name, _u64) for name in ("site", "accesses", "sectors", "lines", "bytes", "lanes")),
        ("region", _u32),
        ("write", _u32),
    )


class _LinkMap(ctypes.Structure):
    """The start of the dynamic linker's struct link_map."""

    _fields_ = (("address", _u64),)


@functools.cache
def load() -> ctypes.CDLL:
    """Build the runtime if need be, and load it for the kernels to find."""
    for name in ("libm.so.6", "libc.so.6"):  # kernels call exp and the like without naming libm
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(runtime_object()), mode=ctypes.RTLD_GLOBAL)

    def declare(name: str, result: object, *arguments: object) -> None:
        function = getattr(library, f"workbench_{name}")
        function.restype, function.argtypes = result, arguments

    declare("begin", None, ctypes.POINTER(LaunchStruct))
    declare("run", _u32)
    declare("new_buffer", _pointer, _u32, _u64, ctypes.c_char_p, _u32, _u32, _u32, _u32)
    declare("free_buffer", None, _u32)
    declare("threadgroup_buffer", _pointer, _u64, ctypes.c_char_p)
    declare("threadgroup_bytes", _u64)
    declare("findings", ctypes.POINTER(FindingStruct))
    declare("region_name", ctypes.c_char_p, _u32)
    declare("totals", ctypes.POINTER(TotalsStruct), _u32)
    declare("sites", ctypes.POINTER(SiteStruct), ctypes.POINTER(_u32))
    return library


def load_address(library: ctypes.CDLL) -> int:
    """Where a loaded object lies."""
    link_map = ctypes.cast(library._handle, ctypes.POINTER(_LinkMap))
    return int(link_map.contents.address)
