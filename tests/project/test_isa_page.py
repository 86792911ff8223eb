"""docs/isa.md is what `.ci/isa_page.py` writes now: of each op that it must name, and a sample.

`.ci/run` compares all of it.
"""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from pyengine import _ext, ops
from workbench.isa.calls import matmul_calls
from workbench.isa.rows import BITS, ROWS, table

SOURCE = Path(__file__).parents[2] / ".ci/isa_page.py"
SAMPLE = ("quantized_matmul", "dense_matmul", "rms_norm", "weigh_experts")


@pytest.fixture(scope="module")
def written() -> ModuleType:
    spec = importlib.util.spec_from_file_location("isa_page", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_says_what_it_is_not(written: ModuleType) -> None:
    text = written.PAGE.read_text()
    assert text.startswith(written.HEAD) and "not what a Mac does" in " ".join(text.split())


def test_every_op_is_there(written: ModuleType) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d*) \| (\d*) ", written.PAGE.read_text(), re.MULTILINE)
    for op, call in matmul_calls(64).items():
        for b in (16,) if op == "dense_matmul" else BITS:
            taken = {M for M in ROWS if _ext.launches_of(call(M, 256, b))[0]}
            assert taken and {(op, str(b), str(M)) for M in taken} <= set(rows)
    for op in ops.dispatch.OPS:
        assert any(kernel.startswith(op) for kernel, *_ in rows), op


@pytest.mark.parametrize("kernel", SAMPLE)
def test_a_sample_is_current(written: ModuleType, kernel: str) -> None:
    lines = written.PAGE.read_text().splitlines()
    rows = [row for row in table([kernel], [1], [8]) if row.kernel == kernel]
    assert rows and all(written.line(row) in lines for row in rows)
