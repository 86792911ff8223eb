"""Many requests on one engine: each has the text that `generate` gives it, whoever is there."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import pytest
from knowing import tiny
from models import spoil
from text_fakes import script_pair, write_tokenizers
from tiny_pairs import greedy_text

from pyengine import Engine, Request, Sampling, generate
from pyengine.checkpoint import memory
from pyengine.engine import round as on_device
from pyengine.engine import schedule
from pyengine.engine.report import NonFinite
from pyengine.model import plan
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

TEXT = greedy_text("uni12")
PROMPTS = [TEXT[:n] for n in (3, 9, 14, 21, 30, 5)]


@pytest.fixture
def pair() -> Any:
    return tiny("uni12")


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


def settings(number: int) -> dict[str, Any]:
    """Of the request of that number: no two alike."""
    rule = ("residual", "block", "coupled")[number % 3]
    sampling = Sampling(1.0 + 0.1 * number, seed=number, verify=rule, top_k=number % 2 * 8)
    return {"sampling": sampling, "max_tokens": 6 + 3 * number, "block_size": 1 + number % 4}


def told(result: Any) -> tuple[Any, ...]:
    stats = result.stats
    return result.tokens, result.text, result.finish_reason, stats.accepted, stats.drafted


@pytest.fixture
def prompts_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """No round runs while a prompt is there, however slow the machine."""
    monkeypatch.setattr(schedule, "SLOWDOWN", 1e9)


@pytest.fixture
def alone(pair: Any) -> list[tuple[Any, ...]]:
    return [told(generate(p, pair=pair, **settings(n))) for n, p in enumerate(PROMPTS)]


def submitted(engine: Engine) -> list[Request]:
    return [engine.submit(p, **settings(n)) for n, p in enumerate(PROMPTS)]


def run(engine: Engine) -> None:
    while engine.step():
        pass


@pytest.mark.parametrize("sequences", [1, 2, 4, 8])
def test_texts_are_those_of_generate(sequences: int, pair: Any, alone: Any) -> None:
    """Twice, so that prefixes of the first time are found."""
    with Engine(pair, sequences=sequences) as engine:
        for _ in range(2):
            requests = submitted(engine)
            assert engine.waiting == len(PROMPTS)
            most = 0
            while engine.step():
                most = max(most, engine.active)
            assert most == min(sequences, len(PROMPTS)) and not engine.active
            assert [told(request.result) for request in requests] == alone
        assert any(request.result.stats.reused_tokens for request in requests)


def test_iterating_over_one_moves_all(pair: Any, alone: Any) -> None:
    with Engine(pair) as engine:
        requests = submitted(engine)
        assert "".join(requests[5]) == alone[5][1]
        assert all(request.result.tokens for request in requests)
        for number in (2, 0, 4, 1, 3):
            assert "".join(requests[number]) == alone[number][1]
        assert list(requests[0]) == []


@pytest.mark.parametrize("started", [False, True])
def test_threads_may_each_read_one(started: bool, pair: Any, alone: Any) -> None:
    with Engine(pair, sequences=3) as engine:
        if started:
            engine.start()
        requests, texts = submitted(engine), {}

        def read(number: int) -> None:
            texts[number] = "".join(requests[number])

        readers = [threading.Thread(target=read, args=[n]) for n in range(len(requests))]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(60)
        assert [texts[number] for number in range(len(requests))] == [text for _, text, *_ in alone]


def test_cancelled_ones_keep_what_there_is_and_leave_the_others(pair: Any, alone: Any) -> None:
    """Before they join, amid their text, and after its end."""
    with Engine(pair, sequences=3) as engine:
        requests = submitted(engine)
        requests[4].cancel()
        for _ in range(8):
            engine.step()
        requests[1].close()
        with requests[2]:
            next(requests[2])
        requests[0].cancel()
        run(engine)
        assert list(requests[1]) == [] and requests[4].result.tokens == []
        part = requests[1].result
        assert 0 < len(part.tokens) < len(alone[1][0]) and part.finish_reason is None
        assert part.tokens == alone[1][0][: len(part.tokens)]
        for number in (0, 3, 5):
            assert told(requests[number].result) == alone[number]
        assert not engine.active and not engine.waiting


def test_one_that_fails_fails_alone(pair: Any, alone: Any, prompts_first: None) -> None:
    with Engine(pair, sequences=3) as engine:
        requests = submitted(engine)
        while requests[1].sequence is None or requests[1].reads:
            engine.step()
        spoil(requests[1].sequence.parts.cache)
        engine._known.shrink(0)  # nobody else begins with what was spoiled
        run(engine)
        with pytest.raises(NonFinite, match=r"\[decode\] logits must be finite"):
            list(requests[1])
        for number in (0, 2, 3, 4, 5):
            assert told(requests[number].result) == alone[number]
        # Nothing of it is found by the next one
        again = engine.submit(PROMPTS[1], **settings(1))
        run(engine)
        assert told(again.result) == alone[1]


def test_a_round_that_raises_fails_its_requests_and_the_engine_lives(
    pair: Any, alone: Any, prompts_first: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(pair, sequences=2) as engine:
        requests, read = submitted(engine), on_device.read
        while requests[1].sequence is None or requests[1].reads:
            engine.step()

        def fail(*_: Any) -> Any:
            monkeypatch.setattr(on_device, "read", read)
            raise RuntimeError("[metal] no memory")

        monkeypatch.setattr(on_device, "read", fail)
        run(engine)
        for number in (0, 1):
            with pytest.raises(RuntimeError, match=r"\[metal\] no memory"):
                "".join(requests[number])
        assert [told(request.result) for request in requests[2:]] == alone[2:]


def test_a_ctrl_c_ends_what_was_in_the_round(
    pair: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(pair, sequences=1) as engine:
        requests, read = submitted(engine)[:2], on_device.read
        assert next(requests[0])

        def interrupt(*_: Any) -> Any:
            monkeypatch.setattr(on_device, "read", read)
            raise KeyboardInterrupt

        monkeypatch.setattr(on_device, "read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            "".join(requests[0])
        with pytest.raises(RuntimeError, match=r"\[engine\] the generation was broken off\."):
            "".join(requests[0])
        assert "".join(requests[1]) == alone[1][1]


def test_a_long_prompt_lets_others_write(
    pair: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its chunks there are rounds, and its text is the same."""
    monkeypatch.setattr(plan, "CHUNK", 4)
    want = told(generate(TEXT[:60], pair=pair, **settings(3)))
    with Engine(pair) as engine:
        first = engine.submit(PROMPTS[5], **settings(5))
        while not first.result.tokens:
            engine.step()
        long = engine.submit(TEXT[:60], **settings(3))
        begun = len(first.result.tokens)
        for _ in long.steps():
            if long.result.tokens:
                break
        assert len(first.result.tokens) > begun + 3
        run(engine)
        assert told(first.result) == alone[5] and told(long.result) == want


