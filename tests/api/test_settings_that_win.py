"""Settings that must win: what is given before what the pair says before what we say, everywhere.

What reaches the engine is recorded where the engine begins, whichever way it came in.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from reading import read_request
from text_fakes import script_pair, write_tokenizers
from typer.main import get_command
from typer.testing import CliRunner

from pyengine import cli, generation
from pyengine.chat import Chat
from pyengine.checkpoint.defaults import GenerationDefaults, read_generation
from pyengine.engine.controller import AUTO_BLOCK
from pyengine.engine.sequence import Round
from pyengine.generation import Stream, generate, stream
from pyengine.model.config import TargetConfig
from pyengine.sampling.settings import Sampling
from pyengine.serve.protocols.ask import Limits
from pyengine.task import resolve_sampling
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

# Fields of Sampling that a pair may set: our value, the pair's, and what a caller gives against
# it: another, ours (which must not look as if nothing had been given), and the least there is.
OWN: dict[str, tuple[float, float, list[float]]] = {
    "temperature": (1.0, 0.5, [0.25, 1.0, 0.0]),
    "top_p": (0.95, 0.5, [0.75, 0.95]),
    "top_k": (64, 7, [9, 64, 0]),
    "min_p": (0.0, 0.125, [0.25, 0.0]),
    "repetition_penalty": (1.0, 1.5, [2.0, 1.0]),
    "presence_penalty": (0.0, 0.5, [0.75, 0.0, -0.5]),
    "frequency_penalty": (0.0, 0.25, [0.375, 0.0]),
}
OURS = {name: values[0] for name, values in OWN.items()}
PAIRS = {name: values[1] for name, values in OWN.items()}
GIVEN = [(name, value) for name, values in OWN.items() for value in values[2]]
SUPPRESSED = (30, 20)

Door = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizers(folder)
    return load_tokenizer(folder)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each generation asked of the engine, which answers with one token."""
    kept: list[dict[str, Any]] = []

    def decode(target: Any, assistant: Any, prompt: list[int], **asked: Any) -> Iterator[Round]:
        kept.append(asked)
        yield Round([40], "length", 0, 0)

    monkeypatch.setattr(generation, "decode", decode)
    return kept


@pytest.fixture
def pair(tok: Tokenizer, asked: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = script_pair(tok, "jumps")
    vars(made.generation).update(PAIRS, suppress_tokens=SUPPRESSED)
    monkeypatch.setattr(cli.common, "load_pair", lambda *_: made)
    return made


def by_dict(pair: Any, **given: Any) -> None:
    generate("fox", pair=pair, sampling=given or None)


def by_empty_dict(pair: Any, **given: Any) -> None:
    list(stream("fox", pair=pair, sampling={**given}))


def by_chat(pair: Any, **given: Any) -> None:
    list(Chat(pair, sampling=given or None).ask("fox"))


def by_command(pair: Any, *, command: str = "generate", **given: Any) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    done = CliRunner().invoke(cli.app, [command, *words], input="fox\n")
    assert done.exit_code == 0, done.output


def by_chat_command(pair: Any, **given: Any) -> None:
    by_command(pair, command="chat", **given)


def by_request(pair: Any, *, chat: bool = False, **given: Any) -> None:
    prompt = {"messages": [{"role": "user", "content": "fox"}]} if chat else {"prompt": "fox"}
    body = json.loads(json.dumps({**prompt, **given}))
    list(Stream(read_request(pair, body, Limits(), chat).task(), None))


def by_chat_request(pair: Any, **given: Any) -> None:
    by_request(pair, chat=True, **given)


DOORS = [
    by_dict,
    by_empty_dict,
    by_chat,
    by_command,
    by_chat_command,
    by_request,
    by_chat_request,
]
SERVED = (by_request, by_chat_request)
doors = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)


