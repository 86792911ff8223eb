"""What each operation of a chat template costs, predicted from its arguments before it runs.

A formula has the parameters of the operation it prices, so a keyword cannot slip past it. It may
say too much, not too little. An operation without a formula is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from collections.abc import Set as AnySet
from string import Formatter
from typing import Any

from jinja2 import TemplateRuntimeError
from jinja2.runtime import LoopContext
from jinja2.utils import Cycler
from markupsafe import Markup

from pyengine.text.meter import ESCAPED, ITEM, MAX_BITS, NUMBER, OBJECT, Meter, size

Price = Callable[..., None]

TOO_LARGE = "it makes too large a number"
# A width or precision, or a star for one: digits that end in a conversion.
_WIDTH = re.compile(r"(?<![0-9])([0-9]+|\*)(?:\.([0-9]+|\*)?)?[hlL]?[diouxXeEfFgGcrsa%]")
_CHARACTER = re.compile(r"%(\(.*?\))?[^a-zA-Z%]*[hlL]?c", re.DOTALL)
_LINE_ENDS = "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"


def count(value: Any) -> int:
    """A width or a number of repetitions; what is neither fails later, in the operation itself."""
    return max(value, 0) if isinstance(value, int) else 0


def swell(*values: Any) -> int:
    """How much longer text gets beside Markup, where ``&`` becomes ``&amp;``."""
    return 5 if any(isinstance(value, Markup) for value in values) else 1


# Operators


def add(m: Meter, left: Any, right: Any) -> None:
    m.number(left)
    m.number(right)
    members = size(left) + size(right)
    m.work(1 + members // 16)
    m.build(OBJECT + members * (1 if isinstance(left, str) else 2) * swell(left, right))


def calculate(m: Meter, left: Any, right: Any) -> None:
    m.work(1)
    m.number(left)
    m.number(right)
    if size(left) or size(right):
        raise TemplateRuntimeError("it calculates with what is no number")


def multiply(m: Meter, left: Any, right: Any) -> None:
    m.number(left)
    m.number(right)
    members = size(left) * count(right) + size(right) * count(left)
    m.work(1 + members // 64)
    m.build(OBJECT + members * (1 if isinstance(left or right, str) else 2))


def power(m: Meter, left: Any, right: Any) -> None:
    calculate(m, left, right)
    if isinstance(left, int) and left.bit_length() * count(right) > MAX_BITS:
        raise TemplateRuntimeError(TOO_LARGE)


def remainder(m: Meter, left: Any, right: Any = 2) -> None:
    """``left % right``, which is a format where ``left`` is a text; the test ``even`` too."""
    if isinstance(left, str):
        printf(m, left, right)
    else:
        calculate(m, left, right)


def concat(m: Meter, *parts: Any) -> None:
    m.build(OBJECT + sum(map(m.text, parts)))


def contains(m: Meter, part: Any, whole: Any) -> None:
    if isinstance(whole, str):
        m.search(whole, part)
    elif isinstance(whole, (Mapping, AnySet)):
        m.key(part)
        m.work(1)
    else:
        m.members(whole)
        m.walk(whole)


def compare(m: Meter, value: Any, *others: Any) -> None:
    """Two values are read as far as they are equal: no more than either has."""
    m.walk(value)


# Formats


def printf(m: Meter, form: str, args: Any) -> None:
    """``form % args``."""
    specs = form.count("%")
    if _CHARACTER.search(form):
        refuse_surrogates(args)
    printed = m.walk(args) * swell(form) * (ESCAPED if "r" in form or "a" in form else 1)
    if not isinstance(args, tuple):  # each of them may print the whole
        printed *= max(specs, 1)
    stars = max(map(count, args), default=0) if isinstance(args, tuple) else 0
    found = [width for pair in _WIDTH.findall(form) for width in pair if width]
    widths = sum(stars if width == "*" else int(width) for width in found)
    m.work(1 + len(form) // 8 + printed // 64)
    m.build(len(form) + printed + widths + specs * NUMBER)


def format_(m: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    m.text(value)
    printf(m, str(value), kwargs or args)


def braces(m: Meter, form: str, *args: Any, **kwargs: Any) -> None:
    """``form.format(...)`` and ``form.format_map(...)``."""
    m.work(1 + len(form) // 8)
    printed = m.walk([args, kwargs]) * ESCAPED * swell(form)
    for literal, field, spec, _ in Formatter().parse(form):
        m.build(len(literal))
        if field is None:
            continue
        if spec and "{" in spec:
            raise TemplateRuntimeError("it formats to a width that comes from elsewhere")
        if (spec or "").endswith("c"):
            refuse_surrogates([args, kwargs])
        m.work(1 + printed // 64)
        m.build(printed + NUMBER + sum(map(int, re.findall(r"\d+", spec or ""))))


def refuse_surrogates(value: Any) -> None:
    """A character made of a number must not be one of marks.py, which stand for special tokens."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            refuse_surrogates(inner)
    elif isinstance(value, int) and 0xD800 <= value < 0xE000:
        raise TemplateRuntimeError("it makes half a character of a number")


