"""A server whose texts are approximate: what they are, what they say, and what is refused."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from exits import passed, trial
from serving import CHAT, GAME, Server, command
from typer.testing import CliRunner

from pyengine import cli
from pyengine.generation import generate
from pyengine.sampling.settings import Sampling
from pyengine.serve.protocols.ask import Limits
from pyengine.task import Result, embedded_pair

pytestmark = pytest.mark.native("the embedded pair takes plain MLX minutes")

TEXTS, RESPONSES, MESSAGES = "/v1/completions", "/v1/responses", "/v1/messages"
SAMPLED = Sampling(temperature=0.8, top_p=0.9)
CERTIFICATE = passed(sampling=SAMPLED, tested=(trial(0.9, 0), trial(0.1, 0)))
LABEL = (
    "approximate: on prompts like the 40 calibrated ones, answers differ from the full model's by "
    "at most 0.1 on average, with confidence 0.95"
)
WEATHER = {"type": "function", "function": {"name": "weather", "description": "of a town"}}
TOLD = {
    "label": LABEL,
    **{"delta": 0.1, "epsilon": 0.05, "n": 40, "metric": "differs"},
    **{"exit_layer": 6, "lambda": 0.1},
}
PROMPTS = ("import os\n", "def fib(n):", "x = [", "Pong!", "<html>", "The fox")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(embedded_pair(), Limits(early_exit=CERTIFICATE, streams=4)) as made:
        yield made


def wanted(prompt: Any, seed: int, **settings: Any) -> Result:
    own = replace(SAMPLED, seed=seed)
    return generate(prompt, early_exit=CERTIFICATE, sampling=own, **settings)


def asked(server: Server, path: str, **body: Any) -> dict[str, Any]:
    said = server.post(path, json=body)
    assert said.status_code == 200, said.text
    return dict(said.json())


def events(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    said = server.post(path, json={**body, "stream": True})
    assert said.status_code == 200, said.text
    lines = [line.removeprefix("data: ") for line in said.text.split("\n") if "data: " in line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def refused(server: Server, path: str = CHAT, **body: Any) -> str:
    given = {"prompt": "x"} if path == TEXTS else {"messages": GAME}
    said = server.post(path, json={**given, **body})
    assert said.status_code == 400, said.text
    return str(said.json()["error"]["message"])


def test_many_clients_get_the_texts_of_generate(server: Server) -> None:
    """Sampler and length are the certificate's where a request names none."""
    pairs = [(prompt, seed) for prompt in PROMPTS for seed in (3, 4)]
    want = [wanted(prompt, seed, raw=True) for prompt, seed in pairs]
    assert all(len(result.tokens) == 24 for result in want)
    assert {6, 24} == {layer for result in want for layer in result.stats.exits}
    exact = [
        generate(p, raw=True, sampling=replace(SAMPLED, seed=n), block_size=1, max_tokens=24)
        for p, n in pairs
    ]
    assert any(one.text != other.text for one, other in zip(want, exact, strict=True))

    def ask(pair: tuple[str, int]) -> dict[str, Any]:
        return asked(server, TEXTS, prompt=pair[0], seed=pair[1])

    with ThreadPoolExecutor(len(pairs)) as pool:
        got = list(pool.map(ask, pairs))
    assert [one["choices"][0]["text"] for one in got] == [result.text for result in want]
    for one, result in zip(got, want, strict=True):
        assert one["early_exit"] == TOLD == result.early_exit
        assert one["usage"]["mean_layers"] == result.stats.mean_layers < 24
        assert one["usage"]["block_size"] == 1 and one["usage"]["drafted_tokens"] == 0


def test_every_protocol_says_that_its_text_is_approximate(server: Server) -> None:
    want, ask = wanted(GAME, 5, max_tokens=9), {"messages": GAME, "max_tokens": 9, "seed": 5}
    said = asked(server, CHAT, **ask)
    assert said["choices"][0]["message"]["content"] == want.text and said["early_exit"] == TOLD
    first, *between, last, usage = events(
        server, CHAT, **ask, stream_options={"include_usage": True}
    )
    chunks = [first, *between, last]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == want.text
    # The first since it may be the last, if somebody breaks off
    assert first["early_exit"] == last["early_exit"] == TOLD and last["choices"][0]["finish_reason"]
    assert not any("early_exit" in chunk for chunk in between) and usage["choices"] == []
    assert usage["usage"]["mean_layers"] == want.stats.mean_layers

    said = asked(server, MESSAGES, **ask)
    assert said["content"][0]["text"] == want.text and said["early_exit"] == TOLD
    told = events(server, MESSAGES, **ask)
    assert "".join(e["delta"]["text"] for e in told if "text" in e.get("delta", ())) == want.text
    start, end = told[0]["message"], told[-2]
    assert end["type"] == "message_delta" and start["early_exit"] == end["early_exit"] == TOLD
    assert end["usage"]["mean_layers"] == want.stats.mean_layers

    ask = {"input": GAME[0]["content"], "max_output_tokens": 9, "seed": 5}
    said = asked(server, RESPONSES, **ask)
    assert said["output"][0]["content"][0]["text"] == want.text and said["early_exit"] == TOLD
    assert httpx.get(f"{server.url}{RESPONSES}/{said['id']}").json()["early_exit"] == TOLD
    told = events(server, RESPONSES, **ask)
    assert told[0]["type"] == "response.created" and told[-1]["type"] == "response.incomplete"
    assert told[0]["response"]["early_exit"] == told[-1]["response"]["early_exit"] == TOLD
    assert told[-1]["response"]["output"][0]["content"][0]["text"] == want.text