def settings(asked: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the newest generation: the fields that a pair may set."""
    return {name: getattr(asked[-1]["sampling"], name) for name in OWN}


def test_every_default_of_a_pair_is_tried_here() -> None:
    """A new field without an unlike value above fails."""
    elsewhere = {"stop_ids", "suppress_tokens", "num_draft", "notes"}
    assert {field.name for field in fields(GenerationDefaults)} == elsewhere | set(OWN)
    assert {field.name for field in fields(Sampling)} == set(OWN) | {
        *("seed", "suppress_tokens", "logit_bias", "verify", "logprobs")
    }
    assert replace(Sampling(), **OURS) == Sampling()
    for ours, pairs, given in OWN.values():
        assert pairs not in (ours, *given)


@doors
def test_the_pair_beats_us(pair: Any, asked: list[dict[str, Any]], door: Door) -> None:
    door(pair)
    assert settings(asked) == PAIRS


@doors
@pytest.mark.parametrize(("name", "value"), GIVEN)
def test_what_is_given_beats_the_pair(
    pair: Any, asked: list[dict[str, Any]], door: Door, name: str, value: float
) -> None:
    """That field, and no other."""
    door(pair, **{name: value})
    assert settings(asked) == {**PAIRS, name: value}


@doors
def test_all_that_is_given_beats_the_pair(
    pair: Any, asked: list[dict[str, Any]], door: Door
) -> None:
    given = {name: values[2][0] for name, values in OWN.items()}
    door(pair, **given)
    assert settings(asked) == given


@pytest.mark.parametrize(("name", "value"), GIVEN)
def test_a_sampling_is_all_there_is(
    pair: Any, asked: list[dict[str, Any]], name: str, value: float
) -> None:
    """Its own fields are ours where none were given, whatever the pair says."""
    generate("fox", pair=pair, sampling=Sampling(**{name: value}))
    assert settings(asked) == {**OURS, name: value}


@doors
def test_tokens_of_the_pair_stay_suppressed(
    pair: Any, asked: list[dict[str, Any]], door: Door
) -> None:
    door(pair)
    assert asked[-1]["sampling"].suppress_tokens == (20, 30)


@pytest.mark.parametrize("given", [{"suppress_tokens": (25, 20, 5)}, {"suppress_tokens": ()}])
@pytest.mark.parametrize("form", [dict, lambda **kw: Sampling(**kw)], ids=["dict", "Sampling"])
def test_callers_add_to_the_suppressed_tokens(pair: Any, asked: Any, given: Any, form: Any) -> None:
    generate("fox", pair=pair, sampling=form(**given))
    more = (5, 20, 25, 30) if given["suppress_tokens"] else (20, 30)
    assert asked[-1]["sampling"].suppress_tokens == more


@pytest.mark.parametrize("door", [by_command, by_chat_command])
def test_other_options_reach_the_engine(pair: Any, asked: Any, door: Any) -> None:
    door(pair, logit_bias="7=-1.5", verify="coupled", max_tokens=3, block_size=9, seed=0)
    got = asked[-1]
    want = Sampling(
        **PAIRS, seed=0, suppress_tokens=(20, 30), logit_bias={7: -1.5}, verify="coupled"
    )
    assert got["sampling"] == want
    assert (got["max_tokens"], got["block_size"]) == (3, 9)
    door(pair)
    got = asked[-1]
    assert (got["max_tokens"], got["block_size"], got["sampling"].verify) == (None, 4, "residual")
    assert (got["sampling"].logit_bias, got["sampling"].logprobs) == ({}, None)


@pytest.mark.parametrize("door", [by_request, by_chat_request])
def test_other_fields_of_a_request_reach_the_engine(pair: Any, asked: Any, door: Any) -> None:
    logprobs = {"logprobs": True, "top_logprobs": 2} if door is by_chat_request else {"logprobs": 2}
    door(pair, logit_bias={"7": -1.5}, max_tokens=3, block_size=9, seed=0, **logprobs)
    got = asked[-1]
    want = Sampling(
        **PAIRS,
        seed=0,
        suppress_tokens=(20, 30),
        logit_bias={7: -1.5},
        logprobs=2,
        verify="coupled",
    )
    assert got["sampling"] == want
    assert (got["max_tokens"], got["block_size"]) == (3, 9)
    door(pair)
    got = asked[-1]
    block = (
        AUTO_BLOCK if door in SERVED else 4
    )  # requests are coupled, so theirs may follow the load
    assert (got["max_tokens"], got["block_size"], got["sampling"].verify) == (
        8192,
        block,
        "coupled",
    )
    assert (got["sampling"].logit_bias, got["sampling"].logprobs) == ({}, None)


def test_what_a_request_asks_not_to_have(pair: Any, asked: Any) -> None:
    """`logprobs` false is none; 0 and true alone are of no other token than the chosen."""
    by_chat_request(pair, logprobs=False)
    assert asked[-1]["sampling"].logprobs is None
    by_chat_request(pair, logprobs=True)
    assert asked[-1]["sampling"].logprobs == 0
    by_request(pair, logprobs=0)
    assert asked[-1]["sampling"].logprobs == 0


def test_limits_of_new_tokens_by_their_names(pair: Any, asked: Any) -> None:
    by_chat_request(pair, max_completion_tokens=5)
    assert asked[-1]["max_tokens"] == 5
    body = {"prompt": "fox"}
    list(Stream(read_request(pair, body, Limits(max_tokens=77), chat=False).task(), None))
    assert asked[-1]["max_tokens"] == 77


@doors
def test_the_block_size_that_wins(pair: Any, asked: Any, door: Door) -> None:
    """What is given, else the pair's measured best, else its assistant's wish and one, else 4."""

    def used() -> int:
        door(pair)
        return int(asked[-1]["block_size"])

    follows = door in SERVED  # whose requests are coupled: it follows the load
    assert used() == (AUTO_BLOCK if follows else 4)
    pair.generation.num_draft = 6
    assert used() == (AUTO_BLOCK if follows else 7)
    pair.manifest = {"benchmark": {"best_block_size": 5}}
    assert used() == (AUTO_BLOCK if follows else 5)
    pair.generation.num_draft = 2
    assert used() == (AUTO_BLOCK if follows else 5)
    if door in (by_command, by_chat_command, by_request, by_chat_request):
        for size in (1, 4, 9):
            door(pair, block_size=size)
            assert asked[-1]["block_size"] == size


def test_stop_ids_of_pair_and_template(pair: Any, asked: Any, tok: Tokenizer) -> None:
    pair.generation.stop_ids = (33, 44)
    for door in DOORS:
        door(pair)
        assert asked[-1]["stop_ids"] == {33, 44, tok.id_of("<turn|>")}


BENCH = [
    "bench",
    "gemma-mtp",
    "--allow-unverified-gemma",
    "--repeats=1",
    "--block-sizes=2",
    "--json",
]


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        ("", {}),
        ("--temperature 0.25", {"temperature": 0.25}),
        ("--temperature 0", {"temperature": 0.0}),
        ("--top-p 0.75", {"top_p": 0.75}),
        ("--top-k 9", {"top_k": 9}),
        ("--top-k 0", {"top_k": 0}),
    ],
)
def test_a_bench_has_settings_of_its_own(
    pair: Any, asked: Any, tmp_path: Path, words: str, changed: dict[str, Any]
) -> None:
    """Figures of two pairs are compared, so only what a pair suppresses is the pair's."""
    suite = tmp_path / "suite.jsonl"
    suite.write_text(json.dumps({"id": "a", "category": "c", "prompt": "fox", "max_tokens": 9}))
    done = CliRunner().invoke(cli.app, [*BENCH, *words.split(), "--prompt-suite", str(suite)])
    assert done.exit_code == 0, done.output
    assert [settings(asked[i:]) for i in range(len(asked))] == [{**OURS, **changed}] * 4
    assert {got["sampling"].suppress_tokens for got in asked} == {(20, 30)}
    said = json.loads(done.stdout.splitlines()[-1])["sampler"]
    assert {name: said[name] for name in OWN} == {**OURS, **changed}
    assert said["suppress_tokens"] == [20, 30]


# Files of a checkpoint


def config(vocab: int = 400) -> TargetConfig:
    return SimpleNamespace(vocab_size=vocab, eos_ids=(1, 106))  # type: ignore[return-value]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    ("own", "manifest", "wins"),
    [
        (False, False, "ours"),
        (False, True, "manifest"),
        (True, False, "own"),
        (True, True, "own"),
    ],
)
def test_the_checkpoint_beats_the_bundle_beats_us(
    tmp_path: Path, name: str, own: bool, manifest: bool, wins: str
) -> None:
    """Field by field: the others stay."""
    ours, pairs, (given, *_) = OWN[name]
    if own:
        (tmp_path / "generation_config.json").write_text(json.dumps({name: pairs}))
    said = {"benchmark": {name: given} if manifest else {}}
    got = read_generation(tmp_path, None, config(), said)
    want = {**OURS, name: {"ours": ours, "manifest": given, "own": pairs}[wins]}
    assert {key: getattr(got, key) for key in OWN} == want


