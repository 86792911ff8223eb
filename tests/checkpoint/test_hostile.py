"""Bad input, one case a line: one sentence in the house form, exit code 2, nothing written.

Every case is the embedded pair with one thing wrong, or one wrong argument, through the command.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from text_fakes import write_tokenizers
from typer.testing import CliRunner

from pyengine import cli
from pyengine.checkpoint import memory
from pyengine.checkpoint.manifest import MANIFEST
from pyengine.checkpoint.safetensors import BYTES, INDEX, SINGLE, read_header

NANO = Path(cli.__file__).parents[1] / "nano"
FIXTURES = Path(__file__).parents[1] / "fixtures"
SCALES = "model.layers.1.mlp.up_proj.scales"
NORM = "model.layers.3.input_layernorm.weight"
NAN, INF = 0x7FC0, 0x7F80  # bfloat16

Change = Callable[[Path], Any]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of the embedded pair, under its own root so that a way out stays in the test."""
    return Path(shutil.copytree(NANO, tmp_path / "root" / "bundle"))


def run(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments))


def refused(done: Any, message: str) -> None:
    assert done.exit_code == 2, (done.exit_code, done.exception, done.output)
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("pyengine: ["), done.stderr
    assert lines[0].isprintable() and len(lines[0]) < 700
    assert message in lines[0], lines[0]


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Ways to change a file


def config(part: str = "target", **values: Any) -> Change:
    """config.json with these values; ``...`` takes a key out, ``a__b`` goes down a level."""

    def change(bundle: Path) -> None:
        path = bundle / part / "config.json"
        whole = json.loads(path.read_text())
        for key, value in values.items():
            *outer, last = key.split("__")
            place = whole
            for name in outer:
                place = place[name]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        path.write_text(json.dumps(whole))

    return change


def text(name: str, content: str | bytes) -> Change:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda bundle: (bundle / name).write_bytes(data)


def gone(name: str) -> Change:
    return lambda bundle: (bundle / name).unlink()


def cut(size: int) -> Change:
    def change(bundle: Path) -> None:
        path = bundle / "target" / SINGLE
        path.write_bytes(path.read_bytes()[:size])

    return change


def header(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """The target's file with its header edited in place, or replaced by the bytes returned."""

    def change(bundle: Path) -> None:
        path = bundle / "target" / SINGLE
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        values = json.loads(data[8 : 8 + length])
        new = edit(values)
        raw = new if isinstance(new, bytes) else json.dumps(values).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])

    return change


def entry(**fields: Any) -> Change:
    return header(lambda values: values[NORM].update(fields))


