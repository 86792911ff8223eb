"""A server whose drafts are trees: texts are plain ones, usage says so, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import CHAT, GAME, Server
from typer.testing import CliRunner

from pyengine import cli
from pyengine.generation import generate
from pyengine.serve.protocols.ask import Limits
from pyengine.serve.server import make_app
from pyengine.task import embedded_pair

pytestmark = pytest.mark.native("the embedded pair takes plain MLX minutes")

TEXTS, RESPONSES, MESSAGES = "/v1/completions", "/v1/responses", "/v1/messages"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(embedded_pair(), Limits(drafter="dflash", tree=7, streams=4)) as made:
        yield made


def asked(server: Server, path: str, **body: Any) -> dict[str, Any]:
    said = server.post(path, json=body)
    assert said.status_code == 200, said.text
    return dict(said.json())


def test_many_clients_get_plain_texts(server: Server) -> None:
    """Greedy and sampled, of several depths, at once; the rule is coupled where none is named."""
    asks: list[dict[str, Any]] = [
        {"prompt": "import os\n", "temperature": 0},
        {"prompt": "<html>", "temperature": 0, "block_size": 4},
        {"prompt": "<html>", "temperature": 1, "seed": 3},
        {"prompt": "def fib(n):", "temperature": 0.7, "seed": 4},
        {"prompt": "def fib(n):", "temperature": 0.7, "seed": 5, "logprobs": 1},
    ]
    want = [
        generate(
            ask["prompt"],
            raw=True,
            max_tokens=16,
            block_size=1,
            sampling={
                "verify": "coupled",
                **{k: ask[k] for k in ("temperature", "seed") if k in ask},
            },
        )
        for ask in asks
    ]
    with ThreadPoolExecutor(len(asks)) as pool:
        got = list(pool.map(lambda ask: asked(server, TEXTS, max_tokens=16, **ask), asks))
    assert [one["choices"][0]["text"] for one in got] == [result.text for result in want]
    assert all(one["usage"]["tree"] == 7 for one in got)
    assert [one["usage"]["block_size"] for one in got] == [8, 4, 8, 8, 8]
    drafted = [one["usage"]["drafted_tokens"] for one in got]
    assert all(count > 0 and count % 7 == 0 for count in drafted)
    assert any(one["usage"]["accepted_tokens"] for one in got)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": GAME, "max_tokens": 9}),
        (MESSAGES, {"messages": GAME, "max_tokens": 9}),
        (RESPONSES, {"input": GAME[0]["content"], "max_output_tokens": 9}),
    ],
)
def test_every_protocol_says_so(server: Server, path: str, body: dict[str, Any]) -> None:
    want = generate(GAME, max_tokens=9, block_size=1, sampling={"seed": 6, "verify": "coupled"})
    said = asked(server, path, seed=6, **body)
    assert json.dumps(want.text) in json.dumps(said) and said["usage"]["tree"] == 7


FORM = (
    "[generate] the answer's form must be free with a tree but one is asked for; leave out the "
    "format, regex, grammar, strict tool or tool_choice that asks for it, or the tree (a server's "
    "is its --tree)."
)
SCHEMA = {"type": "object", "properties": {}, "additionalProperties": False}
TOOL = {"name": "now", "parameters": SCHEMA}
JSON = {"type": "json_schema", "json_schema": {"name": "empty", "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": GAME, "regex": "a+"}),
        (CHAT, {"messages": GAME, "response_format": {"type": "json_object"}}),
        (CHAT, {"messages": GAME, "response_format": JSON}),
        (
            CHAT,
            {
                "messages": GAME,
                "tools": [{"type": "function", "function": TOOL | {"strict": True}}],
            },
        ),
        (
            CHAT,
            {
                "messages": GAME,
                "tools": [{"type": "function", "function": TOOL}],
                "tool_choice": "required",
            },
        ),
        (TEXTS, {"prompt": "a", "grammar": 'start: "a"'}),
        (
            RESPONSES,
            {"input": "a", "text": {"format": {"type": "json_schema", **JSON["json_schema"]}}},
        ),
        (
            MESSAGES,
            {
                "messages": GAME,
                "max_tokens": 9,
                "output_config": {"format": {"type": "json_schema", "schema": SCHEMA}},
            },
        ),
    ],
)
def test_a_form_is_refused_with_the_way_out(
    server: Server, path: str, body: dict[str, Any]
) -> None:
    said = server.post(path, json=body)
    assert said.status_code == 400 and said.json()["error"]["message"] == FORM


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"verify": "block"}, "[generate] verify must be coupled, or temperature 0, with a tree"),
        ({"presence_penalty": 1}, "[generate] penalties must be off with a tree"),
        ({"block_size": 1}, "[generate] block_size must be at least 2 with a tree but got 1."),
    ],
)
def test_what_no_tree_goes_with(server: Server, body: dict[str, Any], message: str) -> None:
    said = server.post(CHAT, json={"messages": GAME, **body})
    assert said.status_code == 400 and said.json()["error"]["message"].startswith(message)


def test_a_target_that_processes_share_is_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shared(setting: str) -> None:
        raise ValueError(f"[ranks] {setting}")

    pair = embedded_pair()
    monkeypatch.setattr(type(pair.target), "check_alone", lambda self, setting: shared(setting))
    with pytest.raises(ValueError, match=r"\[ranks\] tree"):
        make_app(pair, limits=Limits(drafter="dflash", tree=7))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tree", "7"], "[generate] drafter must be dflash with a tree"),
        (["--tree", "16", "--drafter", "dflash"], "[generate] tree must be 1 to 15 but got 16."),
        (
            ["--tree", "7", "--drafter", "dflash+lookup"],
            "[generate] drafter must be dflash with a tree",
        ),
    ],
)
def test_what_the_command_refuses_before_weights_are_read(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cli.common, "load_pair")
    done = CliRunner().invoke(cli.app, ["serve", *words])
    assert done.exit_code == 2 and done.stderr.startswith(f"pyengine: {message}"), done.output
    assert done.stderr.count("\n") == 1
