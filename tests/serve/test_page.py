"""The page's files and headers, and the rounds that a chat's stream tells."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import GAME, Server
from teller import telling, thinking_tokenizer

from pyengine.checkpoint.pair import load
from pyengine.engine.guided import Guide
from pyengine.engine.stats import last_source
from pyengine.serve.web import FILES, FOLDER, POLICY

ROOT = Path(__file__).parents[2]
STREAMED = {"stream": True, "stream_options": {"include_rounds": True, "include_usage": True}}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(load()) as made:
        yield made


def chunks(server: Server, **body: Any) -> list[dict[str, Any]]:
    said = server.post(json={"messages": GAME, **body})
    assert said.status_code == 200, said.text
    lines = [line.removeprefix("data: ") for line in said.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def rounds(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk["pyengine"]["round"] for chunk in told if "pyengine" in chunk]


def text_of(told: list[dict[str, Any]], field: str = "content") -> str:
    return "".join(c["delta"].get(field) or "" for chunk in told for c in chunk["choices"])


def check_rounds(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rounds add up to the deltas, chunk by chunk, and to the usage."""
    each = rounds(told)
    for field in ("content", "reasoning_content"):
        assert "".join(piece for one in each for piece in one[field]) == text_of(told, field)
    for one in each:
        assert len({len(one[name]) for name in ("tokens", "content", "sources")}) == 1
        assert 0 <= one["accepted"] <= one["drafted"]
    usage = told[-1]["usage"]
    assert sum(len(one["tokens"]) for one in each) == usage["completion_tokens"]
    assert sum(one["drafted"] for one in each) == usage["drafted_tokens"]
    assert sum(one["accepted"] for one in each) == usage["accepted_tokens"]
    return each


@pytest.mark.parametrize("path", FILES)
def test_headers(server: Server, path: str) -> None:
    said = httpx.get(server.url + path)
    assert said.status_code == 200 and said.content == (FOLDER / FILES[path][0]).read_bytes()
    assert said.headers["content-type"] == FILES[path][1]
    assert said.headers["content-security-policy"] == "; ".join(POLICY)
    assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} < set(POLICY)
    assert not any(word in " ".join(POLICY) for word in ("unsafe", "*", "http", "data:"))
    assert said.headers["x-content-type-options"] == "nosniff"
    assert said.headers["referrer-policy"] == "no-referrer"
    assert httpx.head(server.url + path).status_code == 200
    assert httpx.post(server.url + path).status_code == 405


def test_the_page_without_a_key_and_without_the_page(tmp_path: Path) -> None:
    pair = telling(thinking_tokenizer(tmp_path), "fox")
    with Server(pair, key="sesame") as guarded:
        for path in FILES:
            assert httpx.get(guarded.url + path).status_code == 200
        for path in ("/v1/models", "/metrics", "/page", "/page/", "/page/../v1/models", "//"):
            assert httpx.get(guarded.url + path).status_code == 401
        other = {"host": "example.com"}
        assert httpx.get(guarded.url, headers=other).status_code == 400
    with Server(pair, page=False) as bare:
        assert {httpx.get(bare.url + path).status_code for path in FILES} == {404}
        assert bare.health()["status"] == "ok"


def test_the_files_are_served_shipped_and_name_nobody_else() -> None:
    served = {name for name, _ in FILES.values()}
    assert {path.name for path in FOLDER.iterdir()} == served
    source = (ROOT / "pyproject.toml").read_text()
    excluded = re.findall(r'"([^"]+)"', re.search(r"^wheel.exclude = \[(.*)\]$", source, re.M)[1])
    excluded += re.findall(r'"([^"]+)"', re.search(r"^sdist.exclude = \[(.*)\]$", source, re.M)[1])
    assert 'wheel.packages = ["pyengine"]' in source and len(excluded) > 3
    for name in served:
        path = f"pyengine/serve/page/{name}"
        assert not any(fnmatch.fnmatch(path, glob) for glob in excluded)
        text = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "//" not in re.sub(r"^\s*//.*|; //.*", "", text, flags=re.M), name
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacent",
            "document.write",
            "eval(",
            "Storage",
        ):
            assert word not in text, name
        assert not re.search(
            r"<script(?! type=\"module\" src=\"/page/)|<style|\sstyle=|\son\w+=", text
        )
    paths = re.findall(r'(?:src|href)="([^"]*)"', (FOLDER / "index.html").read_text())
    assert set(paths) <= set(FILES) and len(paths) == 4