def test_other_fields_of_the_checkpoint(tmp_path: Path) -> None:
    (target := tmp_path / "target").mkdir()
    (assistant := tmp_path / "assistant").mkdir()
    got = read_generation(target, assistant, config(), {})
    assert (got.stop_ids, got.suppress_tokens, got.num_draft) == ((1, 106), (), None)
    own = {"eos_token_id": [7, 9], "suppress_tokens": [30, 20], "num_assistant_tokens": 8}
    (target / "generation_config.json").write_text(json.dumps(own))
    (assistant / "generation_config.json").write_text(
        json.dumps({"num_assistant_tokens": 3, "suppress_tokens": [5], "temperature": 0.125})
    )
    got = read_generation(target, assistant, config(), {})
    assert (got.stop_ids, got.suppress_tokens, got.num_draft) == ((7, 9), (30, 20), 3)
    assert got.temperature == 1.0  # the target chooses tokens, so its settings count


def test_a_checkpoint_that_does_not_sample_loses_to_what_is_given(
    tmp_path: Path, pair: Any, asked: Any
) -> None:
    """It is greedy, whatever temperature stands beside it, until a caller names one."""
    said = {"do_sample": False, "temperature": 0.5}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    pair.generation = read_generation(tmp_path, None, config(), {})
    for door in DOORS:
        door(pair)
        assert asked[-1]["sampling"].temperature == 0.0
        door(pair, temperature=0.25)
        assert asked[-1]["sampling"].temperature == 0.25


