"""Grammars compiled with llguidance: kept, bounded, refused in a sentence."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

import pyengine
from pyengine.grammar.asked import Source
from pyengine.grammar.compiled import MOST_KEPT, compile_grammar
from pyengine.grammar.matcher import GrammarMatcher
from pyengine.task import embedded_pair

pytest.importorskip("llguidance", reason="the extra grammar is not installed")


def schema(value: Any) -> Source:
    return Source("json_schema", json.dumps(value))


def chain(count: int, link: str) -> Source:
    """So many rules that each lead to the next."""
    rules = "\n".join(link.format(f"r{i}", f"r{i + 1}") for i in range(count))
    return Source("lark", f'start: r0\n{rules}\nr{count}: "a"')


def terminals(count: int) -> Source:
    """The same of terminals."""
    text = chain(count, '{}: {} "x"').text
    return Source("lark", text.replace("r", "R").replace("staRt", "start"))


def refs(count: int, link: Any) -> Source:
    defs = {f"a{i}": link({"$ref": f"#/$defs/a{i + 1}"}) for i in range(count)}
    return schema({"$ref": "#/$defs/a0", "$defs": {**defs, f"a{count}": {"type": "null"}}})


def walk(source: Source, steps: int = 20) -> str | None:
    """Compile and follow a random text; what was said against it."""
    pair = embedded_pair()
    try:
        grammar = compile_grammar(pair, source)
        matcher = GrammarMatcher(grammar, pair.tokenizer, [2])
        rng = random.Random(1)
        for _ in range(steps):
            row = np.zeros(grammar.words, np.uint32)
            matcher.fill(row)
            ids = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
            token = int(rng.choice(ids))
            if token in grammar.stop_ids:
                break
            assert matcher.add(token)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return None


HOSTILE = {
    "rules in a chain": chain(4000, '{}: {} "x"'),
    "terminals in a chain": terminals(4000),
    "rules that double": chain(60, "{0}: {1} {1}"),
    "groups in groups": Source("lark", "start: " + "(" * 20000 + '"a"' + ")" * 20000),
    "a rule of itself": Source("lark", "start: start"),
    "no such rule": Source("lark", "start: foo"),
    "no grammar": Source("lark", "}{"),
    "a file": Source("lark", "%import /etc/passwd.X\nstart: X"),
    "ambiguous": Source("lark", 'start: start start | "a" |'),
    "many terminals": Source("lark", "start: " + " | ".join(f"/a{{{i}}}b*/" for i in range(2000))),
    "refs in a chain": refs(2500, lambda ref: ref),
    "lists in a chain": refs(2000, lambda ref: {"type": "array", "items": ref}),
    "all of a chain": refs(1800, lambda ref: {"allOf": [ref, {"type": ["string", "null"]}]}),
    "itself": schema({"$ref": "#"}),
    "no such ref": schema({"$ref": "#/$defs/none"}),
    "a ref elsewhere": schema({"$ref": "https://example.com/x.json"}),
    "a ref to a file": schema({"$ref": "file:///etc/passwd"}),
    "many properties": schema({"type": "object", "properties": {f"p{i}": {} for i in range(3000)}}),
    "products of unions": schema(
        {
            "allOf": [
                {"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"}}} for j in range(10)]}
                for i in range(20)
            ]
        }
    ),
    "long enum": schema({"enum": [f"value {7919 * i}" for i in range(6000)]}),
    "patterns and patterns": schema(
        {"allOf": [{"type": "string", "pattern": ".*".join("abcdefgh"[i:])} for i in range(6)]}
    ),
    "a large factor": schema({"type": "integer", "multipleOf": 10**9 + 7}),
    "no value": schema({"type": "integer", "minimum": 5, "maximum": 4}),
    "an unknown type": schema({"type": "tuple"}),
    "an unknown keyword": schema({"type": "object", "dependentSchemas": {"a": {"type": "null"}}}),
    "stars in stars": Source("regex", "(a+)+$"),
    "counted in counted": Source("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "exponential": Source("regex", "(a|b)*a(a|b){300}"),
    "groups of a regex": Source("regex", "(" * 8000 + "a" + ")" * 8000),
    "as long as may be": Source("regex", "a" * (1 << 14)),
    "looks ahead": Source("regex", "(?=a)b"),
    "refers back": Source("regex", r"(a)\1"),
    "matches nothing": Source("regex", r"[^\s\S]"),
}  # fmt: skip
REFUSED = {
    "groups in groups",
    "a rule of itself",
    "no such rule",
    "no grammar",
    "a file",
    "itself",
    "no such ref",
    "a ref elsewhere",
    "a ref to a file",
    "many properties",
    "products of unions",
    "patterns and patterns",
    "a large factor",
    "no value",
    "an unknown type",
    "an unknown keyword",
    "groups of a regex",
    "looks ahead",
    "refers back",
    "matches nothing",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_bounded(name: str) -> None:
    """Compiled and followed, or refused in one line; no crash, and processor time is bounded."""
    start = time.process_time()
    said = walk(HOSTILE[name])
    assert time.process_time() - start < 60  # they take up to 3 s
    if name in REFUSED:
        assert said is not None, name
    if said is not None:
        assert said.startswith("[grammar] ")
        assert "\n" not in said
        assert len(said) < 400


LARK = 'start : a A "x" /y+/ | ( ) * {1,3} %import common.INT [ ] ~ & <|turn> <[5]> %json {} \\'
REGEX = "a [ ] ^ ( ) | * + ? {2,} { \\d \\p{L} (?i) ."
KEYS = (
    "type items enum const properties required anyOf allOf $ref minimum maxLength pattern format "
    "additionalProperties prefixItems"
)


def test_random_grammars_do_no_harm() -> None:
    """Pieces of grammars, regexes and schemas in any order."""
    rng = random.Random(5)

    def value(depth: int) -> Any:
        if not depth or rng.random() < 0.2:
            return rng.choice([None, True, 3, -1.5, "string", "object", "#", "date", [], {}, 1e300])
        if rng.random() < 0.3:
            return [value(depth - 1) for _ in range(rng.randrange(3))]
        return {rng.choice(KEYS.split()): value(depth - 1) for _ in range(rng.randrange(4))}

    for _ in range(100):
        words = [rng.choice(LARK.split(" ")) + rng.choice([" ", "\n", ""]) for _ in range(9)]
        sources = [
            Source("lark", "start: " + "".join(words)),
            Source("regex", "".join(rng.choice(REGEX.split()) for _ in range(9))),
            schema(value(4)),
        ]
        for said in map(walk, sources):
            assert said is None or (said.startswith("[grammar] ") and "\n" not in said)


def test_a_grammar_is_compiled_once_and_the_oldest_is_dropped() -> None:
    pair = embedded_pair()
    first = compile_grammar(pair, Source("regex", "kept"))
    assert compile_grammar(pair, Source("regex", "kept")) is first
    for n in range(MOST_KEPT):
        compile_grammar(pair, Source("regex", f"other {n}"))
    assert compile_grammar(pair, Source("regex", "kept")) is not first


def test_threads_compile_and_follow_at_once() -> None:
    """The stack of a thread may be small: the library descends on one of its own."""
    said: list[str | None] = []
    usual = threading.stack_size(1 << 18)
    try:
        threads = [
            threading.Thread(target=lambda n=n: said.append(walk(chain(1000 + n, '{}: {} "x"'))))
            for n in range(4)
        ]
        for thread in threads:
            thread.start()
    finally:
        threading.stack_size(usual)
    for thread in threads:
        thread.join()
    assert said == [None] * 4


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ValueError, match=r'pip install "pyengine-mlx\[grammar\]"'):
        pyengine.generate("a", regex="a")
