"""Chat templates are programs of strangers: what Gemma's need works, and nothing runs away."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pyengine.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "x" * 1000}]
GROW = "{% set ns = namespace(a='x', b='x') %}{% for i in range(60) %}"
LONG = "{% set a = 'x' * 1000000 %}"
WORK = "it does too much work"

# Source, and why it stops.
HOSTILE = {
    "nested loops": (
        "{% for a in 'x' * 3000 %}{% for b in 'x' * 3000 %}{% endfor %}{% endfor %}",
        WORK,
    ),
    "text doubled by ~": (GROW + "{% set ns.a = ns.a ~ ns.a %}{% endfor %}", WORK),
    "text doubled by +": (GROW + "{% set ns.a = ns.a + ns.a %}{% endfor %}", WORK),
    "text doubled by a block": (
        GROW + "{% set b %}{{ ns.a }}{{ ns.a }}{% endset %}{% set ns.a = b %}{% endfor %}",
        WORK,
    ),
    "list of lists printed": (GROW + "{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a }}", WORK),
    "dict of dicts printed": (
        GROW + "{% set ns.a = {'a': ns.a, 'b': ns.a} %}{% endfor %}{{ ns.a }}",
        WORK,
    ),
    "namespaces printed": (
        GROW + "{% set ns.a = namespace(a=ns.a, b=ns.a) %}{% endfor %}{{ ns.a }}",
        WORK,
    ),
    "a namespace in itself": ("{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}", WORK),
    "lists joined by ~": (
        GROW + "{% set ns.a = [ns.a, ns.a] %}{% endfor %}{% set b = ns.a ~ '' %}",
        WORK,
    ),
    "lists as json": (GROW + "{% set ns.a = [ns.a, ns.a] %}{% endfor %}{{ ns.a | tojson }}", WORK),
    "lists compared": (
        GROW + "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
        "{{ ns.a == ns.b }}",
        WORK,
    ),
    "lists compared by a test": (
        GROW + "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
        "{{ ns.a is eq(ns.b) }}",
        WORK,
    ),
    "tuples hashed": (GROW + "{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ {ns.a: 1} }}", WORK),
    "tuples looked up": (
        GROW + "{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ messages[0][ns.a] }}",
        WORK,
    ),
    "replace, method": (LONG + "{{ a.replace('x', a) | length }}", WORK),
    "replace, filter": (LONG + "{{ a | replace('x', a) | length }}", WORK),
    "replace, mapped": (LONG + "{{ [a] | map('replace', 'x', a) | list }}", WORK),
    "join, method": (LONG + "{{ a.join(a) | length }}", WORK),
    "join, filter": (LONG + "{{ a | join(a) | length }}", WORK),
    "slices": (LONG + "{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}", WORK),
    "searches": (LONG + "{% for i in range(99999) %}{{ 'y' in a }}{% endfor %}", WORK),
    "counts": (LONG + "{% for i in range(99999) %}{{ a.count('y') }}{% endfor %}", WORK),
    "splits": (LONG + "{% for i in range(99999) %}{% set b = a.split('x') %}{% endfor %}", WORK),
    "macros that fork": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        WORK,
    ),
    "a macro in itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion depth"),
    "a repeated text": ("{{ 'x' * 999999999 }}", WORK),
    "a large number": (
        "{% set ns = namespace(a=9) %}{% for i in range(60) %}{% set ns.a = ns.a * ns.a %}"
        "{% endfor %}",
        "too large a number",
    ),
    "padding, method": ("{{ 'x'.ljust(999999999) }}", "unsafe str.ljust"),
    "padding, format": ("{{ '{:999999999}'.format(1) }}", "unsafe"),
    "padding, %": ("{{ '%999999999d' % 1 }}", "pads a text"),
    "padding, %*": ("{{ '%*d' % (999999999, 1) }}", "pads a text"),
    "padding, filter": ("{{ 'x' | center(999999999) }}", "No filter named 'center'"),
    "padding, date": ("{{ strftime_now('%999999999Y') }}", "pads a date"),
    "indentation": ("{{ 'a\n' | indent(999999999) }}", "indents too far"),
    "indentation, text": ("{{ 'a\n' | indent('y' * 99999) }}", "indents too far"),
    "indentation, json": ("{{ [1] | tojson(indent=999999999) }}", "indents too far"),
    "a power": ("{{ 9 ** 99999999 }}", r"\*\*"),
    "filler text": ("{{ lipsum(n=99999) }}", "unsafe"),
    "an attribute by filter": ("{{ messages | attr('__class__') }}", "No filter named 'attr'"),
    "the same, mapped": ("{{ messages | map('attr', '__class__') | list }}", "attr"),
    "a class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a changed message": ("{{ messages[0].clear() }}", "unsafe"),
    "a recursive loop": (
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "must not be recursive",
    ),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "too much output": (
        "{% for a in range(99999) %}{{ messages[0].content }}{% endfor %}",
        "too long",
    ),
    "deep brackets": ("{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}", "recursion depth"),
    "deep loops": ("{% for a in 'x' %}" * 40 + "{% endfor %}" * 40, "nested"),
    "a number without end": ("{{ " + "9" * 99999 + " }}", "4300"),
}


PROBE = """
import json, resource, sys, time
from pyengine.chat_template import ChatTemplate
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


