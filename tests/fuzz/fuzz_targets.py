"""Every reader of files, and of the server's requests, as a function of bytes.

For test_fuzz.py and fuzz_atheris.py. A target returns True where the bytes were taken and False
where they were refused in the house form; anything else is a finding. What is taken is also used,
as far as that is cheap.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
from reading import read_request
from text_fakes import script_pair, write_tokenizers

import pyengine.checkpoint.pair as pairs
from pyengine.bench.suite import load_suite
from pyengine.checkpoint import weights
from pyengine.checkpoint.config_json import read_assistant_config, read_target_config
from pyengine.checkpoint.defaults import read_generation
from pyengine.checkpoint.manifest import MANIFEST, bundle_parts, read_manifest
from pyengine.checkpoint.safetensors import INDEX, SINGLE, read_headers
from pyengine.serve.protocols.ask import Limits, Refused
from pyengine.text.template import ChatTemplate
from pyengine.text.tokenizer import load_tokenizer
from pyengine.untrusted import parse

FIXTURES = Path(__file__).parents[1] / "fixtures"
NANO = Path(pairs.__file__).parents[1] / "nano"
HOUSE = re.compile(r"\[[\w. -]+\] \S.*[.?]$", re.DOTALL)
ASKS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 5, "stop": ["a"], "seed": 1},
    {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "b"}]},
            {"role": "user", "content": "c"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "logprobs": True,
        "top_logprobs": 2,
        "logit_bias": {"5": -1.5},
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 1,
    },
    {"prompt": [5, 6], "echo": True, "logprobs": 1, "max_tokens": 0, "presence_penalty": 1},
    {"prompt": ["the fox"], "stream": True, "stream_options": {"include_usage": True}, "top_k": 3},
)
USER = {"role": "user", "content": "the fox <|turn> jumps"}


class Finding(AssertionError):
    """A reader that neither took its bytes nor refused them properly."""


def house(read: Callable[[bytes], object]) -> Callable[[bytes], bool]:
    """The reader with its error checked."""

    @functools.wraps(read)
    def target(data: bytes) -> bool:
        try:
            read(data)
        except ValueError as error:
            if not HOUSE.match(str(error)):
                raise Finding(f"{read.__name__}: {error!r}") from error
            return False
        return True

    return target


@contextmanager
def folder(**files: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        for file, data in files.items():
            (Path(name) / file.replace("__", ".")).write_bytes(data)
        yield Path(name)


@functools.cache
def tokenizers() -> Path:
    path = Path(tempfile.mkdtemp(prefix="fuzz-tokenizers-"))
    write_tokenizers(path)
    return path


@house
def header(data: bytes) -> None:
    """A safetensors file; what the header promises is read."""
    with folder(model__safetensors=data) as path:
        for shard, entries in read_headers(path):
            loaded = weights._open(shard)
            for name, entry in entries.items():
                if entry.elements < 1 << 20:
                    mx.eval(loaded[name])


@house
def index(data: bytes) -> None:
    with folder(model__safetensors=(FIXTURES / "uni12" / "assistant" / SINGLE).read_bytes()) as p:
        (p / INDEX).write_bytes(data)
        list(read_headers(p))


@house
def target_config(data: bytes) -> None:
    with folder(config__json=data) as path:
        config = read_target_config(path)
        weights.target_layout(config)
        for layer in config.layers[:2]:
            config.rope(layer.sliding).frequencies(layer.head_dim)


@house
def assistant_config(data: bytes) -> None:
    with folder(config__json=data) as path:
        weights.assistant_layout(read_assistant_config(path))


@house
def manifest(data: bytes) -> None:
    with folder() as path:
        (path / MANIFEST).write_bytes(data)
        for part in ("target", "assistant", "dflash"):
            (path / part).mkdir()
        inside = path.resolve()
        for part in bundle_parts(path).values():
            assert part.resolve().is_relative_to(inside)
        config = read_target_config(FIXTURES / "uni12" / "target")
        read_generation(path / "target", path / "assistant", config, read_manifest(path))


@house
def generation(data: bytes) -> None:
    with folder(generation_config__json=data) as path:
        read_generation(path, path, read_target_config(FIXTURES / "uni12" / "target"), {})


@house
def suite(data: bytes) -> None:
    with folder(suite__jsonl=data) as path:
        for case in load_suite(path / "suite.jsonl"):
            assert len(case.sha256) == 64 and case.content


def _use_tokenizer(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("the fox \u00e9 <|turn>\n", bos=True)
    tokenizer.decode(ids)
    if tokenizer.has_chat_template:
        tokenizer.encode_chat([USER])


@house
def tokenizer_json(data: bytes) -> None:
    with folder(tokenizer__json=data) as path:
        _use_tokenizer(path)


@house
def tokenizer_model(data: bytes) -> None:
    with folder(tokenizer__model=data) as path:
        _use_tokenizer(path)


@house
def tokenizer_config(data: bytes) -> None:
    with folder(tokenizer_config__json=data) as path:
        shutil.copyfile(tokenizers() / "tokenizer.json", path / "tokenizer.json")
        _use_tokenizer(path)


@house
def chat_template(data: bytes) -> None:
    """Text only: a template that is no UTF-8 ends earlier, in files.py."""
    ChatTemplate(data.decode("utf-8", "replace"), {"bos_token": "<bos>"}).render([USER])


@functools.cache
def pair() -> Any:
    return script_pair(load_tokenizer(tokenizers()), "jumps")


def _ask(data: bytes, chat: bool) -> None:
    """What the server is asked; nothing is generated."""
    body = parse(data.decode("utf-8", "replace"), "[serve] the request")
    if not isinstance(body, dict):
        raise ValueError("[fuzz] serve.py refuses this before.")
    try:
        ask = read_request(pair(), body, Limits(), chat)
    except Refused as error:
        raise ValueError(str(error)) from error
    assert 0 < len(ask.ids) < pair().target.context
    assert (0 if ask.echo is not None else 1) <= ask.max_tokens <= Limits().max_tokens


@house
def chat_request(data: bytes) -> None:
    _ask(data, chat=True)


@house
def text_request(data: bytes) -> None:
    _ask(data, chat=False)


def seeds(name: str) -> list[bytes]:
    """Right inputs of a target, to be spoiled."""
    target, assistant = FIXTURES / "uni12" / "target", FIXTURES / "e2b" / "assistant"
    whole = (FIXTURES / "uni12" / "assistant" / SINGLE).read_bytes()
    small = json.dumps(
        {
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
            "__metadata__": {"format": "mlx"},
        }
    ).encode()
    known = {
        "header": lambda: [len(small).to_bytes(8, "little") + small + bytes(range(32)), whole],
        "index": lambda: [
            json.dumps({"weight_map": {"model.norm.weight": SINGLE}}).encode(),
            b'{"metadata": {}, "weight_map": {}}',
        ],
        "target_config": lambda: [
            (FIXTURES / f / "target" / "config.json").read_bytes() for f in ("e2b", "moe26")
        ],
        "assistant_config": lambda: [(assistant / "config.json").read_bytes()],
        "manifest": lambda: [(NANO / MANIFEST).read_bytes()],
        "generation": lambda: [(target / "generation_config.json").read_bytes()],
        "suite": lambda: [
            b'{"id": "a", "category": "b", "prompt": "c", "max_tokens": 5}\n'
            b'{"id": "d", "category": "b", "prompt": "c", "max_tokens": 5, "notes": "n", '
            b'"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}\n'
        ],
        "tokenizer_json": lambda: [(tokenizers() / "tokenizer.json").read_bytes()],
        "tokenizer_model": lambda: [(tokenizers() / "tokenizer.model").read_bytes()],
        "tokenizer_config": lambda: [(tokenizers() / "tokenizer_config.json").read_bytes()],
        "chat_request": lambda: [json.dumps(ask).encode() for ask in ASKS if "messages" in ask],
        "text_request": lambda: [json.dumps(ask).encode() for ask in ASKS if "prompt" in ask],
        "chat_template": lambda: [
            (tokenizers() / "chat_template.jinja").read_bytes(),
            (NANO / "target" / "chat_template.jinja").read_bytes(),
        ],
    }
    return known[name]()


TARGETS: dict[str, Callable[[bytes], bool]] = {
    f.__name__: f
    for f in (
        header,
        index,
        target_config,
        assistant_config,
        manifest,
        generation,
        suite,
        tokenizer_json,
        tokenizer_model,
        tokenizer_config,
        chat_template,
        chat_request,
        text_request,
    )
}
