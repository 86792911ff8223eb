"""Code addresses to lines of the kernel, from real objects."""

import os

import pytest
from snippets import source
from test_mlx_kernels import CASES, INCLUDE, built

from workbench import library

INLINED = """#include <metal_stdlib>
using namespace metal;
inline float helper(const device float* a, uint i) {
  return a[i];
}
kernel void k(const device float* a [[buffer(0)]], device float* o [[buffer(1)]],
    uint i [[thread_position_in_grid]]) {
  float x = helper(a, i);
  o[i] = simd_sum(x);
}
"""


def rows(kernel):
    return [where for _, where in kernel.lines._rows]


def test_inlined_helpers_have_their_own_lines_and_the_library_its_callers():
    path = source(INLINED)
    kernel = library.load(path, "k", {}, checked=True)
    found = {where.rpartition(":")[2] for where in rows(kernel) if where.startswith(path)}
    assert {"4", "9"} <= found <= {"4", "6", "7", "8", "9", "10"}
    assert not any("include/msl" in where for where in rows(kernel))


def test_addresses(monkeypatch, tmp_path):
    path = source(INLINED)
    kernel = library.load(path, "k", {}, checked=True)
    table = kernel.lines
    assert table.where(0) == ""
    assert table.where(table.base) == ""  # before all code
    ends = [(a, where) for a, where in table._rows if where.endswith(":9")]
    # Return addresses lie behind the call that they belong to.
    assert table.where(table.base + ends[-1][0] + 1).endswith(".metal:9")
    monkeypatch.chdir(tmp_path)
    assert table.where(table.base + ends[-1][0] + 1) == f"{path}:9"
    monkeypatch.chdir(os.path.dirname(path))
    assert table.where(table.base + ends[-1][0] + 1) == f"{os.path.basename(path)}:9"


@pytest.mark.parametrize("name", ["gemm", "attention"])
def test_code_of_no_line_counts_to_a_line(name):
    launch, _, _ = built(CASES[name])
    kernel = library.load(
        launch.library, launch.kernel, launch.constants, checked=True, include=[INCLUDE]
    )
    assert len(rows(kernel)) > 100
    assert not any(where.endswith(":0") for where in rows(kernel))
