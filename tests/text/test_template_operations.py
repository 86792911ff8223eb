"""Each operation of a chat template has a price: a bomb made of it stops, honest use renders.

The rows are in template_operations.py; the parity suite compares the honest ones with transformers.
The bombs run in a process of their own, whose peak of memory is theirs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from template_operations import MESSAGES, OPERATIONS

from pyengine.text.costs import FILTERS, GLOBALS, METHODS, TESTS
from pyengine.text.template import ChatTemplate

STOPS = re.compile(
    r"\[tokenizer\] chat template must render the messages but stopped: "
    r"(it (does too much work|builds too much|makes too large a number|nests values too deep"
    r"|looks up (a tuple|too large a number)|pads a date to a width"
    r"|calculates with what is no number|formats to a width that comes from elsewhere"
    r"|calls macros or loops in each other too deep|reads a loop as a list)|Range too big.*)\."
)

# Source, and why it is refused although transformers has it, or why it stops as it does there.
REFUSED = {
    "urlize": ("{{ 'a' | urlize }}", "No filter named 'urlize'"),
    "lipsum": ("{{ lipsum() }}", "'lipsum' is undefined"),
    "autoescape": ("{% autoescape true %}a{% endautoescape %}", "autoescape is not for prompts"),
    "autoescape, computed": (
        "{% autoescape 'a' | indent(2000000000, true) %}{% endautoescape %}",
        "autoescape",
    ),
    "a chain with in": ("{{ 1 < 2 in [2] }}", "must not be in a chain"),
    "encode": ("{{ 'a'.encode('utf-32') }}", "unsafe str.encode"),
    "maketrans": ("{{ 'a'.maketrans('a', 'b') }}", "calls something unsafe"),
    "translate": ("{{ 'a'.translate({97: 'x' * 99}) }}", "unsafe str.translate"),
    "to_bytes": ("{{ (1).to_bytes(99999999, 'big') }}", "unsafe"),
    "fromkeys": ("{{ {}.fromkeys('abc') }}", "calls something unsafe"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "another file, imported": ("{% import '/etc/passwd' as a %}", "no loader"),
    "another file, from": ("{% from '/etc/passwd' import a %}", "no loader"),
    "another file, extended": ("{% extends '/etc/passwd' %}", "no loader"),
    "do": ("{% do [].append(1) %}", "unknown tag 'do'"),
    "a class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "an attribute by filter": ("{{ (messages | attr('__class__')).mro() }}", "unsafe"),
    "an attribute by map": (
        "{{ (messages | map(attribute='__class__') | first).mro() }}",
        "unsafe",
    ),
    "an attribute by format": ("{{ '{0.__class__.mro}'.format(1) }}", "unsafe"),
    "a changed message": ("{{ messages[0].clear() }}", "unsafe"),
    "a changed list": ("{{ messages.append(1) }}", "unsafe"),
    "a namespace of the machine's": ("{{ namespace(__init__=1) }}", "underscore"),
    "the same, set": ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "underscore"),
    "a global of a macro": ("{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}", "unsafe"),
    "a block called": (
        "{% block b %}{% if x %}{{ self.b() }}{% endif %}{% endblock %}{{ self.b() }}",
        "unsafe",
    ),
    "a huge complaint": ("{{ raise_exception('word ' * 900000) }}", "word word"),
    "a complaint of nothing": ("{{ raise_exception('') }}", "TemplateRuntimeError"),
    "work paid back": ("{{ [1] | map('#step', -1, 0) | list }}", "No filter named '#step'"),
    "work paid back, safely": ("{{ [1] | map('#step' | safe, -1, 0) | list }}", "No filter"),
    "a filter without a name": ("{{ [1] | map([]) | list }}", "has no attribute"),
    "half a character of a number": ("{{ '%c' % 55296 }}", "half a character"),
    "the same by format": ("{{ '%5c' | format(57343) }}", "half a character"),
    "the same by name": ("{{ '%(n)c' % {'n': 55297} }}", "half a character"),
    "the same by a bracketed name": ("{{ '%(a(b)x)c' % {'a(b)x': 55297} }}", "half a character"),
    "the same by braces": ("{{ '{0:>3c}'.format(55296) }}", "half a character"),
    "no argument": ("{{ 'a' | indent(nonsense=3) }}", "nonsense"),
}


def repeated(text: str, size: int = 60_000) -> str:
    return text * (size // len(text))


def named(text: str, number: int = 1500) -> str:
    """The text again and again, each time with another name."""
    return "".join(text.replace("?", f"a{i}") for i in range(number))


# Sources that are long or deep: what they ask for is asked of the compiler.
SOURCES = {
    "prints": repeated("{{a}}"),
    "sums": "{{ 1" + repeated("+1") + " }}",
    "joined": "{{ 1" + repeated("~1") + " }}",
    "comparisons": "{{ 1" + repeated("<1") + " }}",
    "a list": "{{ [" + repeated("1,") + "] }}",
    "a dict": "{{ {" + repeated("1:1,") + "} }}",
    "filters": "{{ a" + repeated("|abs") + " }}",
    "attributes": "{{ a" + repeated(".a") + " }}",
    "brackets": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "negations": "{{ " + repeated("not ") + "a }}",
    "conditions": "{{ " + repeated("a if a else ") + "a }}",
    "branches": "{% if a %}" + repeated("{%elif a%}") + "{% endif %}",
    "nested branches": "{%if a%}" * 3000 + "{%endif%}" * 3000,
    "nested loops": "{% for a in 'x' %}" * 40 + "{% endfor %}" * 40,
    "loops in loops": "{%for a in b%}" * 19 + repeated("{{a}}") + "{%endfor%}" * 19,
    "names and branches": named("{%set ?=1%}") + repeated("{%if a%}{%endif%}", 30_000),
    "names in branches": named("{%if a%}{%set ?=1%}{%endif%}"),
    "names and macros": named("{%set ?=1%}") + repeated("{%macro a()%}{%endmacro%}", 30_000),
    "blocks": named("{%block ?%}{%endblock%}"),
    "arguments": "{{ a(" + named("?=1,", 6000) + ") }}",
    "open comments": repeated("{#"),
    "open braces": repeated("{"),
    "an open string": "{{ '" + repeated("\\"),
    "blanks": "{{ " + repeated(" "),
    "a number": "{{ " + repeated("9") + " }}",
    "a hexadecimal number": "{{ 0x" + repeated("f") + " // 3 }}",
    "a longer source": repeated("{{a}}", 300_000),
}

PROBE = """
import json, resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))  # or the machine suffers
from pyengine.text.template import ChatTemplate
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out = {}
for name, source in json.load(sys.stdin).items():
    start, said = time.process_time(), ""
    try:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x" * 1000}])
    except ValueError as error:
        said = str(error)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    out[name] = [said, time.process_time() - start, grown]
