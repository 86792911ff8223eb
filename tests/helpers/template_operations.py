"""Operations of chat templates, for test_template_operations.py and the parity suite.

A row is an operation, a template that would take minutes or gigabytes by it, one that uses it as
people do, and what that one renders for one message of 1000 characters.
"""

from __future__ import annotations

MESSAGES = [{"role": "user", "content": "x" * 1000}]

LONG = "{% set a = 'x' * 1000000 %}"
MANY = "{% for i in range(99999) %}"
END = "{% endfor %}"
DOUBLE = "{% set ns = namespace(a=[], b=[]) %}{% for i in range(60) %}"
LISTS = DOUBLE + "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}" + END
TUPLES = DOUBLE + "{% set ns.a = (ns.a, ns.a) %}" + END
DEEP = (
    "{% set ns = namespace(a=[]) %}{% for i in range(300) %}{% set ns.a = [ns.a, ns.a][:1] %}" + END
)
NUMBERS = "{% set a = range(20000) | list %}"
# Comparisons that find the difference at the end only
ALIKE = "{% set a = 'x' * 900000 %}{% set b = 'x' * 450000 ~ 'y' %}"

OPERATIONS: dict[str, tuple[str, str, str]] = {
    # Operators
    "+ of texts": (
        "{% set ns = namespace(a='x') %}" + MANY + "{% set ns.a = ns.a + ns.a %}" + END,
        "{{ 'a' + 'b' }}",
        "ab",
    ),
    "+ of lists": (
        "{% set ns = namespace(a=[1]) %}" + MANY + "{% set ns.a = ns.a + ns.a %}" + END,
        "{{ [1] + [2] }}",
        "[1, 2]",
    ),
    "+ of numbers": (
        "{% set ns = namespace(a=9 ** 600) %}{% for i in range(99) %}"
        "{% set ns.a = ns.a * 9 ** 600 + ns.a %}" + END,
        "{{ 1 + 2.5 }}",
        "3.5",
    ),
    "-": ("{{ messages[0].keys() - messages[0].keys() }}", "{{ 7 - 9 }}", "-2"),
    "* of a text": ("{{ 'x' * 2000000000 }}", "{{ '-' * 5 }}", "-----"),
    "* from the left": ("{{ 2000000000 * 'x' }}", "{{ 2 * 'ab' }}", "abab"),
    "* of a list": ("{{ ([1] * 200000000) | length }}", "{{ [1] * 3 }}", "[1, 1, 1]"),
    "* of numbers": (
        "{% set ns = namespace(a=9) %}{% for i in range(60) %}{% set ns.a = ns.a * ns.a %}" + END,
        "{{ 6 * 7 }}",
        "42",
    ),
    "**": ("{{ 9 ** 99999999 }}", "{{ 2 ** 10 }} {{ 4 ** 0.5 }}", "1024 2.0"),
    "/ and //": (
        "{% set n = ('f' * 1000000) | int(base=16) %}{{ n // 3 }}",
        "{{ 7 / 2 }} {{ 7 // 2 }}",
        "3.5 3",
    ),
    "% of numbers": ("{{ (9 ** 600 * 9 ** 600) * 9 % 7 }}", "{{ 7 % 4 }}", "3"),
    "~": (
        "{% set ns = namespace(a='x') %}" + MANY + "{% set ns.a = ns.a ~ ns.a %}" + END,
        "{{ 'a' ~ 1 ~ none }}",
        "a1None",
    ),
    "~ of lists": (LISTS + "{% set b = ns.a ~ '' %}", "{{ [1] ~ 'a' }}", "[1]a"),
    "==": (LISTS + "{{ ns.a == ns.b }}", "{{ [1] == [1] }}", "True"),
    "<": (LISTS + "{{ ns.a < ns.b }}", "{{ [1] < [2] }} {{ 1 < 2 < 3 }}", "True True"),
    "a chain of comparisons": (LISTS + "{{ 1 < ns.a <= ns.b }}", "{{ 3 > 2 > 1 }}", "True"),
    "in a text": (ALIKE + MANY + "{{ b in a }}" + END, "{{ 'b' in 'abc' }}", "True"),
    "in a list": (LISTS + "{{ ns.a in [ns.b] }}", "{{ 2 in [1, 2] }}", "True"),
    "in a dict": (TUPLES + "{{ ns.a in {} }}", "{{ 'a' not in {'a': 1} }}", "False"),
    "in a range": (MANY + "{{ 'x' in range(99999) }}" + END, "{{ 3 in range(5) }}", "True"),
    "a slice of a text": (LONG + MANY + "{% set b = a[1:] %}" + END, "{{ 'abc'[1:] }}", "bc"),
    "a slice of a list": (
        NUMBERS + MANY + "{% set b = a[::-1] %}" + END,
        "{{ [1, 2, 3][::-1] }}",
        "[3, 2, 1]",
    ),
    "an item": (TUPLES + "{{ messages[0][ns.a] }}", "{{ [1, 2][-1] }}{{ {'a': 1}['a'] }}", "21"),
    "an item of a long name": (
        LONG + MANY + "{{ messages[0][a] }}" + END,
        "{{ messages[0]['role'] }}",
        "user",
    ),
    # Values
    "a list": (
        "{% set ns = namespace(a=none) %}" + MANY + "{% for j in range(9) %}"
        "{% set ns.a = [ns.a, 0, 0, 0, 0, 0, 0, 0, 0, 0] %}" + END + END,
        "{{ [1, 'a', none] }}",
        "[1, 'a', None]",
    ),
    "a dict": (
        "{% set ns = namespace(a=none) %}" + MANY + "{% for j in range(9) %}"
        "{% set ns.a = {'a': ns.a} %}" + END + END,
        "{{ {'a': 1}.a }}",
        "1",
    ),
    "a dict's key": (TUPLES + "{{ {ns.a: 1} }}", "{{ {1: 2, 'a': 3} }}", "{1: 2, 'a': 3}"),
    "a macro kept": (
        "{% set ns = namespace(a=none) %}" + MANY + "{% for j in range(9) %}"
        "{% macro f() %}{% endmacro %}{% set ns.a = [ns.a, f] %}" + END + END,
        "{% macro f() %}a{% endmacro %}{% set b = [f] %}{{ b[0]() }}",
        "a",
    ),
    "printing": (LISTS + "{{ ns.a }}", "{{ [1, [2]] }}", "[1, [2]]"),
    "printing a namespace": (
        "{% set ns = namespace(a=1) %}{% set ns.a = [ns, ns] %}{{ ns }}",
        "{{ namespace(a=1) }}",
        "<Namespace {'a': 1}>",
    ),
    "printing a number": ("{{ 9 ** 600 ** 600 }}", "{{ 9 ** 20 }}", "12157665459056928801"),
    "printing a method": (
        LONG + MANY + "{{ (a | safe).join }}" + END,
        "{{ 'a'.join('bc') }}",
        "bac",
    ),
    "capturing": (
        "{% set ns = namespace(a='x') %}"
        + MANY
        + "{% set b %}{{ ns.a }}{{ ns.a }}{% endset %}{% set ns.a = b %}"
        + END,
        "{% set b %}a{{ 1 }}{% endset %}{{ b }}",
        "a1",
    ),
    "text of the source": (
        "{% set b %}" + MANY + "y" * 5000 + END + "{% endset %}{{ b | length }}",
        "{% for i in range(3) %}ab{% endfor %}",
        "ababab",
    ),
    "constants of the source": (
        MANY + "{% for i in range(99) %}{{ '" + "y" * 5000 + "' }}" + END + END,
        "{% for i in range(2) %}{{ 'ab' }}{% endfor %}",
        "abab",
    ),
    # Statements
    "loops": (MANY + MANY + END + END, "{% for i in [1, 2] %}{{ loop.index }}{% endfor %}", "12"),
    "a loop's test": (
        MANY + "{% for j in range(99999) if false %}" + END + END,
        "{% for i in range(5) if i % 2 %}{{ i }}{% endfor %}",
        "13",
    ),
    "a loop's body": (
        "{% for i in range(99999) %}" + "{% set b = i - 1 %}" * 500 + END,
        "{% for i in range(2) %}{% set b = i + 1 %}{{ b }}{% endfor %}",
        "12",
    ),
    "a recursive loop": (
        "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
        "{% for a in [[1, [2]]] recursive %}({% if a is sequence %}{{ loop(a) }}"
        "{% else %}{{ a }}{% endif %}){% endfor %}",
        "((1)((2)))",
    ),
    "a recursive loop that forks": (
        "{% set ns = namespace(a=[]) %}{% for i in range(50) %}{% set ns.a = [ns.a, ns.a] %}"
        "{% endfor %}{% for a in ns.a recursive %}{{ loop(a) }}{% endfor %}",
        "{% for a in [[], []] recursive %}{{ loop.depth }}{{ loop(a) }}{% endfor %}",
        "11",
    ),
    "a macro in itself": (
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
        "".join(str(n) for n in range(50, 0, -1)),
    ),
    "macros that fork": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(60) }}",
        "{% macro f(n) %}{% if n %}{{ n }}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
        "{{ f(2) }}",
        "211",
    ),
    "a macro's body": (
        "{% macro f() %}" + "{% set b = 1 %}" * 3000 + "{% endmacro %}"
        "{% for i in range(99999) %}{{ f() }}" + END,
        "{% macro f(a, b=2) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}",
        "12",
    ),
    "a call block": (
        "{% macro f() %}{{ caller() }}{% endmacro %}"
        + MANY
        + "{% call f() %}"
        + "{% set b = 1 %}" * 3000
        + "{% endcall %}"
        + END,
        "{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}a{% endcall %}",
        "<a>",
    ),
    "a filter block": (
        "{% filter indent(width=2000000000, first=true) %}a{% endfilter %}",
        "{% filter upper %}a{% endfilter %}",
        "A",
    ),
    "a generation block": (
        "{% generation %}" + MANY + MANY + END + END + "{% endgeneration %}",
        "a{% generation %}b{% endgeneration %}c",
        "abc",
    ),
    "break": (
        MANY + MANY + "{% if false %}{% break %}{% endif %}" + END + END,
        "{% for i in range(9) %}{% if i > 2 %}{% break %}{% endif %}{{ i }}{% endfor %}",
        "012",
    ),
    "output": (
        LONG + MANY + "{{ a }}" + END,
        "{{ messages[0].content[:2] }}",
        "xx",
    ),
    # Formats
    "% with a width": (
        "{{ '%1500000000d' % 1 }}",
        "{{ '%5d|%-5s|%05.1f' % (1, 'a', 2.25) }}",
        "    1|a    |002.2",
    ),
    "% with a name and a width": (
        "{{ '%(a)1500000000d' % {'a': 1} }}",
        "{{ '%(a)s' % {'a': 1} }}",
        "1",
    ),
    "% with names in brackets": ("{{ '%((a))1500000000d' % {'(a)': 1} }}", "{{ '%%' % () }}", "%"),
    "% with a star": ("{{ '%*d' % (1500000000, 1) }}", "{{ '%*d' % (3, 1) }}", "  1"),
    "% with a precision": ("{{ '%.1500000000d' % 1 }}", "{{ '%.3f' % 1 }}", "1.000"),
    "% of one value again and again": (
        LONG + "{{ ('%(a)s' * 1000) % {'a': a} }}",
        "{{ '%s and %s' % ('a', [1]) }}",
        "a and [1]",
    ),
    "% of lists": (LISTS + "{{ '%s' % ns.a }}", "{{ '%r' % 'a' }}", "'a'"),
    "% with digits": ("{{ ('%' ~ '1' * 3000 ~ 'd') % 1 }}", "{{ '12 %s' % 1 }}", "12 1"),
    "format filter": ("{{ '%1500000000d' | format(1) }}", "{{ '%s-%s' | format(1, 2) }}", "1-2"),
    "format filter of a list": (
        "{{ ['%1500000000d'] | format(1) }}",
        "{{ '%(a)s' | format(a=1) }}",
        "1",
    ),
    "format method": (
        "{{ '{:1500000000}'.format(1) }}",
        "{{ '{:>4}{b!r}'.format(1, b='a') }}",
        "   1'a'",
    ),
    "format method, nested": (
        "{{ '{:{}}'.format(1, 1500000000) }}",
        "{{ '{0}{0}'.format(1) }}",
        "11",
    ),
    "format method, other digits": (
        "{{ '{:\u0661\u0665\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0660}'.format(1) }}",
        "{{ '{:.2f}'.format(1) }}",
        "1.00",
    ),
    "format method of lists": (
        LISTS + "{{ '{}'.format(ns.a) }}",
        "{{ '{0[0]}'.format([1]) }}",
        "1",
    ),
    "format method of a loop": (
        "{% set a = 'x' * 1000000 %}{% for i in [a, a, a] %}"
        "{{ ('{0.nextitem}' * 999).format(loop) }}" + END,
        "{% for i in [1, 2] %}{{ '{0.index}'.format(loop) }}{% endfor %}",
        "12",
    ),
    "format_map": (
        "{{ '{a:1500000000}'.format_map({'a': 1}) }}",
        "{{ '{a}'.format_map({'a': 1}) }}",
        "1",
    ),
    "strftime_now": ("{{ strftime_now('%1500000000Y') }}", "{{ strftime_now('%%') }}", "%"),
    "tojson": (
        LISTS + "{{ ns.a | tojson }}",
        "{{ {'b': 1, 'a': 'ž<'} | tojson }}",
        '{"b": 1, "a": "ž<"}',
    ),
    "tojson with an indent": (
        "{{ [1] | tojson(indent=999999999) }}",
        "{{ [1] | tojson(indent=2) }}",
        "[\n  1\n]",
    ),
    "tojson with an indent, deep": (
        DEEP + "{% for i in range(2000) %}{% set b = ns.a | tojson(indent=64) %}" + END,
        "{{ [[]] | tojson(indent=1) }}",
        "[\n []\n]",
    ),
    "tojson with an indent that is a text": (
        LONG + "{% for i in range(99) %}{% set b = [[[1]]] | tojson(indent=a) %}" + END,
        "{{ [1] | tojson(indent='- ') }}",
        "[\n- 1\n]",
    ),
    "tojson with separators": (
        LONG + "{{ range(999) | list | tojson(separators=(a, a)) }}",
        "{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}",
        '{"a":2,"b":1}',
    ),
    "tojson in ascii": (
        "{% set a = '\U0001f40e' * 1000000 %}{{ [a, a, a] | tojson(ensure_ascii=true) }}",
        "{{ '\U0001f40e' | tojson(ensure_ascii=true) }}",
        '"\\ud83d\\udc0e"',
    ),
    "pprint": (
        LISTS + "{{ ns.a | pprint }}",
        "{{ {'b': [1], 'a': 'x'} | pprint }}",
        "{'a': 'x', 'b': [1]}",
    ),
    "pprint, deep": (
        "{% set ns = namespace(a=[1] * 500) %}{% for i in range(200) %}"
        "{% set ns.a = {'y' * 1000: ns.a} %}" + END + "{{ ns.a | pprint | length }}",
        "{{ 'a' | pprint }}",
        "'a'",
    ),
    # Texts
    "indent by a keyword": (
        "{{ 'a\nb' | indent(first=true, width=2000000000) }}",
        "{{ 'a\nb' | indent(width=2, first=true) }}",
        "  a\n  b",
    ),
    "indent": ("{{ 'a\nb' | indent(2000000000) }}", "{{ 'a\nb' | indent }}", "a\n    b"),
    "indent by a text": (
        "{{ ('a\n' * 3000) | indent('y' * 30000) }}",
        "{{ 'a\n\nb' | indent('> ', blank=true) }}",
        "a\n> \n> b",
    ),
    "indent of many lines": (
        "{{ ('\u2028' * 99999) | indent(1000, blank=true) }}",
        "{{ 'a' | indent(1) }}",
        "a",
    ),
    "replace": (
        LONG + "{{ a.replace('x', a) | length }}",
        "{{ 'aXa'.replace('a', 'bb', 1) }}",
        "bbXa",
    ),
    "replace of nothing": (
        LONG + "{{ a | replace('', 'y' * 99) | length }}",
        "{{ 'ab' | replace('', '-') }}",
        "-a-b-",
    ),
    "replace, filter": (
        LONG + "{{ a | replace(new=a, old='x', count=99999) | length }}",
        "{{ 'aaa' | replace('a', 'b', 2) }}",
        "bba",
    ),
    "replace, mapped": (
        LONG + "{{ [a] | map('replace', 'x', a) | list }}",
        "{{ ['a'] | map('replace', 'a', 'b') | list }}",
        "['b']",
    ),
    "replace, 64-fold": (
        "{% set ns = namespace(a='x') %}{% for i in range(9) %}"
        "{% set ns.a = ns.a.replace('x', 'x' * 64) %}" + END,
        "{% set ns = namespace(a='x') %}{% for i in range(2) %}"
        "{% set ns.a = ns.a.replace('x', 'xx') %}" + END + "{{ ns.a }}",
        "xxxx",
    ),
    "replace beside safe": (
        "{% set a = ('&' * 3000000) | safe %}{{ a.replace('z', '&' * 3000000) | length }}"
        "{{ (a + '&' * 3000000) | length }}",
        "{{ ('<' | safe) + '<' }}",
        "<&lt;",
    ),
    "join": (LONG + "{{ a | join(a) | length }}", "{{ [1, 'a'] | join('-') }}", "1-a"),
    "join, method": (LONG + "{{ a.join(a) | length }}", "{{ ', '.join(['a', 'b']) }}", "a, b"),
    "join, 64-fold": (
        "{% set ns = namespace(a='x' * 64) %}{% for i in range(9) %}"
        "{% set ns.a = ns.a | join('x' * 64) %}" + END,
        "{{ messages | join(', ', attribute='role') }}",
        "user",
    ),
    "join of lists": (LISTS + "{{ [ns.a] | join }}", "{{ [[1], 2] | join }}", "[1]2"),
    "find": (ALIKE + MANY + "{{ a.find(b) }}" + END, "{{ 'abcb'.find('b') }}", "1"),
    "rfind": (
        "{% set a = 'a' * 900000 %}{{ a.rfind('b' ~ 'a' * 450000) }}",
        "{{ 'abcb'.rfind('b', 0, 3) }}",
        "1",
    ),
    "index": (ALIKE + MANY + "{{ (a ~ b).index(b) }}" + END, "{{ 'abc'.index('c') }}", "2"),
    "rindex": (
        "{% set a = 'a' * 900000 %}{{ a.rindex('b' ~ 'a' * 450000) }}",
        "{{ 'abcb'.rindex('b') }}",
        "3",
    ),
    "count, method": (ALIKE + MANY + "{{ a.count(b) }}" + END, "{{ 'aba'.count('a') }}", "2"),
    "startswith": (
        LONG + MANY + "{{ a.startswith((a, a)) }}" + END,
        "{{ 'abc'.startswith(('x', 'a')) }}",
        "True",
    ),
    "split": (
        LONG + MANY + "{% set b = a.split('x') %}" + END,
        "{{ 'a<b'.split('<') }}",
        "['a', 'b']",
    ),
    "split at blanks": (
        "{{ ('x ' * 4000000).split() | length }}",
        "{{ ' a b '.split() }}",
        "['a', 'b']",
    ),
    "rsplit": (
        "{% set a = 'a' * 900000 %}{{ a.rsplit('b' ~ 'a' * 450000) }}",
        "{{ 'a,b,c'.rsplit(',', 1) }}",
        "['a,b', 'c']",
    ),
    "partition": (
        ALIKE + MANY + "{{ a.partition(b) }}" + END,
        "{{ 'a=b=c'.partition('=') }}",
        "('a', '=', 'b=c')",
    ),
    "rpartition": (
        "{% set a = 'a' * 900000 %}{{ a.rpartition('b' ~ 'a' * 450000) }}",
        "{{ 'a=b=c'.rpartition('=') }}",
        "('a=b', '=', 'c')",
    ),
    "splitlines": (
        "{% set a = 'xy\n' * 300000 %}{% for i in range(999) %}{% set b = a.splitlines() %}" + END,
        "{{ 'a\nb'.splitlines() }}",
        "['a', 'b']",
    ),
    "strip": (
        "{% set a = 'a' * 1000000 %}{{ a.strip('b' * 1000000 ~ 'a') | length }}",
        "{{ '-a-'.strip('-') }}",
        "a",
    ),
    "lstrip": (
        "{% set a = 'a' * 1000000 %}{{ a.lstrip('b' * 1000000 ~ 'a') | length }}",
        "{{ '  a '.lstrip() }}",
        "a ",
    ),
    "rstrip": (
        "{% set a = 'a' * 1000000 %}{{ a.rstrip('b' * 1000000 ~ 'a') | length }}",
        "{{ ' a..'.rstrip('.') }}",
        " a",
    ),
    "trim": (
        "{% set a = 'a' * 1000000 %}{{ a | trim('b' * 1000000 ~ 'a') | length }}",
        "{{ ' a ' | trim }}",
        "a",
    ),
    "removeprefix": (
        LONG + MANY + "{{ a.removeprefix('x') | length }}" + END,
        "{{ 'abc'.removeprefix('a').removesuffix('c') }}",
        "b",
    ),
    "center": ("{{ 'x' | center(2000000000) }}", "{{ 'x' | center(5) }}|", "  x  |"),
    "center, method": ("{{ 'x'.center(2000000000) }}", "{{ 'x'.center(5, '*') }}", "**x**"),
    "ljust": ("{{ 'x'.ljust(2000000000, '.') }}", "{{ 'x'.ljust(3, '.') }}", "x.."),
    "rjust": ("{{ 'x'.rjust(2000000000) }}", "{{ 'x'.rjust(3) }}", "  x"),
    "zfill": ("{{ 'x'.zfill(2000000000) }}", "{{ '7'.zfill(3) }}", "007"),
    "expandtabs": ("{{ '\t'.expandtabs(2000000000) }}", "{{ 'a\tb'.expandtabs(4) }}", "a   b"),
    "expandtabs by a keyword": (
        "{{ '\t\t'.expandtabs(tabsize=2000000000) }}",
        "{{ '\t'.expandtabs(tabsize=1) }}|",
        " |",
    ),
    "wordwrap": (
        "{{ ('x' * 900000) | wordwrap(1) }}",
        "{{ 'aa bb cc' | wordwrap(5) }}",
        "aa bb\ncc",
    ),
    "wordwrap by a text": (
        "{{ ('x ' * 9000) | wordwrap(1, wrapstring='y' * 90000) }}",
        "{{ 'aa bb' | wordwrap(2, wrapstring='|') }}",
        "aa|bb",
    ),
    "truncate": (
        LONG + MANY + "{{ a | truncate(900000) | length }}" + END,
        "{{ 'aa bb cc' | truncate(5, leeway=0) }}{{ 'abcdef' | truncate(3, true, '', 0) }}",
        "aa...abc",
    ),
    "striptags": (
        "{{ ('<!---->' * 99999 ~ 'a' * 99999) | striptags | length }}",
        "{{ '<b>a</b> &amp; b' | striptags }}",
        "a & b",
    ),
    "xmlattr": (
        LISTS + "{{ {'a': ns.a} | xmlattr }}",
        "{{ {'a': 1, 'b': '\"'} | xmlattr }}",
        ' a="1" b="&#34;"',
    ),
    "urlencode": (
        LISTS + "{{ {'a': ns.a} | urlencode }}",
        "{{ 'a b/ž' | urlencode }} {{ {'a': 1} | urlencode }}",
        "a%20b/%C5%BE a=1",
    ),
    "escape": (
        "{{ ('&' * 4000000) | escape | length }}",
        "{{ '<a>' | e }}{{ '<' | escape }}",
        "&lt;a&gt;&lt;",
    ),
    "forceescape": (
        "{{ ('&' * 4000000) | forceescape | length }}",
        "{{ '<' | safe | forceescape }}",
        "&lt;",
    ),
    "title": (
        "{{ ('a-' * 900000) | title | length }}",
        "{{ 'ab-cd ef' | title }} {{ 'ab'.title() }}",
        "Ab-Cd Ef Ab",
    ),
    "wordcount": ("{{ ('a ' * 900000) | wordcount }}", "{{ 'a b c' | wordcount }}", "3"),
    "upper": (
        LONG + MANY + "{{ a | upper | length }}" + END,
        "{{ 'ab' | upper }}{{ 'ß'.upper() }}",
        "ABSS",
    ),
    "lower of lists": (
        LISTS + "{{ ns.a | lower }}",
        "{{ 'AB' | lower }}{{ ['A'] | lower }}",
        "ab['a']",
    ),
    "capitalize": (
        LONG + MANY + "{{ a | capitalize | length }}" + END,
        "{{ 'aB' | capitalize }}{{ 'aB'.swapcase() }}{{ 'ẞ'.casefold() }}",
        "AbAbss",
    ),
    "string": (LISTS + "{{ ns.a | string }}", "{{ 1 | string }}", "1"),
    "isalnum": (
        LONG + MANY + "{{ a.isalnum() }}" + END,
        "{{ 'a'.isalnum() }}{{ '1'.isdigit() }}{{ '1'.isdecimal() }}{{ 'a'.isascii() }}"
        "{{ 'Aa'.istitle() }}{{ 'a'.isidentifier() }}{{ 'a'.isprintable() }}",
        "True" * 7,
    ),
    # Lists
    "list of a text": (
        "{% set a = '\U0001f40e' * 4000000 %}{{ a | list | length }}",
        "{{ 'ab' | list }}",
        "['a', 'b']",
    ),
    "list of a range": (
        MANY + "{% set b = range(99999) | list %}" + END,
        "{{ range(3) | list }}",
        "[0, 1, 2]",
    ),
    "reverse": (
        LONG + MANY + "{% set b = a | reverse %}" + END,
        "{{ 'ab' | reverse }}{{ [1, 2] | reverse | list }}",
        "ba[2, 1]",
    ),
    "sort": (
        "{% set a = 'x' * 200 %}{% set b = [a] * 20000 %}"
        "{% for i in range(99) %}{% set c = b | sort %}" + END,
        "{{ [3, 1, 2] | sort(reverse=true) }}{{ ['b', 'A'] | sort }}",
        "[3, 2, 1]['A', 'b']",
    ),
    "sort by many attributes": (
        "{% set b = [{}] * 20000 %}{{ b | sort(attribute='a,' * 9999) | length }}",
        "{{ [{'a': 2}, {'a': 1}] | sort(attribute='a') | map(attribute='a') | list }}",
        "[1, 2]",
    ),
    "sort of lists": (
        LISTS + "{{ [ns.a, ns.b] | sort | length }}",
        "{{ [[2], [1]] | sort }}",
        "[[1], [2]]",
    ),
    "dictsort": (
        LISTS + "{{ {'a': ns.a, 'b': ns.b} | dictsort(by='value') }}",
        "{{ {'b': 1, 'a': 2} | dictsort }}{{ {'b': 1, 'a': 2} | dictsort(false, 'value') }}",
        "[('a', 2), ('b', 1)][('b', 1), ('a', 2)]",
    ),
    "unique": (
        NUMBERS + "{% for i in range(99) %}{% set b = a | unique %}" + END,
        "{{ [1, 2, 1] | unique | list }}"
        "{{ [{'a': 1}, {'a': 1}] | unique(attribute='a') | list | length }}",
        "[1, 2]1",
    ),
    "unique of tuples": (
        TUPLES + "{{ [ns.a, ns.a] | unique }}",
        "{{ ['a', 'A', 'b'] | unique | list }}",
        "['a', 'b']",
    ),
    "unique of tuples by attribute": (
        TUPLES + "{{ [{'a': ns.a}] | unique(attribute='a') | length }}",
        "{{ messages | unique(attribute='role') | list | length }}",
        "1",
    ),
    "groupby": (
        "{% set b = [{'a': 'x' * 200}] * 20000 %}"
        "{% for i in range(99) %}{% set c = b | groupby('a') %}" + END,
        "{% for key, items in [{'a': 2}, {'a': 1}, {'a': 2}] | groupby('a') %}"
        "{{ key }}:{{ items | length }} {% endfor %}",
        "1:1 2:2 ",
    ),
    "min and max": (
        LISTS + "{{ [ns.a, ns.b] | max }}",
        "{{ [3, 1, 2] | max }}{{ [3, 1] | min }}{{ [{'a': 1}, {'a': 2}] | max(attribute='a') }}",
        "31{'a': 2}",
    ),
    "map by a long path": (
        "{% set b = range(5000) | list %}{{ b | map(attribute='a.' * 9999) | list | length }}",
        "{{ [{'a': {'b': 1}}, {}] | map(attribute='a.b', default=0) | list }}",
        "[1, 0]",
    ),
    "map by a path of numbers": (
        "{% set b = [[1]] * 5000 %}{{ b | map(attribute='0.' * 9999) | list | length }}",
        "{{ [[1, 2]] | map(attribute=1) | list }}",
        "[2]",
    ),
    "map by a filter": (
        MANY + "{{ range(999) | map('string') | list | length }}" + END,
        "{{ ['a'] | map('upper') | list }}",
        "['A']",
    ),
    "map by a filter that pads": (
        "{{ ['a'] | map('center', 2000000000) | list }}",
        "{{ ['a'] | map('center', 3) | list }}",
        "[' a ']",
    ),
    "selectattr by a long path": (
        "{% set b = [{}] * 5000 %}{{ b | selectattr('a.' * 9999) | list | length }}",
        "{{ [{'a': 1}, {'a': 2}] | selectattr('a', 'gt', 1) | list }}"
        "{{ [{'a': 0}] | rejectattr('a') | list }}",
        "[{'a': 2}][{'a': 0}]",
    ),
    "select by a test": (
        LISTS + "{{ [ns.a] | select('eq', ns.b) | list }}",
        "{{ [1, 2] | select('odd') | list }}{{ [1, none] | reject('none') | list }}",
        "[1][1]",
    ),
    "batch": (
        "{{ [1] | batch(999999999, 0) | list | length }}",
        "{{ [1, 2, 3] | batch(2, 0) | list }}",
        "[[1, 2], [3, 0]]",
    ),
    "slice": (
        "{{ [1] | slice(999999999) | list | length }}",
        "{{ [1, 2, 3] | slice(2) | list }}",
        "[[1, 2], [3]]",
    ),
    "sum": (
        "{{ ([[1] * 999] * 9999) | sum(start=[]) | length }}",
        "{{ [1, 2.5] | sum }}{{ [{'a': 1}] | sum('a', 5) }}{{ [[1], [2]] | sum(start=[]) }}",
        "3.56[1, 2]",
    ),
    "items": (
        MANY + "{% set b = {'a': 1} | items %}" * 99 + END,
        "{{ {'a': 1} | items | list }}",
        "[('a', 1)]",
    ),
    "first and last": (
        MANY + MANY + "{{ 'ab' | first }}" + END + END,
        "{{ [1, 2] | first }}{{ [1, 2] | last }}",
        "12",
    ),
    "copies": (
        NUMBERS + MANY + "{% set b = a.copy() %}" + END,
        "{{ [1].copy() }}{{ {'a': 1}.copy() }}",
        "[1]{'a': 1}",
    ),
    "a list's index": (
        LISTS + "{{ [ns.a].index(ns.b) }}",
        "{{ [1, 2].index(2) }}{{ (1, 1).count(1) }}",
        "12",
    ),
    "a dict's get": (
        TUPLES + "{{ messages[0].get(ns.a) }}",
        "{{ messages[0].get('x', 'none') }}",
        "none",
    ),
    "a dict's items": (
        MANY + "{% for k, v in messages[0].items() %}{% for j in range(9) %}" + END + END + END,
        "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}",
        "a1",
    ),
    # Numbers
    "int": (
        "{{ ('f' * 1000000) | int(base=16) }}",
        "{{ '42' | int }}{{ 'x' | int(7) }}{{ 'ff' | int(base=16) }}{{ '1.5' | int }}",
        "4272551",
    ),
    "float": (
        "{% set a = 'x' * 4000000 %}{{ a | float }}",
        "{{ '1.5' | float }}{{ 'x' | float(2.0) }}",
        "1.52.0",
    ),
    "round": (
        "{{ 1.5 | round(999999999, 'floor') }}",
        "{{ 2.567 | round(1) }}{{ 2.1 | round(method='ceil') | int }}",
        "2.63",
    ),
    "abs": (MANY + MANY + "{{ -1 | abs }}" + END + END, "{{ -3 | abs }}", "3"),
    "filesizeformat": (
        "{% set a = '1' * 4000000 %}{{ a | filesizeformat }}",
        "{{ 2000 | filesizeformat }}",
        "2.0 kB",
    ),
    # Tests
    "a test of equality": (
        LISTS + "{{ ns.a is eq(ns.b) }}",
        "{{ 1 is eq(1) }}{{ 1 is ne 1 }}{{ 2 is ge 1 }}",
        "TrueFalseTrue",
    ),
    "a test of membership": (LISTS + "{{ ns.a is in([ns.b]) }}", "{{ 1 is in([1]) }}", "True"),
    "divisibleby": ("{{ '%1500000000d' is divisibleby(1) }}", "{{ 4 is divisibleby(2) }}", "True"),
    "odd and even": (
        "{{ '%1500000000d' is odd }}{{ '%1500000000d' is even }}",
        "{{ 3 is odd }}{{ 3 is even }}",
        "TrueFalse",
    ),
    "lower and upper": (
        LISTS + "{{ ns.a is lower }}",
        "{{ 'a' is lower }}{{ 'a' is upper }}",
        "TrueFalse",
    ),
    "tests of kinds": (
        MANY + MANY + "{{ 1 is number }}" + END + END,
        "{{ 1 is number }}{{ 'a' is string }}{{ {} is mapping }}{{ [] is sequence }}"
        "{{ 1 is integer }}{{ 1.0 is float }}{{ true is boolean }}{{ none is none }}"
        "{{ x is undefined }}{{ [] is iterable }}{{ range is callable }}"
        "{{ 'upper' is filter }}{{ 'odd' is test }}{{ 1 is sameas(1) }}{{ true is true }}",
        "True" * 15,
    ),
    # What templates may call
    "range": ("{% for i in range(9999999999) %}" + END, "{{ range(1, 6, 2) | list }}", "[1, 3, 5]"),
    "namespace": (
        "{% set ns = namespace(a=none) %}"
        + MANY
        + "{% for j in range(9) %}{% set ns.a = namespace(a=ns.a) %}"
        + END
        + END,
        "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns.b }}",
        "12",
    ),
    "dict": (
        TUPLES + "{{ dict([(ns.a, 1)]) }}",
        "{{ dict([('a', 1)], b=2) }}{{ dict(a=1) }}{{ dict({'a': 1}) }}",
        "{'a': 1, 'b': 2}{'a': 1}{'a': 1}",
    ),
    "cycler": (
        MANY + MANY + "{{ cycler(1, 2).next() }}" + END + END,
        "{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.current }}",
        "abab",
    ),
    "joiner": (
        MANY + MANY + "{{ joiner()() }}" + END + END,
        "{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b",
        "a, b",
    ),
    "loop.cycle": (
        MANY + MANY + "{{ loop.cycle(1, 2) }}" + END + END,
        "{% for i in 'abc' %}{{ loop.cycle(1, 2) }}{% endfor %}",
        "121",
    ),
    "loop as a list": (
        LONG + MANY + "{% for j in [a] * 9999 %}{{ loop | join | length }}" + END + END,
        "{% for i in [1, 2] %}{{ loop is defined }}{{ loop.length }}{% endfor %}",
        "True2True2",
    ),
    "arguments without end": (
        "{% macro f() %}{{ varargs | length }}{% endmacro %}"
        + MANY
        + "{% set b = f(*range(99999)) %}"
        + END,
        "{% macro f() %}{{ varargs | length }}{{ kwargs }}{% endmacro %}{{ f(*[1, 2], a=3) }}",
        "2{'a': 3}",
    ),
    "attributes that are not there": (
        MANY + "{% set b = i.a %}{% set c = messages['b'] %}" * 900 + END,
        "{{ messages[0].role }}{{ messages.a }}",
        "user",
    ),
    "loop.changed": (
        LISTS + "{% for i in [1, 2] %}{{ loop.changed([ns.a, ns.b][i - 1]) }}" + END,
        "{% for i in [1, 1, 2] %}{{ loop.changed(i) }}{% endfor %}",
        "TrueFalseTrue",
    ),
    "raise_exception": (
        LISTS + "{{ raise_exception(ns.a) }}",
        "{% if false %}{{ raise_exception('x') }}{% endif %}a",
        "a",
    ),
    "attr": (
        LONG + MANY + "{{ messages | attr(a) }}" + END,
        "{{ namespace(a=1) | attr('a') }}{{ 'ab' | attr('upper') is callable }}",
        "1True",
    ),
    "default": (
        MANY + MANY + "{{ x | default(1) }}" + END + END,
        "{{ x | default(1) }}{{ '' | d('a', true) }}",
        "1a",
    ),
}
