"""What a text leaves to the next one changes its time, and never its tokens."""

from __future__ import annotations

import dataclasses
import gc
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest

import pyengine
from pyengine import Prefix, Result, Sampling, generate, stream
from pyengine.checkpoint.pair import Pair
from pyengine.engine import idle
from pyengine.engine import round as on_device
from pyengine.engine.idle import Idle, idle_of
from pyengine.engine.rounds import Rounds

PROMPTS = ("Write a Snake game in one HTML file", "def first(items):")
GREEDY = Sampling(temperature=0.0)
MAKES: list[dict[str, Any]] = [
    {"block_size": 1, "sampling": GREEDY},
    {"block_size": 4, "sampling": GREEDY},
    {"block_size": 4, "sampling": Sampling(seed=3, verify="coupled")},
    {"block_size": 6, "sampling": Sampling(seed=3, verify="residual", repetition_penalty=1.1)},
    {"block_size": 5, "sampling": Sampling(seed=3, verify="block", top_k=0), "drafter": "lookup"},
    {"block_size": 4, "sampling": Sampling(seed=5, verify="block"), "drafter": "dflash"},
    {"block_size": 4, "sampling": GREEDY, "drafter": "early:6"},
    {"block_size": "auto", "sampling": Sampling(seed=6, verify="coupled"), "raw": True},
    {"block_size": 1, "sampling": GREEDY, "grammar": 'start: "yes" | "no"'},
]


@pytest.fixture
def pair() -> Pair:
    """The embedded one, for which nothing was left."""
    return dataclasses.replace(pyengine.load())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[on_device.RecordedRound]:
    """The rounds that are recorded from now on."""
    found: list[on_device.RecordedRound] = []

    class Noted(on_device.RecordedRound):
        def __init__(self, *parts: Any) -> None:
            super().__init__(*parts)
            found.append(self)

    monkeypatch.setattr(on_device, "RecordedRound", Noted)
    return found


def ask(pair: Pair, make: dict[str, Any], prompt: str = PROMPTS[0], **more: Any) -> Result:
    return generate(prompt, pair=pair, **({"max_tokens": 40} | make | more))


def told(result: Result) -> tuple[Any, ...]:
    return result.tokens, result.finish_reason, result.stats.accepted, result.stats.rounds


def test_texts_behind_others_are_those_they_are_alone(pair: Pair) -> None:
    """Every make of text behind every other one, with what those left, and in what they held."""
    makes = [make for make in MAKES if "grammar" not in make]
    cases = [(make, prompt) for make in makes for prompt in PROMPTS]
    alone = [ask(dataclasses.replace(pair), make, prompt) for make, prompt in cases]
    for step in (1, 3, 7):  # other neighbours each time
        for n in range(len(cases)):
            make, prompt = cases[n * step % len(cases)]
            want = alone[n * step % len(cases)]
            got = ask(pair, make, prompt)
            if make["block_size"] == "auto":  # its rounds follow the clock
                assert got.tokens == want.tokens
            else:
                assert told(got) == told(want), (make, prompt)


def test_a_text_under_a_grammar_leaves_to_others_too(pair: Pair) -> None:
    pytest.importorskip("llguidance", reason="grammars need the extra grammar")
    for make in (MAKES[-1], MAKES[1], MAKES[-1]):
        assert told(ask(pair, make)) == told(ask(dataclasses.replace(pair), make))


def test_what_was_recorded_is_played_again(
    pair: Pair, recorded: list[on_device.RecordedRound]
) -> None:
    ask(pair, MAKES[1])
    assert len(recorded) == 1
    programs = recorded[0].together._graphs  # type: ignore[attr-defined]
    [(graph, _)] = programs.values()
    made = graph.programs
    for prompt in PROMPTS:
        ask(pair, MAKES[1], prompt)
    assert len(recorded) == 1
    assert graph.programs == made  # and its memory kept
    ask(pair, MAKES[0])
    assert len(recorded) == 2
    ask(dataclasses.replace(pair), MAKES[1])
    assert len(recorded) == 3  # nothing is left to another pair


