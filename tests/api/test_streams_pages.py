"""Pages of an engine: whatever becomes of its requests, all come back, and no text is another."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest
from knowing import tiny
from models import spoil
from tiny_pairs import greedy_text

from pyengine import Engine, Sampling, generate
from pyengine.engine import round as on_device
from pyengine.model import plan
from pyengine.streams import LITTLE
from pyengine.task import new_task

TEXT = greedy_text("dense31")
# Past a page, past a window's page, and short; the last two have one prompt
PROMPTS = [TEXT[:70], [*TEXT, *TEXT[:30]], TEXT[:9], TEXT[:66], TEXT[:66]]


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(plan, "CHUNK", 32)
    pair = tiny("dense31")
    monkeypatch.setattr(pair.target, "context", 4096)
    return pair


def settings(number: int) -> dict[str, Any]:
    sampling = Sampling(1.2, seed=number % 4, top_k=8, verify="coupled")
    return {"sampling": sampling, "max_tokens": 12 + 9 * number, "block_size": 1 + number % 4}


@pytest.fixture
def alone(pair: Any) -> list[list[int]]:
    return [generate(p, pair=pair, **settings(n)).tokens for n, p in enumerate(PROMPTS)]


@contextmanager
def checked(pair: Any, **options: Any) -> Iterator[Engine]:
    """An engine whose pages are those of its prefixes when nobody is active, and none in the
    end."""
    with Engine(pair, **options) as engine:
        arena = engine._arena
        yield engine
        assert not engine.active
        nodes = list(engine._known.tree.nodes())
        for pages, own in (
            (arena.full, {node.full for node in nodes}),
            (arena.sliding, {node.sliding for node in nodes} - {None}),
        ):
            assert pages.count - pages.free == len(own)
        assert engine.cache_bytes == arena.held_bytes
    assert arena.held_bytes == 0


def run(engine: Engine) -> None:
    while engine.step():
        pass


def submitted(engine: Engine) -> list[Any]:
    """The last prompt twice, as two texts of one prompt."""
    requests = [engine.submit(p, **settings(n)) for n, p in enumerate(PROMPTS)]
    return [*requests, *engine.submit(PROMPTS[-1], n=3, **settings(4))]


@pytest.mark.parametrize("sequences", [2, 8])
def test_cancelled_at_every_stage(sequences: int, pair: Any, alone: Any) -> None:
    """One or more, while they wait, amid their prompt, behind it, amid their text."""
    rng = random.Random(1)
    with checked(pair, sequences=sequences) as engine:
        for steps in (0, 1, 2, 3, 5, 8, 11, 15, 19, 24, 30):
            requests = submitted(engine)
            for _ in range(steps):
                engine.step()
            gone = rng.sample(range(len(requests)), rng.randint(1, 5))
            for number in gone:
                requests[number].cancel()
            run(engine)
            for number, request in enumerate(requests[:5]):
                tokens = request.result.tokens
                assert tokens == alone[number][: len(tokens)]
                assert number in gone or len(tokens) == len(alone[number])


def test_who_finds_no_page_fails_alone(pair: Any, alone: Any) -> None:
    """In the prompt or in the text; what it had serves others."""
    page = sum(pair.target.new_arena().page_bytes(kind) for kind in (False, True))
    failed = set()
    for most in (3, 6, 9):
        with checked(pair, sequences=3) as engine:
            engine._arena.most_bytes = most * page
            requests = submitted(engine)
            run(engine)
            for number, request in enumerate(requests):
                if request.error is not None:
                    assert str(request.error).startswith("[cache] pages must fit the 0.00 GB")
                    failed.add((most, number))
                elif number < 5:
                    assert request.result.tokens == alone[number]
    assert 3 < len(failed) < 20


@pytest.mark.parametrize("count", [1, 2, 4, 7, 11])
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_round_that_raises_gives_all_pages_back(
    count: int, place: str, pair: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with checked(pair, sequences=4) as engine:
        requests, read, calls = submitted(engine), on_device.read, []

        def broken(*args: Any) -> list[int]:
            calls.append(0)
            row = read(*args) if place == "after" else []
            if len(calls) == count:
                raise RuntimeError("the machine")
            return row or read(*args)

        with monkeypatch.context() as patch:
            patch.setattr(on_device, "read", broken)
            run(engine)
        failed = [request for request in requests if request.error is not None]
        assert failed and {str(request.error) for request in failed} == {"the machine"}
        for number, request in enumerate(requests[:5]):
            assert request.error or request.result.tokens == alone[number]
        again = submitted(engine)
        run(engine)
        assert [request.result.tokens for request in again[:5]] == alone


def test_what_turned_nan_serves_the_next(pair: Any, alone: Any) -> None:
    with checked(pair, sequences=3) as engine:
        for _ in range(2):
            requests = submitted(engine)
            while requests[1].sequence is None or requests[1].reads:
                engine.step()
            spoil(requests[1].sequence.parts.cache)
            run(engine)
            assert "must be finite" in str(requests[1].error)
            for number in (0, 2, 3, 4):
                assert requests[number].result.tokens == alone[number]


def test_texts_of_one_prompt_share_its_whole_pages(pair: Any) -> None:
    with checked(pair, sequences=4) as engine:
        ask: dict[str, Any] = {"max_tokens": 9, "block_size": 3}
        texts = engine.submit(TEXT[:70] * 2, n=3, sampling=Sampling(seed=5), **ask)
        while not all(text.result.tokens for text in texts):
            engine.step()
        caches = [text.sequence.parts.cache for text in texts]
        assert len({tuple(cache.full[:2]) for cache in caches}) == 1
        assert len({cache.full[2] for cache in caches}) == 3
        run(engine)
        for n, text in enumerate(texts):
            alone = generate(TEXT[:70] * 2, pair=pair, sampling=Sampling(seed=5 + n), **ask)
            assert text.result.tokens == alone.tokens


def long(pair: Any, engine: Engine) -> None:
    """Texts that take many pages, cancelled so that none of these is kept."""
    requests = [
        engine.submit([n, *TEXT * 9], max_tokens=300, block_size=2, sampling=Sampling(seed=n))
        for n in range(4)
    ]
    for _ in range(160):
        engine.step()
    for request in requests:
        request.cancel()
    engine.step()
    engine._known.shrink(0)


def test_an_idle_engine_gives_most_of_its_memory_back(pair: Any, alone: Any) -> None:
    """It keeps what texts may begin with, whose bits are the same: the next begin there."""
    with checked(pair, sequences=4, cache_bytes=LITTLE - 1) as engine:
        arena = engine._arena
        long(pair, engine)
        requests = submitted(engine)
        while engine._active or engine._waiting or engine._incoming:
            assert engine.step()
        before, active, pages = arena.nbytes, mx.get_active_memory(), arena.full.count
        assert not engine.step()
        after, kept = arena.nbytes, arena.full.count
        # A sequence may need eleven pages of the window: these are no more
        assert kept < pages / 2 and arena.sliding.count == 11
        assert after == sum(a.nbytes for a in arena.arrays)
        assert active - mx.get_active_memory() > 0.9 * (before - after)
        assert arena.held_bytes == engine._known.nbytes > 0
        again = submitted(engine)
        run(engine)
        for number, request in enumerate(again[:5]):
            assert request.result.tokens == requests[number].result.tokens == alone[number]
            assert request.result.stats.reused_tokens == len(PROMPTS[number]) - 1
        assert arena.full.count == kept  # and it is not given back and asked for by turns
    assert arena.nbytes == 0


def test_memory_is_not_moved_under_a_text(pair: Any) -> None:
    """Also of one that waits for its reader."""
    with checked(pair, sequences=4, cache_bytes=LITTLE - 1) as engine:
        long(pair, engine)
        before = engine._arena.nbytes
        request = engine.add(new_task(TEXT[:64], pair=pair, max_tokens=9, block_size=1), 1)
        while engine.step():
            pass
        assert request.is_held and engine._arena.nbytes == before
        while not request.ended:
            request.take()
            engine.step()
        engine.step()
        assert engine._arena.nbytes < before


def test_what_is_broken_off_leaves_nothing_and_no_wrong_text(
    pair: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any array."""
    for count in (1, 2, 5):
        with checked(pair, sequences=4, cache_bytes=LITTLE - 1) as engine:
            long(pair, engine)
            submitted(engine)
            while engine._active or engine._waiting or engine._incoming:
                assert engine.step()
            evaluate, calls = mx.eval, []

            def interrupt(*args: Any, evaluate: Any = evaluate, calls: Any = calls) -> None:
                calls.append(0)
                if len(calls) == count:  # noqa: B023
                    raise KeyboardInterrupt
                evaluate(*args)

            with monkeypatch.context() as patch:
                patch.setattr(mx, "eval", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    engine.step()
            assert engine._arena.nbytes == 0 == len(engine._known.tree)
            again = submitted(engine)
            run(engine)
            assert [request.result.tokens for request in again[:5]] == alone


def test_sizes_are_few_while_texts_grow(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each further one, the graphs of rounds are recorded anew."""
    sizes = set()
    with checked(pair, sequences=4) as engine:
        requests = [engine.submit(TEXT[:9], max_tokens=400, block_size=1) for _ in range(4)]
        while engine.step():
            sizes.add((engine._arena.full.count, engine._arena.sliding.count))
        assert [len(request.result.tokens) for request in requests] == [400] * 4
    assert len(sizes) <= 3