def test_several_texts_of_one_request(server: Server) -> None:
    prompts = ["import os\n", "x = ["]
    want = [wanted(p, seed, raw=True, max_tokens=9) for p in prompts for seed in (7, 8)]
    ask = {"prompt": prompts, "n": 2, "seed": 7, "max_tokens": 9}
    said = asked(server, TEXTS, **ask)
    assert [choice["text"] for choice in said["choices"]] == [result.text for result in want]
    assert said["early_exit"] == TOLD
    layers = [n * count for one in want for n, count in one.stats.exits.items()]
    assert said["usage"]["mean_layers"] == sum(layers) / (4 * 8)
    told = events(server, TEXTS, **ask)
    ends = [e for e in told if e["choices"][0]["finish_reason"]]
    assert len(ends) == 4 and all(end["early_exit"] == TOLD for end in [told[0], *ends])
    assert sum("early_exit" in event for event in told) == 5


def test_a_conversation_shares_nothing_with_the_turn_before(server: Server) -> None:
    first = asked(server, CHAT, messages=GAME, seed=1)
    turn = {"role": "assistant", "content": first["choices"][0]["message"]["content"]}
    talk = [*GAME, turn, {"role": "user", "content": "Now Pong."}]
    said = asked(server, CHAT, messages=talk, seed=2)
    assert said["choices"][0]["message"]["content"] == wanted(talk, 2).text
    assert said["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_the_state_of_the_server_says_so(server: Server) -> None:
    assert server.health()["early_exit"] == TOLD
    with Server(embedded_pair()) as plain:
        assert "early_exit" not in plain.health()
        said = asked(plain, TEXTS, prompt="x", max_tokens=2)
        assert "early_exit" not in said and "mean_layers" not in said["usage"]
        assert not any(
            "early_exit" in json.dumps(e) for e in events(plain, CHAT, messages=GAME, max_tokens=2)
        )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"temperature": 0}, "[early-exit] temperature must be 0.8 as calibrated but got 0.0."),
        ({"top_p": 1}, "[early-exit] top_p must be 0.9 as calibrated but got 1.0."),
        ({"top_k": 5}, "[early-exit] top_k must be 64 as calibrated but got 5."),
        (
            {"presence_penalty": 1},
            "[early-exit] presence_penalty must be 0.0 as calibrated but got 1.0.",
        ),
        (
            {"logit_bias": {"7": 1}},
            "[early-exit] logit_bias must be {} as calibrated but got {'7': 1.0}.",
        ),
        ({"max_tokens": 25}, "[serve] max_tokens must be at most 24 as calibrated."),
        ({"max_tokens": 9000}, "[serve] max_tokens must be at most 24 as calibrated."),
        (
            {"logprobs": True},
            "[early-exit] logprobs must be None, since those of an exit are not the model's, but "
            "got 0.",
        ),
        (
            {"block_size": 4},
            "[early-exit] an early exit must go without drafts but some are asked for.",
        ),
        ({"regex": "a+"}, "[early-exit] the answer's form must be free but one is asked for."),
        (
            {"response_format": {"type": "json_object"}},
            "[early-exit] the answer's form must be free but one is asked for.",
        ),
        (
            {"tool_choice": "none", "tools": [WEATHER]},
            "[early-exit] tool_choice must be auto, since no answer was calibrated with tokens "
            "suppressed, but got none.",
        ),
        (
            {"thinking_budget": 4},
            "[early-exit] the thinking budget must be none, as calibrated, but got 4.",
        ),
    ],
)
def test_what_was_not_calibrated_is_refused(
    server: Server, body: dict[str, Any], message: str
) -> None:
    assert refused(server, **body) == message


def test_what_is_named_as_calibrated_is_served(server: Server) -> None:
    own = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 24, "block_size": 1, "verify": "block"}
    said = asked(server, CHAT, messages=GAME, seed=5, **own)
    assert said["choices"][0]["message"]["content"] == wanted(GAME, 5).text
    tools = {"tools": [WEATHER], "tool_choice": "auto"}
    said = asked(server, CHAT, messages=GAME, seed=5, max_tokens=9, **tools)
    assert said["usage"]["completion_tokens"] == len(
        wanted(GAME, 5, max_tokens=9, tools=[WEATHER]).tokens
    )


