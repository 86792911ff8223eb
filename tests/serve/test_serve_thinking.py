"""A budget of thoughts: the thought is closed behind its last token, and the text is the one that
the model would have made had it closed the thought itself."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from serving import CHAT, Server
from speaker import letter, speaking
from teller import telling, thinking_tokenizer
from telling import needs
from text_fakes import write_tokenizers

from pyengine.checkpoint.pair import Pair, load
from pyengine.generation import generate
from pyengine.sampling.settings import Sampling
from pyengine.serve.protocols.ask import Limits
from pyengine.serve.thinking import Thoughts
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

FOX = [{"role": "user", "content": "fox"}]
NAME = "thought\n"


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


def marks(tok: Tokenizer) -> tuple[int, int]:
    opens, closes = tok.channel_ids()
    return opens, closes


@pytest.fixture
def thinker(tok: Tokenizer) -> Any:
    """Thinks "thought, newline, a to l", and says "uvwxyz"; each token has its place in the
    conversation, so that what goes on behind a cut goes on in the script."""
    opens, closes = marks(tok)
    script = [opens, *letter(tok, NAME + "abcdefghijkl"), closes, *letter(tok, "uvwxyz")]
    pair = speaking(tok, script)
    script, prefill = list(pair.target.script), pair.target.prefill
    prompt = len(tok.encode_chat(FOX))

    def placed(ids: list[int], *args: Any, **kw: Any) -> Any:
        pair.target.script = [*script[len(ids) - prompt :], *script]
        pair.target.__dict__.pop("rows", None)
        return prefill(ids, *args, **kw)

    pair.target.prefill = placed
    return pair


def ask(server: Server, **body: Any) -> dict[str, Any]:
    answer = server.post(CHAT, json={"messages": FOX, "temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("block", [1, 3, 7])
@pytest.mark.parametrize("budget", [1, 8, 9, 12, 19])
def test_a_thought_has_no_more_tokens_than_its_budget(
    thinker: Any, tok: Tokenizer, budget: int, block: int
) -> None:
    """Wherever a round's border falls; behind the mark the script goes on where it stands."""
    with Server(thinker) as server:
        said = ask(server, thinking_budget=budget, block_size=block, max_tokens=budget + 4)
    choice = said["choices"][0]
    whole = NAME + "abcdefghijkl"
    assert choice["message"].get("reasoning_content") == whole[len(NAME) : budget]
    # One token of the script went to the mark: the mark, budget tokens, the closing one, two more
    rest = (whole + "<uvwxyz")[budget + 1 :][:2]
    assert choice["message"]["content"] == rest.replace("<", "")
    assert said["usage"]["completion_tokens"] == budget + 4
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("budget", [20, 21, 100])
def test_a_thought_that_ends_within_its_budget_is_left_alone(thinker: Any, budget: int) -> None:
    with Server(thinker) as server:
        plain = ask(server)
        given = ask(server, thinking_budget=budget)
    assert plain["choices"] == given["choices"]
    assert given["choices"][0]["message"]["content"] == "uvwxyz"
    assert given["choices"][0]["finish_reason"] == "stop"


def test_the_answer_may_end_at_the_cut(thinker: Any) -> None:
    with Server(thinker) as server:
        for most, tokens in ((5, 5), (6, 6), (7, 7)):
            said = ask(server, thinking_budget=4, max_tokens=most)
            choice = said["choices"][0]
            assert said["usage"]["completion_tokens"] == tokens
            assert choice["finish_reason"] == "length"
            assert choice["message"]["content"] == {5: "", 6: "", 7: NAME[5:6]}[most]


