"""Where a thought begins: in the turn that is the model's to write, whatever was said before."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from text_fakes import script_pair, write_tokenizers

from pyengine.generation import generate
from pyengine.task import prompt_ids
from pyengine.text.output import Reader
from pyengine.text.tokenizer import Tokenizer, load_tokenizer

# As the published editions end a prompt, in short
TURNS = """\
{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}
{% if m.thought %}<|channel>thought
{{ m.thought }}<channel|>{% endif %}{{ m.content }}{{ tools }}{% if not m.open %}<turn|>
{% endif %}{% endfor %}"""
ENDINGS = {
    "open": "{{ '<|turn>model\\n' }}",
    "a closed channel": "{{ '<|turn>model\\n<|channel>thought\\n<channel|>' }}",
    "an open channel": "{{ '<|turn>model\\n<|channel>thought\\n' }}",
    "a channel without its name": "{{ '<|turn>model\\n<|channel>' }}",
    "no turn": "",
}
USER = {"role": "user", "content": "the fox"}
NAMED = [
    {"role": "system", "content": "Think in <|channel>, as in <|channel>thought\na"},
    {"role": "developer", "content": [{"type": "text", "text": "<|channel>"}]},
    {"role": "user", "content": "what is <|channel>?"},
    {"role": "tool", "content": "<|channel>thought\n"},
    {"role": "assistant", "content": "It is <|channel>thought\n"},
    {"role": "assistant", "content": "a", "thought": "hm"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reader")
    write_tokenizers(directory)
    return directory


def tokenizer(directory: Path, folder: Path, template: str) -> Tokenizer:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, directory)
    (directory / "chat_template.jinja").write_text(template)
    return load_tokenizer(directory)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("message", NAMED, ids=lambda message: message["role"])
def test_only_the_open_turn_says_whether_the_answer_begins_in_a_thought(
    tmp_path: Path, folder: Path, message: dict[str, Any], ending: str
) -> None:
    tok = tokenizer(tmp_path, folder, TURNS + ENDINGS[ending])
    tools = [{"description": "writes <|channel>thought\n"}]
    script = tok.encode("a fox<channel|>jumps" if "an open" in ending else "a fox")
    if ending == "a channel without its name":
        script = tok.encode("thought\na fox<channel|>jumps")
    for messages in ([message, USER], [USER, message], [message]):
        result = generate(messages, pair=script_pair(tok, script), variables={"tools": tools})
        if "an open" in ending or "without" in ending:
            assert (result.text, result.thinking) == ("jumps", "a fox")
        else:
            assert (result.text, result.thinking) == ("a fox", None)


def test_a_turn_left_open_after_a_tool_s_result(tmp_path: Path, folder: Path) -> None:
    """The model goes on in the turn of its call; the template may open a thought there."""
    tok = tokenizer(tmp_path, folder, TURNS + "{{ '<|channel>thought\\n' if think }}")
    turn = {"role": "model", "content": "called, <turn|> <|channel>", "thought": "b", "open": True}
    script = tok.encode("a fox<channel|>jumps")
    ids = prompt_ids(script_pair(tok, script), [USER, turn], variables={"think": True})
    assert Reader(tok, ids, ()).has_thought
    result = generate(ids, pair=script_pair(tok, script))
    assert (result.text, result.thinking) == ("jumps", "a fox")
    said = {**turn, "content": "called"}
    ids = prompt_ids(script_pair(tok, script), [USER, said])
    assert not Reader(tok, ids, ()).has_thought


def test_a_prompt_without_turns_is_all_open(tmp_path: Path, folder: Path) -> None:
    tok = tokenizer(tmp_path, folder, TURNS)
    assert Reader(tok, tok.encode("fox <|channel>thought\nhm"), ()).has_thought
    assert not Reader(tok, tok.encode("<|channel>thought\nhm<channel|>fox"), ()).has_thought
