"""Which compiler is taken, what is said when there is none, and what is cached."""

import importlib.util
import shutil
import subprocess
import sys

import numpy as np
import pytest
from snippets import launch

import workbench
from workbench import library, native, toolchain

BODY = """threadgroup float t[64];
t[l] = a[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
o[i] = simd_sum(half(t[63 - l])) + float(bfloat(n)) + exp(a[0]);"""


def test_a_compiler_is_there():
    # The test extra brings one, so this fails, with both ways out, rather than skips.
    assert toolchain.find_compiler().command


def test_without_a_compiler_both_ways_out_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError) as refused:
        toolchain.find_compiler()
    assert "apt install clang-19" in str(refused.value)
    assert "pip install ziglang" in str(refused.value)


def test_other_machines_are_refused(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(RuntimeError, match=r"runs on x86-64 Linux but this is Darwin arm64\."):
        toolchain.find_compiler()


@pytest.mark.parametrize(("version", "taken"), [("16.0.6", False), ("17.0.0", True)])
def test_clang_before_17_is_passed_over(monkeypatch, tmp_path, version, taken):
    script = tmp_path / "clang++"
    script.write_text(f"#!/bin/sh\necho Debian clang version {version}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    if taken:
        assert toolchain.find_compiler().command == (str(script),)
    else:
        with pytest.raises(RuntimeError, match="found none"):
            toolchain.find_compiler()


def test_the_highest_versioned_clang_is_taken(monkeypatch, tmp_path):
    for version in (18, 21):
        script = tmp_path / f"clang++-{version}"
        script.write_text(f"#!/bin/sh\necho clang version {version}.1.0\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.find_compiler().command == (str(tmp_path / "clang++-21"),)


@pytest.fixture(params=["clang", "zig"])
def each_compiler(request, monkeypatch):
    """The whole workbench with one compiler, in a process of its own where needed."""
    if request.param == "clang" and not any(
        shutil.which(name) for name in ["clang++", *(f"clang++-{v}" for v in range(17, 31))]
    ):
        pytest.skip("no clang here; ziglang's is tested")
    return request.param


def test_both_compilers_run_and_check_kernels(each_compiler, tmp_path):
    script = tmp_path / "both.py"
    script.write_text(
        f"""
import shutil, sys
sys.path += {[str(library.METAL.parent), str(library.METAL.parent / "tests" / "workbench")]}
if {each_compiler == "zig"}:
    shutil.which = lambda name: None
import numpy as np
from snippets import run
from workbench import library, strict, toolchain
for mode in ("fast", "check", "count"):
    outputs, report = run({BODY!r}, mode=mode)
    assert report.findings == []
    print(outputs["o"].tobytes().hex())
_, report = run("float x = 1;\\no[i] = a[i + 1] + x;")
assert strict.problems(library.METAL / "softcap.metal") == ""
print(report.findings[0].where.split(":")[-1], report.findings[0].offset)
print("zig" if "zig" in toolchain.compiler().identity else "clang", file=sys.stderr)
"""
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    a = np.arange(64, dtype=np.float32)
    sums = np.repeat(a[::-1].reshape(2, 32).sum(1), 32)
    right = (sums + 64 + 1).astype(np.float32).tobytes().hex()
    assert done.stdout.split("\n")[:4] == [right] * 3 + ["10 256"]
    assert done.stderr.strip().endswith(each_compiler)


def test_objects_are_cached_in_process_and_by_content(monkeypatch, tmp_path):
    compiled = []
    build = toolchain.Compiler.build
    monkeypatch.setattr(
        toolchain.Compiler, "build", lambda *given: compiled.append(given) or build(*given)
    )
    monkeypatch.setattr(library, "CACHE", tmp_path)
    monkeypatch.setattr(library, "_loaded", {})
    one = launch("o[i] = a[i] * 3;")
    a = np.ones(64, np.float32)

    def compilations():
        workbench.run(one, {"a": a})
        return len(compiled)

    assert compilations() == 1
    assert compilations() == 1  # the loaded kernel
    library._loaded.clear()
    assert compilations() == 1  # the object on disk
    library._loaded.clear()
    monkeypatch.setattr(library, "own_digest", lambda: "another workbench")
    assert compilations() == 2


def test_a_changed_include_is_a_new_object(tmp_path):
    header = tmp_path / "factor.h"
    kernel = tmp_path / "k.metal"
    kernel.write_text(
        '#include "factor.h"\n#include <metal_stdlib>\nkernel void k(device int* o [[buffer(0)]],'
        " uint i [[thread_position_in_grid]]) { o[i] = FACTOR * i; }"
    )
    buffer = workbench.Buffer("o", "out", (4,), "int32")
    one = workbench.Launch(str(kernel), "k", (1, 1, 1), (4, 1, 1), (buffer,))
    for factor in (2, 3):
        header.write_text(f"#define FACTOR {factor}\n")
        library._loaded.clear()
        outputs, _ = workbench.run(one, {})
        assert list(outputs["o"]) == [0, factor, 2 * factor, 3 * factor]


def test_the_runtime_says_where_objects_lie():
    kernel = library.load(launch("o[i] = 0;").library, "k", {}, checked=True)
    assert kernel.lines.base < kernel.entry < kernel.lines.end
    assert native.load() is native.load()