def test_n_texts_have_a_seed_each(pair: Any) -> None:
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 12}
    one = [
        generate(TEXT[:9], sampling={"seed": seed, "temperature": 2.0}, **ask)
        for seed in (2**32 - 1, 0, 1)
    ]
    results = generate(TEXT[:9], n=3, sampling={"seed": 2**32 - 1, "temperature": 2.0}, **ask)
    assert [told(result) for result in results] == [told(result) for result in one]
    assert [result.stats.seed for result in results] == [2**32 - 1, 0, 1]
    assert len({tuple(result.tokens) for result in results}) == 3
    with pytest.raises(ValueError, match=r"\[generate\] n must be 1 to 128 but got 0\."):
        generate(TEXT[:9], n=0, **ask)


@pytest.mark.parametrize("drafter", ["assistant", "lookup"])
@pytest.mark.parametrize("sequences", [2, 4])
def test_n_texts_process_their_prompt_once(
    sequences: int, drafter: str, pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes first; also where that one leaves before its prompt is done."""
    monkeypatch.setattr(plan, "CHUNK", 8)
    ask: dict[str, Any] = {"max_tokens": 12, "block_size": 3, "drafter": drafter}
    prompt = TEXT[:20] * 2
    want = [
        told(generate(prompt, pair=pair, sampling={"seed": s, "temperature": 1.5}, **ask))
        for s in range(3, 7)
    ]
    calls, prefill = [], pair.target.prefill
    monkeypatch.setattr(
        pair.target, "prefill", lambda ids, *a, **kw: calls.append(1) or prefill(ids, *a, **kw)
    )
    with Engine(pair, sequences=sequences) as engine:
        given = {"sampling": {"seed": 3, "temperature": 1.5}, "n": 4, **ask}
        requests = engine.submit(prompt, **given)
        run(engine)
        assert [told(request.result) for request in requests] == want and len(calls) == 5
        assert requests[3].result.stats.reused_tokens == len(prompt)
    with Engine(pair, sequences=sequences) as engine:
        requests = engine.submit(prompt, **given)
        engine.step()
        requests[0].cancel()
        run(engine)
        assert [told(request.result) for request in requests[1:]] == want[1:]
        assert len(calls) <= 5 + 1 + 5


def test_a_list_of_prompts_is_a_list_of_results(pair: Any) -> None:
    ask: dict[str, Any] = {"pair": pair, "max_tokens": 9, "block_size": 4}
    each = [{"temperature": 0.0}, Sampling(seed=3)]
    results = generate(PROMPTS[:2], sampling=each, sequences=2, **ask)
    want = [generate(p, sampling=s, **ask) for p, s in zip(PROMPTS, each, strict=False)]
    assert [told(result) for result in results] == [told(result) for result in want]
    twice = generate([PROMPTS[0]], n=2, sampling=Sampling(seed=5, temperature=2.0), **ask)
    assert [result.stats.seed for result in twice] == [5, 6]
    with pytest.raises(ValueError, match=r"one or one per prompt but got 1 for 2\."):
        generate(PROMPTS[:2], sampling=each[:1], **ask)
    with pytest.raises(ValueError, match=r"prefix must be None with several prompts or n\."):
        from pyengine import Prefix

        generate(PROMPTS[:2], prefix=Prefix(), **ask)


def test_strings_are_prompts_too_and_end_at_their_stops(tok: Tokenizer) -> None:
    made = script_pair(tok, "the quick brown fox jumps over a lazy dog;", assistant=None)
    results = generate(["the", "a"], pair=made, sampling={"temperature": 0}, stop=["fox"])
    assert [result.text for result in results] == ["the quick brown ", "the quick brown "]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sequences": 0}, r"sequences must be 1 to 128 but got 0\."),
        ({"sequences": 129}, r"sequences must be 1 to 128 but got 129\."),
        ({"sequences": 1.5}, r"sequences must be a whole number but got 1\.5\."),
        ({"cache_bytes": 0}, r"cache_bytes must be at least 1 but got 0\."),
        ({"cache_bytes": "all"}, r"cache_bytes must be a whole number but got 'all'\."),
    ],
)
def test_wrong_arguments(given: dict[str, Any], message: str, pair: Any) -> None:
    with pytest.raises(ValueError, match=rf"\[engine\] {message}"):
        Engine(pair, **given)
    with pytest.raises(ValueError, match=r"\[engine\] pair must come from pyengine\.load"):
        Engine("pair")  # type: ignore[arg-type]


def test_a_closed_engine_takes_nothing_and_ends_all(pair: Any) -> None:
    engine = Engine(pair)
    engine.start()
    requests = submitted(engine)
    next(requests[0])
    engine.close()
    for request in requests:
        list(request)
    assert not engine.active and not engine.waiting
    with pytest.raises(RuntimeError, match=r"\[engine\] the engine must be open but was closed\."):
        engine.submit(PROMPTS[0])


# Memory


def needs(pair: Any, tokens: int, block_size: int = 4) -> int:
    return int(pair.target.prompt_bytes(tokens, block_size, 3))


def test_what_can_never_fit_is_refused_with_the_number_that_would(pair: Any) -> None:
    most = needs(pair, 40)
    with Engine(pair, cache_bytes=most) as engine:
        request = engine.submit(TEXT[:20], max_tokens=20, block_size=4)
        with pytest.raises(ValueError, match=r"got 512 tokens, which need .* GB; \d+ fit\."):
            engine.submit(TEXT[:20], max_tokens=600, block_size=4)
        "".join(request)


def test_who_does_not_fit_waits_and_whoever_is_behind_too(pair: Any, alone: Any) -> None:
    """Two at a time have the memory; all end, in the order they came."""
    most = 2 * max(needs(pair, len(p) + 6 + 3 * n, 1 + n % 4) for n, p in enumerate(PROMPTS))
    with Engine(pair, sequences=6, cache_bytes=most) as engine:
        requests, joined, active = submitted(engine), [], set()
        while engine.step():
            under_way = [r for r in requests if r.sequence is not None]
            joined += [r for r in under_way if r not in joined]
            active.add(engine.active)
            assert sum(request.needs for request in under_way) <= most
        assert joined == requests and 1 < max(active) < 5
        assert [told(request.result) for request in requests] == alone


def test_a_text_of_no_known_length_has_all_there_is(pair: Any) -> None:
    most = needs(pair, 60)
    with Engine(pair, cache_bytes=most) as engine:
        requests = [engine.submit(TEXT[:9], block_size=1, stop=None) for _ in range(2)]
        for _ in range(9):
            engine.step()
        assert engine.active == 1 and engine.waiting == 1
        for request in requests:
            request.cancel()


def test_prefixes_are_forgotten_for_those_who_need_the_memory(pair: Any) -> None:
    """Idle ones have half of the memory; the newest stays."""
    ask: dict[str, Any] = {"max_tokens": 4, "block_size": 1}
    held = []
    for most in (None, needs(pair, 40, 1)):
        with Engine(pair, sequences=6, cache_bytes=most) as engine:
            for prompt in PROMPTS:
                "".join(engine.submit(prompt[::-1], **ask))
            held.append(engine._known.nbytes)
            "".join(again := engine.submit(PROMPTS[-1][::-1], **ask))
            assert again.result.stats.reused_tokens
    assert 0 < held[1] < held[0]


def test_memory_is_counted_where_nobody_said_how_much(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda: needs(pair, 40))
    with Engine(pair) as engine, pytest.raises(ValueError, match=r"must fit the free memory"):
        engine.submit(TEXT[:20], max_tokens=600, block_size=4)
    monkeypatch.setattr(memory, "free_bytes", lambda: None)
    with Engine(pair) as engine:
        engine.submit(TEXT[:20], max_tokens=600, block_size=4)


# Prefixes


def test_conversations_by_turns_do_not_evict_each_other(pair: Any) -> None:
    one, other = TEXT[:20], [5 + i * 7 % 250 for i in range(20)]
    reused = []
    with Engine(pair, sequences=2) as engine:
        for turn in range(3):
            for prompt in (one, other):
                request = engine.submit(prompt + TEXT[: 2 * turn], max_tokens=3, block_size=1)
                "".join(request)
                reused.append(request.result.stats.reused_tokens)
    assert reused[:2] == [0, 0] and min(reused[2:]) >= 16


@pytest.mark.slow
def test_joins_and_leaves_leave_nothing_behind(pair: Any) -> None:
    """Hundreds of requests, some cancelled: neither memory nor graphs grow."""
    rng = random.Random(1)

    def rounds(engine: Engine, count: int) -> Iterator[int]:
        for number in range(count):
            request = engine.submit(
                TEXT[: rng.randrange(1, 40)],
                max_tokens=rng.randrange(1, 9),
                sampling=Sampling(seed=number, top_k=8),
                block_size=2,
            )
            for _ in range(rng.randrange(8)):
                engine.step()
            if rng.random() < 0.2:
                request.cancel()
            yield mx.get_active_memory()

    with Engine(pair, sequences=4, cache_bytes=needs(pair, 60)) as engine:
        first = max(rounds(engine, 100))
        assert max(rounds(engine, 400)) < first + (1 << 20)
        run(engine)
        assert len(engine._rounds._recorded) <= 16
