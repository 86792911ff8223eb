"""What `.ci/ops_page.py` writes is what the ops' own files say now."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from pyengine import ops

SOURCE = Path(__file__).parents[2] / ".ci/ops_page.py"


@pytest.fixture(scope="module")
def written() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ops_page", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_head_of_the_package(written: ModuleType) -> None:
    """An op that is not imported there would be none."""
    assert tuple(written.op_names()) == ops.dispatch.OPS
    assert written.package() == written.PACKAGE.read_text()


@pytest.mark.slow  # counts in the workbench, where it may compile every kernel
def test_the_page_of_the_ops(written: ModuleType) -> None:
    assert written.page() == written.PAGE.read_text()


def test_the_sentence_of_what_a_gpu_runs(written: ModuleType) -> None:
    doc = "Adds.\n\nAll; a GPU\nruns wide ``rows`` as plain MLX. No.\n\nArgs:\n    x: a GPU runs."
    assert written.past_limits(doc) == "A GPU runs wide `rows` as plain MLX."
    assert written.past_limits("The same on a GPU too.") == ""
