"""Published numbers: the usage that the server tells, worked out by hand, whole and streamed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from reading import read_request
from test_stats_numbers import STATS
from text_fakes import script_pair, write_tokenizers

from pyengine.generation import Stream, generate
from pyengine.serve.protocols.ask import Ask, Limits
from pyengine.serve.protocols.chat import ChatReply
from pyengine.serve.protocols.choices import usage_of
from pyengine.serve.protocols.completions import CompletionReply
from pyengine.task import Result
from pyengine.text.tokenizer import load_tokenizer

BODY: dict[str, Any] = {"prompt": [5, 6, 7, 8, 9, 10, 11], "seed": 2**32 - 3, "max_tokens": 9}
# Nine tokens are told although the stats count what a stop string cut off too
RESULT = Result("text", [1, 2, 3, 4, 5, 6, 7, 8, 9], "stop", STATS)
USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 9,
    "total_tokens": 16,
    "prompt_tokens_details": {"cached_tokens": 20},
    "seed": 2**32 - 3,
    "block_size": STATS.block_size,
    "drafted_tokens": 25,
    "accepted_tokens": 16,
    "acceptance": 0.64,
    "tok_s": 2.5,
    "by_drafter": STATS.by_drafter,
    "mean_layers": 12.0,
    "tree": 15,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return script_pair(load_tokenizer(folder), "jumps over a lazy dog")


def ask(pair: Any, **changes: Any) -> Ask:
    return read_request(pair, {**BODY, **changes}, Limits(), chat="messages" in changes)


def test_every_field_of_the_usage(pair: Any) -> None:
    assert usage_of(ask(pair), [RESULT]) == USAGE
    two = {"lookup": {"rounds": 4, "drafted": 18, "accepted": 14}}
    assert usage_of(ask(pair, n=2), [RESULT, RESULT])["by_drafter"] == two
    one_drafter = replace(RESULT, stats=replace(STATS, by_drafter={}, exits={}, tree=None))
    assert not {"by_drafter", "mean_layers", "tree"} & usage_of(ask(pair), [one_drafter]).keys()
    deeper = replace(RESULT, stats=replace(STATS, exits={24: 30}))
    assert usage_of(ask(pair, n=2), [RESULT, deeper])["mean_layers"] == 18


def test_a_server_that_does_not_tell_what_was_known(pair: Any) -> None:
    quiet = read_request(pair, BODY, Limits(cached_tokens=False), chat=False)
    assert usage_of(quiet, [RESULT]) == {k: v for k, v in USAGE.items() if "details" not in k}


@pytest.mark.parametrize("chat", [False, True])
def test_whole_and_streamed_answers_tell_the_same(pair: Any, chat: bool) -> None:
    made, reply_of = ask(pair), ChatReply if chat else CompletionReply
    whole = reply_of(made).whole({}, [RESULT])
    assert whole["usage"] == USAGE
    assert [choice["index"] for choice in whole["choices"]] == [0]
    reply = reply_of(replace(made, with_usage=True))
    [end] = reply.end(0, RESULT)
    assert end["usage"] is None
    [last] = reply.close([RESULT])
    assert last["usage"] == USAGE and last["choices"] == []
    [end] = reply_of(made).end(0, RESULT)
    assert "usage" not in end and not list(reply_of(made).close([RESULT]))


def test_usage_of_a_real_generation(pair: Any) -> None:
    """The prompt as the target saw it, the tokens that were told."""
    made = ask(pair, max_tokens=5, block_size=1)
    running = Stream(made.task(), None)
    list(running)
    told = usage_of(made, [running.result])
    assert len(pair.target.prompt) == told["prompt_tokens"] == 7
    assert (told["completion_tokens"], told["total_tokens"]) == (5, 12)
    assert (told["drafted_tokens"], told["acceptance"]) == (0, 0.0)
    assert told["seed"] == running.result.stats.seed == 2**32 - 3


def test_a_seed_that_was_drawn_is_told(pair: Any) -> None:
    """The one the generation used."""
    drawn = set()
    for _ in range(4):
        made = read_request(pair, {"prompt": [5], "max_tokens": 2}, Limits(), chat=False)
        running = Stream(made.task(), None)
        list(running)
        seed = usage_of(made, [running.result])["seed"]
        assert seed == running.result.stats.seed == made.sampling.seed
        drawn.add(seed)
    assert len(drawn) == 4


def test_every_seed_may_be_drawn(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 0 to the largest, by the server and by generate alike."""
    for pick, seed in ((lambda n: n - 1, 2**32 - 1), (lambda n: 0, 0)):
        monkeypatch.setattr("secrets.randbelow", pick)
        made = read_request(pair, {"prompt": [5], "max_tokens": 1}, Limits(), chat=False)
        assert made.sampling.seed == seed
        assert generate([5], pair=pair, max_tokens=1).stats.seed == seed