@pytest.mark.parametrize(("block", "temperature"), [(1, 0.0), (4, 0.0), (6, 1.0)])
def test_rounds_add_up(server: Server, block: int, temperature: float) -> None:
    ask = {"max_tokens": 60, "seed": 3, "temperature": temperature, "block_size": block}
    told = chunks(server, **ask, **STREAMED)
    first, *others = check_rounds(told)
    assert first["sources"] == ["first"] and first["drafted"] == 0
    for one in others[:-1]:
        kept, drafted = one["accepted"], one["drafted"]
        last = "plain" if not drafted else "bonus" if kept == drafted else "correction"
        assert one["sources"] == ["draft"] * kept + [last] and drafted == block - 1
    plain = chunks(server, **ask, stream=True)
    assert text_of(plain) == text_of(told) and rounds(plain) == []
    assert {key for chunk in plain for key in chunk} == {
        *("id", "created", "model", "object", "choices"),
    }


def test_rounds_of_several_texts_are_told_apart(server: Server) -> None:
    told = chunks(server, n=2, max_tokens=20, temperature=1, seed=1, **STREAMED)
    for index in (0, 1):
        own = [c for c in told if c["choices"] and c["choices"][0]["index"] == index]
        pieces = [piece for one in rounds(own) for piece in one["content"]]
        assert "".join(pieces) == text_of(own) and rounds(own)[0]["sources"] == ["first"]
    assert sum(len(one["tokens"]) for one in rounds(told)) == 40


def test_rounds_are_for_streams_of_chats(server: Server) -> None:
    for body in ({"stream_options": {"include_rounds": True}}, {**STREAMED, "prompt": "a"}):
        path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
        given = body if "prompt" in body else {**body, "messages": GAME}
        said = server.post(path, json=given)
        assert said.status_code == 400 and "stream" in said.json()["error"]["message"]


@pytest.mark.parametrize("block", [1, 3, 8])
def test_pieces_of_characters_stops_and_thoughts(tmp_path: Path, block: int) -> None:
    """Half characters, what may begin a stop string, and thoughts: pieces are what deltas say."""
    says = {
        "cat": "Katze \U0001f408\u200d\u2b1b und \u4e2d\u6587, dann STO und STOP, nie",
        "ponder": "a dog \U0001f415<channel|> It sleeps \U0001f634.",
    }
    pair = telling(thinking_tokenizer(tmp_path), says)
    with Server(pair) as server:
        ask = {"temperature": 0, "block_size": block, **STREAMED}
        told = chunks(server, **{**ask, "messages": [{"role": "user", "content": "cat"}]})
        each = check_rounds(told)
        assert text_of(told) == says["cat"]
        assert "" in [piece for one in each[:-1] for piece in one["content"]]
        cut = chunks(
            server, **{**ask, "messages": [{"role": "user", "content": "cat"}]}, stop="STOP"
        )
        assert text_of(cut) == says["cat"].partition("STOP")[0]
        assert "".join(p for one in rounds(cut) for p in one["content"]) == text_of(cut)
        # All of it may begin a stop string until the tokens are used up
        held = {"max_tokens": 5, "stop": says["cat"] + "!"}
        told = chunks(server, **{**ask, **held, "messages": [{"role": "user", "content": "cat"}]})
        assert says["cat"].startswith(text_of(told)) and text_of(told)
        assert [p for one in rounds(told) for p in one["content"]] == [
            "",
            "",
            "",
            "",
            text_of(told),
        ]
        thinks = {"messages": [{"role": "user", "content": "ponder"}], "reasoning_effort": "high"}
        told = chunks(server, **{**ask, **thinks})
        check_rounds(told)
        assert text_of(told, "reasoning_content") == "a dog \U0001f415"
        # A budget writes the closing mark, which is nobody's token
        told = chunks(server, **{**ask, **thinks, "thinking_budget": 1})
        each = rounds(told)
        sources = [source for one in each for source in one["sources"]]
        assert (
            sources.count("budget") == 1 and len(sources) == told[-1]["usage"]["completion_tokens"]
        )
        for field in ("content", "reasoning_content"):
            assert "".join(p for one in each for p in one[field]) == text_of(told, field)


def test_sources_under_a_grammar() -> None:
    guide = Guide.__new__(Guide)
    guide.drawn, guide.forced = [True, False, False, True], [False, True, False, False]
    assert guide.sources(4) == ["draft", "forced", "plain", "draft"]
    assert guide.sources(1) == ["draft"] and guide.sources(0) == []
    assert [last_source(*pair) for pair in ((0, 0), (3, 3), (3, 2))] == [
        *("plain", "bonus", "correction"),
    ]


def test_forced_tokens_are_told(server: Server) -> None:
    pytest.importorskip("llguidance", reason="needs the extra grammar")
    schema = {"type": "object", "properties": {"colour": {"enum": ["reddish"]}}}
    schema |= {"required": ["colour"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    told = chunks(server, response_format=form, temperature=0, max_tokens=60, **STREAMED)
    each = check_rounds(told)
    assert json.loads(text_of(told)) == {"colour": "reddish"}
    assert sum(one["sources"].count("forced") for one in each) > 3
    assert (
        sum(one["sources"].count("draft") for one in each) <= told[-1]["usage"]["accepted_tokens"]
    )