def test_a_conversation_plays_what_was_recorded_too(
    pair: Pair, recorded: list[on_device.RecordedRound]
) -> None:
    prefix = Prefix()
    for prompt in PROMPTS:
        ask(pair, MAKES[1], prompt, prefix=prefix)
    assert len(recorded) == 1


def test_a_text_that_is_broken_off_leaves_what_is_whole(pair: Pair) -> None:
    early = stream(PROMPTS[1], pair=pair, max_tokens=40, **MAKES[1])
    next(early)
    early.close()
    [left] = idle_of(pair)._left
    assert left.arena is not None and left.arena.nbytes > 0
    assert left.arena.held_bytes == 0
    assert told(ask(pair, MAKES[1])) == told(ask(dataclasses.replace(pair), MAKES[1]))


def test_a_text_that_fails_leaves_nothing(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(pair, MAKES[1])

    def play(self: Rounds, sequences: Any) -> list[Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Rounds, "play", play)
        with pytest.raises(KeyboardInterrupt):
            ask(pair, MAKES[1])
    assert idle_of(pair)._left == []
    assert told(ask(pair, MAKES[1])) == told(ask(dataclasses.replace(pair), MAKES[1]))


def test_texts_under_way_at_once_share_nothing(pair: Pair) -> None:
    """By turns, a round each, and in threads."""
    ask(pair, MAKES[1])
    cases = [(MAKES[1], PROMPTS[0]), (MAKES[2], PROMPTS[1]), (MAKES[1], PROMPTS[1])]
    alone = [told(ask(dataclasses.replace(pair), make, prompt)) for make, prompt in cases]
    streams = [stream(prompt, pair=pair, max_tokens=40, **make) for make, prompt in cases]
    going: list[Iterator[Any]] = [own.steps() for own in streams]
    while going:
        going = [own for own in going if next(own, None) is not None]
    assert [told(own.result) for own in streams] == alone
    assert len(idle_of(pair)._left) == 1

    found: dict[int, Any] = {}

    def work(n: int) -> None:
        for _ in range(3):
            found[n] = told(ask(pair, *cases[n]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n] for n in range(len(cases))] == alone
    assert len(idle_of(pair)._left) <= 1


def test_a_large_arena_is_not_kept(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ask(pair, MAKES[1])
    [left] = idle_of(pair)._left
    assert left.arena is not None
    monkeypatch.setattr(idle, "LARGEST", left.arena.nbytes - 1)
    ask(pair, MAKES[1])
    [left] = idle_of(pair)._left
    assert left.arena is None
    assert told(ask(pair, MAKES[1])) == told(ask(dataclasses.replace(pair), MAKES[1]))


def test_what_is_left_ends_with_its_pair(pair: Pair) -> None:
    """No circle holds the weights, not even through the extension."""
    ask(pair, MAKES[1])
    own = dataclasses.replace(pair)
    ask(own, MAKES[1])
    [left] = idle_of(own)._left
    gone = weakref.ref(left.rounds)
    gc.disable()
    try:
        del own, left
        assert gone() is None
    finally:
        gc.enable()


def test_memory_is_level(pair: Pair) -> None:
    """However many texts there were."""
    for make in MAKES[:3]:
        ask(pair, make)
    mx.clear_cache()
    before = mx.get_active_memory()
    for _ in range(3):
        for make in MAKES[:3]:
            ask(pair, make)
    mx.clear_cache()
    assert mx.get_active_memory() <= before + 4096


def test_another_drafter_s_layers_ask_for_another_arena(pair: Pair) -> None:
    own = Idle()
    layers = pair.dflash.config.kept if pair.dflash else ()
    assert layers
    with own.work(pair.target, ()) as first:
        pass
    with own.work(pair.target, ()) as second:
        assert second.arena is first.arena and second.rounds is first.rounds
    with own.work(pair.target, layers) as third:
        assert third.arena is not first.arena and third.rounds is first.rounds


def test_an_arena_is_left_with_nothing_under_way(pair: Pair) -> None:
    """What another thread could not evaluate."""
    own = Idle()
    with own.work(pair.target, ()) as left:
        assert left.arena is not None
        left.arena.note_read(mx.ones(2) + 1)
    assert left.arena._reads == []
