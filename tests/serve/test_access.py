"""Who may ask: the key, and pages of other origins."""

from __future__ import annotations

import hmac
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import CHAT, GAME, Server, command
from text_fakes import script_pair, write_tokenizers

from pyengine.serve.access import check_key, check_origins
from pyengine.serve.server import make_app
from pyengine.text.tokenizer import load_tokenizer

KEY = "a-Key_0f.mine~"
PAGE = "https://chat.example.com"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return script_pair(load_tokenizer(folder), "jumps over")


@pytest.fixture(scope="module")
def server(pair: Any) -> Iterator[Server]:
    with Server(pair, key=KEY, origins=[PAGE]) as made:
        yield made


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": f"Bearer {KEY}"},
        {"authorization": f"bearer  {KEY}"},
        {"x-api-key": KEY},
        {"authorization": "Bearer other", "x-api-key": KEY},
    ],
)
def test_the_key_opens(server: Server, headers: dict[str, str]) -> None:
    assert server.post(json={"messages": GAME}, headers=headers).status_code == 200
    assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": KEY},
        {"authorization": f"Basic {KEY}"},
        {"authorization": f"Bearer {KEY[:-1]}"},
        {"authorization": f"Bearer {KEY}x"},
        {"x-api-key": ""},
        {"x-api-key": KEY.upper()},
        {"x-api-key": "caf\u00e9".encode("latin-1")},
    ],
)
def test_nothing_else_does(server: Server, headers: Any) -> None:
    for path in ("/v1/models", "/metrics", "/nowhere"):
        answer = httpx.get(server.url + path, headers=headers)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer" and answer.headers["x-request-id"]
    answer = server.post(json={"messages": GAME}, headers=headers)
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["error"]["code"] == "invalid_api_key"
    answer = server.post("/v1/messages", json={}, headers=headers)
    assert answer.status_code == 401 and answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["type"] == "error"


def test_what_watches_the_server_needs_no_key(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_keys_are_compared_in_constant_time(
    pair: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests of one length, and every header whatever the first one said."""
    compared: list[tuple[int, int]] = []
    compare = hmac.compare_digest

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((len(a), len(b)))
        return compare(a, b)

    monkeypatch.setattr("pyengine.serve.access.hmac.compare_digest", noted)
    for key in (KEY, "x"):
        headers = {"authorization": f"Bearer {key}", "x-api-key": "y"}
        httpx.get(f"{server.url}/v1/models", headers=headers)
    assert compared == [(32, 32)] * 4


def test_the_key_is_nowhere_told(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    for key in (KEY, KEY + "x"):
        headers = {"authorization": f"Bearer {key}"}
        answer = server.post(json={"messages": GAME}, headers=headers)
        httpx.get(f"{server.url}/v1/models?key={key}", headers=headers)
        assert KEY not in answer.text + str(answer.headers)
    ours = [r.getMessage() for r in caplog.records if r.name.startswith("pyengine")]
    assert ours and not any(KEY in line for line in ours)


def test_pages_of_the_origin_may_ask(server: Server) -> None:
    ask = {"origin": PAGE, "access-control-request-method": "POST"}
    ask["access-control-request-headers"] = "authorization,content-type"
    answer = httpx.options(server.url + CHAT, headers=ask)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in answer.headers["access-control-allow-headers"]
    headers = {"origin": PAGE, "authorization": f"Bearer {KEY}"}
    answer = server.post(json={"messages": GAME}, headers=headers)
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    # Also an error is told to the page
    answer = httpx.get(f"{server.url}/v1/models", headers={"origin": PAGE})
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == PAGE


def test_other_pages_may_not(server: Server, pair: Any) -> None:
    ask = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    answer = httpx.options(server.url + CHAT, headers=ask)
    assert "access-control-allow-origin" not in answer.headers and answer.status_code == 400
    answer = httpx.get(f"{server.url}/health", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    with Server(pair) as closed:  # none unless told
        answer = httpx.options(closed.url + CHAT, headers={**ask, "origin": PAGE})
        assert "access-control-allow-origin" not in answer.headers
    with Server(pair, origins=["*"]) as everybody:
        answer = httpx.get(f"{everybody.url}/health", headers={"origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("key", ["", " ", "a b", "caf\u00e9", "a\n", "x" * 513])
def test_keys_that_no_header_carries_are_refused_unseen(pair: Any, key: str) -> None:
    for check in (check_key, lambda key: make_app(pair, key=key)):
        with pytest.raises(ValueError, match="must be 1 to 512 visible ASCII") as caught:
            check(key)
        assert len(str(caught.value)) < 90


@pytest.mark.parametrize("origin", ["", "example.com", "https://x/", "https://x:", "null", "http:"])
def test_origins_that_no_browser_names_are_refused(pair: Any, origin: str) -> None:
    for check in (lambda one: check_origins([one]), lambda one: make_app(pair, origins=[one])):
        with pytest.raises(ValueError, match="an origin must be like https"):
            check(origin)
    check_origins(["https://example.com:8443", "http://localhost:3000", "app://obsidian.md", "*"])


def refused(*arguments: str, **environment: str) -> str:
    """What the command says of arguments that it refuses."""
    import os

    done = subprocess.run(
        [sys.executable, "-m", "pyengine", "serve", "--port", "0", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    return done.stderr


def test_the_command_asks_for_a_key_where_others_reach_it() -> None:
    said = refused("--host", "0.0.0.0")
    assert "must be served with --api-key or PYENGINE_API_KEY" in said and "--no-api-key" in said
    said = refused("--no-api-key", PYENGINE_API_KEY=KEY)
    assert "--no-api-key must not go with" in said and KEY not in said
    said = refused("--api-key", KEY + " ")
    assert "visible ASCII" in said and KEY not in said
    assert "an origin must be like" in refused("--cors", "example.com")


def test_the_command_takes_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYENGINE_API_KEY", KEY)
    with command("--host", "0.0.0.0", "--port", "0", "--log-level", "debug") as process:
        assert process.stderr is not None
        lines = [process.stderr.readline() for _ in range(2)]
        assert "is not encrypted, the key included" in lines[1]
        port = lines[0].split(":")[2].partition("/")[0]
        url = f"http://127.0.0.1:{port}{CHAT}"
        body = {"messages": GAME, "max_tokens": 2}
        assert httpx.post(url, json=body, timeout=60).status_code == 401
        headers = {"x-api-key": KEY}
        assert httpx.post(url, json=body, headers=headers, timeout=60).status_code == 200
        process.terminate()
        said = "".join(lines) + process.stderr.read()
    assert KEY not in said and "asks for 1 texts of up to 2 tokens" in said
