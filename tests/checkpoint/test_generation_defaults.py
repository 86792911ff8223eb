"""generation_config.json: a setting is honoured or told, and what loads generates by default."""

from __future__ import annotations

import json
import logging
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyengine import cli, generate
from pyengine.checkpoint.defaults import WITHOUT_EFFECT
from pyengine.checkpoint.inspect import inspect
from pyengine.checkpoint.manifest import MANIFEST
from pyengine.checkpoint.pair import load
from pyengine.sampling.settings import Sampling
from pyengine.task import resolve_sampling

NANO = Path(cli.__file__).parents[1] / "nano"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return Path(shutil.copytree(NANO, tmp_path / "b"))


def say(bundle: Path, part: str = "target", **values: Any) -> Path:
    (bundle / part / "generation_config.json").write_text(json.dumps(values))
    return bundle


HONOURED = [
    ({}, Sampling(1.0, 0.95, 64)),
    ({"do_sample": False}, Sampling(0.0, 0.95, 64)),
    ({"do_sample": False, "temperature": 0.7}, Sampling(0.0, 0.95, 64)),
    ({"do_sample": True, "temperature": 0.7}, Sampling(0.7, 0.95, 64)),
    ({"do_sample": None, "temperature": None}, Sampling(1.0, 0.95, 64)),
    ({"temperature": 0}, Sampling(0.0, 0.95, 64)),
    ({"top_p": 1, "top_k": 0}, Sampling(1.0, 1.0, 0)),
    ({"top_k": 256}, Sampling(1.0, 0.95, 256)),
    ({"top_k": 20.0}, Sampling(1.0, 0.95, 20)),
    ({"min_p": 0.05}, Sampling(1.0, 0.95, 64, min_p=0.05)),
    ({"repetition_penalty": 1.1}, Sampling(1.0, 0.95, 64, repetition_penalty=1.1)),
    (
        {"presence_penalty": -1, "frequency_penalty": 0.5},
        Sampling(1.0, 0.95, 64, presence_penalty=-1.0, frequency_penalty=0.5),
    ),
    ({"suppress_tokens": [9, 8]}, Sampling(1.0, 0.95, 64, suppress_tokens=(8, 9))),
]


@pytest.mark.parametrize(("values", "settings"), HONOURED)
def test_what_sampling_has_is_taken_over(
    values: dict[str, Any], settings: Sampling, bundle: Path
) -> None:
    pair = load(bundle=say(bundle, **values))
    assert resolve_sampling(pair, None) == settings
    assert pair.generation.notes == ()


def test_the_command_keeps_them_too(bundle: Path) -> None:
    """A default of the command line must not stand in front of the pair's."""
    say(bundle, min_p=0.25, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.75)
    words = ["generate", "fox", "--bundle", str(bundle), "--max-tokens", "24", "--json"]
    ask = [*words, "--seed", "5"]
    plain = CliRunner().invoke(cli.app, ask)
    same = ["--min-p", "0.25", "--repetition-penalty", "1.5"]
    same += ["--presence-penalty", "0.5", "--frequency-penalty", "0.75"]
    given = CliRunner().invoke(cli.app, [*ask, *same])
    off = ["--min-p", "0", "--repetition-penalty", "1"]
    off += ["--presence-penalty", "0", "--frequency-penalty", "0"]
    other = CliRunner().invoke(cli.app, [*ask, *off])
    texts = [json.loads(done.stdout)["tokens"] for done in (plain, given, other)]
    assert texts[0] == texts[1] != texts[2]


UNUSED = {
    "typical_p": 0.9,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.001,
    "top_h": 0.5,
    "no_repeat_ngram_size": 3,
    "encoder_repetition_penalty": 1.2,
    "guidance_scale": 1.5,
    "penalty_alpha": 0.6,
    "num_beams": 4,
    "bad_words_ids": [[7]],
    "force_words_ids": [[7]],
    "sequence_bias": [[[7], -10.0]],
    "begin_suppress_tokens": [7],
    "forced_bos_token_id": 2,
    "forced_eos_token_id": 1,
    "exponential_decay_length_penalty": [20, 1.1],
    "min_new_tokens": 8,
    "max_new_tokens": 64,
    "max_length": 4096,
    "max_time": 2.5,
    "stop_strings": ["END"],
    "watermarking_config": {"bias": 2.5},
    "token_healing": True,
    "dola_layers": "high",
    "xtc_probability": 0.5,
}


@pytest.mark.parametrize("key", UNUSED)
def test_what_is_not_offered_is_told(
    key: str, bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "pyengine"):
        pair = load(bundle=say(bundle, **{key: UNUSED[key]}))
    (note,) = pair.generation.notes
    assert note.startswith(f"`{key}` {UNUSED[key]!r} of generation_config.json is not used")
    assert [record.getMessage() for record in caplog.records] == [f"[load] {note}"]
    report = inspect(bundle)
    assert report["text"]["notes"] == [note] and not report["refused"]
    shown = CliRunner().invoke(cli.app, ["inspect", str(bundle)])
    assert f"note: `{key}`" in shown.stdout