def word(name: str, value: int, part: str = "target") -> Change:
    """One 16-bit number in the middle of a tensor replaced."""

    def change(bundle: Path) -> None:
        path = bundle / part / SINGLE
        _, _, begin, end = read_header(path)[name]
        with path.open("r+b") as file:
            file.seek(begin + (end - begin) // 4 * 2)
            file.write(value.to_bytes(2, "little"))

    return change


def rewritten(edit: Callable[[dict[str, Any]], Any]) -> Change:
    """The target's tensors edited as (dtype name, array of raw numbers), written again."""

    def change(bundle: Path) -> None:
        path = bundle / "target" / SINGLE
        data = path.read_bytes()
        tensors = {n: (d, s, data[b:e]) for n, (d, s, b, e) in read_header(path).items()}
        edit(tensors)
        values, body = {}, b""
        for name, (dtype, shape, raw) in tensors.items():
            span = [len(body), len(body) + len(raw)]
            values[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
            body += raw
        head = json.dumps(values).encode()
        path.write_bytes(len(head).to_bytes(8, "little") + head + body)

    return change


def as_dtype(name: str, dtype: str) -> Change:
    def edit(tensors: dict[str, Any]) -> None:
        _, shape, _ = tensors[name]
        tensors[name] = (dtype, shape, bytes(int(np.prod(shape)) * BYTES[dtype]))

    return rewritten(edit)


def shards(weight_map: Any, then: Change = lambda bundle: None) -> Change:
    def change(bundle: Path) -> None:
        (bundle / "target" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        then(bundle)

    return change


def link(name: str, to: str) -> Change:
    """A file or folder moved out of the bundle, and a link left in its place."""

    def change(bundle: Path) -> None:
        outside = bundle.parent / to
        (bundle / name).rename(outside)
        (bundle / name).symlink_to(outside)

    return change


def circle(name: str) -> Change:
    def change(bundle: Path) -> None:
        (bundle / name).unlink()
        (bundle / name).symlink_to(bundle / name)

    return change


def other_assistant(flavour: str) -> Change:
    def change(bundle: Path) -> None:
        shutil.rmtree(bundle / "assistant")
        shutil.copytree(FIXTURES / flavour / "assistant", bundle / "assistant")

    return change


def manifest(**values: Any) -> Change:
    return text(MANIFEST, json.dumps(values))


def tokenizer(**values: Any) -> Change:
    def change(bundle: Path) -> None:
        path = bundle / "target" / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def no_unknown_token(bundle: Path) -> None:
    path = bundle / "target" / "tokenizer.json"
    write_tokenizers(path.parent)  # in both forms; the embedded one never needs that token
    whole = json.loads(path.read_text())
    other = ("<0x", "<unk>")
    vocab = {
        ("x" if k.startswith(other) else "") + k: v for k, v in whole["model"]["vocab"].items()
    }
    path.write_text(json.dumps(whole | {"model": whole["model"] | {"vocab": vocab}}))


def template(source: str) -> Change:
    return text("target/chat_template.jinja", source)


DEEP = "[" * 100_000
LONG = "9" * 5000
REGEX = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
WORDS = {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"}
DIR = "target/model.safetensors"

FILES: dict[str, tuple[Change, str]] = {
    # safetensors: the header
    "no bytes": (cut(0), "is cut off or not a safetensors file"),
    "seven bytes": (cut(7), "is cut off or not a safetensors file"),
    "half a header": (cut(900), "is cut off or not a safetensors file"),
    "half the data": (cut(3_000_000), "ends past the end of the file"),
    "one byte short": (cut(-1), "ends past the end of the file"),
    "no header": (text(DIR, bytes(range(256)) * 9), "is cut off or not a safetensors file"),
    "header too long": (text(DIR, (1 << 62).to_bytes(8, "little") + b"{}"), "is cut off"),
    "header of nothing": (text(DIR, bytes(8) + b"{}"), "is cut off or not"),
    "header no json": (header(lambda v: b"{" * 99), "is damaged"),
    "header too deep": (header(lambda v: DEEP.encode()), "is damaged"),
    "header a list": (header(lambda v: b"[]"), "is damaged"),
    "header utf-16": (header(lambda v: json.dumps(v).encode("utf-16")), "is damaged"),
    "header latin-1": (header(lambda v: b'{"\xe9": {}}'), "is damaged"),
    "header a number too long": (header(lambda v: f'{{"a": {LONG}}}'.encode()), "is damaged"),
    "a name twice": (
        header(lambda v: json.dumps(v).encode()[:-1] + b', "%s": {}}' % NORM.encode()),
        "must name each key once but",
    ),
    "entry a number": (header(lambda v: v.update({NORM: 3})), "an entry has a wrong form"),
    "entry without offsets": (header(lambda v: v[NORM].pop("data_offsets")), "a wrong form"),
    "offsets past the end": (entry(data_offsets=[10**9, 10**9 + 256]), "ends past the end"),
    "offsets near 2**64": (entry(data_offsets=[2**64 - 256, 2**64]), "ends past the end"),
    "offsets negative": (entry(data_offsets=[-256, 0]), "no sound shape and offsets"),
    "offsets reversed": (entry(data_offsets=[512, 256]), "no sound shape and offsets"),
    "offsets of another": (entry(data_offsets=[0, 256]), "overlaps another"),
    "shape of another size": (entry(shape=[129]), "do not fit its shape"),
    "shape negative": (entry(shape=[-128]), "no sound shape and offsets"),
    "shape a fraction": (entry(shape=[128.0]), "no sound shape and offsets"),
    "shape true": (entry(shape=[True]), "no sound shape and offsets"),
    "shape near 2**64": (entry(shape=[2**62, 0], data_offsets=[0, 0]), "no sound shape"),
    "dtype unknown": (entry(dtype="F12"), "has the unknown dtype"),
    "dtype a list": (entry(dtype=["F32"]), "has the unknown dtype"),
    # tensors
    "a tensor missing": (header(lambda v: v.pop(NORM)), "weights miss"),
    "a tensor too many": (
        rewritten(lambda t: t.update({"model.extra\x1b[31m\n": ("F32", (1,), bytes(4))})),
        "is no tensor of this Gemma 4 model",
    ),
    "wrong shape": (
        rewritten(lambda t: t.update({NORM: ("BF16", (2, 64), t[NORM][2])})),
        "must have shape [128] but got [2, 64]",
    ),
    "wrong dtype": (as_dtype(NORM, "I32"), "must be bfloat16 or float16 or float32 but got int32"),
    "a dtype of none": (as_dtype(NORM, "F8_E4M3"), "must be bfloat16 or float16 or float32"),
    "a double": (as_dtype(NORM, "F64"), "[load]"),
    "mixed dtypes": (as_dtype(NORM, "F32"), "like the rest of the checkpoint"),
    "words as floats": (as_dtype(SCALES, "U16"), "must be bfloat16 or float16 or float32"),
    "NaN in scales": (word(SCALES, NAN), "up_proj.scales` must be finite"),
    "infinity in biases": (word(SCALES.replace("scales", "biases"), INF), "must be finite"),
    "NaN in a norm": (word(NORM, NAN), "layers.3.input_layernorm.weight` must be finite"),
    "NaN in a scalar": (word("model.layers.0.layer_scalar", NAN), "layer_scalar` must be finite"),
    "NaN in the assistant": (word("model.norm.weight", NAN, "assistant"), "must be finite"),
    # shards and paths
    "no weights": (gone(DIR), "has no model.safetensors and no index"),
    "weights a folder": (lambda b: ((b / DIR).unlink(), (b / DIR).mkdir()), "but is a folder"),
    "shard missing": (
        shards({NORM: "a.safetensors"}, gone(DIR)),
        "misses the shard a.safetensors; is it all downloaded, or is model.safetensors.index.json",
    ),
    "shard outside": (shards({NORM: "../a.safetensors"}), "a shard must be a file in"),
    "shard absolute": (shards({NORM: "/etc/passwd"}), "a shard must be a file in"),
    "shard with a null": (shards({NORM: "a\0b"}), "a shard must be a file in"),
    "shard a number": (shards({NORM: 7}), "a shard must be a file in"),
    "shard a list": (shards({NORM: [SINGLE]}), "a shard must be a file in"),
    "shard without its tensor": (
        header(lambda v: v.pop(NORM)),
        "[load] weights miss `layers.3.input_layernorm.weight`; is this a Gemma 4",
    ),
    "shard of another format": (
        shards({NORM: "a.gguf"}, text("target/a.gguf", b"GGUF" + bytes(64))),
        "is cut off or not a safetensors file",
    ),
    "shard linked outside": (
        shards({NORM: SINGLE}, link(DIR, "else.safetensors")),
        "must lie inside its folder but leads to",
    ),
    "index a list": (text("target/" + INDEX, "[]"), "must hold a JSON object but got a list"),
    "index without a map": (text("target/" + INDEX, "{}"), "must map tensor names to files"),
    "index too deep": (text("target/" + INDEX, DEEP), "nested too deeply"),
    "weights linked outside": (link(DIR, "else.safetensors"), "must lie inside its folder"),
    "weights in a circle": (circle(DIR), "leads nowhere"),
    "config linked outside": (link("target/config.json", "c.json"), "must lie inside its folder"),
    "template linked outside": (
        link("target/chat_template.jinja", "t.jinja"),
        "must lie inside its folder",
    ),
    "tokenizer linked outside": (
        link("target/tokenizer.json", "t.json"),
        "must lie inside its folder",
    ),
    "target linked outside": (link("target", "elsewhere"), "must lie inside its folder"),
    "manifest linked outside": (link(MANIFEST, "m.json"), "must lie inside its folder"),
    "manifest leads up": (manifest(layout={"target": "../bundle/target"}), "inside the bundle"),
    "manifest absolute": (manifest(layout={"target": "/etc"}), "inside the bundle"),
    "manifest with a null": (manifest(layout={"target": "a\0"}), "must name a folder"),
    "manifest names nothing": (manifest(layout={"target": "no"}), "target must be a folder"),
    # manifest and generation settings
    "manifest no json": (text(MANIFEST, "{"), "must be JSON but is not"),
    "manifest a number": (text(MANIFEST, "3"), "must hold a JSON object but got a number"),
    "manifest binary": (text(MANIFEST, b"\xff\xfe"), "must be UTF-8 text"),
    "manifest too deep": (text(MANIFEST, '{"a":' + DEEP), "nested too deeply"),
    "name a list": (manifest(name=["a"]), "`name` of mtplx_pair.json must be a line"),
    "name for a terminal": (manifest(name="a\x1b[31m"), "`name` of mtplx_pair.json must be a line"),
    "name half a character": (manifest(name="\ud800"), "`name` of mtplx_pair.json must be a line"),
    "name a book": (manifest(name="a" * 201), "`name` of mtplx_pair.json must be a line"),
    "benchmark a list": (manifest(benchmark=[1]), "`benchmark` of mtplx_pair.json must be"),
    "block size a word": (manifest(benchmark={"best_block_size": "6"}), "must be a whole number"),
    "block size absurd": (manifest(benchmark={"best_block_size": 10**9}), "number from 1 to 128"),
    "temperature endless": (
        text("target/generation_config.json", '{"temperature": Infinity}'),
        "default temperature must be a number",
    ),
    "temperature too long": (
        text("target/generation_config.json", '{"temperature": 1' + "0" * 400 + "}"),
        "default temperature must be a number",
    ),
    "top k a part": (text("target/generation_config.json", '{"top_k": 9.5}'), "must be a count"),
    "stop ids outside": (
        text("target/generation_config.json", '{"eos_token_id": [1, 99999]}'),
        "must hold ids from 0 to 1279",
    ),
    # config.json
    "config missing": (gone("target/config.json"), "is this a checkpoint folder?"),
    "config no json": (text("target/config.json", '{"model_type": "gem'), "must be JSON"),
    "config a list": (text("target/config.json", "[]"), "must hold a JSON object but got a list"),
    "config too deep": (text("target/config.json", DEEP), "nested too deeply"),
    "config a number too long": (text("target/config.json", f'{{"a": {LONG}}}'), "must be JSON"),
    "config too large": (text("target/config.json", b" " * (9 << 20)), "must be at most 8 MB"),
    "not gemma 4": (config(model_type="llama"), "`model_type` must be one of gemma4"),
    "model type a list": (config(model_type=["gemma4"]), "`model_type` must be one of gemma4"),
    "a key missing": (config(sliding_window=...), "config.json misses `sliding_window`"),
    "width negative": (config(hidden_size=-128), "`hidden_size` must be an integer from 1"),
    "width zero": (config(hidden_size=0), "`hidden_size` must be an integer from 1"),
    "width a fraction": (config(hidden_size=128.0), "`hidden_size` must be an integer"),
    "width absurd": (config(hidden_size=10**30), "`hidden_size` must be an integer from 1 to"),
    "width of another": (config(hidden_size=256), "are these two a pair?"),
    "layers absurd": (config(num_hidden_layers=10**9), "`num_hidden_layers` must be an integer"),
    "layers miscounted": (config(num_hidden_layers=23), "`layer_types` must list 23 times"),
    "layer types a word": (config(layer_types="full"), "`layer_types` must list 24 times"),
    "layer types nested": (config(layer_types=[[]] * 24), "`layer_types` must list 24 times"),
    "all layers shared": (config(num_kv_shared_layers=24), "leave a layer with its own keys"),
    "heads that do not divide": (config(num_key_value_heads=3), "must be a multiple of 3"),
    "heads absurd": (config(num_attention_heads=10**6), "`num_attention_heads` must be an int"),
    "head width odd": (config(head_dim=255), "`head_dim` must be even"),
    "vocabulary absurd": (config(vocab_size=10**12), "`vocab_size` must be an integer"),
    "vocabulary of another": (config(vocab_size=2560), "must equal the target's 2560 but got 1280"),
    "window one": (config(sliding_window=1), "`sliding_window` must be an integer from 2"),
    "window absurd": (config(sliding_window=10**12), "`sliding_window` must be an integer"),
    "context zero": (config(max_position_embeddings=0), "`max_position_embeddings` must be"),
    "rope theta zero": (
        config(rope_parameters__full_attention__rope_theta=0),
        "`rope_parameters.full_attention.rope_theta` must be a number from 1",
    ),
    "rope theta tiny": (
        config(rope_parameters__full_attention__rope_theta=5e-324),
        "rope_theta` must be a number from 1",
    ),
    "rope theta NaN": (
        config(rope_parameters__full_attention__rope_theta=float("nan")),
        "rope_theta` must be a number from 1",
    ),
    "rope theta too long": (
        config(rope_parameters__full_attention__rope_theta=10**400),
        "rope_theta` must be a number from 1",
    ),
    "rope fraction 2": (
        config(rope_parameters__full_attention__partial_rotary_factor=2),
        "partial_rotary_factor` must be a number",
    ),
    "epsilon endless": (config(rms_norm_eps=float("inf")), "`rms_norm_eps` must be a number"),
    "softcap negative": (config(final_logit_softcapping=-1), "softcapping` must be a number"),
    "head not tied": (config(tie_word_embeddings=False), "`tie_word_embeddings` must be true"),
    "end id a word": (config(eos_token_id="end"), "`eos_token_id` must be a token id"),
    "3 bits": (config(quantization__bits=3), "`quantization.bits` must be 4, 6 or 8"),
    "8.0 bits": (config(quantization__bits=8.0), "`quantization.bits` must be 4, 6 or 8"),
    "4 bits claimed": (config(quantization__bits=4), "must have shape"),
    "group of 7": (config(quantization__group_size=7), "`quantization.group_size` must be"),
    "group of 32 claimed": (config(quantization__group_size=32), "must have shape"),
    "another quantisation": (config(quantization__mode="mxfp4"), "be MLX affine quantisation"),
    "quantisation a word": (config(quantization="8bit"), "`quantization` must be an object"),
    "quantisation gone": (
        config(quantization=..., quantization_config=...),
        "config.json must have a `quantization` block",
    ),
    # the pair
    "assistant of another": (other_assistant("uni12"), "are these two a pair?"),
    "backbone of another": (config("assistant", backbone_hidden_size=64), "are these two a pair?"),
    "window of another": (
        config("assistant", text_config__sliding_window=8),
        "are these two a pair?",
    ),
    "assistant no assistant": (config("assistant", model_type="gemma4"), "`model_type` must be"),
    # tokenizer and template
    "tokenizer missing": (
        lambda b: [(b / "target" / f"tokenizer.{e}").unlink() for e in ("json", "model")],
        "must hold tokenizer.json or tokenizer.model",
    ),
    "tokenizer no json": (text("target/tokenizer.json", "{"), "cannot be read"),
    "tokenizer without its unknown token": (no_unknown_token, "token `<unk>` not found"),
    "tokenizer empty": (text("target/tokenizer.json", "{}"), "cannot be read"),
    "tokenizer binary": (text("target/tokenizer.json", b"\xff\x00"), "must be UTF-8 text"),
    "tokenizer with a pattern": (tokenizer(pre_tokenizer=REGEX), "without regular expressions"),
    "tokenizer of another kind": (tokenizer(model=WORDS), "is this a Gemma 4 tokenizer?"),
    "tokenizer settings a list": (
        text("target/tokenizer_config.json", "[]"),
        "must hold a JSON object",
    ),
    "special tokens a number": (
        text("target/tokenizer_config.json", '{"extra_special_tokens": 5}'),
        "`extra_special_tokens` must be an object or a list but got a number",
    ),
    "template no jinja": (template("{% if %}"), "chat template must be valid jinja"),
    "template endless": (
        template("{% for a in 'x' * 9999 %}{% for b in 'x' * 9999 %}{% endfor %}{% endfor %}"),
        "it does too much work",
    ),
    "template binary": (text("target/chat_template.jinja", b"\xff"), "must be UTF-8 text"),
    "template of nothing": (template(""), "prompt must not be empty"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bundle_with_one_thing_wrong(bundle: Path, name: str) -> None:
    change, message = FILES[name]
    change(bundle)
    before = listing(bundle.parent)
    refused(run("generate", "--bundle", str(bundle), "--max-tokens", "2", "fox"), message)
    assert listing(bundle.parent) == before


def test_the_bundle_itself_is_right(bundle: Path) -> None:
    done = run("generate", "--bundle", str(bundle), "--max-tokens", "2", "fox")
    assert done.exit_code == 0 and done.stdout and "pyengine:" not in done.stderr


ARGUMENTS: dict[str, tuple[list[str], str]] = {
    "no prompt": (["generate", ""], "prompt must not be empty"),
    "a prompt of bytes": (["generate", "--raw", "\udcff"], "must be Unicode"),
    "a prompt too long": (["generate", "fox " * 9000], "prompt must be shorter than the context"),
    "no tokens": (["generate", "a", "--max-tokens", "0"], "max_tokens must be at least 1"),
    "temperature NaN": (["generate", "a", "--temperature", "nan"], "temperature must be 0"),
    "temperature negative": (["generate", "a", "--temperature", "-1"], "temperature must be 0"),
    "top p 0": (["generate", "a", "--top-p", "0"], "top_p must be above 0"),
    "top p 2": (["generate", "a", "--top-p", "2"], "top_p must be above 0"),
    "top k 999": (["generate", "a", "--top-k", "999"], "top_k must be 0"),
    "min p NaN": (["generate", "a", "--min-p", "nan"], "min_p must be 0"),
    "seed negative": (["generate", "a", "--seed", "-1"], "seed must be 0"),
    "seed too long": (["generate", "a", "--seed", str(1 << 64)], "seed must be 0"),
    "block size 0": (["generate", "a", "--block-size", "0"], "block_size must be 1 to 128"),
    "block size 129": (["generate", "a", "--block-size", "129"], "block_size must be 1 to 128"),
    "stop at nothing": (["generate", "a", "--stop", ""], "stop must hold strings"),
    "no bundle": (["generate", "a", "--bundle", "/absent"], "bundle must be a folder"),
    "a bundle with escapes": (["generate", "a", "--bundle", "/\x1b[31m\n"], "must be a folder"),
    "an assistant alone": (["generate", "a", "--assistant", "."], "must come with a target"),
    "no suite": (["bench", "gemma-mtp", "--prompt-suite", "/absent"], "cannot be read"),
    "a suite that is a folder": (["bench", "gemma-mtp", "--prompt-suite", "/"], "cannot be read"),
    "a suite that is a machine": (
        ["bench", "gemma-mtp", "--prompt-suite", "/dev/zero"],
        "must be at most 64 MB",
    ),
    "an output that is a folder": (["bench", "gemma-mtp", "--output", "/"], "must be a file"),
    "an output nowhere": (["bench", "gemma-mtp", "--output", "/no/a"], "must lie in a folder"),
    "an output in a machine": (["bench", "gemma-mtp", "--output", "/proc/a"], "must be writable"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_wrong_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, message = ARGUMENTS[name]
    refused(run(*arguments), message)
    assert listing(tmp_path) == []


SUITES = {
    "no json": ("{", "line 1: must be JSON"),
    "too deep": (DEEP, "line 1: must be JSON but is nested too deeply"),
    "a number": ("5", "line 1: must be an object but got a number"),
    "a key too many": ('{"id": "a", "x": 1}', "keys must be id"),
    "half a character": (
        '{"id": "a", "category": "b", "prompt": "\\ud800", "max_tokens": 5}',
        "must be Unicode",
    ),
    "nothing": ("\n", "must hold at least one case"),
    "bytes": (b"\xff\xfe", "must be UTF-8 text"),
}


@pytest.mark.parametrize("name", SUITES)
def test_a_damaged_suite(tmp_path: Path, name: str) -> None:
    content, message = SUITES[name]
    path = tmp_path / "suite.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(run("bench", "gemma-mtp", "--prompt-suite", str(path)), message)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_files_without_permission(bundle: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (bundle / "target" / name).chmod(0)
    if os.geteuid() == 0:  # root may read everything, so the test refuses in the system's place
        whole = Path.open

        def open_as_others(path: Path, *arguments: Any, **kw: Any) -> Any:
            if path.exists() and not path.stat().st_mode & 0o444:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return whole(path, *arguments, **kw)

        monkeypatch.setattr(Path, "open", open_as_others)
    done = run("generate", "--bundle", str(bundle), "a")
    refused(done, f"{name} cannot be read: Permission denied")


def test_not_enough_memory_is_known_before_loading(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(memory, "available_bytes", lambda: 5_000_000)
    monkeypatch.setattr("pyengine.checkpoint.pair.load_target_weights", never)
    done = run("generate", "--bundle", str(bundle), "a")
    refused(done, "must fit the free memory of 0.0 GB but needs")


def test_a_window_of_gigabytes_takes_what_is_written(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor bounds the window; but a page is there only for positions that are."""
    config(sliding_window=1 << 20)(bundle)
    config("assistant", text_config__sliding_window=1 << 20)(bundle)
    monkeypatch.setattr(memory, "available_bytes", lambda: 16_000_000_000)
    done = run("generate", "--bundle", str(bundle), "a", "--max-tokens", "1")
    assert done.exit_code == 0 and mx.get_peak_memory() < 1 << 30


def test_logits_that_are_not_finite_are_the_inputs_fault(bundle: Path) -> None:
    """Scales that are finite each and overflow together: seen in a round, not while loading."""
    for layer in range(24):
        word(f"model.layers.{layer}.post_feedforward_layernorm.weight", 0x7F7F)(bundle)
    done = run("generate", "--bundle", str(bundle), "a", "--max-tokens", "4")
    refused(done, "logits must be finite")


def test_the_hub_s_cache_of_links_is_a_folder_too(bundle: Path, tmp_path: Path) -> None:
    """Its files are links to blobs beside the snapshots: inside the repository, so inside."""
    repo = tmp_path / "models--someone--pair"
    blobs, snapshot = repo / "blobs", repo / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    for number, path in enumerate(p for p in sorted(bundle.rglob("*")) if p.is_file()):
        place = snapshot / path.relative_to(bundle)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blobs / str(number))
        place.symlink_to(os.path.relpath(blobs / str(number), place.parent))
    arguments = ["generate", "--bundle", str(snapshot), "--max-tokens", "2", "fox"]
    assert run(*arguments).exit_code == 0
    # A link from there to anywhere else is as foreign as ever
    (snapshot / "target" / "config.json").unlink()
    (snapshot / "target" / "config.json").symlink_to(bundle / "target" / "config.json")
    refused(run(*arguments), "must lie inside its folder")
