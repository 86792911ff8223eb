"""`.ci/structure.py`: what it counts, on a package made for it."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).parents[2] / ".ci/structure.py"
FILES = {
    "pyengine/__init__.py": "from pyengine import _ext\nfrom pyengine.a import f\n",
    "pyengine/a.py": "from __future__ import annotations\nfrom pyengine import b\n\n"
    "def f():\n    return b.g() + b.g()\n",
    "pyengine/b.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
    "    from pyengine import a\nfrom . import c\n\ndef g():\n    return c.h()\n",
    "pyengine/c.py": "def h():\n    from pyengine import a\n    return 1\n",
    "pyengine/ops/__init__.py": '__all__ = ["one", "one_reference", "two", "two_reference"]\n',
    "pyengine/ops/one.py": "def one_reference():\n    return 1\n",
    "pyengine/ops/two.py": "def two_reference():\n    return 2\n",
    "csrc/bindings.cpp": "bind_one(m);\nbind_two(m);\n",
    "csrc/ops/one.cpp": "struct One {};\n\n",
    "metal/one.metal": "// one\n",
    "metal/workbench/run.h": "// not the product's\n",
    "README.md": "Ops: `one`.\n",
    "docs/ops.md": "Generated. one two\n",
}


@pytest.fixture
def structure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("structure", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_lines(structure: ModuleType, tree: Path) -> None:
    sizes = structure.lines(tree)
    assert sizes == {"python": 22, "csrc": 4, "metal": 1, "product": 27}


def test_cycles_are_those_of_the_heads_of_modules(structure: ModuleType, tree: Path) -> None:
    imports = structure.module_imports(tree)
    assert imports["pyengine"] == {"pyengine.a"}  # the extension is none of ours
    assert imports["pyengine.b"] == {"pyengine.a", "pyengine.c"}
    assert imports["pyengine.c"] == set()
    assert structure.cycles(imports) == [["pyengine.a", "pyengine.b"]]


def test_places_are_files_of_the_op_and_lists_of_ops(structure: ModuleType, tree: Path) -> None:
    places = structure.places(tree)
    lists = ["csrc/bindings.cpp", "pyengine/ops/__init__.py"]
    own = ["csrc/ops/one.cpp", "metal/one.metal", "pyengine/ops/one.py"]
    assert sorted(places["one"]) == sorted(own + lists)
    assert sorted(places["two"]) == [*lists, "pyengine/ops/two.py"]


def test_an_op_is_its_own_files_in_six_places(structure: ModuleType) -> None:
    """Those that CONTRIBUTING lists, and tests of Metal for it alone; no other file names it."""
    root = SOURCE.parents[1]
    table = (root / "CONTRIBUTING.md").read_text().partition("## Add an op: six places")[2]
    cells = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    assert len(cells) == 6
    files = {file for cell in cells for file in re.findall(r"`([^`]+)`", cell)}
    files |= {file.replace("{h,cpp}", end) for file in files for end in ("h", "cpp")}
    files.add("tests/metal/test_metal_X.py")
    for op, found in structure.places(root).items():
        assert set(found) <= {re.sub(r"\bX|(?<=_)X\b", op, file) for file in files}, op


def test_crossings_are_calls_in_a_row_in_different_files(structure: ModuleType) -> None:
    way = structure.Way(Path("/package"))
    names = ["/package/a", "/package/a", "/package/b", "/other/a", "/package/b", "/package/a"]
    codes = [compile("0", f"{name}.py", "exec") for name in names]
    sys.setprofile(way)
    try:
        for code in codes:
            exec(code)
    finally:
        sys.setprofile(None)
    assert way.files == [f"/package/{name}.py" for name in "aabba"]
    assert way.crossings == 2
