"""What ends an answer where the checkpoint does not say: the tokenizer's own end of a turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from text_fakes import TEMPLATE, script_pair, write_tokenizers

import pyengine
from pyengine.checkpoint.inspect import inspect
from pyengine.checkpoint.pair import load
from pyengine.generation import generate
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

NANO = Path(pyengine.__file__).parent / "nano"
NEXT = "jumps<turn|>\n<|turn>user\nover the dog"


def tokenizer(directory: Path, template: str | None, **config: Any) -> Tokenizer:
    write_tokenizers(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").unlink()
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)
    return load_tokenizer(directory)


def without_eos(tok: Tokenizer) -> Any:
    pair = script_pair(tok, tok.encode(NEXT))
    pair.generation.stop_ids = ()
    return pair


@pytest.mark.parametrize("block_size", [1, 4])
def test_a_chat_ends_with_the_turn(tmp_path: Path, block_size: int) -> None:
    tok = tokenizer(tmp_path, TEMPLATE)
    result = generate("fox", pair=without_eos(tok), max_tokens=40, block_size=block_size)
    assert (result.text, result.finish_reason) == ("jumps", "stop")
    assert result.tokens[-1] == tok.id_of("<turn|>")


def test_without_a_template_nothing_is_added(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path, None)
    assert tok.answer_ends() == ()
    result = generate("fox", pair=without_eos(tok), max_tokens=12)
    assert result.finish_reason == "length" and "over" in result.text


def test_the_config_may_name_the_end_of_a_turn(tmp_path: Path) -> None:
    tok = tokenizer(tmp_path, TEMPLATE, extra_special_tokens={"eot_token": "<table>"})
    assert tok.answer_ends() == (tok.id_of("<table>"),)


def test_a_tool_s_result_is_waited_for_where_the_template_has_one(tmp_path: Path) -> None:
    for source, marks in (
        ("{{ '<|turn>' }}", ["<turn|>"]),
        ("{{ '<|tool_response>' }}", ["<turn|>", "<|tool_response>"]),
    ):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(NANO / "target" / name, tmp_path)
        (tmp_path / "chat_template.jinja").write_text(source)
        tok = load_tokenizer(tmp_path)
        assert tok.answer_ends() == tuple(tok.id_of(mark) for mark in marks)


@pytest.mark.parametrize("eos", [1, None])
def test_inspect_says_what_ends_an_answer(tmp_path: Path, eos: int | None) -> None:
    bundle = Path(shutil.copytree(NANO, tmp_path / "pair"))
    (bundle / "target" / "generation_config.json").unlink()
    file = bundle / "target" / "config.json"
    config = json.loads(file.read_text())
    for section in (config, config.get("text_config", {})):
        section.pop("eos_token_id", None)
    file.write_text(json.dumps(config if eos is None else {**config, "eos_token_id": eos}))
    ends = [*([] if eos is None else ["<eos> (1)"]), "<turn|> (16)", "<|tool_response> (9)"]
    report = inspect(bundle)
    assert report["text"]["answer_ends"] == ends and report["refused"] == []
    pair = load(bundle=bundle)
    assert pair.generation.stop_ids == (() if eos is None else (1,))