# The environment


def test_no_variable_of_the_environment_is_a_setting(
    pair: Any, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options come from the command line alone, but for the key that is better not there."""

    def options(command: Any) -> Iterator[Any]:
        yield from command.params
        for inner in getattr(command, "commands", {}).values():
            yield from options(inner)

    every = list(options(get_command(cli.app)))
    assert len(every) > 60 and [o.name for o in every if o.envvar] == ["api_key"]
    for name in OWN:
        for prefix in ("PYENGINE", "PYENGINE_GENERATE", "TYPER", "GENERATE"):
            monkeypatch.setenv(f"{prefix}_{name.upper()}", "0.875")
    by_command(pair)
    assert settings(asked) == PAIRS


# lm-eval's settings, with or without lm-eval


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module, its lm-eval replaced by what it takes from there to be imported."""
    names = ("lm_eval", "lm_eval.__main__", "lm_eval.api", "lm_eval.api.instance")
    names += ("lm_eval.api.model", "lm_eval.api.registry", "tqdm")
    for name in names:
        monkeypatch.setitem(sys.modules, name, made := ModuleType(name))
        made.cli_evaluate = made.Instance = made.tqdm = None  # type: ignore[attr-defined]
        made.TemplateLM = object  # type: ignore[attr-defined]
        made.register_model = lambda name: lambda model: model  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "pyengine.evaluate", raising=False)
    yield importlib.import_module("pyengine.evaluate")
    sys.modules.pop("pyengine.evaluate", None)


def test_a_task_that_does_not_sample_is_greedy(pair: Any, evaluate: ModuleType) -> None:
    own = resolve_sampling(pair, None)
    for task in ({}, {"do_sample": False}, {"do_sample": False, "temperature": 0.75}):
        assert evaluate._sampling(task, own).temperature == 0


@pytest.mark.parametrize("given", [{}, {"temperature": 0.25}, {"top_p": 0.75}, {"top_k": 9}])
def test_a_task_that_samples_beats_the_pair(
    pair: Any, evaluate: ModuleType, given: dict[str, Any]
) -> None:
    got = evaluate._sampling({"do_sample": True, **given}, resolve_sampling(pair, None))
    assert {key: getattr(got, key) for key in OWN} == {**PAIRS, **given}
    assert got.seed == 0  # a task gives the same figures every time
