"""`import pyengine`: cheap, no hook of the host program replaced, and every name the right one."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pyengine

HERE = Path(__file__).parent  # not the checkout, whose package is not built in place
HEAVY = {"jinja2", "mlx", "numpy", "rich", "sentencepiece", "tokenizers", "typer"}


def python(source: str, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, *options, source], capture_output=True, text=True, timeout=60, cwd=HERE
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("use", "allowed"), [("", set()), ("pyengine.generate; pyengine.load", {"jinja2", "mlx"})]
)
def test_the_import_brings_little(use: str, allowed: set[str]) -> None:
    """NumPy and the tokenizers cost more processor time than all of pyengine's modules."""
    told = python(f"import sys, pyengine; {use}\nprint(sorted(sys.modules))", "-c")
    assert HEAVY.intersection(ast.literal_eval(told)) == allowed


HOOKS = """
import signal, sys, threading
hooks = lambda: [sys.excepthook, sys.unraisablehook, sys.displayhook, threading.excepthook,
    *(signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE))]
before = hooks()
import pyengine
pyengine.generate, pyengine.load, pyengine.ops
print(hooks() == before)
"""


@pytest.mark.parametrize("name", ["pyengine", "app.py"])
def test_the_host_program_keeps_its_hooks(tmp_path: Path, name: str) -> None:
    """Whatever it is called, and as a module, when argv[0] is -m during the imports."""
    (tmp_path / name).write_text(HOOKS)
    assert python(str(tmp_path / name)) == "True"
    early = "import sys; sys.argv[0] = '-m'"
    (tmp_path / name).write_text(f"{early}\n{HOOKS}")
    assert python(str(tmp_path / name)) == "True"


def test_no_name_is_a_submodule_too() -> None:
    """The import of one would put the module in the name's place."""
    modules = {module.name for module in pkgutil.iter_modules(pyengine.__path__)}
    assert modules & set(pyengine.__all__) == {"ops"}
    assert "generation" in modules


EVERY = """
import pyengine
for module in {modules}: __import__(module)
modules = [name for name in pyengine.__all__ if type(getattr(pyengine, name)) is type(pyengine)]
print(modules, callable(pyengine.generate))
"""


@pytest.mark.parametrize("first", [True, False])
def test_a_name_is_the_same_whatever_was_imported_before(first: bool) -> None:
    modules = ["pyengine.generation", "pyengine.chat", "pyengine.bench.suite", "pyengine.ops"]
    names = "pyengine.generate, pyengine.stream, pyengine.load" if first else ""
    source = EVERY.replace("import pyengine\n", f"import pyengine\n{names}\n")
    assert python(source.format(modules=modules), "-c") == "['ops'] True"


def typed_homes() -> dict[str, str]:
    """Name -> module, as type checkers read it."""
    tree = ast.parse(Path(pyengine.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    return {
        name.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }


def test_names_are_what_type_checkers_take_them_for() -> None:
    homes = typed_homes()
    assert sorted(homes) == pyengine.__all__ and homes.pop("ops") == "pyengine"
    for name, module in homes.items():
        assert getattr(pyengine, name) is getattr(importlib.import_module(module), name), name
    assert isinstance(pyengine.ops, ModuleType)


def test_names_are_listed_and_others_refused() -> None:
    assert {*pyengine.__all__, "__version__"} <= set(dir(pyengine))
    listed = python("import pyengine; print(dir(pyengine))", "-c")
    assert set(pyengine.__all__) <= set(ast.literal_eval(listed))
    with pytest.raises(AttributeError, match="module 'pyengine' has no attribute 'generat'"):
        pyengine.generat  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Sampler' from 'pyengine'"):
        from pyengine import Sampler  # type: ignore[attr-defined]  # noqa: F401
