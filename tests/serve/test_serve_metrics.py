"""The server's figures: `/metrics` as Prometheus reads it, and `/health`; worked out by hand."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from serving import CHAT, GAME, LEFT_S, Server, asking, hold_rounds
from speaker import LETTERS, letter, speaking
from text_fakes import write_tokenizers

pytest.importorskip("prometheus_client", reason="needs the extra serve")

from prometheus_client.parser import text_string_to_metric_families

from pyengine.checkpoint.pair import load
from pyengine.serve import metrics as metrics_module
from pyengine.serve import queue as queue_module
from pyengine.serve import server as server_module
from pyengine.serve.protocols.ask import Limits
from pyengine.serve.queue import Speed
from pyengine.streams import Engine
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

TEXT = "/v1/completions"
# The assistant errs at every third place: a block of 4 keeps two drafts and commits three tokens.
# 13 tokens are the first, which the prompt gives, and 4 rounds.
ASK: dict[str, Any] = {"prompt": [5, 6, 7], "temperature": 0, "max_tokens": 13, "block_size": 4}


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


@pytest.fixture
def pair(tok: Tokenizer) -> Any:
    return speaking(tok, letter(tok, LETTERS), errs=3)


def figures(server: Server) -> dict[str, float]:
    """By name, a label's value behind it."""
    answer = httpx.get(server.url + "/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return {
        "_".join([sample.name.removeprefix("pyengine_"), *sample.labels.values()]): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def until(server: Server, **wanted: float) -> dict[str, float]:
    """Ask until these figures are so; each answer is waited for, so this does not spin."""
    end = threading.Event()
    timer = threading.Timer(LEFT_S, end.set)
    timer.start()
    while not wanted.items() <= (said := figures(server)).items():
        assert not end.is_set(), (said, wanted)
    timer.cancel()
    return said


def counts(said: dict[str, float]) -> list[float]:
    names = ("prompt_tokens", "tokens", "rounds", "blocks", "drafts", "drafts_accepted")
    return [said[f"{name}_total"] for name in names]


def outcomes(said: dict[str, float]) -> list[float]:
    names = ("answered", "refused", "busy", "failed", "left")
    return [said[f"requests_total_{name}"] for name in names]


def clock(patch: pytest.MonkeyPatch, *modules: Any) -> list[float]:
    """The times that these modules read, one after another."""
    times: list[float] = []
    told = SimpleNamespace(perf_counter=lambda: times.pop(0), monotonic=lambda: times[0])
    for module in modules:
        patch.setattr(module, "time", told)
    return times


def test_counts_of_known_texts(pair: Any) -> None:
    with Server(pair) as server, Server(pair) as other:
        assert counts(figures(server)) == [0] * 6 and outcomes(figures(server)) == [0] * 5
        assert server.post(TEXT, json=ASK).status_code == 200
        assert counts(figures(server)) == [3, 13, 4, 4, 12, 8]
        assert server.post(TEXT, json={**ASK, "stream": True}).status_code == 200
        assert counts(figures(server)) == [6, 26, 8, 8, 24, 16]
        # Two texts of 5 tokens, plain: whether they meet in a round is left to the clock
        two = {**ASK, "prompt": [[5, 6, 7], [5, 6, 8, 9]], "max_tokens": 5, "block_size": 1}
        assert server.post(TEXT, json=two).status_code == 200
        said = figures(server)
        assert 12 <= said["rounds_total"] <= 16
        assert counts(said) == [13, 36, said["rounds_total"], 16, 24, 16]
        # A stop string ends the text amid a round: first a, then b c d, then e of e f g
        assert server.post(TEXT, json={**ASK, "stop": "e"}).status_code == 200
        assert counts(figures(server))[1] == 36 + 5
        assert outcomes(figures(server)) == [4, 0, 0, 0, 0]
        health = server.health()
        assert health["acceptance"] == 20 / 30 and health["tok_s"] > 0
        assert {**health, "tok_s": 0} == {
            "status": "ok",
            "waiting": 0,
            "running": 0,
            "texts": 0,
            "streams": 8,
            "acceptance": 20 / 30,
            "tok_s": 0,
            "cache_bytes": 0,
            "pages": {key: {"held": 0, "free": 0, "bytes": 1} for key in ("full", "sliding")},
        }
        assert counts(figures(other)) == [0] * 6


def by_drafter(said: dict[str, float], name: str) -> list[float]:
    """Blocks, drafts and accepted drafts of one drafter."""
    kinds = ("drafter_blocks", "drafter_drafts", "drafter_drafts_accepted")
    return [said.get(f"{kind}_total_{name}", 0) for kind in kinds]


def test_counts_by_drafter(pair: Any) -> None:
    """Of one drafter its own, of a mix each: behind ten tokens that stand there twice lookup."""
    with Server(pair) as server:
        assert server.post(TEXT, json=ASK).status_code == 200
        assert by_drafter(figures(server), "assistant") == [4, 12, 8]
    said = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    with Server(pair, Limits(drafter="assistant+lookup")) as server:
        body = {**ASK, "prompt": [*said, 4, *said], "max_tokens": 2}
        usage = server.post(TEXT, json=body).json()["usage"]
        told = figures(server)
        of_mix = {
            name: dict(zip(("rounds", "drafted", "accepted"), by_drafter(told, name), strict=True))
            for name in usage["by_drafter"]
        }
        assert usage["by_drafter"] == of_mix != {}
        drafted = sum(own["drafted"] for own in of_mix.values())
        assert drafted == told["drafts_total"] == usage["drafted_tokens"] == 3


def test_what_runs_and_waits(pair: Any) -> None:
    gate = hold_rounds(pair)
    with Server(pair, Limits(streams=1, waiting=3)) as server:
        socks = [server.raw(asking(max_tokens=4)) for _ in range(3)]
        gate.wait()
        server.counts(waiting=2, running=1)
        said, health = figures(server), server.health()
        assert said["streams"] == health["streams"] == 1
        assert said["requests_running"] == said["texts_active"] == health["texts"] == 1
        assert said["requests_waiting"] == 2
        assert said["cache_bytes"] == 0  # of a scripted cache
        gate.open.set()
        for sock in socks:
            assert sock.recv(12) == b"HTTP/1.1 200"
            sock.close()
        until(server, requests_running=0, requests_waiting=0, texts_active=0)


def test_requests_by_outcome(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(pair, Limits(streams=1, waiting=0)) as server:
        assert server.post(json={"messages": []}).status_code == 400
        assert server.post(content=b"{}").status_code == 415
        assert server.post(content=b"\xff", headers={"content-type": "application/json"})
        assert outcomes(figures(server)) == [0, 3, 0, 0, 0]
        gate = hold_rounds(pair)
        sock = server.raw(asking(max_tokens=4))
        gate.wait()
        assert server.post(json={"messages": GAME}).status_code == 429
        assert outcomes(figures(server)) == [0, 3, 1, 0, 0]
        sock.close()
        said = until(server, requests_total_left=1)
        assert outcomes(said) == [0, 3, 1, 0, 1]
        gate.open.set()
        server.counts(waiting=0, running=0)

        def fail(rows: int) -> None:
            raise OSError("a fault")

        pair.target.before_call = fail
        assert server.post(TEXT, json=ASK).status_code == 500
        streamed = server.post(TEXT, json={**ASK, "stream": True})
        assert streamed.status_code == 200 and "the generation failed" in streamed.text
        assert outcomes(figures(server)) == [0, 3, 1, 2, 1]
        for path in ("/health", "/metrics", "/nowhere"):  # none of them asks for an answer
            httpx.get(server.url + path)
        assert outcomes(figures(server)) == [0, 3, 1, 2, 1]


def test_times_of_tokens(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = clock(monkeypatch, server_module, metrics_module)
    with Server(pair) as server:
        for stream in (False, True):
            # The request, its first token, its four rounds
            times += [100, 100.3, 100.4, 100.5, 100.6, 101.5]
            assert server.post(TEXT, json={**ASK, "stream": stream}).status_code == 200
            assert times == []
        said, first, each = figures(server), "time_to_first_token_seconds", "time_per_token_seconds"
        assert said[f"{first}_count"] == said[f"{each}_count"] == 2
        assert said[f"{first}_sum"] == pytest.approx(2 * 0.3)
        assert said[f"{each}_sum"] == pytest.approx(2 * 1.2 / 12)
        assert [said[f"{first}_bucket_{le}"] for le in ("0.25", "0.5", "+Inf")] == [0, 2, 2]
        assert [said[f"{each}_bucket_{le}"] for le in ("0.075", "0.15", "+Inf")] == [0, 2, 2]
        # A prompt that comes back is no token, and one token has none behind it
        times += [100, 100.7]
        assert server.post(TEXT, json={**ASK, "echo": True, "max_tokens": 1}).status_code == 200
        times += [100]
        assert server.post(TEXT, json={**ASK, "echo": True, "max_tokens": 0}).status_code == 200
        said = figures(server)
        assert said[f"{first}_sum"] == pytest.approx(2 * 0.3 + 0.7)
        assert said[f"{first}_count"] == 3 and said[f"{each}_count"] == 2


def test_the_speed_is_that_of_the_last_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    times = clock(monkeypatch, queue_module)
    times[:] = [50]
    speed = Speed()
    assert speed.tok_s == 0
    for now, made in ((51, 6), (52, 4)):
        times[:] = [now]
        speed.note(made)
    assert speed.tok_s == 5  # 10 tokens in the 2 s since the start
    times[:] = [60]
    assert speed.tok_s == 1
    times[:] = [61]
    assert speed.tok_s == 0.4  # the six are ten seconds old
    times[:] = [70]
    assert speed.tok_s == 0


def test_a_foreign_host_is_told_nothing(pair: Any) -> None:
    with Server(pair) as server:
        url = server.url + "/metrics"
        refused = httpx.get(url, headers={"host": "evil.example"})
        assert refused.status_code == 400 and "pyengine_" not in refused.text
        assert httpx.post(url).status_code == 405
        asked = httpx.get(url, headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert asked.headers["content-type"].startswith("application/openmetrics-text;")
        assert asked.text.endswith("# EOF\n")


@pytest.fixture
def without_the_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    whole = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "prometheus_client" else whole(name, *rest),
    )
    yield


@pytest.mark.usefixtures("without_the_library")
def test_without_the_library_all_else_is_served(pair: Any) -> None:
    with Server(pair) as server:
        assert server.post(TEXT, json=ASK).status_code == 200
        assert server.post(TEXT, json={**ASK, "stream": True}).status_code == 200
        assert server.post(CHAT, json={"messages": []}).status_code == 400
        assert server.health()["acceptance"] == 16 / 24
        said = httpx.get(server.url + "/metrics")
        assert said.status_code == 404
        assert 'pip install "pyengine-mlx[serve]"' in said.json()["error"]["message"]


def test_texts_of_one_prompt_have_pages_of_their_own_behind_it() -> None:
    with Engine(load(), sequences=2) as engine:
        texts = engine.submit("def fib(n):", n=2, max_tokens=40, raw=True)
        while not all(text.result.tokens for text in texts):
            engine.step()
        assert engine.active == 2
        pages = {name: kind["held"] for name, kind in engine.pages.items()}
        assert pages == {"full": 2, "sliding": 2}  # less than a page each
        assert engine.cache_bytes == 2 * sum(kind["bytes"] for kind in engine.pages.values()) > 0
        prompt = len(texts[0].task.ids)
        assert engine.totals.prompt_tokens == 2 * prompt and engine.totals.reused_tokens == prompt
