"""matmul_kernels.py: kernels are compiled as cmake compiles them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import matmul_kernels

SETS = {
    "portable": [],
    "avx2": ["-mavx2"],
    "avx512": ["-mavx2", "-mavx512f"],
    "vnni": ["-mavx2", "-mavx512f", "-mavx512vnni"],
    "amx": ["-mavx2", "-mavx512f", "-mavx512vnni", "-mamx-int8"],
}


@pytest.mark.parametrize("isa", SETS)
def test_a_set_has_the_flags_of_those_before_it(isa: str) -> None:
    flags = matmul_kernels.flags_of(isa)
    assert all(flag.startswith("-m") for flag in flags)
    assert [flag for flag in flags if flag in SETS["amx"]] == SETS[isa]
