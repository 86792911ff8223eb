"""A grammar followed through a text: thoughts before it, its end, and tokens taken back."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pyengine.grammar.asked import Source
from pyengine.grammar.compiled import Grammar, compile_grammar
from pyengine.grammar.matcher import GrammarMatcher
from pyengine.task import embedded_pair
from pyengine.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="the extra grammar is not installed")

NUMBERS = Source("regex", "[0-9]{2,3}(;[0-9]{2,3})*")


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return compile_grammar(embedded_pair(), NUMBERS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The embedded pair's, as if its template had a channel for thoughts."""
    return Tokenizer(embedded_pair().tokenizer._pieces, {}, "<|channel>thought<channel|><|turn>")


def allowed(matcher: GrammarMatcher) -> set[int]:
    row = np.zeros(40, np.uint32)
    matcher.fill(row)
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def test_an_answer_ends_where_the_grammar_accepts(grammar: Grammar, tokenizer: Tokenizer) -> None:
    matcher = GrammarMatcher(grammar, embedded_pair().tokenizer, [2])
    stops = set(grammar.stop_ids)
    assert stops == {1, 9, 16}
    one, two, semicolon = (tokenizer.encode(t)[0] for t in "12;")
    for token, accepts in (
        (one, False),
        (two, True),
        (semicolon, False),
        (one, False),
        (two, True),
    ):
        assert not matcher.add(semicolon if accepts is False and token != semicolon else 1280 - 1)
        assert matcher.add(token)
        assert bool(allowed(matcher) & stops) is accepts
        if accepts:
            assert stops <= allowed(matcher)
    assert matcher.add(16)
    assert allowed(matcher) == set()
    assert not matcher.add(one)
    matcher.take_back(1)
    assert stops <= allowed(matcher)


def test_where_nothing_else_may_come_one_id_ends_it() -> None:
    """Which of them does changes no text: so it is forced, and costs no draft."""
    pair = embedded_pair()
    grammar = compile_grammar(pair, Source("regex", "a"))
    matcher = GrammarMatcher(grammar, pair.tokenizer, [2])
    assert matcher.add(pair.tokenizer.encode("a")[0])
    assert allowed(matcher) == {16}


def test_thoughts_come_before_the_grammar(grammar: Grammar, tokenizer: Tokenizer) -> None:
    opens, closes = tokenizer.channel_ids()
    think, turn, ends = (tokenizer.id_of(m) for m in ("<|think|>", "<|turn>", "<turn|>"))
    assert think is not None
    assert turn is not None
    assert ends is not None
    digit, word = tokenizer.encode("1")[0], tokenizer.encode("h")[0]

    def start(*prompt: int) -> GrammarMatcher:
        return GrammarMatcher(grammar, tokenizer, [2, *prompt])

    answer = allowed(start(turn))
    assert digit in answer
    assert not {word, opens} & answer
    # A prompt that asks to think: the answer may begin with a thought
    asked = start(turn, think, ends, turn)
    assert allowed(asked) == answer | {opens}
    assert asked.add(opens)
    thought = allowed(asked)
    assert {word, closes} <= thought
    assert len(thought) == 1280 - len(grammar.stop_ids)
    assert not asked.add(16)  # a thought is no answer
    assert asked.add(word)
    assert asked.add(closes)
    assert allowed(asked) == answer
    assert not asked.add(opens)
    assert asked.add(digit)
    # Back to the first token, and without a thought
    asked.take_back(4)
    assert allowed(asked) == answer | {opens}
    assert asked.add(digit)
    assert opens not in allowed(asked)
    # The prompt leaves a thought open, or holds one that is over
    assert allowed(start(turn, opens, word)) == thought
    assert allowed(start(turn, think, opens, closes)) == answer
    # What stands in an earlier turn says nothing
    assert allowed(start(turn, opens, word, ends, turn)) == answer


def test_masks_do_not_depend_on_what_was_taken_back(grammar: Grammar, tokenizer: Tokenizer) -> None:
    """Random walks with detours have the masks of the straight way: so a text does not depend on
    how many drafts were refused."""
    rng, pair = random.Random(2), embedded_pair()
    sources = [
        NUMBERS,
        Source("lark", 'start: ("ab" x | /[a-c]+/ "!")+\nx: "q" /.{0,4}/ | "while" "True"'),
        Source("json_schema", '{"type": "object", "properties": {"a": {"type": "string"}, '
               '"bcd": {"type": "array", "items": {"type": ["null", "integer"]}}}}'),
    ]  # fmt: skip
    for source in sources:
        own = compile_grammar(pair, source)
        for _ in range(15):
            crooked = GrammarMatcher(own, tokenizer, [2])
            text: list[int] = []
            for _ in range(12):
                detour = 0
                for _ in range(rng.randrange(5)):
                    if not (ids := allowed(crooked)):
                        break
                    assert crooked.add(rng.choice(sorted(ids)))
                    detour += 1
                crooked.take_back(detour)
                straight = GrammarMatcher(own, tokenizer, [2])
                assert all(map(straight.add, text))
                ids = allowed(crooked)
                assert ids == allowed(straight)
                token = rng.choice(sorted(ids))
                if token in own.stop_ids:
                    break
                assert crooked.add(token)
                text.append(token)


def test_a_matcher_that_failed_goes_back(tokenizer: Tokenizer) -> None:
    """What is too complex behind drafts that are refused is forgotten with them."""
    own = compile_grammar(embedded_pair(), Source("regex", "((a{1,1000}){1,1000}){1,1000}"))
    matcher = GrammarMatcher(own, tokenizer, [2])
    a = tokenizer.encode("a")[0]
    count = 0
    with pytest.raises(RuntimeError, match=r"^\[grammar\] .* too many expressions"):
        while count < 200:
            allowed(matcher)
            assert matcher.add(a)
            count += 1
    matcher.take_back(count)
    assert a in allowed(matcher)
