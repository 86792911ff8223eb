"""The drafter is chosen by name at every door, and no text depends on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from reading import read_request
from text_fakes import script_pair, write_tokenizers
from typer.testing import CliRunner

import pyengine
from pyengine import cli
from pyengine.chat import Chat
from pyengine.checkpoint.pair import load
from pyengine.generation import Stream, generate, stream
from pyengine.sampling import Sampling
from pyengine.serve.protocols.ask import Limits
from pyengine.task import LOOKUP_BLOCK
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

# It comes back to its own words, so that lookup finds some
STORY = "the lazy dog jumps over the lazy fox; the lazy dog jumps over the brown fox"
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


def test_lookup_works_with_a_target_alone() -> None:
    pair = load(Path(pyengine.__file__).parent / "nano" / "target")
    assert pair.assistant is None
    prompt = "import json\nimport json\nimport json\n"
    ask: dict[str, Any] = {"pair": pair, "sampling": GREEDY, "max_tokens": 30, "raw": True}
    plain = generate(prompt, **ask)
    looked_up = generate(prompt, block_size=5, drafter="lookup", **ask)
    assert looked_up.tokens == plain.tokens and plain.stats.block_size == 1
    assert looked_up.stats.accepted > 0


def test_lookup_has_a_block_of_its_own(tok: Tokenizer) -> None:
    for assistant in ({}, {"assistant": None}):
        pair = script_pair(tok, STORY, **assistant)
        result = generate("fox", pair=pair, sampling=Sampling(seed=1), drafter="lookup")
        assert result.text == STORY and result.stats.block_size == LOOKUP_BLOCK
        assert result.stats.accepted > 0
        # Most rounds of so short a text are plain steps
        assert 0 < result.stats.drafted < result.stats.rounds * (LOOKUP_BLOCK - 1)


def test_the_assistant_drafts_where_nothing_is_said(tok: Tokenizer) -> None:
    pair = script_pair(tok, STORY)
    ask: dict[str, Any] = {"pair": pair, "sampling": GREEDY, "block_size": 4}
    told = [generate("fox", drafter=d, **ask) for d in (None, "assistant")]
    first, second = ({**vars(r.stats), "prefill_s": 0, "decode_s": 0} for r in told)
    for counts in (first, second):
        del counts["seed"], counts["peak_memory_bytes"]
    assert first == second and first["drafted"] == first["rounds"] * 3


def every_door(pair: Any, drafter: Any) -> list[Callable[[], Any]]:
    return [
        lambda: generate("fox", pair=pair, drafter=drafter),
        lambda: stream("fox", pair=pair, drafter=drafter),
        lambda: Chat(pair, drafter=drafter),
        lambda: read_request(pair, {"prompt": "fox"}, Limits(drafter=drafter), False),
    ]


@pytest.mark.parametrize(
    ("drafter", "shown"), [("best", "'best'"), ("", "''"), (3, "3"), (["lookup"], "['lookup']")]
)
def test_an_unknown_name_is_one_sentence(tok: Tokenizer, drafter: Any, shown: str) -> None:
    for door in every_door(script_pair(tok, STORY), drafter):
        with pytest.raises(ValueError) as error:
            door()
        message = (
            "[generate] drafter must be assistant, dflash, lookup, early:N or NAME+lookup but got "
            f"{shown}."
        )
        assert str(error.value) == message


def test_an_assistant_that_is_not_there_is_not_passed_over(tok: Tokenizer) -> None:
    """One asked for by name; where none is asked for, the pair decodes plainly."""
    pair = script_pair(tok, STORY, assistant=None)
    for door in every_door(pair, "assistant"):
        with pytest.raises(ValueError) as error:
            door()
        message = (
            "[generate] drafter must be lookup or early:N without an assistant but got assistant."
        )
        assert str(error.value) == message
    assert generate("fox", pair=pair, sampling=GREEDY).stats.block_size == 1


def test_a_dflash_model_that_is_not_there_is_not_passed_over(tok: Tokenizer) -> None:
    for assistant in ({}, {"assistant": None}):
        for door in every_door(script_pair(tok, STORY, **assistant), "dflash"):
            with pytest.raises(ValueError) as error:
                door()
            message = (
                "[generate] drafter must be one that the pair has but got dflash; load it with "
                "dflash=."
            )
            assert str(error.value) == message


def test_a_chat_looks_up_in_its_earlier_turns(tok: Tokenizer) -> None:
    pair = script_pair(tok, STORY)
    chat = Chat(pair, sampling=GREEDY, drafter="lookup", block_size=4)
    accepted = []
    for _ in range(2):
        assert "".join(chat.ask("fox")) == STORY
        accepted.append(chat.result.stats.accepted)
    assert accepted[1] > accepted[0]  # the whole answer stands in the prompt by now


def test_a_server_has_one_for_all_requests(tok: Tokenizer) -> None:
    pair = script_pair(tok, STORY, assistant=None)
    body = {"prompt": "fox", "temperature": 0, "block_size": 4}
    running = Stream(read_request(pair, body, Limits(drafter="lookup"), False).task(), None)
    assert "".join(running) == STORY and running.result.stats.drafted > 0


@pytest.fixture
def scripted(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Any:
    pair = script_pair(tok, STORY, assistant=None)
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pair)
    return pair


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_commands_take_its_name(command: str, scripted: Any) -> None:
    words = [command, "--json", "--temperature", "0", "--drafter", "lookup", "--block-size", "4"]
    done = CliRunner().invoke(cli.app, words, input="fox\n")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["text"] == STORY and said["stats"]["drafted"] > 0


@pytest.mark.parametrize("command", ["generate", "chat", "serve"])
def test_a_wrong_name_is_told_before_the_weights_are_read(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pytest.fail("weights were read"))
    port = ["--port", "0"] if command == "serve" else []
    done = CliRunner().invoke(cli.app, [command, "--drafter", "best", *port], input="fox\n")
    assert done.exit_code != 0
    assert (
        "[generate] drafter must be assistant, dflash, lookup, early:N or NAME+lookup but got "
        "'best'." in done.stderr
    )


@pytest.mark.parametrize(
    "command",
    [["generate"], ["chat"], ["serve"], *(["bench", b] for b in ("gemma-mtp", "sweep", "streams"))],
    ids=" ".join,
)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--assistant", "b"], None),
        (["--drafter", "lookup"], "lookup"),
        (["--drafter", "assistant+lookup"], "assistant+lookup"),
    ],
)
def test_a_dflash_that_nobody_would_use_is_not_read(
    command: list[str], words: list[str], said: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: pytest.fail("weights were read"))
    given = [*command, "--target", "a", "--dflash", "c", *words]
    done = CliRunner().invoke(cli.app, given, input="fox\n")
    said = said or ("assistant,lookup" if "sweep" in command else "assistant")
    message = f"[load] --dflash must go with --drafter dflash but got {said}."
    assert done.exit_code == 2 and message in done.stderr, done.output


def test_the_bench_compares_drafters(scripted: Any, tmp_path: Path) -> None:
    suite, out = tmp_path / "suite.jsonl", tmp_path / "out.json"
    case = {"id": "one", "category": "chat", "prompt": "fox", "max_tokens": 24}
    suite.write_text(json.dumps(case))
    words = "bench gemma-mtp --allow-unverified-gemma --repeats 1 --block-sizes 4 --temperature 0"
    given = ["--drafter", "lookup", "--prompt-suite", str(suite), "--output", str(out)]
    # So wide that the table is no list, however long its figures
    done = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, [*words.split(), *given])
    assert done.exit_code == 0, done.output
    report = json.loads(out.read_text())
    assert [row["drafter"] for row in report["rows"]] == [None, "lookup"]
    assert [row["exact_match"] for row in report["summary"]] == [True, True]
    assert report["settings"]["drafter"] == ["lookup"]
    assert any(line.split()[:2] == ["4", "lookup"] for line in done.stdout.splitlines())
