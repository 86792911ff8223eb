"""Kernels as assembly of gfx1030, a GPU of 32 lanes per simdgroup that stock LLVM compiles for."""

from __future__ import annotations

import hashlib
import os
from math import prod
from pathlib import Path

from ..entry import BUILTINS, Slots, kernel_of, within
from ..launch import LaunchLike
from ..library import METAL, SEMANTICS, preprocess, source_path, syntax_flags
from ..rewrite import Unit, rewrite
from ..toolchain import CACHE, INCLUDE, OVERLAY, CompileError, gpu_compiler
from .program import Program, parse

OWN = Path(__file__).resolve().parent  # and in include/ its <metal_stdlib>
SYMBOL = "counted"
REGISTERS_OF_A_CORE = (208 << 10) // 4  # of M1 and M2, 32 bits each, for all threads
MOST_REGISTERS = 128  # of one thread
LEAST_LIMIT = 64  # this compiler heeds no lower one

_OPTIONS = (
    *("-O3", "-S", "-mcumode", "-g1", "-fdebug-compilation-dir=.", "-ffp-contract=off"),
    *("-Xclang", "-fdenormal-fp-math-f32=preserve-sign"),
    # Metal's compiler inlines everything.
    *("-mllvm", "-amdgpu-function-calls=0", "-mllvm", "-amdgpu-early-inline-all"),
    # Not what only this GPU has: bytes of registers as operands, values of other lanes as
    # operands, and one atomic for all lanes.
    *("-mllvm", "-amdgpu-sdwa-peephole=0", "-mllvm", "-amdgpu-dpp-combine=0"),
    *("-mllvm", "-amdgpu-atomic-optimizer-strategy=None"),
)


def assembly(launch: LaunchLike) -> str:
    """A launch's kernel, compiled with its function constants.

    Raises:
        RuntimeError: The compiler is not installed.
        CompileError: The source is no valid Metal.
    """
    unit = rewrite(preprocess(source_path(launch.library), [OVERLAY, METAL]), launch.constants)
    if unit.mistakes:
        raise CompileError("\n".join(unit.mistakes))
    text = f"#include <metal_stdlib>\n{unit.text}{_entry(unit, launch)}"
    digest = hashlib.sha256(text.encode())
    for path in sorted([*(OWN / "include").iterdir(), *INCLUDE.rglob("*.h"), OWN / "compile.py"]):
        digest.update(path.read_bytes())
    digest.update(gpu_compiler().identity.encode())
    target = CACHE / f"gfx1030-{digest.hexdigest()[:32]}.s"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        written = target.with_suffix(f".{os.getpid()}.cpp")
        unfinished = target.with_suffix(f".{os.getpid()}.s")
        written.write_text(text)
        try:
            own = [*gpu_compiler().options, "-isystem", str(OWN / "include"), *_OPTIONS]
            files = [str(written), "-o", str(unfinished)]
            gpu_compiler().call([*own, *syntax_flags(), *SEMANTICS, *files])
            os.replace(unfinished, target)
        finally:
            written.unlink()
    return target.read_text()


def program_of(launch: LaunchLike) -> Program:
    """A launch's kernel, compiled and read; see `assembly` for the errors."""
    return parse(assembly(launch))


def registers_of(threads: int) -> int:
    """How many of 32 bits M1 has for each thread of such a threadgroup."""
    return min(MOST_REGISTERS, REGISTERS_OF_A_CORE // threads // 4 * 4)


def _entry(unit: Unit, launch: LaunchLike) -> str:
    """The kernel's entry point: buffers that share no bytes, as Metal's compiler takes them."""
    target, name = kernel_of(unit, launch.kernel)
    slots = Slots(unit.kernels[name])
    given, passed = {}, []
    for i, parameter in enumerate(unit.kernels[name]):
        kind = f"typename msl_entry::parameter<counted_type, {i}>::type"
        builtin = next((a for a in parameter.attributes if a in BUILTINS), None)
        if builtin:
            passed.append(f"msl_entry::builtin<counted_type, {i}>({BUILTINS[builtin]})")
        elif "threadgroup" in parameter.attributes:
            passed.append(f"({kind})memory_{parameter.attributes['threadgroup']}")
        else:
            slot = slots.buffer_slot(parameter)
            pointer = f"metal::msl_pointer<{kind}>"
            if slot < len(launch.buffers):
                given[slot] = f"{pointer} __restrict b{slot}"
            value = f"b{slot}" if slot in given else f"({pointer})nullptr"
            passed.append(f"{'*' if '&' in parameter.text else ''}{value}")
    buffers = "".join(f"{given[slot]}, " for slot in sorted(given))
    # Its size is not the compiler's business: it would plan for the few threadgroups that fit.
    begins, end = [], 0
    for index, size in launch.threadgroup_memory:
        begins.append(f"#define memory_{index} (threadgroup_memory + {end})\n")
        end += (size + 15) // 16
    memory = "extern threadgroup uint4 threadgroup_memory[];\n" + "".join(begins)
    threads = unit.threads.get(name) or prod(launch.threadgroup)
    code = (
        f'\n#line 1 "entry point"\nusing counted_type = decltype({target});\n{memory}'
        f'extern "C" __attribute__((visibility("default"), amdgpu_kernel, '
        f"amdgpu_flat_work_group_size(32, {threads}), "
        f"amdgpu_num_vgpr({max(LEAST_LIMIT, registers_of(threads))}))) void\n"
        f"{SYMBOL}({buffers}msl_dispatch dispatch) {{\n"
        f"  msl_context context = msl_here(dispatch), *t = &context;\n"
        f"  {target}({', '.join(passed)});\n}}\n"
    )
    return within(unit.namespaces[name], code)
