"""A sandbox for chat templates whose time and memory are bounded.

Jinja's own sandbox keeps a template away from Python's insides, not from running for ever: a few
lines of literals, loops and ``~`` build a value of any size. Here each operation is paid for before
it happens, by its own formula (``costs``) from one account (``meter``); what has
no formula is refused. Nothing is computed while compiling.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Cycler, Joiner, Namespace, _PassArg, pass_context
from jinja2.visitor import NodeTransformer

from pyengine.text.costs import (
    FILTERS,
    GLOBALS,
    METHODS,
    OPERATORS,
    TESTS,
    braces,
    compare,
    concat,
    contains,
    cut,
)
from pyengine.text.meter import ITEM, Meter

MAX_CALLS = 100  # of macros and recursive loops inside each other; a call takes seven Python frames


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja as transformers sets it up, metered; ``meter.begin`` before each rendering."""

    intercepted_binops = frozenset(OPERATORS)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,  # else constants would be computed while compiling
        )
        self.meter = Meter()
        self._calls = 0
        own: dict[str, Callable[..., Any]] = {
            "cycler": Cycler,
            "dict": self._dict,
            "joiner": Joiner,
            "namespace": self._namespace,
            "raise_exception": _refuse,
            "range": safe_range,
            "strftime_now": _now,
        }
        self.globals = dict(own)
        self._prices = {own[name]: price for name, price in GLOBALS.items()}
        known = {**self.filters, "tojson": _to_json}
        self.filters = {name: self._paid(known[name], price) for name, price in FILTERS.items()}
        self.tests = {
            name: self._paid(cast(Any, self.tests[name]), price) for name, price in TESTS.items()
        }
        # What _Metered calls, under names that are no identifiers; see call_filter
        self.filters |= {
            "#step": self._step,
            "#print": self._print,
            "#literal": self.meter.literal,
            "#key": self.meter.key,
            "#concat": self._paid(lambda *parts: "".join(map(str, parts)), concat),
            "#in": self._paid(lambda part, whole: part in whole, contains),
            "#slice": self._paid(lambda value, *bounds: value[slice(*bounds)], cut),
            "#read": self._paid(lambda value: value, compare),
        }

    def _paid(self, function: Callable[..., Any], price: Callable[..., Any]) -> Callable[..., Any]:
        """A filter or test that pays first."""
        meter, first = self.meter, 0 if _PassArg.from_obj(function) is None else 1

        @wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            price(meter, *args[first:], **kwargs)
            result = function(*args, **kwargs)
            # Lazy ones are made into lists at once, so that they work while their price is known
            return list(result) if isinstance(result, Iterator) else result

        return paid

    def _step(self, value: Any, work: int, chars: int) -> Any:
        """One pass through a body; spelt out, for most of a long rendering is such steps."""
        meter = self.meter
        meter.done += work
        meter.built += chars
        if meter.done > meter.most_work or meter.built > meter.most_built:
            meter.work(0)
            meter.build(0)
        return value

    @pass_context  # jinja calls a filter that takes the context at run time only
    def _print(self, context: Any, value: Any) -> Any:
        self.meter.build(1 + self.meter.text(value))
        return value

    def _dict(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        """``dict``, whose keys are looked at first."""
        pairs = args[0] if args else ()
        pairs = pairs.items() if isinstance(pairs, Mapping) else pairs
        return {**{self.meter.key(key): value for key, value in pairs}, **kwargs}

    def _namespace(self, *args: Any, **kwargs: Any) -> Namespace:
        return _Namespace(self._dict(*args, **kwargs))

    # What jinja itself asks

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        metered = _Metered().visit(tree)
        assert isinstance(metered, nodes.Template)
        return metered.set_environment(self)  # type: ignore[return-value]

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.meter.work(4 + len(args) + len(kwargs))
        __self.meter.build(ITEM * len(args))
        if not isinstance(__obj, (Macro, LoopContext)):
            # Jinja adds the loop's own variables to the keywords; they are not arguments
            given = {k: v for k, v in kwargs.items() if k not in ("_loop_vars", "_block_vars")}
            __self._pay_call(__obj, args, given)
            return super().call(__context, __obj, *args, **kwargs)
        if __self._calls == MAX_CALLS:
            raise jinja2.TemplateRuntimeError("it calls macros or loops in each other too deep")
        __self._calls += 1
        try:
            return super().call(__context, __obj, *args, **kwargs)
        finally:
            __self._calls -= 1

    def _pay_call(self, obj: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(obj, _Format):
            return braces(self.meter, obj.text, *args, **kwargs)
        if isinstance(obj, (Joiner, Undefined)):  # the latter says what is undefined
            return self.meter.work(1)
        owner = getattr(obj, "__self__", None)
        name = getattr(obj, "__name__", "")
        kind = next((kind for kind in METHODS if isinstance(owner, kind)), None)
        if kind is not None:
            if name not in METHODS[kind]:
                raise jinja2.TemplateRuntimeError(f"it calls the unsafe {kind.__name__}.{name}")
            return METHODS[kind][name](self.meter, owner, *args, **kwargs)
        price = self._prices.get(obj) if callable(obj) else None
        if price is None:
            raise jinja2.TemplateRuntimeError("it calls something unsafe")
        return price(self.meter, *args, **kwargs)

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        # map('#step', -1) would pay work back
        if name.startswith("#"):
            raise jinja2.TemplateRuntimeError(f"No filter named {name[:80]!r}")
        return super().call_filter(name, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        OPERATORS[operator](self.meter, left, right)
        return super().call_binop(context, operator, left, right)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # Jinja's way is twenty calls, and the loops over all messages ask for little else
        if type(obj) is _Namespace and attribute in (known := obj._Namespace__attrs):
            return known[attribute]
        self.meter.work(4)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        try:
            return obj[argument]
        except (TypeError, LookupError):
            self.meter.work(4)
            return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        return None if wrapped is None else _Format(value.__self__, wrapped)


class _Format:
    """A text's ``format``, with the text at hand to predict its result from."""

    def __init__(self, text: str, call: Callable[..., str]) -> None:
        self.text, self._call = text, call

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        return self._call(*args, **kwargs)


class _Namespace(Namespace):
    """As transformers has it: names that begin with an underscore are refused."""

    def __init__(self, attributes: Mapping[Any, Any]) -> None:
        super().__init__()
        for name, value in attributes.items():
            type(self).__setitem__(self, name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.TemplateRuntimeError("it names a namespace's attribute with an underscore")
        super().__setitem__(name, value)


class _Generation(Extension):
    """``{% generation %}`` marks the model's words for training; here it is its body."""

    tags = {"generation"}  # noqa: RUF012 - as jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Metered(NodeTransformer):
    """Sends what repeats, builds, compares or prints through the sandbox's own filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        step = _step(node.body)
        if node.test is not None:
            test = _filter("#step", nodes.Const(True), *_weight([node.test]))
            node.test = nodes.And(test, node.test)
        self.generic_visit(node)
        node.body.insert(0, step)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        step = _step(node.body)
        self.generic_visit(node)
        node.body.insert(0, step)
        return node

    visit_CallBlock = visit_Macro

    def visit_ScopedEvalContextModifier(self, node: nodes.Node) -> nodes.Node:
        raise jinja2.TemplateSyntaxError("autoescape is not for prompts", node.lineno)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        plain = (nodes.TemplateData, nodes.Const)
        node.nodes = [n if isinstance(n, plain) else _filter("#print", n) for n in node.nodes]
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _filter("#literal", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filter("#literal", node) if node.ctx == "load" else node

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        for pair in node.items:
            pair.key = _filter("#key", pair.key)
        return _filter("#literal", node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter("#concat", *node.nodes)

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        first, name, second = node.expr, node.ops[0].op, node.ops[0].expr
        membership = any(operand.op in ("in", "notin") for operand in node.ops)
        if len(node.ops) > 1:
            if membership:
                raise jinja2.TemplateSyntaxError("`in` must not be in a chain", node.lineno)
            self.generic_visit(node)
            node.expr = _filter("#read", node.expr)
            for operand in node.ops[:-1]:
                operand.expr = _filter("#read", operand.expr)
        elif not membership:
            # Nothing is long that is equal to what stands in the source
            constant = isinstance(first, nodes.Const) or isinstance(second, nodes.Const)
            self.generic_visit(node)
            if not constant:
                node.expr = _filter("#read", node.expr)
        elif isinstance(second, (nodes.List, nodes.Tuple)) and all(
            isinstance(item, nodes.Const) for item in second.items
        ):
            node.expr = self.visit(first)
        else:
            within = _filter("#in", self.visit(first), self.visit(second))
            return within if name == "in" else nodes.Not(within, lineno=node.lineno)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            bounds = (node.arg.start, node.arg.stop, node.arg.step)
            return _filter("#slice", node.node, *(bound or nodes.Const(None) for bound in bounds))
        if not isinstance(node.arg, nodes.Const):
            node.arg = _filter("#key", node.arg)
        return node


def _filter(name: str, value: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def _step(body: list[nodes.Node]) -> nodes.Node:
    """A statement that pays for one pass through ``body``."""
    return nodes.ExprStmt(_filter("#step", nodes.Const(None), *_weight(body)))


def _weight(body: list[nodes.Node]) -> tuple[nodes.Const, nodes.Const]:
    """Work and characters of one pass; loops and macros inside it pay for their own bodies."""
    number = chars = 0
    left = list(body)
    while left:
        node = left.pop()
        # A macro or block is an object of its own, made in each pass
        number += 33 if isinstance(node, (nodes.Macro, nodes.Block)) else 1
        if isinstance(node, nodes.Output):
            texts = (getattr(n, "data", getattr(n, "value", "")) for n in node.nodes)
            chars += sum(len(text) for text in texts if isinstance(text, str))
        own = ("body",) if isinstance(node, (nodes.For, nodes.Macro, nodes.CallBlock)) else ()
        left.extend(node.iter_child_nodes(exclude=own))
    return nodes.Const(1 + number // 16 + chars // 64), nodes.Const(chars)


def _refuse(message: Any) -> NoReturn:
    raise jinja2.TemplateRuntimeError(str(message))


def _now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
