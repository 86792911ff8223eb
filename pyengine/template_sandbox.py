"""A sandbox for chat templates whose work and memory are bounded.

Jinja's own sandbox keeps a template away from Python's insides, not from running for ever: a few
lines of literals, loops and ``~`` build a value of any size. Here everything that repeats, builds,
compares or prints draws on one budget before it happens: a unit is one step, or 64 characters or
members touched. Filters, methods and globals are those chat templates need; what they cannot pay
for, or what could grow a text by a number (widths, padding), is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import loopcontrols
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_WORK = 1_000_000
MAX_CHARS = 1 << 24  # of one text that a template builds or prints
MAX_INDENT = 64
CHUNK = 64

CHEAP_FILTERS = (
    "abs capitalize count d default e escape first float int items last length list lower map "
    "reject rejectattr reverse safe select selectattr title trim upper wordcount"
)
DEEP_FILTERS = "dictsort groupby indent join max min replace sort string unique"
COMPARISONS = "in == eq equalto != ne > gt greaterthan >= ge < lt lessthan <= le"
METHODS = {
    str: "capitalize count endswith find index isalnum isalpha isdigit isnumeric isspace islower "
    "isupper join lower lstrip removeprefix removesuffix replace rfind rsplit rstrip split "
    "splitlines startswith strip title upper",
    dict: "get items keys values",
    list: "count index",
    tuple: "count index",
    LoopContext: "cycle",
}
METHOD_NAMES = {kind: frozenset(names.split()) for kind, names in METHODS.items()}


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, on a budget; :meth:`begin` before each rendering."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols],
            optimized=False,  # else constants would be computed while compiling
            finalize=self.printed,
        )
        self.work = 0
        own: dict[str, Callable[..., Any]] = {
            "raise_exception": _refuse,
            "strftime_now": _now,
            "range": self._range,
            "dict": dict,
            "namespace": Namespace,
        }
        self.globals = dict(own)
        self._callable = {id(value) for value in own.values()}
        self._callable |= {id(f) for f in (_refuse, _now)}
        self.filters = {name: self._cheap(self.filters[name]) for name in CHEAP_FILTERS.split()} | {
            name: self._deep(self.filters[name]) for name in DEEP_FILTERS.split()
        }
        self.filters["tojson"] = self._deep(_to_json)
        self.tests |= {
            name: self._deep(cast(Any, self.tests[name])) for name in COMPARISONS.split()
        }

    def begin(self) -> None:
        self.work = 0

    def spend(self, amount: int) -> None:
        self.work += amount
        if self.work > MAX_WORK:
            raise jinja2.TemplateRuntimeError("it does too much work")

    # What the compiled template calls, put there by _Metered

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        """The items of a loop, each paid for."""
        for value in values:
            self.spend(1)
            yield value

    def touched(self, value: Any) -> Any:
        """A value that was copied, paid by its length."""
        self.spend(1 + _length(value) // CHUNK)
        return value

    def walked(self, value: Any) -> Any:
        """A value about to be read to its last leaf, paid as if nothing in it were shared."""
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, Namespace):
                item = item._Namespace__attrs
            if isinstance(item, dict):
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, (list, tuple, set, frozenset)):
                stack.extend(item)
            self.spend(1 + _length(item) // CHUNK)
        return value

    def joined(self, *parts: Any) -> str:
        """``a ~ b``."""
        return str(self.touched("".join([str(self.walked(part)) for part in parts])))

    def printed(self, value: Any) -> Any:
        return self.walked(value)

    # What jinja itself asks

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        metered = _Metered().visit(tree)
        assert isinstance(metered, nodes.Template)
        return metered.set_environment(self)  # type: ignore[return-value]

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(__obj, "__self__", None)
        if owner is __self and __obj.__name__ in ("counted", "touched", "walked", "joined"):
            return __obj(*args)
        __self.spend(1)
        if isinstance(__obj, Macro):
            return __self.touched(super().call(__context, __obj, *args, **kwargs))
        name = getattr(__obj, "__name__", "")
        kind = next((kind for kind in METHOD_NAMES if isinstance(owner, kind)), None)
        if kind is not None:
            if name not in METHOD_NAMES[kind]:
                raise jinja2.TemplateRuntimeError(f"it calls the unsafe {kind.__name__}.{name}")
            __self.touched(owner)
        elif id(__obj) not in __self._callable and __obj != __self._range:
            raise jinja2.TemplateRuntimeError("it calls something unsafe")
        # Jinja adds the loop's own variables to the keywords; they are not arguments
        data = [*args, *(value for key, value in kwargs.items() if not key.startswith("_"))]
        __self.walked(data)
        if isinstance(owner, str) and name in ("replace", "join"):
            _check_growth(owner, *data)
        return __self.touched(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.TemplateRuntimeError("it uses **")
        if operator == "%" and isinstance(left, str):
            if re.search(r"%[^a-zA-Z%]*[\d*]", left):
                raise jinja2.TemplateRuntimeError("it pads a text to a width")
            self.walked(right)
        for value, count in ((left, right), (right, left)):
            if operator == "*" and isinstance(count, int):
                self.spend(_length(value) * max(count, 0))
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, int) and abs(result) >> 63:
            raise jinja2.TemplateRuntimeError("it makes too large a number")
        return self.touched(result)

    def _cheap(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        """A filter that reads its value once."""

        @wraps(filter_)
        def metered(*args: Any, **kwargs: Any) -> Any:
            for arg in (*args, *kwargs.values()):
                self.touched(arg)
            result = filter_(*args, **kwargs)
            # Lazy ones are made into lists at once, so that each item is paid for here
            return self.touched(list(self.counted(result)) if _lazy(result) else result)

        return metered

    def _deep(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that reads its value to the last leaf."""
        name = getattr(function, "__name__", "")

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            data = [arg for arg in (*args, *kwargs.values()) if not _machinery(arg)]
            self.walked(data)
            if name == "do_indent":
                _check_indent(*data[1:])
            elif name in ("do_replace", "sync_do_join", "do_join"):
                _check_growth(*data)
            result = function(*args, **kwargs)
            return self.touched(list(self.counted(result)) if _lazy(result) else result)

        return metered

    def _range(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self.spend(len(numbers))
        return numbers


class _Metered(NodeTransformer):
    """Sends what repeats, builds or compares through the sandbox's counters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        if node.recursive:
            raise jinja2.TemplateSyntaxError("a loop must not be recursive", node.lineno)
        self.generic_visit(node)
        node.iter = _call("counted", node.iter)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _call("touched", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _call("touched", node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:  # a key is hashed to its last leaf
            pair.key = _call("walked", pair.key)
        return _call("touched", node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("joined", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("walked", node.expr)
        for operand in node.ops:
            operand.expr = _call("walked", operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return _call("touched", node)
        if not isinstance(node.arg, nodes.Const):
            node.arg = _call("walked", node.arg)
        return node


def _call(name: str, *args: nodes.Node) -> nodes.Call:
    function = nodes.EnvironmentAttribute(name)
    return nodes.Call(function, list(args), [], None, None, lineno=args[0].lineno)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict, set)) else 0


def _lazy(value: Any) -> bool:
    return isinstance(value, Iterator)


def _machinery(value: Any) -> bool:
    """The environment or context that jinja passes to some filters."""
    return isinstance(value, (jinja2.Environment, jinja2.runtime.Context, nodes.EvalContext))


def _chars(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    members = value if isinstance(value, (list, tuple, dict, set)) else ()
    return sum(len(str(member)) + 1 for member in members)


def _check_growth(value: Any, *args: Any) -> None:
    """``replace`` and ``join`` may put each argument between any two characters or members."""
    longest = max((_chars(arg) for arg in args), default=0)
    if (_chars(value) + 1) * (longest + 1) > MAX_CHARS and min(_chars(value), longest) > CHUNK:
        raise jinja2.TemplateRuntimeError("it does too much work")


def _check_indent(width: Any = 4, *_: Any) -> None:
    if (len(width) if isinstance(width, str) else width) > MAX_INDENT:
        raise jinja2.TemplateRuntimeError("it indents too far")


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateRuntimeError(message)


def _now(form: str) -> str:
    if re.search(r"%[^a-zA-Z%]*\d", form):
        raise jinja2.TemplateRuntimeError("it pads a date to a width")
    return datetime.now().strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    if indent is not None:
        _check_indent(indent)
    return json.dumps(value, ensure_ascii=False, indent=indent)
