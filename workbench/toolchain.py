"""The compiler: the system's clang, or the one inside the ziglang package."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
INCLUDE = HERE / "include"
OVERLAY = HERE / "overlay"  # stands in front of a few of MLX's headers
# Objects by content; deleting the directory costs a recompilation and nothing else.
CACHE = HERE.parent / "build" / "workbench"

OLDEST_CLANG = 17  # the first that computes in bfloat16
NEWEST_CLANG = 30  # the highest versioned name that is looked for

MISSING = (
    "[workbench] needs clang 17 or newer to compile kernels, and found none. Install one of:\n"
    "    apt install clang-19\n"
    "    pip install ziglang"
)

SHARED = (
    *("-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    # Absolute paths: who reads them may stand elsewhere than who compiled.
    *("-gdwarf-4", "-g1", "-fdebug-compilation-dir=."),
)

# 32 lanes per simdgroup, as Apple's GPUs have
_GPU_TARGET = ("--target=amdgcn-amd-amdhsa", "-mcpu=gfx1030", "-nogpulib")


class CompileError(RuntimeError):
    """A kernel, or the workbench's own runtime, did not compile."""


@dataclass(frozen=True)
class Compiler:
    """A command that takes clang's options, and what else it needs to be told."""

    command: tuple[str, ...]
    options: tuple[str, ...]
    identity: str

    def call(self, arguments: Sequence[str]) -> str:
        """Run the compiler; returns what it wrote, or raises CompileError with it."""
        zig_cache = str(CACHE / "zig")
        environment = {
            **os.environ,
            "ZIG_GLOBAL_CACHE_DIR": zig_cache,
            "ZIG_LOCAL_CACHE_DIR": zig_cache,
        }
        done = subprocess.run(
            [*self.command, *arguments],
            capture_output=True,
            text=True,
            env=environment,
        )
        if done.returncode:
            raise CompileError(done.stderr or done.stdout)
        return done.stdout or done.stderr

    def build(self, sources: Sequence[Path], target: Path, options: Sequence[str]) -> None:
        """Compile C++ sources into the shared object `target`, which appears when it is whole."""
        objects = []
        try:
            for i, source in enumerate(sources):
                objects.append(target.with_suffix(f".{os.getpid()}.{i}.o"))
                flags = [*self.options, *SHARED, *options]
                self.call([*flags, "-c", str(source), "-o", str(objects[-1])])
            unfinished = target.with_suffix(f".{os.getpid()}.so")
            # No library is named: the process that loads the object has them all.
            names = [str(path) for path in (*objects, "-o", unfinished)]
            self.call([*self.link_options(), "-shared", "-nostdlib", *names])
            os.replace(unfinished, target)
        finally:
            for path in objects:
                path.unlink(missing_ok=True)

    def link_options(self) -> tuple[str, ...]:
        """The options that linking needs too."""
        return tuple(o for o in self.options if not o.startswith("-march"))


def _clang(path: str) -> Compiler | None:
    """The clang at `path`, unless it is too old."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"clang version (\d+)", said)
    if not version or int(version[1]) < OLDEST_CLANG:
        return None
    return Compiler((path,), ("-march=x86-64-v3",), said)


def _zig() -> Compiler | None:
    """The clang inside the ziglang package, if it is installed."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        return None
    zig = Path(spec.submodule_search_locations[0]) / "zig"
    if not zig.exists():
        return None
    version = subprocess.run([zig, "version"], capture_output=True, text=True).stdout
    # zig adds checks of its own to C code unless told not to.
    options = ("-target", "x86_64-linux-gnu", "-mcpu=x86_64_v3", "-fno-sanitize=undefined")
    return Compiler((str(zig), "cc"), options, f"zig {version}")


def find_compiler() -> Compiler:
    """The newest versioned clang, else clang++, else ziglang's.

    Raises:
        RuntimeError: This is no x86-64 Linux, or no compiler is there.
    """
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        machine = f"{platform.system()} {platform.machine()}"
        raise RuntimeError(f"[workbench] runs on x86-64 Linux but this is {machine}.")
    names = [f"clang++-{version}" for version in range(NEWEST_CLANG, OLDEST_CLANG - 1, -1)]
    for name in [*names, "clang++"]:
        path = shutil.which(name)
        compiler = _clang(path) if path else None
        if compiler:
            return compiler
    compiler = _zig()
    if compiler is None:
        raise RuntimeError(MISSING)
    return compiler


compiler = functools.cache(find_compiler)


@functools.cache
def gpu_compiler() -> Compiler:
    """The clang in the ziglang package: never another, so that everyone counts the same.

    Raises:
        RuntimeError: The package is not installed.
    """
    found = _zig()
    if found is None:
        raise RuntimeError("[isa] needs clang's GPU targets: pip install ziglang")
    return Compiler((found.command[0], "clang"), _GPU_TARGET, found.identity)


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256(compiler().identity.encode())
    for path in sorted(p for p in files if p.is_file()):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def own_digest() -> str:
    """A digest of everything here that decides what a compiled kernel looks like."""
    decisive = ("toolchain", "tokens", "rewrite", "entry", "library")
    python = [HERE / f"{name}.py" for name in decisive]
    return _digest([*python, *INCLUDE.rglob("*"), *OVERLAY.rglob("*")])


@functools.cache
def runtime_object() -> Path:
    """The compiled runtime, built if it is not there yet."""
    key = _digest([HERE / "toolchain.py", *(HERE / "runtime").iterdir()])
    target = CACHE / f"runtime-{key[:20]}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        sources = sorted((HERE / "runtime").glob("*.cpp"))
        compiler().build(sources, target, ["-x", "c++", "-std=c++17", "-O2"])
    return target