def test_what_changes_no_text_is_not_told(bundle: Path) -> None:
    silent: dict[str, Any] = dict.fromkeys(WITHOUT_EFFECT, 1)
    silent |= {"typical_p": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0, "bad_words_ids": None}
    silent |= {"stop_strings": [], "guidance_scale": 1, "token_healing": False}
    assert load(bundle=say(bundle, **silent)).generation.notes == ()
    # The assistant's settings are not the text's
    assert load(bundle=say(bundle, "assistant", num_beams=4, top_k=9999)).generation.notes == ()


def test_a_top_k_beyond_the_most_is_off_and_told(bundle: Path) -> None:
    pair = load(bundle=say(bundle, top_k=1000))
    assert pair.generation.top_k == 0 and "`top_k` 1000 of" in pair.generation.notes[0]
    generate("fox", pair=pair, max_tokens=3)
    # As large as the vocabulary it is off anyway
    pair = load(bundle=say(bundle, top_k=pair.target.config.vocab_size))
    assert pair.generation.top_k == 0 and pair.generation.notes == ()


REFUSED = [
    ({"temperature": "warm"}, "the default temperature must be a number but got 'warm'"),
    ({"temperature": -1}, "the default temperature must be 0 or more but got -1"),
    ({"temperature": 1e-30}, "the default temperature must be 0, which is greedy, or at least"),
    ({"top_p": 0}, "the default top_p must be above 0 and at most 1 but got 0"),
    ({"top_p": 1.5}, "the default top_p must be above 0 and at most 1 but got 1.5"),
    ({"top_p": True}, "the default top_p must be a number but got True"),
    ({"top_k": -1}, "the default top_k must be a count but got -1"),
    ({"top_k": 1.5}, "the default top_k must be a count but got 1.5"),
    ({"min_p": 1}, "the default min_p must be 0 or more and below 1 but got 1"),
    ({"repetition_penalty": 0}, "the default repetition_penalty must be positive but got 0"),
    ({"do_sample": "no"}, "`do_sample` of .* must be true or false but got 'no'"),
    ({"temperature": float("nan")}, "the default temperature must be a number but got nan"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_a_default_no_generation_could_use_is_refused_at_load(
    values: dict[str, Any], message: str, bundle: Path
) -> None:
    with pytest.raises(ValueError, match=rf"^\[load\] {message}"):
        load(bundle=say(bundle, **values))


def test_a_default_block_no_generation_could_use_is_refused_at_load(bundle: Path) -> None:
    say(bundle, "assistant", num_assistant_tokens=128)
    with pytest.raises(ValueError, match="num_assistant_tokens must be from 1 to 127 but got 128"):
        load(bundle=bundle)
    say(bundle, "assistant")
    manifest = json.loads((NANO / MANIFEST).read_text())
    for best in (0, 129, "6", 2.0, True):
        manifest["benchmark"]["best_block_size"] = best
        (bundle / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"best_block_size` of .* must be a whole number from"):
            load(bundle=bundle)


def test_suppressing_every_token_is_refused_at_load(bundle: Path) -> None:
    vocab = load().target.config.vocab_size
    with pytest.raises(ValueError, match=r"`suppress_tokens` of .* must leave a token but names"):
        load(bundle=say(bundle, suppress_tokens=list(range(vocab))))


VALUES = [None, True, False, -1, 0, 1, 2, 0.0, 0.5, 1.0, 3.5, 64, 300, 10**6, 1e-30, "a", [], [3]]


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_what_loads_generates_by_default(first: int, bundle: Path) -> None:
    """Some of ten random settings are refused, in a sentence of ours; with the others it runs."""
    loaded = 0
    for seed in range(first, first + 10):
        rng = random.Random(seed)
        keys = [*HONOURED_KEYS, *rng.sample(sorted(UNUSED), 3)]
        right = {key: value for given, _ in HONOURED for key, value in given.items()}
        values = {
            key: right[key] if key in right and rng.random() < 0.7 else rng.choice(VALUES)
            for key in rng.sample(keys, rng.randint(1, 4))
        }
        say(bundle, **values)
        say(bundle, "assistant", num_assistant_tokens=rng.choice([None, 1, 2, 64, "a", 0]))
        try:
            pair = load(bundle=bundle)
        except ValueError as error:
            assert str(error).startswith("[load] "), values
            continue
        loaded += 1
        result = generate("fox", pair=pair, max_tokens=4)
        # Ended by an id that stops, or by the limit
        assert 1 <= len(result.tokens) <= 4, values
        assert result.finish_reason == ("length" if len(result.tokens) == 4 else "stop"), values
    assert 2 <= loaded <= 8


HONOURED_KEYS = sorted({key for values, _ in HONOURED for key in values} | {"eos_token_id"})
