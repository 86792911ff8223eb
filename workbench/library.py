"""Compiled kernels: one object per kernel, function constants and options; cached by content."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import native
from .entry import SYMBOL, entry_point
from .lines import LineTable
from .rewrite import rewrite
from .toolchain import CACHE, INCLUDE, OVERLAY, SHARED, CompileError, compiler, own_digest

METAL = Path(__file__).resolve().parents[1] / "metal"

LANGUAGE = (
    *("-x", "c++", "-std=c++17", "-nostdinc", "-isystem", str(INCLUDE)),
    *("-D__METAL__=1", "-D__METAL_VERSION__=320", "-D__HAVE_BFLOAT__=1"),
)
ADDRESS_SPACES = (
    "-Ddevice=__attribute__((opencl_global))",
    "-Dconstant=const __attribute__((opencl_constant))",
    "-Dthreadgroup=__attribute__((opencl_local))",
    "-Dthread=",
)
# As Metal computes: single-precision literals, half and bfloat rounded after every operation,
# and simd functions that stay in the branch they are written in.
SEMANTICS = (
    *("-fno-math-errno", "-fno-strict-aliasing", "-fno-threadsafe-statics", "-fno-finite-loops"),
    "-fno-stack-protector",
    *("-Xclang", "-fconvergent-functions", "-Xclang", "-cl-single-precision-constant"),
    *("-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none"),
)
# No array whose length is no constant, no conversion of vectors unasked; the rest of the warnings
# is about Metal's way of writing.
WARNINGS = (
    *("-Werror=vla", "-flax-vector-conversions=none"),
    *("-Wno-unknown-attributes", "-Wno-ignored-attributes", "-Wno-unknown-pragmas"),
    *("-Wno-pass-failed", "-Wno-duplicate-decl-specifier", "-Wno-unused-command-line-argument"),
)
_FAST = ("-O2",)
# Every access calls a hook of the runtime, with the accesses as they are written: no
# vectoriser joins them, only the optimiser's plain removal of double loads.
_CHECKED = (
    *(
        "-DWORKBENCH_CHECKED",
        "-O1",
        "-fno-vectorize",
        "-fno-slp-vectorize",
        "-ftrivial-auto-var-init=pattern",
    ),
    *("-fsanitize=kernel-address", "-fsanitize-coverage=trace-pc"),
    *("-mllvm", "-asan-instrumentation-with-call-threshold=0"),
    *("-mllvm", "-asan-stack=0", "-mllvm", "-asan-globals=0", "-mllvm", "-asan-opt=0"),
    *("-mllvm", "-asan-kernel-mem-intrinsic-prefix=1", "-mllvm", "-disable-vector-combine"),
)
_INCLUDED = re.compile(rb'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


@dataclass
class Kernel:
    """A compiled kernel, loaded."""

    name: str
    entry: int  # address of its entry point
    buffers: dict[int, str]  # index -> name
    optional: list[int]  # those that some launches do not have
    threadgroup: dict[int, str]
    threads: int  # most of a threadgroup, as the kernel says; 0 where it does not
    lines: LineTable
    _object: ctypes.CDLL


_loaded: dict[object, Kernel] = {}


def load(
    library: str,
    kernel: str,
    constants: Mapping[int, bool | int | float],
    *,
    checked: bool,
    contract: str = "off",
    include: Sequence[str | Path] = (),
) -> Kernel:
    """Compile a kernel, unless an object of the same content is cached, and load it.

    Raises:
        ValueError: The library or the kernel does not exist, or a function constant that the
            kernel uses has no value.
        CompileError: The source is no valid Metal.
    """
    key = (library, kernel, tuple(constants.items()), checked, contract, tuple(include))
    found = _loaded.get(key)
    if found is None:
        found = _loaded[key] = _load(library, kernel, constants, checked, contract, include)
    return found


def source_path(library: str) -> Path:
    """The file of a library: metal/NAME.metal, or the path given."""
    path = Path(library) if library.endswith(".metal") else METAL / f"{library}.metal"
    if not path.is_file():
        raise ValueError(f"[workbench] library must be a file of metal/ but got {library}.")
    return path.resolve()


def _load(
    library: str,
    kernel: str,
    constants: Mapping[int, bool | int | float],
    checked: bool,
    contract: str,
    include: Sequence[str | Path],
) -> Kernel:
    if contract not in ("off", "fast"):
        raise ValueError(f"[workbench] contract must be off or fast but got {contract}.")
    source = source_path(library)
    folders = [Path(folder).resolve() for folder in (OVERLAY, *include, METAL)]
    options = [*(_CHECKED if checked else _FAST), f"-ffp-contract={contract}"]
    path = _compile(source, kernel, constants, folders, options)
    about = json.loads(path.with_suffix(".json").read_text())
    native.load()
    try:
        handle = ctypes.CDLL(str(path))
    except OSError as error:
        missing = re.search(r"msl_missing_(\d+)_(\w+)", str(error))
        if not missing:
            raise
        raise ValueError(
            f"[workbench] {kernel} must be given function constant {missing[1]} ({missing[2]})."
        ) from None
    return Kernel(
        name=kernel,
        entry=ctypes.cast(getattr(handle, SYMBOL), ctypes.c_void_p).value or 0,
        buffers={int(i): name for i, name in about["buffers"].items()},
        optional=about["optional"],
        threadgroup={int(i): name for i, name in about["threadgroup"].items()},
        threads=about["threads"],
        lines=LineTable(path, native.load_address(handle)),
        _object=handle,
    )


def _compile(
    source: Path,
    kernel: str,
    constants: Mapping[int, bool | int | float],
    folders: Sequence[Path],
    options: Sequence[str],
) -> Path:
    """The shared object of a kernel, compiled if it is not cached."""
    read = hashlib.sha256()
    for path, content in _closure(source, folders).items():
        read.update(f"{path}\0{len(content)}\0".encode() + content)
    digest_of_source = read.hexdigest()
    request = [own_digest(), kernel, sorted(constants.items()), *options, digest_of_source]
    digest = hashlib.sha256(repr([*request, [str(f) for f in folders]]).encode())
    target = CACHE / f"{digest.hexdigest()[:32]}.so"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    unit = rewrite(_preprocessed(source, tuple(folders), digest_of_source), constants)
    if unit.mistakes:
        raise CompileError("\n".join(unit.mistakes))
    entry = entry_point(unit, kernel)
    flags = [*syntax_flags(), *SEMANTICS, *options]
    about = {
        "source": str(source),
        "kernel": kernel,
        "buffers": entry.buffers,
        "optional": entry.optional,
        "threadgroup": entry.threadgroup,
        "threads": entry.threads,
    }
    # The object comes last and whole: where it exists, the rest does.
    unfinished = target.with_suffix(f".{os.getpid()}.json")
    unfinished.write_text(json.dumps(about))
    os.replace(unfinished, target.with_suffix(".json"))
    written = target.with_suffix(f".{os.getpid()}.cpp")
    written.write_text(f"#include <metal_stdlib>\n{unit.text}{entry.code}")
    try:
        compiler().build([written], target, ["-include-pch", str(_standard(tuple(flags))), *flags])
    finally:
        written.unlink()
    return target


@functools.cache
def _standard(flags: tuple[str, ...]) -> Path:
    """<metal_stdlib> as the compiler holds it with these flags: read once, not in every kernel."""
    key = hashlib.sha256(repr([own_digest(), flags]).encode()).hexdigest()
    target = CACHE / f"standard-{key[:20]}.pch"
    if not target.exists():
        unfinished = target.with_suffix(f".{os.getpid()}.pch")
        # Known by content: without the time of a file that a new checkout has touched
        header = [
            "-x",
            "c++-header",
            "-Xclang",
            "-fno-pch-timestamp",
            str(INCLUDE / "metal_stdlib"),
        ]
        call = [*compiler().options, *SHARED, *flags, *header, "-o", str(unfinished)]
        compiler().call(call)
        os.replace(unfinished, target)
    return target


@functools.lru_cache(maxsize=16)
def _preprocessed(source: Path, folders: tuple[Path, ...], digest: str) -> str:
    """A kernel's file for all of its variants; `digest` is that of what it includes."""
    return preprocess(source, folders)


def syntax_flags() -> list[str]:
    """What the compiler must be told to understand a rewritten kernel."""
    return [*LANGUAGE, *ADDRESS_SPACES, *WARNINGS]


def preprocess(source: Path, folders: Sequence[Path]) -> str:
    """A kernel's file with its own includes, but without <metal_stdlib>."""
    included = [f"-I{folder}" for folder in folders]
    first_pass = [*LANGUAGE, "-DWORKBENCH_FIRST_PASS", *included, str(source)]
    return compiler().call([*compiler().options, "-E", *first_pass])


def _closure(source: Path, folders: Sequence[Path]) -> dict[Path, bytes]:
    """The file and all it includes by name in quotes, taken or not."""
    found: dict[Path, bytes] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = path.read_bytes()
        for name in _INCLUDED.findall(found[path]):
            for folder in (path.parent, *folders):
                candidate = folder / name.decode()
                if candidate.is_file():
                    waiting.append(candidate)
                    break
    return found
