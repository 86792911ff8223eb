"""Every public argument, with values of wrong types: one sentence of ValueError, and nothing else.

No TypeError from the depths, nothing taken for something else, nothing ignored.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_pairs import FIXTURES, tiny_pair

from pyengine import ops
from pyengine.chat import Chat
from pyengine.checkpoint.pair import load
from pyengine.engine.prefix import Prefix
from pyengine.engine.score import prompt_logprobs, score
from pyengine.generation import generate, stream
from pyengine.sampling.settings import Sampling

SENTENCE = re.compile(
    r"\[(generate|chat|load|sampling|score|use|logits|draft)\] \S.* must .+\.", re.DOTALL
)
NOTHING = object()

# What is wrong for an argument of each kind; the kinds' right values are each other's wrong ones.
SEVERAL: list[Any] = [["fox"], [[1]]]  # prompts, of which stream takes none
WRONG: dict[str, list[Any]] = {
    "whole": [1.5, "3", True, False, np.float32(2), np.bool_(True), math.nan, math.inf, [1], {}],
    "number": ["1", True, None, [0.5], {}, mx.array(0.5), np.array([0.5]), 1j, math.nan, 10**400],
    "flag": ["no", 1, 0, None, [], np.array([True])],
    "ids": [5, 1.5, "12", b"12", None, ["1"], [1.5], [True], [None], [-1], [[1]], NOTHING],
    "biases": [5, "5", [1.0], {"5": 1.0}, {1.5: 1.0}, {True: 1.0}, {-1: 1.0}, {5: "1"}, {5: None},
               {5: True}, {5: math.nan}, None],
    "sampling": [5, "greedy", 0.0, True, [], ("temperature", 0), {"temperatur": 0}, {5: 0},
                 {"temperature": "0"}, NOTHING],
    "pair": [5, "pair", True, {}, NOTHING],
    "prefix": [5, "prefix", True, {}, Prefix, NOTHING],
    "stop": [5, True, 1.5, b"a", [5], [None], ["a", ""], NOTHING],
    "variables": [5, "tools", True, [("tools", 1)], {5: 1}, NOTHING],
    "prompt": [5, None, True, 1.5, {}, b"fox", *SEVERAL, [1.5], [True, 5], [10**6], NOTHING,
               np.array([5, 6])],
    "folder": [5, True, 1.5, [], {}, b"pair", NOTHING],
    "dtype": ["float64", "bf16", 16, True, float, np.float32, mx.int32, [], np.array([1, 2])],
    "word": ["other", 5, True, 1.5, [], {}, np.array(["a", "b"]), NOTHING],
    "text": [5, True, 1.5, ["a"], {}, b"a", NOTHING],
    "function": [5, "f", True, [], NOTHING],
}  # fmt: skip


def asked(function: Callable[..., Any], *first: Any, **always: Any) -> Callable[..., Any]:
    """A call whose other arguments are right."""
    return lambda **kw: function(*first, **{**always, **kw})


def calls() -> Iterator[tuple[str, Callable[..., Any], dict[str, str]]]:
    """What is public, and the kinds of its arguments; None is a right value of those with a ?."""
    pair, target = load(), FIXTURES / "uni12" / "target"
    shared = {
        "pair": "pair",
        "max_tokens": "whole?",
        "sampling": "sampling?",
        "block_size": "whole?",
        "stop": "stop?",
    }
    text = {**shared, "raw": "flag", "variables": "variables?", "prefix": "prefix?"}
    for function in (generate, stream):
        ask = asked(function, pair=pair, max_tokens=2)
        name = function.__name__
        yield name, lambda ask=ask, **kw: ask(**{"prompt": [5, 6], **kw}), {"prompt": "prompt"}
        yield name, lambda ask=ask, **kw: ask(**{"prompt": [5, 6], **kw}), text
    chat = {**shared, "system": "text?", "variables": "variables?"}
    yield "Chat", lambda **kw: Chat(**{"pair": pair, **kw}), chat
    yield "Chat.ask", lambda text: list(Chat(pair, max_tokens=2).ask(text)), {"text": "text"}
    places = {"target": "folder?", "assistant": "folder?", "bundle": "folder?"}
    yield "load", lambda **kw: load(**{"target": target, **kw}), places
    others = {"dtype": "dtype?", "position": "word", "text": "flag"}
    yield "load", lambda **kw: load(**{"target": target, **kw}), others
    yield "ops.use", ops.use, {"implementation": "word"}
    numbers = "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty"
    yield (
        "Sampling",
        Sampling,
        {
            **dict.fromkeys(numbers.split(), "number"),
            "top_k": "whole",
            "seed": "whole?",
            "logprobs": "whole?",
            "suppress_tokens": "ids",
            "logit_bias": "biases",
            "verify": "word",
        },
    )
    right = {"pair": pair, "context": [5, 6], "continuation": [7]}
    kinds = {"context": "ids", "continuation": "ids", "prefix": "prefix?"}
    yield "score", lambda **kw: score(**{**right, **kw}), kinds
    rows = {"pair": pair, "ids": [5, 6], "count": 1}
    kinds = {"ids": "ids", "count": "whole", "progress": "function?"}
    yield "prompt_logprobs", lambda **kw: prompt_logprobs(**{**rows, **kw}), kinds
    yield "Pair.logits", pair.logits, {"ids": "ids"}
    yield (
        "Pair.draft",
        lambda **kw: pair.draft(**{"ids": [5, 6], "k": 1, **kw}),
        {
            "ids": "ids",
            "k": "whole",
        },
    )


def cases() -> Iterator[tuple[str, Callable[..., Any], str, Any]]:
    for name, function, kinds in calls():
        for argument, kind in kinds.items():
            for value in WRONG[kind.rstrip("?")]:
                if value is None and kind.endswith("?"):
                    continue
                if name == "generate" and any(value is one for one in SEVERAL):
                    continue
                yield name, function, argument, value


def test_wrong_types_are_one_sentence() -> None:
    wrong, count = [], 0
    for name, function, argument, value in cases():
        count += 1
        try:
            function(**{argument: value})
        except ValueError as error:
            text = str(error)
            if not SENTENCE.fullmatch(text) or "\n" in text:
                wrong.append((name, argument, value, text))
        except Exception as error:
            wrong.append((name, argument, value, repr(error)))
        else:
            wrong.append((name, argument, value, "nothing was said"))
    assert wrong == []
    assert count > 400


def test_numbers_of_numpy_are_taken_and_become_pythons() -> None:
    """So that a result is JSON, whatever it was asked with."""
    pair = load()
    sampling = Sampling(
        temperature=np.float32(0.5),
        top_p=np.float64(0.9),
        top_k=np.int64(5),
        seed=np.uint32(7),
        suppress_tokens=np.array([3, 4]),
        logit_bias={np.int32(5): np.float16(1)},
        logprobs=np.int8(1),
    )
    assert sampling == Sampling(
        0.5, 0.9, 5, seed=7, suppress_tokens=(3, 4), logit_bias={5: 1.0}, logprobs=1
    )
    json.dumps(sampling.to_dict())
    ask = {"pair": pair, "sampling": sampling}
    result = generate([5, 6], max_tokens=np.int16(3), block_size=np.int64(2), **ask)
    assert result.tokens == generate([5, 6], max_tokens=3, block_size=2, **ask).tokens
    json.dumps(result.to_dict())


def test_a_dtype_may_be_its_name() -> None:
    folder = FIXTURES / "uni12"
    for name in ("float32", "float16", "bfloat16"):
        pair = load(folder / "target", folder / "assistant", dtype=name)
        assert pair.target.dtype == getattr(mx, name)
    text = r"\[load\] dtype must be float32, float16, bfloat16 or None but got 'bf16'\."
    with pytest.raises(ValueError, match=text):
        load(folder / "target", dtype="bf16")


def test_a_dict_of_fields_changes_the_pairs_own_sampling() -> None:
    pair, prompt = load(), [5, 6, 7]
    own = pair.generation
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 12}
    greedy = generate(prompt, sampling={"temperature": 0}, **ask)
    assert greedy.tokens == generate(prompt, sampling=Sampling(temperature=0.0), **ask).tokens
    whole = Sampling(temperature=0.7, top_p=own.top_p, top_k=own.top_k, seed=4)
    some = generate(prompt, sampling={"temperature": 0.7, "seed": 4}, **ask)
    assert some.tokens == generate(prompt, sampling=whole, **ask).tokens
    with pytest.raises(ValueError, match=r"sampling must hold fields of Sampling but got 'temp'"):
        stream(prompt, pair=pair, sampling={"temp": 0})


def test_a_pair_is_told_in_a_line() -> None:
    for pair in (load(), tiny_pair("e2b", "bfloat16")):
        text = repr(pair)
        assert len(text) < 200 and "\n" not in text
        dtype = str(pair.target.dtype).split(".")[-1]
        for part in (pair.name, dtype, f"{len(pair.target.layers)} layers", str(pair.path)):
            assert part in text


def test_a_drawn_seed_is_told_and_gives_the_text_again() -> None:
    pair, prompt = load(), "def f("
    ask: dict[str, Any] = {"pair": pair, "raw": True, "max_tokens": 24}
    hot = {"temperature": 1.5, "top_p": 1.0, "top_k": 0}
    drawn = [generate(prompt, sampling=hot, **ask) for _ in range(4)]
    seeds = [result.stats.seed for result in drawn]
    assert len(set(seeds)) == 4 and all(type(seed) is int for seed in seeds)
    assert len({result.text for result in drawn}) > 1
    for result in drawn:
        assert result.to_dict()["stats"]["seed"] == result.stats.seed
        again = generate(prompt, sampling={**hot, "seed": result.stats.seed}, **ask)
        assert (again.tokens, again.stats.seed) == (result.tokens, result.stats.seed)
    # Drawn when the stream is made, and told before it runs
    running = stream(prompt, sampling=hot, **ask)
    seed = running.result.stats.seed
    assert type(seed) is int and list(running) and running.result.stats.seed == seed


@pytest.mark.parametrize("last", [False, True])
def test_every_seed_may_be_drawn(monkeypatch: pytest.MonkeyPatch, last: bool) -> None:
    monkeypatch.setattr("secrets.randbelow", lambda count: count - 1 if last else 0)
    done = generate([5, 6], pair=load(), max_tokens=2)
    assert done.stats.seed == (2**32 - 1 if last else 0)


@pytest.mark.parametrize(("context", "room"), [(300, 1), (300, 5), (300, 40), (None, 5)])
def test_without_max_tokens_the_context_is_the_limit(context: int | None, room: int) -> None:
    """The pair's own, and a shorter one."""
    pair = load()
    pair.target.context = context = context or pair.target.context
    ids = list(itertools.islice(itertools.cycle(range(20, 60)), context - room))
    result = generate(ids, pair=pair, sampling={"temperature": 0, "suppress_tokens": (1, 106)})
    stop = set(pair.generation.stop_ids) & set(result.tokens)
    assert len(result.tokens) == room or stop
    assert result.finish_reason == ("stop" if stop else "length")