def test_a_prompt_that_only_comes_back_is_scored_by_the_full_model(server: Server) -> None:
    ask = {"prompt": "import os\nimport sys\n", "echo": True, "max_tokens": 0, "logprobs": 1}
    said = asked(server, TEXTS, **ask)
    with Server(embedded_pair()) as plain:
        assert said["choices"] == asked(plain, TEXTS, **ask)["choices"]
    assert "early_exit" not in said
    assert refused(server, TEXTS, **{**ask, "max_tokens": 1}).startswith("[early-exit] logprobs")


def test_whole_answers_alone_where_these_were_judged() -> None:
    """A longest answer that clients of messages must name is any above the certificate's."""
    whole = replace(CERTIFICATE, metric="lcs")
    with Server(embedded_pair(), Limits(early_exit=whole)) as server:
        want = wanted(GAME, 5).text
        said = asked(server, MESSAGES, messages=GAME, seed=5, max_tokens=4096)
        assert said["content"][0]["text"] == want and said["early_exit"]["metric"] == "lcs"
        assert (
            asked(server, CHAT, messages=GAME, seed=5)["choices"][0]["message"]["content"] == want
        )
        told = "[early-exit] max_tokens must be 24 under lcs but got 9."
        assert refused(server, max_tokens=9) == refused(server, MESSAGES, max_tokens=9) == told
        assert refused(server, stop="x").startswith("[early-exit] stop must be none under lcs")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"drafter": "lookup"}, "[early-exit] an early exit must go without drafts but some are"),
        ({"cache_dir": Path("x")}, "[serve] --cache-dir must be left out with --early-exit, which"),
        ({"early_exit": 3}, "[early-exit] early_exit must be a certificate or its file but got 3."),
        (
            {"early_exit": replace(CERTIFICATE, metric="lcs"), "max_tokens": 23},
            "[serve] max_tokens must be at least 24 under lcs, which judged whole answers, but got "
            "23.",
        ),
    ],
)
def test_limits_that_do_not_go_with_it(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Limits(**{"early_exit": CERTIFICATE, **limits})
    assert str(error.value).startswith(message)


def test_a_lower_limit_of_the_server_holds() -> None:
    assert Limits(early_exit=CERTIFICATE, max_tokens=9).length == 9
    assert Limits(early_exit=CERTIFICATE).length == 24 and Limits().length == 8192


@pytest.fixture
def file(tmp_path: Path) -> str:
    CERTIFICATE.write(tmp_path / "exit.json")
    return str(tmp_path / "exit.json")


def test_the_command_says_so_when_it_starts(file: str) -> None:
    """And serves what `pyengine generate --early-exit` gives."""
    with command("--early-exit", file, "--port", "0", "--json") as process:
        assert process.stdout is not None and process.stderr is not None
        started = json.loads(process.stdout.readline())
        assert started["early_exit"] == TOLD
        ask = {"messages": GAME, "seed": 5}
        said = httpx.post(f"{started['url']}/chat/completions", json=ask, timeout=60).json()
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
        assert process.stderr.read().splitlines()[1] == f"{LABEL}."
    words = ["--temperature", "0.8", "--top-p", "0.9", "--seed", "5", "--json"]
    alone = CliRunner().invoke(
        cli.app, ["generate", "--early-exit", file, *words, GAME[0]["content"]]
    )
    told = json.loads(alone.stdout)
    assert said["choices"][0]["message"]["content"] == told["text"]
    assert said["early_exit"] == told["early_exit"] == TOLD
    assert said["usage"]["mean_layers"] == told["stats"]["mean_layers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drafter", "lookup"], "[early-exit] an early exit must go without drafts but some are"),
        (["--cache-dir", "x"], "[serve] --cache-dir must be left out with --early-exit, which"),
    ],
)
def test_what_does_not_go_with_it_is_told_before_weights_are_read(
    file: str, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.common, "load_pair", None)  # which would be a TypeError
    done = CliRunner().invoke(cli.app, ["serve", "--early-exit", file, *words])
    assert done.exit_code == 2 and done.stderr.startswith(f"pyengine: {message}"), done.output


def test_a_certificate_of_another_pair_is_refused_at_the_start(tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    replace(CERTIFICATE, target="0" * 64).write(other)
    with command("--early-exit", str(other), "--port", "0") as process:
        _, said = process.communicate(timeout=60)
    line = "pyengine: [early-exit] target must be the calibrated one, 000000000000, but got"
    assert process.returncode == 2 and said.startswith(line) and said.count("\n") == 1, said
    done = CliRunner().invoke(cli.app, ["serve", "--early-exit", str(tmp_path / "none.json")])
    assert done.exit_code == 2 and "none.json cannot be read" in done.stderr, done.output
