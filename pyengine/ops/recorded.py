"""Functions of arrays whose graph is built once and played again: what a round costs the host.

Arguments and results are trees: arrays, None, lists of arrays, and tuples, named or not, of trees.
Only here are they taken apart into the flat lists that the extension records over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Generic, ParamSpec, TypeVar

import mlx.core as mx

from pyengine import _ext
from pyengine.ops.dispatch import lazy

P = ParamSpec("P")
R = TypeVar("R")


def recorded(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, run once for a set of shapes and dtypes; after that its graph is played.

    The graph is the very one that the function builds, node for node, so no bit differs;
    ``mx.compile`` would fuse nodes. On a processor it is one node to MLX, which has more to do for
    a node than most of ours take; and what is mostly ours keeps its memory and its tasks
    (``csrc/program.h``). The function must read nothing that changes but its arguments:
    what depends on no argument is computed once. On another thread it is run again, for nodes
    belong to the stream they were made on. The four graphs used last are kept, of each form of
    the arguments. Under ``ops.use("workbench")``, where ops evaluate, the function itself is
    returned.
    """
    return Recorded(function) if lazy() else function


class Recorded(Generic[P, R]):
    """A recorded function; made by :func:`recorded`."""

    def __init__(self, function: Callable[P, R]) -> None:
        self._function = function
        self._graphs: dict[Any, tuple[_ext.Recorded, list[Any]]] = {}  # by form of the arguments
        self._played: _ext.Recorded | None = None

    def __call__(self, *trees: P.args, **named: P.kwargs) -> R:
        assert not named
        arrays: list[mx.array] = []
        form = _flatten(trees, arrays)
        if form not in self._graphs:
            self._graphs[form] = _record(self._function, form)
        self._played, result = self._graphs[form]
        made = self._played(arrays)
        tree: R = _tree(result[0], iter(made))
        return tree

    @property
    def nodes(self) -> list[str]:
        """Operations of the graph played last, by name."""
        return [] if self._played is None else self._played.nodes

    @property
    def tapes(self) -> int:
        """Graphs that are kept."""
        return sum(graph.tapes for graph, _ in self._graphs.values())


def _record(function: Callable[..., Any], form: Any) -> tuple[_ext.Recorded, list[Any]]:
    """``function`` over the flat arrays of a form; and the form of its result, once it has run."""
    result: list[Any] = []

    # Holds nothing that holds the graph: no collector sees a circle through the extension
    def flat(arrays: Any) -> list[mx.array]:
        made: list[mx.array] = []
        result[:] = [_flatten(function(*_tree(form, iter(arrays))), made)]
        return made

    return _ext.Recorded(flat), result


def _flatten(tree: Any, arrays: list[mx.array]) -> Any:
    """The form of a tree, hashable; its arrays go to the end of ``arrays``."""
    if tree is None:
        return None
    if isinstance(tree, list):  # taken as it is: a cache has a hundred arrays, in every round
        arrays += tree
        return len(tree)
    if not isinstance(tree, tuple):
        arrays.append(tree)
        return mx.array
    forms: list[Any] = []
    for part in tree:  # most are arrays and lists, which need no call
        if part.__class__ is mx.array:
            arrays.append(part)
            forms.append(mx.array)
        elif part.__class__ is list:
            arrays += part
            forms.append(len(part))
        else:
            forms.append(_flatten(part, arrays))
    return type(tree), tuple(forms)


def _tree(form: Any, arrays: Iterator[mx.array]) -> Any:
    """The tree of that form, made of the arrays that come next."""
    if form is mx.array:
        return next(arrays)
    if form is None:
        return None
    if isinstance(form, int):
        return list(islice(arrays, form))
    kind, forms = form
    parts = [next(arrays) if part is mx.array else _tree(part, arrays) for part in forms]
    return kind(*parts) if hasattr(kind, "_fields") else kind(parts)