def date(m: Meter, format: Any) -> None:
    if re.search(r"%[^a-zA-Z%]*\d", str(format)):
        raise TemplateRuntimeError("it pads a date to a width")
    m.work(1 + size(format))
    m.build(size(format) * 64)


def to_json(
    m: Meter,
    x: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> None:
    wide = len(indent) if isinstance(indent, str) else count(indent)
    between = sum(map(size, separators)) if isinstance(separators, (list, tuple)) else 0
    chars = m.walk([x], level=wide, apart=6 + between)
    m.work(chars // 16)
    m.build(OBJECT + chars * (1 if indent is None else 4))  # with an indent, from small pieces


def pretty(m: Meter, value: Any) -> None:
    """Each level is tried on one line first, and its lines stand as far in as its keys are long."""
    chars = m.walk([value])
    m.work(chars * (1 + chars // 64))
    m.build(chars * (1 + chars // 8))


# Texts


def flat(m: Meter, *args: Any, **kwargs: Any) -> None:
    m.work(1)


def texts(times: int) -> Price:
    """Reads its arguments as texts and writes at most so many characters for each of theirs."""

    def price(m: Meter, *args: Any, **kwargs: Any) -> None:
        chars = times * sum(map(m.text, (*args, *kwargs.values())))
        m.work(1 + chars // 64)
        m.build(OBJECT + chars)

    return price


def quote(m: Meter, value: Any) -> None:
    """A text, or pairs of them, with each byte as %XX."""
    if not isinstance(value, str):
        m.listed(value)
    texts(ESCAPED)(m, value)


def search(m: Meter, text: str, part: Any, *bounds: Any) -> None:
    m.search(text, part)


def partition(m: Meter, text: str, sep: Any) -> None:
    m.search(text, sep)
    m.build(len(text) + 4 * ITEM)


def split(m: Meter, text: str, sep: Any = None, maxsplit: int = -1) -> None:
    m.search(text, sep)
    pieces = len(text) // 2
    if isinstance(sep, str) and sep:
        m.search(text, sep)
        pieces = text.count(sep)
    m.work(1 + len(text) // 64 + pieces // 4)
    m.build(len(text) + (pieces + 1) * ITEM)


def lines(m: Meter, text: str, keepends: bool = False) -> int:
    m.work(1 + len(text) // 8)
    number = sum(map(text.count, _LINE_ENDS)) + 1
    m.build(len(text) + number * ITEM)
    return number


def split_lines(m: Meter, text: str, keepends: bool = False) -> None:
    lines(m, text)


def strip(m: Meter, value: Any, chars: Any = None) -> None:
    length = m.text(value)
    m.work(length * size(chars) // 1024)
    m.build(OBJECT + length)


def replace(m: Meter, s: Any, old: Any, new: Any, count: Any = None) -> None:
    for value in (s, old, new):
        m.text(value)
    text, part, times = str(s), str(old), swell(s, old, new)
    m.search(text, part)
    m.search(text, part)
    found = text.count(part) if times == 1 else len(text) * times + 1
    if isinstance(count, int) and count >= 0:
        found = min(found, count)
    m.work(found // 4)
    m.build(OBJECT + times * (len(text) + found * len(str(new))))


def join(m: Meter, value: Any, d: Any = "", attribute: Any = None) -> None:
    number = m.listed(value)
    m.work(number * m.path(attribute))
    chars = m.walk(value) + number * m.text(d)
    m.work(chars // 64)
    # A method of Markup escapes what it joins
    m.build(OBJECT + chars * swell(d))


def join_method(m: Meter, separator: str, items: Any) -> None:
    join(m, items, separator)


def pad(m: Meter, value: Any, width: Any = 80, fillchar: Any = " ") -> None:
    chars = max(m.text(value), count(width)) * swell(value, fillchar)
    m.work(chars // 64)
    m.build(OBJECT + chars)


def expand_tabs(m: Meter, text: str, tabsize: Any = 8) -> None:
    chars = m.text(text) + text.count("\t") * count(tabsize)
    m.work(chars // 16)
    m.build(OBJECT + chars)


def indent(m: Meter, s: Any, width: Any = 4, first: bool = False, blank: bool = False) -> None:
    if isinstance(s, str):  # else jinja cannot add a line end to it
        number = lines(m, s) + 1
        wide = (len(width) if isinstance(width, str) else count(width)) * swell(s, width)
        m.work(number + number * wide // 64)
        m.build(OBJECT + 2 * len(s) + number * (ITEM + wide + 5))


def truncate(
    m: Meter,
    s: Any,
    length: Any = 255,
    killwords: bool = False,
    end: Any = "...",
    leeway: Any = None,
) -> None:
    m.build(OBJECT + m.text(s) + m.text(end) * swell(s))


def wrap(
    m: Meter,
    s: Any,
    width: Any = 79,
    break_long_words: bool = True,
    wrapstring: Any = None,
    break_on_hyphens: bool = True,
) -> None:
    """A word longer than a line is cut line by line, and its rest copied each time."""
    chars = m.text(s)
    m.work(chars * (4 + chars // 512))
    m.build(OBJECT + chars * (ITEM + size(wrapstring) * swell(s)))


def strip_tags(m: Meter, value: Any) -> None:
    """Each comment that goes makes a new text of the rest."""
    chars = m.text(value)
    tags = value.count("<") if isinstance(value, str) else chars
    m.work(chars * (1 + tags // 64))
    m.build(OBJECT + chars * ITEM)


# Lists


def listed(m: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    m.listed(value)


def reverse(m: Meter, value: Any) -> None:
    if isinstance(value, str):
        m.work(1 + len(value) // 64)
        m.build(OBJECT + len(value))
    else:
        m.listed(value)


def mapped(m: Meter, value: Any, *args: Any, attribute: Any = None, **kwargs: Any) -> None:
    """map, select and their kind; the filter or test they call is paid for each member then."""
    parts = m.path(attribute) + sum(map(m.path, args[:1]))
    for test in args[1:2]:
        if isinstance(test, str):  # an error quotes it
            m.key(test)
    m.work(m.listed(value) * parts)


def sort(
    m: Meter,
    value: Any,
    reverse: bool = False,
    case_sensitive: bool = False,
    attribute: Any = None,
) -> None:
    """Each member is compared log2 n times, to its end at worst; its keys are lower-cased first."""
    number, parts, chars = m.listed(value), m.path(attribute), m.walk(value)
    m.work(number * 2 * parts + (number + chars // 8) * number.bit_length())
    m.build(number * ITEM * parts + chars)


def sort_dict(
    m: Meter, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> None:
    m.listed(value)
    if isinstance(value, Mapping):
        sort(m, list(value.values() if by == "value" else value))


def extreme(m: Meter, value: Any, case_sensitive: bool = False, attribute: Any = None) -> None:
    sort(m, value, attribute=attribute)


def group(
    m: Meter, value: Any, attribute: Any, default: Any = None, case_sensitive: bool = False
) -> None:
    sort(m, value, attribute=attribute)
    m.build(size(value) * 4 * ITEM)


def unique(m: Meter, value: Any, case_sensitive: bool = False, attribute: Any = None) -> None:
    """Members of equal hash are compared with each other; an attribute may hold such."""
    number, parts, chars = m.listed(value), m.path(attribute), m.walk(value)
    m.work(number * 2 * parts)
    m.build(number * ITEM + chars)
    if attribute is not None:
        m.work(number * number // 32)
        return
    for item in value if number else ():
        m.key(item)


def add_up(m: Meter, iterable: Any, attribute: Any = None, start: Any = 0) -> None:
    number = m.members(iterable)
    m.work(number * m.path(attribute))
    if not isinstance(start, (int, float)):  # lists: each sum is a new one
        chars = m.walk([iterable, start])
        m.work(number * (chars // 16))
        m.build(number * chars)


def batch(m: Meter, value: Any, linecount: Any, fill_with: Any = None) -> None:
    m.build(m.listed(value) * ITEM)
    m.build(0 if fill_with is None else 2 * count(linecount))


def slices(m: Meter, value: Any, slices: Any, fill_with: Any = None) -> None:
    m.listed(value)
    m.listed(value)
    m.work(count(slices))
    m.build(count(slices) * ITEM)


def cut(m: Meter, value: Any, start: Any, stop: Any, step: Any) -> None:
    """``value[start:stop:step]``."""
    number = len(range(*slice(start, stop, step).indices(size(value))))
    m.work(1 + number // 64)
    m.build(OBJECT + number * (1 if isinstance(value, str) else 2))


# Numbers, objects, look-ups


def to_int(m: Meter, value: Any, default: Any = 0, base: Any = 10) -> None:
    m.work(1)
    if isinstance(value, str) and len(value) > MAX_BITS // 4:
        raise TemplateRuntimeError(TOO_LARGE)


def to_float(m: Meter, value: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(value, str):  # an error quotes it
        m.work(1 + len(value) // 16)
        m.build(OBJECT + len(value) * ESCAPED)


def to_round(m: Meter, value: Any, precision: Any = 0, method: str = "common") -> None:
    calculate(m, value, precision)
    if isinstance(precision, int) and abs(precision) > NUMBER:
        raise TemplateRuntimeError(TOO_LARGE)


def look_up(m: Meter, owner: Any, key: Any, *default: Any) -> None:
    m.work(4)
    m.key(key)


def name(m: Meter, value: Any) -> None:
    m.work(1)
    m.key(value)


def find_member(m: Meter, values: Any, value: Any, *bounds: Any) -> None:
    m.walk(values)
    m.build(m.walk([value]))  # an error quotes it


def changed(m: Meter, loop: Any, *values: Any) -> None:
    for value in values:
        m.walk(value)


def made(m: Meter, *args: Any, **kwargs: Any) -> None:
    """An object made of its arguments."""
    m.literal([*args, *kwargs.values()])
    m.work(8)
    m.build(OBJECT * 2)
    for arg in args:
        m.literal(arg) if isinstance(arg, Mapping) else m.listed(arg)


def say(m: Meter, message: Any) -> None:
    m.text(message)


def _table(rows: dict[str, Price]) -> dict[str, Price]:
    return {name: price for names, price in rows.items() for name in names.split()}


OPERATORS: dict[str, Price] = {
    "+": add,
    "-": calculate,
    "*": multiply,
    "/": calculate,
    "//": calculate,
    "%": remainder,
    "**": power,
}

# Of jinja's filters only urlize is missing: it makes HTML, by expressions that can take for ever.
FILTERS = _table(
    {
        "abs count d default first last length random": flat,
        "string": texts(1),
        "capitalize lower safe upper": texts(3),
        "e escape forceescape xmlattr": texts(6),
        "urlencode": quote,
        "title wordcount": texts(ITEM),
        "center": pad,
        "format": format_,
        "indent": indent,
        "join": join,
        "pprint": pretty,
        "replace": replace,
        "striptags": strip_tags,
        "tojson": to_json,
        "trim": strip,
        "truncate": truncate,
        "wordwrap": wrap,
        "items list": listed,
        "map reject rejectattr select selectattr": mapped,
        "max min": extreme,
        "batch": batch,
        "dictsort": sort_dict,
        "groupby": group,
        "reverse": reverse,
        "slice": slices,
        "sort": sort,
        "sum": add_up,
        "unique": unique,
        "attr": look_up,
        "filesizeformat float": to_float,
        "int": to_int,
        "round": to_round,
    }
)

TESTS = _table(
    {
        "boolean callable defined escaped false float integer iterable mapping none number sameas "
        "sequence string true undefined": flat,
        "filter test": name,
        "!= < <= == > >= eq equalto ge greaterthan gt le lessthan lt ne": compare,
        "in": contains,
        "divisibleby even odd": remainder,
        "lower upper": texts(1),
    }
)

# Of str's methods encode, maketrans and translate are missing: no prompt is bytes or a cipher.
METHODS: dict[type, dict[str, Price]] = {
    str: _table(
        {
            "endswith isalnum isalpha isascii isdecimal isdigit isidentifier islower isnumeric "
            "isprintable isspace istitle isupper removeprefix removesuffix startswith": texts(1),
            "capitalize casefold lower swapcase title upper": texts(3),
            "count find index rfind rindex": search,
            "partition rpartition": partition,
            "split rsplit": split,
            "splitlines": split_lines,
            "strip lstrip rstrip": strip,
            "center ljust rjust zfill": pad,
            "expandtabs": expand_tabs,
            "join": join_method,
            "replace": replace,
        }
    ),
    dict: _table({"get": look_up, "items keys values": flat, "copy": listed}),
    list: _table({"count index": find_member, "copy": listed}),
    tuple: _table({"count index": find_member}),
    float: {"is_integer": flat},
    LoopContext: {"cycle": flat, "changed": changed},
    Cycler: _table({"next reset": flat}),
}

GLOBALS = _table(
    {
        "cycler dict joiner namespace": made,
        "raise_exception": say,
        "range": flat,
        "strftime_now": date,
    }
)