print(json.dumps(out))
"""


def probe(sources: dict[str, str]) -> dict[str, list]:
    """What each said, its seconds, and the growth of memory up to its end."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).parents[1] / "helpers",
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def bounded(name: str, seconds: float, grown: int) -> None:
    """Limits for a slow machine: alone most would want an hour or a terabyte."""
    assert seconds < 20, name
    assert grown * (1 if sys.platform == "darwin" else 1024) < 400 << 20, name


@pytest.fixture(scope="module")
def bombed() -> dict[str, list]:
    return probe({name: bomb for name, (bomb, _, _) in OPERATIONS.items()})


@pytest.mark.parametrize("name", OPERATIONS)
def test_bombs_of_an_operation_stop(bombed: dict[str, list], name: str) -> None:
    said, seconds, grown = bombed[name]
    assert STOPS.fullmatch(said), said
    bounded(name, seconds, grown)


@pytest.mark.parametrize("name", OPERATIONS)
def test_honest_use_of_an_operation_renders(name: str) -> None:
    _, honest, text = OPERATIONS[name]
    assert ChatTemplate(honest, {}).render(MESSAGES) == text


@pytest.mark.parametrize("name", REFUSED)
def test_what_prompts_do_not_need_is_refused(name: str) -> None:
    source, reason = REFUSED[name]
    with pytest.raises(
        ValueError, match=r"^\[tokenizer\] chat template must .*" + re.escape(reason)
    ) as raised:
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.slow
def test_sources_are_compiled_within_bounds() -> None:
    for name, (said, seconds, grown) in probe(SOURCES).items():
        assert not said or said.startswith("[tokenizer] chat template must "), name
        bounded(name, seconds, grown)


# Priced, and too plain to be a bomb.
PLAIN = {
    *("count", "endswith", "is_integer", "isalpha", "islower", "isnumeric", "isspace", "isupper"),
    *("keys", "length", "random", "reset", "safe", "values", "==", "!=", "<", "<=", ">", ">="),
    *("equalto", "gt", "greaterthan", "le", "lt", "lessthan", "defined", "escaped", "false"),
}


def test_every_price_has_a_row() -> None:
    rows = " ".join(honest for _, honest, _ in OPERATIONS.values())
    names = {*FILTERS, *GLOBALS, *TESTS, *(name for kind in METHODS.values() for name in kind)}
    assert not {name for name in names.difference(PLAIN) if not re.search(rf"\b{name}\b", rows)}
