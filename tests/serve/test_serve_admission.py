"""Work before a request is admitted: bounded, counted, and refused before it is done."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import read_request
from serving import GAME, Server, asking, everything, request
from text_fakes import script_pair, write_tokenizers

from pyengine.serve import server as module
from pyengine.serve.protocols import ask
from pyengine.serve.protocols.ask import Limits, Refused
from pyengine.serve.protocols.chat import Chat
from pyengine.task import embedded_pair
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

HEAD = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return script_pair(load_tokenizer(folder), "jumps over")


class Readers:
    """Holds all that read a request until it is opened; knows how many there were."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls = self.now = self.most = 0
        self.open, self._lock = threading.Event(), threading.Lock()
        self.begun = threading.Semaphore(0)

        def held(*args: Any) -> Any:
            with self._lock:
                self.calls += 1
                self.now += 1
                self.most = max(self.most, self.now)
            self.begun.release()
            assert self.open.wait(30)
            with self._lock:
                self.now -= 1
            return whole(*args)

        whole = Chat.read
        patch.setattr(Chat, "read", held)


def test_a_place_is_taken_before_the_request_is_read(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is served and one may wait: the third is refused while those are still being read."""
    readers = Readers(monkeypatch)
    with Server(pair, Limits(streams=1, waiting=1)) as server:
        socks = [server.raw(asking(max_tokens=1)) for _ in range(2)]
        for _ in socks:
            assert readers.begun.acquire(timeout=30)
        for _ in range(3):
            refused = server.post(json={"messages": GAME})
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            assert "too many requests are waiting" in refused.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        assert readers.calls == 2
        readers.open.set()
        for sock in socks:
            assert sock.recv(12) == b"HTTP/1.1 200"
            sock.close()
        # A request that is refused gives its place back
        for _ in range(4):
            assert server.post(json={"messages": []}).status_code == 400
        assert server.post(json={"messages": GAME}).status_code == 200


def test_requests_are_read_by_a_bounded_number_of_threads(
    pair: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    readers = Readers(monkeypatch)
    with Server(pair, Limits(streams=1, waiting=12)) as server:
        socks = [server.raw(asking(max_tokens=1)) for _ in range(12)]
        for _ in range(module.READERS):
            assert readers.begun.acquire(timeout=30)
        assert httpx.get(f"{server.url}/health").status_code == 200
        readers.open.set()
        for sock in socks:
            assert sock.recv(12) == b"HTTP/1.1 200"
            sock.close()
    assert (readers.calls, readers.most) == (12, module.READERS)


def test_bodies_that_come_in_are_counted_together(pair: Any) -> None:
    whole = request(b" " * 1000, "connection: close")
    with Server(pair, Limits(streams=1, waiting=1, body_bytes=1000)) as server:
        socks = [server.raw(whole[:-300]) for _ in range(2)]  # of the 2000 bytes that there are
        *_, last = [everything(server.raw(whole)) for _ in range(3)]
        assert last.startswith(b"HTTP/1.1 503 ") and b"retry-after: " in last
        assert b"too many requests are coming in" in last
        for sock in socks:
            sock.close()
        assert server.post(json={"messages": GAME}).status_code == 200


MANY = [
    {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 140_000}]},
    {"messages": [{"role": "user", "content": ""}] * 100_000},
    {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}] * 200_000}]},
    {"messages": GAME, "tools": [{"type": "function", "function": {"name": ""}}] * 60_000},
]
LONG = "fox " * 900_000
LARGE = [
    {"messages": [{"role": "user", "content": LONG}]},
    {"messages": [{"role": "assistant", "content": LONG}, *GAME]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]},
    {"messages": [{"role": "assistant", "reasoning_content": LONG, "content": ""}, *GAME]},
    {"messages": GAME, "tools": [{"type": "function", "function": {"name": LONG}}]},
    {"prompt": LONG},
    {"prompt": " " * len(LONG)},
    {"prompt": [5] * 1_000_000},
]


@pytest.mark.parametrize("body", [*MANY, *LARGE])
def test_what_cannot_fit_is_refused_unread(
    pair: Any, monkeypatch: pytest.MonkeyPatch, body: Any
) -> None:
    """Without a token made of it, or a message looked into."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("the prompt was read")

    monkeypatch.setattr(ask, "new_task", fail)
    with pytest.raises(Refused) as caught:
        read_request(pair, body, Limits(), "messages" in body)
    many = body in MANY
    assert caught.value.code == (None if many else "context_length_exceeded")
    assert ("must be at most" if many else "must be shorter than the context") in str(caught.value)


def test_a_large_request_over_http(pair: Any) -> None:
    with Server(pair) as server:
        for body in (MANY[0], LARGE[0]):
            content = json.dumps(body, separators=(",", ":"))
            assert len(content) > 3_500_000
            answer = server.post(content=content, headers=HEAD)
            assert answer.status_code == 400 and answer.json()["error"]["message"][:8] == "[serve] "


def test_as_many_messages_as_are_allowed_are_read(pair: Any) -> None:
    limits = Limits(messages=7)
    parts = [{"type": "text", "text": "fox"}] * 2
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": "fox"}] * 2
    with pytest.raises(Refused, match="must be at most 7 but got 8"):
        read_request(pair, {"messages": messages}, limits, True)
    assert read_request(pair, {"messages": messages[:3]}, limits, True).ids


def test_text_that_the_template_trims_is_not_counted(pair: Any) -> None:
    """The bound never refuses what fits."""
    messages = [{"role": "user", "content": " " * 500_000 + "fox" + "\n" * 500_000}]
    assert len(read_request(pair, {"messages": messages}, Limits(), True).ids) < 100


TEXTS = (
    st.text()
    | st.text(alphabet=" \n<|>turnchael", max_size=300)
    | st.text(alphabet="  a", min_size=50)
)


def tokenizers(folder: Any) -> list[Tokenizer]:
    write_tokenizers(folder)
    both = [load_tokenizer(folder)]
    (folder / "tokenizer.json").unlink()
    return [*both, load_tokenizer(folder), embedded_pair().tokenizer]


def test_no_token_covers_more_than_the_longest_piece(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    made = tokenizers(tmp_path_factory.mktemp("both"))

    @given(TEXTS)
    @settings(max_examples=300, deadline=None)
    def check(text: str) -> None:
        for tokenizer in made:
            longest = tokenizer.longest_piece
            assert longest is not None
            assert len(tokenizer.encode(text)) * longest >= len(text)

    check()
    for tokenizer in made:  # and one does cover that many
        pieces = map(tokenizer.spelling, range(tokenizer.vocab_size))
        longest = max(pieces, key=len)
        assert tokenizer.longest_piece == len(longest) and len(tokenizer.encode(longest)) == 1


def test_a_vocabulary_without_bytes_has_no_longest_piece(tmp_path: Any) -> None:
    """Its unknown token covers any number of characters."""
    write_tokenizers(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<0x41>", "<0xZZ>"), encoding="utf-8")
    assert load_tokenizer(tmp_path).longest_piece is None