def test_streams_tell_what_whole_answers_tell(thinker: Any) -> None:
    with Server(thinker) as server:
        body = {"messages": FOX, "temperature": 0, "thinking_budget": 12, "stop": "k"}
        whole = server.post(CHAT, json=body).json()["choices"][0]
        text = server.post(CHAT, json={**body, "stream": True}).text
    events = [
        json.loads(x[6:])["choices"][0] for x in text.split("\n\n") if x.startswith("data: {")
    ]
    for key in ("content", "reasoning_content"):
        assert "".join(e["delta"].get(key) or "" for e in events) == whole["message"][key]
    assert events[-1]["finish_reason"] == whole["finish_reason"] == "stop"
    assert whole["message"]["content"] == "fghij"


@pytest.mark.parametrize("body", [{"thinking_budget": 0}, {"thinking_budget": -1}])
def test_budgets_of_nothing_are_refused(thinker: Any, body: Any) -> None:
    with Server(thinker) as server:
        answer = server.post(CHAT, json={"messages": FOX, **body})
        assert answer.status_code == 400 and "budget must be at least 1" in answer.text
        answer = server.post(CHAT, json={"messages": FOX, "thinking_budget": 3, "logprobs": True})
        assert answer.status_code == 400 and "must not go with a thinking budget" in answer.text


def test_thoughts_are_counted(tok: Tokenizer) -> None:
    opens, closes = marks(tok)
    counted = Thoughts(tok, [])
    for token in [*letter(tok, "ab"), opens, *letter(tok, "t\nab"), closes, *letter(tok, "xy")]:
        counted.add(token)
    assert counted.count == 4 and not counted.under_way
    assert Thoughts(tok, [5, opens]).under_way


# On the embedded pair, whose tokenizer is given a channel: real caches, prefixes and draws


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_is_the_text_behind_a_mark_that_the_model_wrote(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    """The same draws at the same places: those of the whole conversation with the mark in it."""
    settings: dict[str, Any] = {"temperature": temperature, "seed": 11}
    sampling = Sampling(**settings, verify="coupled")
    plain = generate(FOX, pair=pair, max_tokens=30, sampling=sampling).tokens
    opens = plain[0]
    closes = next(t for t in range(pair.tokenizer.vocab_size - 1, 0, -1) if t not in plain)
    thought = [place for place, token in enumerate(plain) if token != opens][4]
    first = plain[: thought + 1]
    ids = pair.tokenizer.encode_chat(FOX)
    behind = generate(
        [*ids, *first, closes],
        pair=pair,
        max_tokens=30 - len(first) - 1,
        sampling=replace(sampling, suppress_tokens=(opens,)),
    )
    monkeypatch.setattr(type(pair.tokenizer), "channel_ids", lambda _: (opens, closes))
    body = {"messages": FOX, "max_tokens": 30, "thinking_budget": 5, "block_size": 4, **settings}
    with Server(pair, Limits(streams=2)) as server:
        said = server.post(CHAT, json=body).json()
        several = server.post(CHAT, json={**body, "n": 3}).json()
    message = said["choices"][0]["message"]
    assert message["content"] == behind.text != ""
    assert said["usage"]["completion_tokens"] == len(first) + 1 + len(behind.tokens)
    assert several["choices"][0]["message"] == message
    if temperature:
        assert len({choice["message"]["content"] for choice in several["choices"]}) == 3


@needs("llguidance", "grammar")
def test_an_answer_behind_the_cut_keeps_its_form(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Where the prompt goes on with what was thought so far, which chooses the answer here."""
    tok = thinking_tokenizer(tmp_path_factory.mktemp("thinks"))
    answers = {"muse": "plainly, " + "and so on " * 20, "plainly": '{"town": "Bonn"}'}
    with Server(telling(tok, answers)) as server:
        said = ask(
            server,
            messages=[{"role": "user", "content": "muse"}],
            reasoning_effort="high",
            thinking_budget=20,
            response_format={"type": "json_object"},
        )
    choice = said["choices"][0]
    assert choice["message"]["reasoning_content"].startswith("plainly, and")
    assert json.loads(choice["message"]["content"]) == {"town": "Bonn"}
    assert choice["finish_reason"] == "stop"
