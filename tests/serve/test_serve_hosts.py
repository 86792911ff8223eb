"""Which hosts a request may name: loopback by its address, however that is spelled, and others."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from serving import Server, command, everything
from text_fakes import script_pair, write_tokenizers

from pyengine.serve.front import host_name, is_loopback
from pyengine.serve.server import make_app
from pyengine.text.tokenizer import load_tokenizer

LOOPBACK = ["localhost", "LOCALHOST", "LocalHost:80", "localhost.", "127.0.0.1", "127.0.0.2:8080"]
LOOPBACK += ["127.255.255.254", "[::1]", "[::1]:8080", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]:1"]
FOREIGN = ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", "[::2]"]
FOREIGN += ["0.0.0.0", "localhost..", "[::ffff:10.0.0.1]", "example.com:80", "xlocalhost"]
MALFORMED = [
    "",
    "local host",
    "localhost:",
    "localhost:x",
    "localhost:123456",
    "[::1",
    "::1",
    "a@b",
]
MALFORMED += ["localhost/", "localhost,evil.example", "[::1]x", "http://localhost"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return script_pair(load_tokenizer(folder), "jumps over")


@pytest.fixture(scope="module")
def server(pair: Any) -> Iterator[Server]:
    with Server(pair) as made:
        yield made


def status(server: Server, host: str) -> tuple[int, str]:
    ask = f"GET /health HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n"
    answer = everything(server.raw(ask.encode("latin-1")))
    return int(answer.split()[1]), answer.decode()


@pytest.mark.parametrize("host", LOOPBACK)
def test_every_spelling_of_loopback_is_taken(server: Server, host: str) -> None:
    assert status(server, host)[0] == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_other_hosts_are_refused(server: Server, host: str) -> None:
    code, text = status(server, host)
    assert code == 400 and f"must be this machine's loopback but got '{host}'" in text


@pytest.mark.parametrize("host", MALFORMED)
def test_malformed_hosts_are_refused(server: Server, host: str) -> None:
    code, text = status(server, host)
    assert code == 400 and "must be a name or an address but got" in text
    assert host_name(host) is None


def test_hosts_that_are_allowed_are_taken_beside_loopback(pair: Any) -> None:
    with Server(pair, hosts=["Models.example.com", "10.0.0.9"]) as server:
        for host in ("models.example.com", "MODELS.EXAMPLE.COM:443", "10.0.0.9:80", "localhost"):
            assert status(server, host)[0] == 200
        for host in ("example.com", "x.models.example.com", "10.0.0.8"):
            assert status(server, host)[0] == 400
    for host in ("models.example.com:443", "http://x", "", "*"):
        with pytest.raises(ValueError, match="an allowed host must be a name or an address"):
            make_app(pair, hosts=[host])


def test_any_host_takes_all_but_malformed_ones(pair: Any) -> None:
    with Server(pair, any_host=True) as server:
        assert [status(server, host)[0] for host in FOREIGN] == [200] * len(FOREIGN)
        assert status(server, "a b")[0] == 400


@pytest.mark.parametrize(
    ("address", "is_one"),
    [
        ("127.0.0.1", True),
        ("127.8.9.10", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("fe80::1%eth0", False),
    ],
)
def test_bound_addresses(address: str, is_one: bool) -> None:
    assert is_loopback(address) is is_one


@pytest.mark.parametrize("host", ["LOCALHOST", "127.0.0.2", "0.0.0.0"])
def test_the_command_guards_by_the_address_it_is_bound_to(host: str) -> None:
    import httpx

    with command("--host", host, "--port", "0", "--quiet", "--no-api-key") as process:
        assert process.stderr is not None
        port = re.search(r":(\d+)/v1", process.stderr.readline())
        assert port
        if host == "0.0.0.0":
            warning = process.stderr.readline()
            assert warning.startswith("Warning: anybody who can reach 0.0.0.0 can use the server")
        at = "127.0.0.1" if host == "0.0.0.0" else host.lower()
        url = f"http://{at}:{port[1]}/health"
        answer = httpx.get(url, headers={"host": "evil.example"}, timeout=60)
        assert answer.status_code == (200 if host == "0.0.0.0" else 400)
        assert httpx.get(url, timeout=60).status_code == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130
        assert process.stderr.read() == "Interrupted.\n"  # quiet: no line per request
