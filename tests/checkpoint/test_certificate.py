"""Certificates of early exits: what they are bound to, and files from a foreign hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exits import passed, trial
from typer.testing import CliRunner

import pyengine
from pyengine import Prefix, cli, generate
from pyengine.checkpoint.certificate import (
    MAX_BYTES,
    MOST_TESTED,
    Certificate,
    bound,
    read_certificate,
)
from pyengine.checkpoint.pair import Pair, load
from pyengine.task import embedded_pair

PROMPT = "Write a Snake game."
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def certificate() -> Certificate:
    return passed()


@pytest.fixture
def file(certificate: Certificate, tmp_path: Path) -> Path:
    certificate.write(tmp_path / "exit.json")
    return tmp_path / "exit.json"


def test_what_is_written_is_read(certificate: Certificate, file: Path) -> None:
    assert read_certificate(file) == certificate and certificate.threshold == 0.5
    told = json.loads(file.read_text())
    assert [row["risk"] for row in told["tested"]] == [0, 0, 7 / 40]
    assert told["lambda"] == 0.5 and told["n"] == 40 and told["layer"] == 6
    assert sorted(path.name for path in file.parent.iterdir()) == ["exit.json"]
    none = replace(certificate, tested=(trial(0.9, 7),))
    assert none.threshold is None and none.to_dict()["lambda"] is None


def test_an_answer_says_what_it_is(certificate: Certificate, file: Path) -> None:
    result = generate(PROMPT, early_exit=file, sampling=GREEDY)
    assert result.early_exit == {
        "label": "approximate: on prompts like the 40 calibrated ones, answers differ from the "
        "full model's by at most 0.1 on average, with confidence 0.95",
        "delta": 0.1,
        "epsilon": 0.05,
        "n": 40,
        "metric": "differs",
        "exit_layer": 6,
        "lambda": 0.5,
    }
    assert result.to_dict()["early_exit"] == result.early_exit
    assert len(result.tokens) == 24 and result.finish_reason == "length"
    assert sum(result.stats.exits.values()) == 23 and result.stats.exits[6] > 10
    assert generate(PROMPT, early_exit=certificate, sampling=GREEDY).tokens == result.tokens
    short = generate(PROMPT, early_exit=str(file), sampling=GREEDY, max_tokens=9, block_size=1)
    assert short.tokens == result.tokens[:9]
    # Nothing of it without the certificate
    plain = generate(PROMPT, sampling=GREEDY, max_tokens=9)
    assert plain.early_exit is None and plain.stats.exits == {}
    assert "early_exit" not in plain.to_dict()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "temperature must be 0.0 as calibrated but got 1.0."),
        ({"sampling": {**GREEDY, "top_k": 5}}, "top_k must be 64 as calibrated but got 5."),
        ({"sampling": {**GREEDY, "top_p": 0.5}}, "top_p must be 0.95 as calibrated but got 0.5."),
        ({"sampling": {**GREEDY, "min_p": 0.5}}, "min_p must be 0.0 as calibrated but got 0.5."),
        (
            {"sampling": {**GREEDY, "repetition_penalty": 1.5}},
            "repetition_penalty must be 1.0 as calibrated but got 1.5.",
        ),
        (
            {"sampling": {**GREEDY, "presence_penalty": 1.5}},
            "presence_penalty must be 0.0 as calibrated but got 1.5.",
        ),
        (
            {"sampling": {**GREEDY, "frequency_penalty": 1.5}},
            "frequency_penalty must be 0.0 as calibrated but got 1.5.",
        ),
        (
            {"sampling": {**GREEDY, "logit_bias": {7: 1}}},
            "logit_bias must be {} as calibrated but got {'7': 1.0}.",
        ),
        (
            {"sampling": {**GREEDY, "suppress_tokens": [7]}},
            "suppress_tokens must be [] as calibrated but got [7].",
        ),
        (
            {"sampling": {**GREEDY, "logprobs": 0}},
            "logprobs must be None, since those of an exit are not the model's, but got 0.",
        ),
        (
            {"sampling": GREEDY, "max_tokens": 25},
            "max_tokens must be at most 24 as calibrated but got 25.",
        ),
        ({"sampling": GREEDY, "block_size": 2}, "an early exit must go without drafts but some "),
        ({"sampling": GREEDY, "drafter": "lookup"}, "an early exit must go without drafts but "),
        ({"sampling": GREEDY, "drafter": "assistant", "block_size": 1}, "must go without drafts"),
        ({"sampling": GREEDY, "prefix": Prefix()}, "prefix must be None but got one."),
        ({"sampling": GREEDY, "regex": "a+"}, "the answer's form must be free but one is asked "),
    ],
)
def test_what_was_not_calibrated_is_refused(
    certificate: Certificate, asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        generate(PROMPT, early_exit=certificate, **asked)
    assert str(error.value).startswith("[early-exit] ") and message in str(error.value)


def test_what_is_no_certificate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"early_exit must be a certificate or its file but got 3"):
        generate(PROMPT, early_exit=3, sampling=GREEDY)  # type: ignore[call-overload]


def test_parts_of_answers_are_refused_where_they_may_differ_more(certificate: Certificate) -> None:
    own = replace(certificate, metric="lcs")
    ask: dict[str, Any] = {"early_exit": own, "sampling": GREEDY}
    assert len(generate(PROMPT, **ask, max_tokens=24).tokens) == 24
    with pytest.raises(ValueError, match=r"max_tokens must be 24 under lcs but got 23\.$"):
        generate(PROMPT, **ask, max_tokens=23)
    with pytest.raises(ValueError, match="stop must be none under lcs, which judged whole answers"):
        generate(PROMPT, **ask, stop="x")
    assert generate(PROMPT, early_exit=certificate, sampling=GREEDY, stop="<html").text


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_pair().path, tmp_path / "pair"))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.safetensors", "target"),
        ("generation_config.json", "target"),
        ("config.json", "target"),
        ("tokenizer.json", "tokenizer"),
        ("tokenizer_config.json", "tokenizer"),
        ("chat_template.jinja", "tokenizer"),
    ],
)
def test_another_pair_is_refused(
    certificate: Certificate, copied: Path, name: str, part: str
) -> None:
    certificate.check_pair(load(bundle=copied))  # wherever it lies
    path = copied / "target" / name
    if name == "model.safetensors":
        data = bytearray(path.read_bytes())
        data[-2] ^= 1
        path.write_bytes(data)
    else:
        path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match=rf"^\[early-exit\] {part} must be the calibrated one, "):
        generate(PROMPT, pair=load(bundle=copied), early_exit=certificate, sampling=GREEDY)


def test_another_dtype_and_too_few_layers_are_refused(certificate: Certificate) -> None:
    with pytest.raises(ValueError, match=r"dtype must be the calibrated one, bfloat16, but got fl"):
        certificate.check_pair(load(dtype="float32"))
    other = replace(certificate, layer=24)
    with pytest.raises(ValueError, match=r"must leave a layer of the target's 24 out but got 24\."):
        other.check_pair(embedded_pair())


def test_files_are_hashed_once(copied: Path) -> None:
    pair: Pair = load(bundle=copied)
    seen: list[int] = []
    first = bound(pair, lambda done, total: seen.append(done))
    assert seen
    seen.clear()
    assert bound(pair, lambda done, total: seen.append(done)) == first and not seen


# Files from a foreign hand: what is done to one that is right, and what is said then


def put(*path: str | int, value: Any) -> Callable[[dict[str, Any]], Any]:
    def change(whole: dict[str, Any]) -> None:
        *way, last = path
        inner: Any = whole
        for step in way:
            inner = inner[step]
        inner[last] = value

    return change


def drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda whole: whole.pop(name) and None


DEEP = "[" * 5000 + "]" * 5000
CASES: list[tuple[str | Callable[[dict[str, Any]], Any], str]] = [
    ("", "must be JSON but is not"),
    ("{", "must be JSON but is not"),
    ("[]", "must hold a JSON object but got a list"),
    ("null", "must hold a JSON object but got null"),
    (DEEP, "must be JSON but is nested too deeply"),
    ('{"n": 1, "n": 2}', "must name each key once but 'n' comes twice"),
    (" " * (MAX_BYTES + 1), "must be at most 1 MB but is larger"),
    ("\ud800", "must be UTF-8 text but is not"),
    ("{}", "certificate must be early-exit but got none"),
    (put("certificate", value="other"), "certificate must be early-exit but got 'other'"),
    (put("version", value=2), "version must be 1 but got 2"),
    (put("version", value=True), "version must be 1 but got True"),
    (put("target", value="../x"), "target must be a SHA-256 but got '../x'"),
    (put("target", value="A" * 64), "target must be a SHA-256 but got"),
    (put("tokenizer", value=5), "tokenizer must be a SHA-256 but got 5"),
    (drop("prompts"), "prompts must be a SHA-256 but got none"),
    (put("dtype", value=None), "dtype must be a text but got None"),
    (put("sampling", value=[]), "sampling must be an object but got []"),
    (put("sampling", "temperature", value=-1), "sampling must hold settings of Sampling"),
    (put("sampling", "temperature", value="hot"), "sampling must hold settings of Sampling"),
    (put("sampling", "other", value=1), "sampling must hold settings of Sampling"),
    (put("sampling", "logit_bias", value=[1]), "sampling must hold settings of Sampling"),
    (put("sampling", "logit_bias", value={"x": 1}), "sampling must hold settings of Sampling"),
    (put("max_tokens", value=0), "max_tokens must be a whole number from 1 to 10000000 but got 0"),
    (put("max_tokens", value=10**400), "max_tokens must be a whole number from 1 to 10000000 but"),
    (put("max_tokens", value=1.0), "max_tokens must be a whole number from 1 to 10000000 but got"),
    (put("layer", value=-1), "layer must be a whole number from 1 to 10000000 but got -1"),
    (put("layer", value="6"), "layer must be a whole number from 1 to 10000000 but got '6'"),
    (put("decay", value=float("nan")), "decay must be a number from 0 to 1e+06 but got nan"),
    (put("decay", value=-1), "decay must be a number from 0 to 1e+06 but got -1"),
    (put("n", value=0), "n must be a whole number from 1 to 10000000 but got 0"),
    (put("n", value=True), "n must be a whole number from 1 to 10000000 but got True"),
    (put("delta", value=0), "delta must be above 0 and below 1 but got 0.0"),
    (put("delta", value=float("inf")), "delta must be a number from 0 to 1 but got inf"),
    (put("delta", value=0.01), "row 1 of tested must follow from its losses and the order"),
    (put("epsilon", value=1), "epsilon must be above 0 and below 1 but got 1.0"),
    (put("epsilon", value=0.0001), "row 1 of tested must follow from its losses and the order"),
    (put("metric", value="bleu"), "metric must be one of lcs, differs but got 'bleu'"),
    (put("metric", value=["lcs"]), "metric must be a text but got ['lcs']"),
    (put("tested", value={}), "tested must be a list but got {}"),
    (put("tested", value=[]), "tested must have 1 to 1000 rows but got 0"),
    (put("tested", value=[{}] * (MOST_TESTED + 1)), "tested must have 1 to 1000 rows but got 1001"),
    (put("tested", value=[7]), "row 1 of tested must be an object but got a number"),
    (put("tested", 0, "lambda", value=2), "row 1 of tested: lambda must be a number from 0 to 1"),
    (put("tested", 1, "lambda", value=0.9), "lambdas of tested must fall from row to row"),
    (put("tested", 0, "loss_sum", value="0"), "row 1 of tested: loss_sum must be a number from 0"),
    (put("tested", 1, "loss_sum", value=9), "row 2 of tested must follow from its losses and the"),
    (put("tested", 1, "loss_sum", value=41), "row 2 of tested must follow from its losses and the"),
    (put("tested", 2, "p_value", value=0), "row 3 of tested must follow from its losses and the"),
    (put("tested", 0, "mean_layers", value="x"), "row 1 of tested: mean_layers must be a number"),
    (put("lambda", value=0.1), "lambda must be the last one that passed but got 0.1"),
    (put("lambda", value=None), "lambda must be the last one that passed but got None"),
    (lambda whole: whole["tested"].pop(1), "lambda must be the last one that passed but got 0.5"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=range(len(CASES)))
def test_a_bad_file_is_one_sentence(
    file: Path, change: str | Callable[[dict[str, Any]], Any], message: str
) -> None:
    if isinstance(change, str):
        file.write_bytes(change.encode("utf-8", "surrogatepass"))
    else:
        whole = json.loads(file.read_text())
        change(whole)
        file.write_text(json.dumps(whole))
    done = CliRunner().invoke(cli.app, ["generate", "--early-exit", str(file), PROMPT])
    assert done.exit_code == 2 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("pyengine: [early-exit] ") and message in line, line
    assert line.isprintable() and len(line) < 700


def test_a_row_after_one_that_failed_is_refused(certificate: Certificate, file: Path) -> None:
    """Whatever it says: the test had ended."""
    rows = (trial(0.9, 0), trial(0.5, 7), trial(0.1, 0))
    replace(certificate, tested=rows).write(file)
    with pytest.raises(ValueError, match=r"row 2 of tested must follow from its losses and the or"):
        read_certificate(file)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"^\[early-exit\] nowhere cannot be read: No such file"):
        generate(PROMPT, early_exit="nowhere")
    assert pyengine.calibrate.__module__ == "pyengine.calibration"
