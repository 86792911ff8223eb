"""The embedded pair's DFlash drafter: real weights on the whole path."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import pytest

import pyengine
from pyengine import Sampling, generate
from pyengine.bench.streams import bench_streams
from pyengine.bench.suite import Case
from pyengine.chat import Chat
from pyengine.checkpoint.pair import Pair
from pyengine.model.dflash import DFlash

PROMPT = "Write a Snake game in one HTML file"
ASK: dict[str, Any] = {"max_tokens": 80, "block_size": 4}
STRICT = {"type": "function", "function": {"name": "weather", "strict": True}}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return pyengine.load()


def test_its_widths_are_those_of_the_model_card(pair: Pair) -> None:
    assert pair.dflash is not None
    config = pair.dflash.config
    assert config.taps == (1, 6, 11, 16, 21) and (config.block_size, config.mask_id) == (8, 4)
    assert [layer.sliding for layer in config.layers] == [True, True, False]
    assert config.quantization is not None and config.quantization.bits == 8


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.0), Sampling(seed=4, verify="coupled")],
    ids=["greedy", "T1"],
)
def test_no_text_depends_on_it(pair: Pair, sampling: Sampling) -> None:
    ask = ASK | {"pair": pair, "sampling": sampling}
    plain = generate(PROMPT, **(ask | {"block_size": 1}))
    drafted = generate(PROMPT, drafter="dflash", **ask)
    assert drafted.tokens == plain.tokens
    assert drafted.stats.accepted > 0


def test_without_an_assistant_it_is_the_pairs_own(pair: Pair) -> None:
    alone = dataclasses.replace(pair, assistant=None)
    ask = ASK | {"pair": alone, "sampling": Sampling(temperature=0.0), "block_size": "auto"}
    told = generate(PROMPT, **ask)
    assert told.stats.accepted > 0 and told.stats.block_size == "auto"
    assert told.tokens == generate(PROMPT, **(ask | {"block_size": 1})).tokens
    assert generate(PROMPT, **(ask | {"sampling": Sampling(seed=1)})).stats.block_size == 8


def test_streams_are_timed_with_its_drafts(pair: Pair) -> None:
    cases, asked = [Case("one", "code", PROMPT, 9)], {"streams": [2], "block_sizes": [4]}
    rows = {
        drafter: bench_streams(
            pair,
            cases,
            **asked,
            max_tokens=40,
            sampling=Sampling(seed=4, verify="coupled"),
            repeats=1,
            drafter=drafter,
        )[0]
        for drafter in ("assistant", "dflash")
    }
    assert all(row["texts_equal_to_alone"] for row in rows.values())
    assert 0 < rows["dflash"]["acceptance"] < rows["assistant"]["acceptance"]


def test_what_it_knows_of_the_text_is_what_it_drafts_by(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far more is kept of its drafts than of one that is told nothing of the text."""
    ask = ASK | {"pair": pair, "sampling": Sampling(temperature=0.0), "drafter": "dflash"}
    kept = generate(PROMPT, **ask).stats.acceptance
    read = DFlash.read

    def read_nothing(self: DFlash, tapped: Any, caches: Any) -> mx.array:
        return read(self, [mx.zeros_like(rows) for rows in tapped], caches)

    monkeypatch.setattr(DFlash, "read", read_nothing)
    ask["pair"] = dataclasses.replace(pair)  # for which nothing was recorded
    assert kept > 0.5 and kept > 2 * generate(PROMPT, **ask).stats.acceptance


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.0), Sampling(seed=4, verify="coupled")],
    ids=["greedy", "T1"],
)
def test_no_text_depends_on_its_trees(pair: Pair, sampling: Sampling) -> None:
    """Nor where it ends: at a stop string within a path, or at the budget."""
    ask: dict[str, Any] = {"pair": pair, "sampling": sampling, "max_tokens": 80}
    plain = generate(PROMPT, block_size=1, **ask)
    drawn = {"drafter": "dflash"}
    trees = {n: generate(PROMPT, tree=n, **drawn, **ask) for n in (3, 15)}
    for n, result in trees.items():
        assert result.tokens == plain.tokens and result.text == plain.text
        assert result.stats.tree == n and result.stats.drafts_per_round == n
    chain = generate(PROMPT, block_size=8, **drawn, **ask)
    assert trees[15].stats.tokens_per_round > chain.stats.tokens_per_round > 2
    for word in (plain.text[70:73], plain.text[101:105]):
        stopped = generate(PROMPT, tree=15, stop=word, **drawn, **ask)
        assert stopped.text == plain.text[: plain.text.index(word)]
        assert stopped.finish_reason == "stop"
    for count in (9, 10, 11):
        cut = generate(PROMPT, tree=15, **drawn, **(ask | {"max_tokens": count}))
        assert cut.tokens == plain.tokens[:count] and cut.finish_reason == "length"


def test_a_conversation_by_trees(pair: Pair) -> None:
    """A turn behind one that trees made: reused, and the text that it is anew."""
    prefix = pyengine.Prefix()
    ask: dict[str, Any] = {"pair": pair, "drafter": "dflash", "tree": 9}
    ask["sampling"] = Sampling(seed=2, verify="coupled")
    first = generate("Write a Pong game.", max_tokens=60, prefix=prefix, **ask)
    turns = [
        {"role": "user", "content": "Write a Pong game."},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Now Snake."},
    ]
    again = generate(turns, max_tokens=40, prefix=prefix, **ask)
    assert again.stats.reused_tokens > 60
    assert again.tokens == generate(turns, max_tokens=40, **ask).tokens
    talk = Chat(max_tokens=20, **ask)
    said = ["".join(talk.ask(text)) for text in ("Write a Pong game.", "Now Snake.")]
    assert talk.result.stats.tree == 9 and talk.result.stats.drafts_per_round == 9
    assert talk.result.stats.reused_tokens > 20
    plain = Chat(pair, max_tokens=20, sampling=ask["sampling"], block_size=1)
    assert said == ["".join(plain.ask(text)) for text in ("Write a Pong game.", "Now Snake.")]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"drafter": "assistant"}, "drafter must be dflash with a tree"),
        ({"sampling": {"verify": "residual"}}, "verify must be coupled, or temperature 0, with a"),
        ({"tools": [STRICT]}, "the answer's form must be free with a tree"),
    ],
)
def test_a_conversation_refuses_its_trees_before_the_first_turn(
    pair: Pair, more: dict[str, Any], told: str
) -> None:
    ask: dict[str, Any] = {"drafter": "dflash", "sampling": {"verify": "coupled"}}
    with pytest.raises(ValueError, match=rf"\[generate\] {told}"):
        Chat(pair, tree=7, **(ask | more))
