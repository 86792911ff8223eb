"""Answers of the embedded pair under schemas: valid, equal at every block size and in company."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
from schemas import SCHEMAS

import pyengine
from pyengine.ops.accept_block import RULES
from pyengine.task import Result, embedded_pair

pytest.importorskip("llguidance", reason="the extra grammar is not installed")

PROMPT = "Create a single-file HTML5 canvas Flappy Bird game."


def form(schema: Any) -> dict[str, Any]:
    inner = {"name": "answer", "schema": schema, "strict": True}
    return {"type": "json_schema", "json_schema": inner}


def answer(schema: Any, seed: int, block_size: int | None = None, **more: Any) -> Result:
    """At temperature 1, the whole vocabulary and the whole mass."""
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": seed, **more}
    return pyengine.generate(
        PROMPT,
        response_format=form(schema),
        sampling=sampling,
        block_size=block_size,
        max_tokens=500,
    )


def check(result: Result, schema: Any) -> None:
    assert result.finish_reason == "stop"
    checker = jsonschema.FormatChecker(["date"])
    jsonschema.validate(json.loads(result.text), schema, format_checker=checker)


@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_are_valid(name: str) -> None:
    for seed, rule in enumerate(("residual", "block")):
        check(answer(SCHEMAS[name], seed, verify=rule), SCHEMAS[name])


@pytest.mark.parametrize("name", ["choice", "person", "date"])
def test_an_answer_is_the_same_at_every_block_size(name: str) -> None:
    for settings in ({"verify": "coupled"}, {"temperature": 0}):
        plain = answer(SCHEMAS[name], 4, 1, **settings)
        for block in (2, 7):
            got = answer(SCHEMAS[name], 4, block, **settings)
            assert (got.tokens, got.text) == (plain.tokens, plain.text), (name, block)
            assert got.stats.forced > 0


@pytest.mark.long
@pytest.mark.parametrize("name", SCHEMAS)
def test_answers_of_two_hundred_seeds(name: str) -> None:
    """20 seeds of each schema at three block sizes; valid and equal."""
    for seed in range(20):
        plain = answer(SCHEMAS[name], seed, 1, verify="coupled")
        check(plain, SCHEMAS[name])
        for block in (2, 4, 8):
            assert answer(SCHEMAS[name], seed, block, verify="coupled").tokens == plain.tokens
        for rule in ("residual", "block"):
            check(answer(SCHEMAS[name], seed, 5, verify=rule), SCHEMAS[name])


def test_json_object_regex_and_lark() -> None:
    def ask(**more: Any) -> str:
        result = pyengine.generate(PROMPT, sampling={"temperature": 1.0, "seed": 3}, **more)
        assert result.finish_reason == "stop"
        return result.text

    made = ask(regex=r"[a-f]{3}-[0-9]{2,4}", max_tokens=40)
    assert made[3] == "-"
    assert set(made[:3]) <= set("abcdef")
    assert made[4:].isdigit()
    assert ask(grammar='start: "x" ("yes" | "no") "z"', max_tokens=10) in ("xyesz", "xnoz")
    cut = pyengine.generate(PROMPT, response_format={"type": "json_object"}, max_tokens=30)
    assert cut.text.startswith("{")
    assert len(cut.tokens) <= 30
    free = pyengine.generate(
        PROMPT, response_format={"type": "text"}, max_tokens=5, sampling={"seed": 1}
    )
    assert free.text == pyengine.generate(PROMPT, max_tokens=5, sampling={"seed": 1}).text


def test_other_settings_hold_within_the_grammar() -> None:
    """Stop strings, penalties, bias, suppressed tokens, log-probabilities, lookup, a prefix."""
    tokenizer, schema = embedded_pair().tokenizer, SCHEMAS["person"]
    red = tokenizer.encode("red")[0]
    settings: dict[str, Any] = {
        "verify": "coupled",
        "logprobs": 2,
        "presence_penalty": 0.4,
        "logit_bias": {red: 3.0},
    }
    plain = answer(schema, 5, 1, **settings)
    got = answer(schema, 5, 6, **settings)
    assert got.tokens == plain.tokens
    assert got.logprobs == plain.logprobs
    assert [entry.token for entry in got.logprobs or []] == got.tokens
    prefix = pyengine.Prefix()
    for block, drafter in ((8, "lookup"), (4, "assistant")):
        other = pyengine.generate(
            PROMPT,
            response_format=form(schema),
            sampling={"top_k": 0, "top_p": 1.0, "seed": 5, **settings},
            block_size=block,
            drafter=drafter,
            max_tokens=500,
            prefix=prefix,
        )
        assert other.tokens == plain.tokens
    stopped = pyengine.generate(
        PROMPT,
        response_format=form(schema),
        sampling={"top_k": 0, "top_p": 1.0, "seed": 5, **settings},
        stop='"age"',
        max_tokens=500,
    )
    assert plain.text.startswith(stopped.text)
    assert stopped.text.endswith(", ")


def texts(tasks: Sequence[dict[str, Any]], together: bool) -> list[tuple[str, str | None]]:
    found = []
    with pyengine.Engine(sequences=6) as engine:
        requests = []
        for task in tasks:
            requests.append(engine.submit(PROMPT, **task))
            if not together:
                list(requests[-1])
        for request in requests:
            list(request)
            found.append((request.result.text, request.result.finish_reason))
    return found


def test_guided_and_free_texts_in_one_engine_are_those_alone() -> None:
    tasks: list[dict[str, Any]] = []
    for n, name in enumerate(["person", None, "point", "union", None, "choice"]):
        sampling = {"seed": n, "verify": RULES[n % 3], "logprobs": 1 if n == 3 else None}
        tasks.append({"sampling": sampling, "block_size": 1 + n, "max_tokens": 60})
        if name is not None:
            tasks[-1]["response_format"] = form(SCHEMAS[name])
    assert texts(tasks, True) == texts(tasks, False)


def test_several_answers_of_one_prompt_are_valid_and_their_own() -> None:
    schema = SCHEMAS["point"]
    several = pyengine.generate(
        PROMPT, n=3, response_format=form(schema), sampling={"seed": 7, "verify": "coupled"}
    )
    for n, result in enumerate(several):
        check(result, schema)
        alone = pyengine.generate(
            PROMPT, response_format=form(schema), sampling={"seed": 7 + n, "verify": "coupled"}
        )
        assert result.text == alone.text


def test_free_text_is_built_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a grammar no half of a round is played and no draft is read."""
    from pyengine.engine import guided

    monkeypatch.setattr(guided, "Guide", None)
    monkeypatch.setattr(guided, "draft", None)
    assert pyengine.generate(PROMPT, max_tokens=8).stats.forced == 0