@pytest.fixture(scope="module")
def rendered() -> dict[str, list]:
    """What each said, its seconds, and the growth of memory; a process whose peak is theirs."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps({name: source for name, (source, _) in HOSTILE.items()}),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_stop(rendered: dict[str, list], name: str) -> None:
    """Alone each would want an hour or a terabyte."""
    said, seconds, grown = rendered[name]
    assert re.match(rf"\[tokenizer\] chat template must .*{HOSTILE[name][1]}", said), said
    assert "\n" not in said and len(said) < 300
    assert seconds < 30
    assert grown * (1 if sys.platform == "darwin" else 1024) < 600 << 20


# Everything the published Gemma templates use, in one: macros, namespaces, sorted tool
# declarations, thoughts cut from history, trim marks. Written for this test.
WHOLE = """
{%- macro value_of(value) -%}
{%- if value is string -%}{{ '<|"|>' ~ value ~ '<|"|>' }}
{%- elif value is boolean -%}{{ 'true' if value else 'false' }}
{%- elif value is mapping -%}{
{%- for key, inner in value | dictsort -%}
{{ key }}:{{ value_of(inner) }}{{ ',' if not loop.last }}
{%- endfor -%}
}
{%- elif value is sequence -%}[
{%- for inner in value -%}{{ value_of(inner) }}{{ ',' if not loop.last }}{%- endfor -%}
]
{%- else -%}{{ value }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last='', found=false) -%}
{{ bos_token }}
{%- if messages[0]['role'] in ['system', 'developer'] -%}
{{ '<|turn>system\n' + messages[0]['content'] | trim + '<turn|>\n' }}
{%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}{%- for tool in tools -%}
{{ '<|tool>declaration:' ~ tool['function']['name'] ~ value_of(tool['function']['parameters']) }}
{%- endfor -%}{%- endif -%}
{%- for message in messages if message.content is defined -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{%- if '<channel|>' in message.content -%}
{%- set text = message.content.split('<channel|>')[-1].lstrip() -%}
{%- else -%}{%- set text = message.content -%}{%- endif -%}
{{ '<|turn>' + role + '\n' + text | trim + '<turn|>\n' }}
{%- for call in message.get('tool_calls', []) -%}
{{ call.function.name | upper }}{{ value_of(call.function.arguments) }}
{%- endfor -%}
{%- set ns.last = role -%}{%- set ns.found = ns.found or loop.index0 > 0 -%}
{%- endfor -%}
{{ messages | length }} {{ messages | map(attribute='role') | join(',') }} {{ ns.found }}
{{ (messages | selectattr('role', 'equalto', 'user') | list)[-1].content[:3] }}
{%- if add_generation_prompt and not enable_thinking | default(false) -%}
{{ '<|turn>model\n' }}
{%- endif -%}
"""


def test_what_gemma_templates_need_works() -> None:
    call = {"function": {"name": "f", "arguments": {"b": [1, 2.5, None], "a": "x", "c": True}}}
    messages = [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "<|channel>thought\nhm<channel|> hi",
            "tool_calls": [call],
        },
        {"role": "user", "content": "again"},
    ]
    tool = {"function": {"name": "g", "parameters": {"type": "object"}}}
    text = ChatTemplate(WHOLE, {"bos_token": "<bos>"}).render(messages, tools=[tool])
    assert text == (
        "<bos><|turn>system\nBe brief.<turn|>\n"
        '<|tool>declaration:g{type:<|"|>object<|"|>}'
        "<|turn>user\nhello<turn|>\n<|turn>model\nhi<turn|>\n"
        'F{a:<|"|>x<|"|>,b:[1,2.5,None],c:true}'
        "<|turn>user\nagain<turn|>\n"
        "3 user,assistant,user True\naga<|turn>model\n"
    )


def test_long_conversations_stay_within_the_budget() -> None:
    messages = [
        {"role": role, "content": f"{i} " + "word " * 400}
        for i in range(500)
        for role in ("user", "assistant")
    ]
    text = ChatTemplate(WHOLE, {"bos_token": "<bos>"}).render(messages)
    assert len(text) > 1_900_000 and "499 word" in text
