"""`pyengine inspect owner/name`: the hub's own library, which tokenizers brings, against a hub of
this machine, whose requests are counted.

Each command is a process, since the library reads its address once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import pytest

from pyengine import cli
from pyengine.checkpoint.inspect import inspect

NANO = Path(cli.__file__).parents[1] / "nano"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
API = "/api/models/someone/pair/"


class Served(NamedTuple):
    path: str
    bytes: int
    ranged: bool


class Hub(ThreadingHTTPServer):
    """One repository, ``someone/pair``, from a folder; what the library asks for, and no more."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder = folder
        self.served: list[Served] = []

    def files(self) -> list[str]:
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [str(path.relative_to(self.folder)) for path in paths]

    def weights(self) -> list[Served]:
        return [one for one in self.served if one.path.endswith(".safetensors") and one.bytes]


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Tests print nothing."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith(f"{API}revision/"):
            root = self.server.folder
            siblings = [
                {"rfilename": name, "size": (root / name).stat().st_size}
                for name in self.server.files()
            ]
            self.reply({"id": "someone/pair", "sha": COMMIT, "siblings": siblings})
        elif path.startswith(f"{API}tree/"):
            self.reply([self.entry(name) for name in self.server.files()])
        elif "/resolve/" in path:
            self.file(path.split("/resolve/")[1].partition("/")[2])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        is_form = "form" in self.headers.get("Content-Type", "")
        wanted = parse_qs(body)["paths"] if is_form else json.loads(body)["paths"]
        self.reply([self.entry(name) for name in wanted if name in self.server.files()])

    def entry(self, name: str) -> dict[str, Any]:
        size = (self.server.folder / name).stat().st_size
        return {"type": "file", "path": name, "size": size, "oid": "0" * 40}

    def file(self, name: str) -> None:
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        data, ranged = path.read_bytes(), self.headers.get("Range")
        self.send_response(206 if ranged else 200)
        if ranged:
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
            data = data[int(first) : int(last or len(data)) + 1]
        self.send_header("ETag", f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        sent = 0
        if self.command == "GET":
            sent = self.wfile.write(data)
        self.server.served.append(Served(name, sent, bool(ranged)))

    def reply(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    folder = tmp_path / "pair"
    shutil.copytree(NANO, folder)
    server = Hub(folder)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def run(hub: Hub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        host, port = hub.server_address[:2]
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://{host}:{port}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": str(Path(cli.__file__).parents[2]),
            **settings,
        }
        return subprocess.run(
            [sys.executable, "-m", "pyengine", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path / "cwd",
        )

    (tmp_path / "cwd").mkdir()
    return run


def fetch(run: Any) -> None:
    """The whole pair into the cache, as generate would."""
    done = run("generate", "Write Pong.", "--bundle", "someone/pair", "--max-tokens", "1")
    assert done.returncode == 0, done.stderr


PARTS = ("target", "assistant", "dflash")


def without_places(report: dict[str, Any]) -> dict[str, Any]:
    parts = {part: {**report[part], "path": ""} for part in PARTS}
    return {**report, **parts, "path": "", "memory": {**report["memory"], "available": 0}}


def test_only_headers_are_fetched(hub: Hub, run: Any, tmp_path: Path) -> None:
    done = run("inspect", "someone/pair", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["path"] == "someone/pair"
    assert report["target"]["path"] == "someone/pair/target"
    assert without_places(report) == without_places(inspect(NANO))
    weights = hub.weights()
    assert {one.path for one in weights} == {f"{part}/model.safetensors" for part in PARTS}
    assert all(one.ranged for one in weights)
    # The length and the header of each, to the byte
    want = 0
    for part in PARTS:
        with (NANO / part / "model.safetensors").open("rb") as file:
            want += 8 + int.from_bytes(file.read(8), "little")
    assert sum(one.bytes for one in weights) == want
    cached = list((tmp_path / "cache").rglob("*.safetensors"))
    assert cached == [] and list((tmp_path / "cache").rglob("tokenizer.json"))


def test_what_is_in_the_cache_is_used(hub: Hub, run: Any) -> None:
    fetch(run)
    before = len(hub.weights())
    assert before == len(PARTS)
    assert run("inspect", "someone/pair").returncode == 0
    assert len(hub.weights()) == before
    offline = run("inspect", "someone/pair", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


def test_offline_is_one_sentence(hub: Hub, run: Any) -> None:
    rule = "pyengine: [hub] someone/pair must be a folder that is there, or owner/name on the hub"
    for _ in range(2):  # with an empty cache; then with one that has the small files alone
        done = run("inspect", "someone/pair", HF_HUB_OFFLINE="1")
        assert done.returncode == 2 and done.stderr.startswith(rule), done.stderr
        assert done.stderr.count("\n") == 1 and "but is neither: " in done.stderr
        assert run("inspect", "someone/pair").returncode == 0


def damaged(hub: Hub, how: str) -> None:
    path = hub.folder / "target" / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    begin = {
        "a length past the end": len(data).to_bytes(8, "little"),
        "a length without end": b"\xff" * 8,
        "no JSON": data[:8] + b"[" * length,
        "cut off": data[:5],
    }[how]
    path.write_bytes(begin if how == "cut off" else begin + data[len(begin) :])


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("a length past the end", "is cut off or not a safetensors file."),
        ("a length without end", "is cut off or not a safetensors file."),
        ("no JSON", "is damaged: it must be JSON but is nested too deeply."),
        ("cut off", "is cut off or not a safetensors file."),
    ],
)
def test_a_damaged_header_is_what_it_is_on_a_disk(hub: Hub, run: Any, how: str, why: str) -> None:
    damaged(hub, how)
    here = inspect(hub.folder)["refused"]
    done = run("inspect", "someone/pair", "--json")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    there = json.loads(done.stdout)["refused"]
    assert there == [text.replace(str(hub.folder), "someone/pair") for text in here]
    assert any(text.endswith(why) for text in there), there


def test_files_that_lead_out_are_refused(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pyengine.checkpoint import hub as module

    monkeypatch.setattr(module, "_snapshot", lambda repository, patterns: hub.folder)
    monkeypatch.chdir(tmp_path)
    many = {f"{i}.safetensors": 8 for i in range(513)}
    for remote in ({"../x.safetensors": 8}, {"/x.safetensors": 8}, many):
        monkeypatch.setattr(module, "_remote_weights", lambda *_, remote=remote: remote)
        with (
            pytest.raises(ValueError, match=r"\[hub\] someone/pair must have at most 512 files"),
            module.headers("someone/pair"),
        ):
            raise AssertionError("it was let in")
