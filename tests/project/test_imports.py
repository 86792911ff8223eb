"""Imports go downwards, from room to room, and never round; what only type checkers read counts.

Read from the source.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "pyengine"
Edges = dict[str, set[str]]  # module -> the modules it imports, both without "pyengine."

# From top to bottom. Rooms on one line do not know each other.
LEVELS = (
    {"__main__"},
    {"cli"},
    {"serve", "bench"},
    {"__init__"},  # the public names
    {"chat", "calibration"},
    {"generation"},
    {"streams"},
    {"task"},
    {"doctor"},
    {"grammar"},
    {"engine"},
    {"checkpoint"},
    {"text"},
    {"drafters"},
    {"sampling"},
    {"ranks"},
    {"model"},
    {"ops"},
    {"base"},
)
LEVEL = {room: number for number, rooms in enumerate(LEVELS) for room in rooms}
# Modules that stand outside a folder of their room
ROOM = {
    "evaluate": "serve",
    **dict.fromkeys(("arguments", "extension", "forked", "mapped", "risk", "untrusted"), "base"),
}
# What lies below and is no business of theirs
APART = {
    "engine": {"text"},  # token ids only
    "grammar": {"engine", "drafters", "sampling", "model", "ops"},  # the same
    "text": {"drafters", "sampling", "model", "ops"},  # no arrays
}


def sources() -> dict[str, str]:
    paths = {path.relative_to(PACKAGE): path for path in PACKAGE.rglob("*.py")}
    return {".".join(name.with_suffix("").parts): path.read_text() for name, path in paths.items()}


def edges_of(texts: dict[str, str]) -> Edges:
    return {name: imports_of(name, text, set(texts)) - {name} for name, text in texts.items()}


def imports_of(module: str, text: str, modules: set[str]) -> set[str]:
    """What its import statements name, wherever they stand; a package is its __init__."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            asked = [name.name.split(".") for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = ["pyengine", *module.split(".")][: -node.level] if node.level else []
            home = [*above, *(node.module or "").split(".")]
            asked = [[*filter(None, home), name.name] for name in node.names]
        else:
            continue
        for package, *path in asked:
            if package == "pyengine" and path != ["_ext"]:
                found.add(longest(path, modules))
    return found


def longest(path: list[str], modules: set[str]) -> str:
    """The module that a dotted name, of a module or of something in one, leads to."""
    for end in range(len(path), -1, -1):
        for name in (".".join(path[:end]), ".".join([*path[:end], "__init__"])):
            if name in modules:
                return name
    raise LookupError(".".join(path))


def room_of(module: str) -> str:
    first = module.split(".")[0]
    return ROOM.get(first, first)


def is_upward(above: str, below: str) -> bool:
    """Whether the first may not import the second."""
    one, other = room_of(above), room_of(below)
    if one == other:
        return False
    return LEVEL[other] <= LEVEL[one] or other in APART.get(one, ())


def upward(edges: Edges) -> set[tuple[str, str]]:
    return {(a, b) for a, below in edges.items() for b in below if is_upward(a, b)}


def cycle(edges: Edges) -> list[str]:
    """Modules that import each other round, or none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


EDGES = edges_of(sources())


def test_every_module_has_a_room() -> None:
    assert len(EDGES) > 80 and sum(map(len, EDGES.values())) > 200
    assert {room_of(module) for module in EDGES} <= set(LEVEL)
    assert set(ROOM) <= set(EDGES), "an entry of the list is not needed any more"


def test_no_module_imports_upwards() -> None:
    assert upward(EDGES) == set()


def test_no_imports_go_round() -> None:
    assert cycle(EDGES) == []


TREE = {"__init__": "", "cli.__init__": "", "cli.common": "", "engine.loop": "", "ops.__init__": ""}
FORMS = {
    "from pyengine import ops": {"ops.__init__"},
    "from pyengine import _ext, __version__": {"__init__"},
    "import pyengine.engine.loop": {"engine.loop"},
    "import pyengine.engine.loop as loop, os": {"engine.loop"},
    "from pyengine.engine.loop import decode": {"engine.loop"},
    "def f():\n    from pyengine.engine import loop": {"engine.loop"},
    "if TYPE_CHECKING:\n    from pyengine.ops import use": {"ops.__init__"},
    "from . import common": {"cli.common"},
    "from .common import sentence": {"cli.common"},
    "from ..engine.loop import decode": {"engine.loop"},
    "from .. import ops": {"ops.__init__"},
    "import mlx.core as mx": set(),
}


@pytest.mark.parametrize("text", FORMS)
def test_each_form_of_an_import_is_seen(text: str) -> None:
    assert edges_of({**TREE, "cli.serve": text})["cli.serve"] == FORMS[text]


def test_each_rule_sees_what_it_is_for() -> None:
    assert is_upward("ops.embed", "model.target") and not is_upward("model.target", "ops.embed")
    assert is_upward("serve.server", "bench.report") and is_upward("engine.loop", "text.prompt")
    assert is_upward("text.prompt", "ops.embed") and not is_upward("text.prompt", "untrusted")
    assert is_upward("checkpoint.pair", "generation") and is_upward("chat", "__init__")
    assert not is_upward("engine.loop", "engine.prefix")
    assert cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) and cycle({"a": {"b"}, "b": set()}) == []
