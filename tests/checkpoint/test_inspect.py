"""`pyengine inspect`: figures that add up, and every reason for a refusal at once."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny_pairs import FIXTURES, FLAVOURS, quantized_fixtures
from typer.testing import CliRunner

from pyengine import cli
from pyengine.checkpoint import memory
from pyengine.checkpoint.inspect import inspect
from pyengine.checkpoint.pair import load
from pyengine.checkpoint.safetensors import SINGLE

NANO = Path(cli.__file__).parents[1] / "nano"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["inspect", *map(str, arguments)])


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("quantized", [False, True])
def test_figures_are_those_of_the_loaded_pair(flavour: str, quantized: bool) -> None:
    root = quantized_fixtures() if quantized else FIXTURES
    target, assistant = root / flavour / "target", root / flavour / "assistant"
    pair = load(target, assistant)
    model = pair.target
    for folder, part in ((target, "target"), (assistant, "assistant")):
        report = inspect(folder, 300)
        assert report["kind"] == part
        # These folders have no tokenizer, which only a target needs
        wanted = [f"[tokenizer] {folder} must hold tokenizer.json or tokenizer.model"]
        found = [sentence[: len(wanted[0])] for sentence in report["refused"]]
        assert found == (wanted if part == "target" else [])
        tensors = report[part]["tensors"]
        way = "8 bit, group 64" if quantized else "bfloat16"
        assert tensors["dtype"] == "bfloat16" and list(tensors["matrices"]) == [way]
    report = inspect(target, 300)
    own = [m for layer in model.layers for m in (layer.mlp.gate, layer.mlp.up, layer.mlp.down)]
    assert report["target"]["tensors"]["matrices"][way] > len(own)
    # What the cache really takes, after as many tokens
    cache = model.new_cache()
    model.prefill([5] * 300, cache)
    spare = cache.arena.page_bytes(True)  # a window may begin anywhere in a page
    assert cache.nbytes <= report["memory"]["cache"] <= cache.nbytes + spare
    gc.collect()  # so that nothing older is given back while it loads
    before = mx.get_active_memory()
    again = load(target)
    grown = mx.get_active_memory() - before
    assert report["memory"]["weights"] <= grown <= 1.6 * report["memory"]["weights"] + 100_000
    assert again.target.config == model.config


def test_the_embedded_pair() -> None:
    report = inspect(NANO)
    assert (report["kind"], report["refused"]) == ("pair", [])
    assert report["text"] == {
        "tokens": 1280,
        "chat_template": True,
        "thinking": False,
        "stop_ids": list(load().generation.stop_ids),
        "answer_ends": ["<eos> (1)", "<turn|> (16)", "<|tool_response> (9)"],
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 64,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "notes": [],
    }
    assert report["target"]["tensors"]["parameters"] == 7_137_432
    parts = [report[part]["tensors"]["bytes"] for part in ("target", "assistant", "dflash")]
    assert report["memory"]["weights"] == sum(parts) and all(parts)
    assert report["memory"]["fits"] is True
    done = run(NANO)
    assert done.exit_code == 0 and "165 x 8 bit, group 64" in done.stdout
    assert json.loads(run(NANO, "--json").stdout) | {"memory": 0} == report | {"memory": 0}


def test_a_template_that_stops_every_chat_is_told(tmp_path: Path) -> None:
    shutil.copytree(NANO, tmp_path / "pair")
    (tmp_path / "pair/target/chat_template.jinja").write_text("{% if %}")
    report = inspect(tmp_path / "pair")
    assert report["refused"] == []  # raw prompts work
    [note] = report["text"]["notes"]
    assert note.startswith("[tokenizer] chat template must be valid jinja but line 1 is not")


def test_whether_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = inspect(NANO)["memory"]
    for free, fits in ((0, False), (1, True), (None, None)):
        total = needed["weights"] + needed["cache"] + needed["prompt"]
        there = None if free is None else total - 1 + free
        monkeypatch.setattr(memory, "available_bytes", lambda there=there: there)
        assert inspect(NANO)["memory"]["fits"] is fits
    # What loading refuses is refused here, in the same words
    monkeypatch.setattr(memory, "available_bytes", lambda: 5_000_000)
    with pytest.raises(ValueError) as error:
        load()
    assert inspect(NANO)["refused"] == [str(error.value)]
    assert "must fit the free memory of 0.0 GB" in str(error.value)


def test_a_context_the_model_has_not() -> None:
    done = run(NANO, "--context", "8193")
    assert done.exit_code == 2
    assert "[inspect] context must be at most the model's 8192 tokens but got 8193." in done.stdout
    assert run(NANO, "--context", "8192").exit_code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there are no control groups")
def test_what_is_free_is_the_least_that_anybody_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The machine, or the container in it."""
    for machine, group, free in ((5, 3, 3), (3, 5, 3), (4, None, 4), (None, None, None)):
        monkeypatch.setattr(memory, "_available_to_machine", lambda machine=machine: machine)
        monkeypatch.setattr(memory, "_available_to_group", lambda _, group=group: group)
        assert memory.available_bytes() == free
    monkeypatch.undo()
    assert memory._available_to_group(tmp_path) is None
    (tmp_path / "memory.current").write_text("100\n")
    for limit, free in (("1000\n", 900), ("max\n", None)):
        (tmp_path / "memory.max").write_text(limit)
        assert memory._available_to_group(tmp_path) == free


def test_every_reason_is_told(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(NANO, tmp_path / "bundle"))
    path = bundle / "target" / SINGLE
    path.write_bytes(path.read_bytes()[:5_000_000])
    config = bundle / "assistant" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"backbone_hidden_size": 64}))
    (bundle / "target" / "tokenizer.json").write_text("{")
    done = run(bundle)
    assert done.exit_code == 2 and done.stderr == ""
    for reason in ("ends past the end of the file", "are these two a pair?", "tokenizer.json"):
        assert f"refused: [{'tokenizer' if 'token' in reason else 'load'}]" in done.stdout
        assert reason in done.stdout
    report = json.loads(run(bundle, "--json").stdout)
    assert len(report["refused"]) >= 3 and report["kind"] == "pair"
    assert report["target"]["hidden_size"] == 128 and "tensors" not in report["target"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/absent"], "[inspect] path must be a folder but got /absent."),
        ([NANO, "--context", "0"], "[inspect] context must be at least 1 but got 0."),
    ],
)
def test_wrong_arguments(arguments: list[object], message: str) -> None:
    done = run(*arguments)
    assert done.exit_code == 2 and done.stderr == f"pyengine: {message}\n"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    report = inspect(tmp_path)
    assert report["kind"] is None and "must be a bundle with the folders" in report["refused"][0]
    assert run(tmp_path).exit_code == 2
