"""What is not read cannot refuse: nonsense in parts for images and sound, in notes, in records."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tiny_pairs import FIXTURES, tiny_pair

from pyengine import cli
from pyengine.checkpoint.manifest import MANIFEST
from pyengine.checkpoint.pair import Pair, load
from pyengine.checkpoint.quantize import quantize_checkpoint
from pyengine.checkpoint.safetensors import SINGLE

NANO = Path(cli.__file__).parents[1] / "nano"
NONSENSE = [None, True, -1, 5, 1e300, float("nan"), "", "x\x1b\ud7ff", [], [[[]]], {}, {"bits": 5}]

# Keys of config.json that no text model needs
TOP = [
    *("vision_config", "audio_config", "image_token_id", "audio_token_id", "boi_token_id"),
    *("architectures", "dtype", "torch_dtype", "transformers_version", "initializer_range"),
    *("vision_soft_tokens_per_image", "auto_map", "id2label", "mode", "anything"),
]
TEXT = [
    *("attention_dropout", "initializer_range", "use_cache", "pad_token_id", "bos_token_id"),
    *("dtype", "rope_theta", "rope_scaling", "cache_implementation", "anything"),
]
# Modules of a quantised checkpoint that the text model has not
MODULES = [
    *("vision_tower.encoder.layers.0.q_proj", "model.vision_tower.patch", "embed_vision.proj"),
    *("audio_tower.conv", "multi_modal_projector.linear", "lm_head", "language_model.lm_head"),
    *("no.such.module", "model.layers.999.mlp.up_proj"),
]
STORED = [
    {"bits": 5},
    {"bits": 3, "group_size": 32},
    {"group_size": 7},
    {"bits": "x"},
    {"mode": "mxfp4", "bits": 4, "group_size": 32},
    {"mode": 5},
    {"quant_method": "gptq"},
    {"bits": None, "group_size": []},
]


def change(path: Path, edit: Any) -> None:
    whole = json.loads(path.read_text())
    edit(whole)
    path.write_text(json.dumps(whole))


def override(bundle: Path, path: str, stored: dict[str, Any]) -> None:
    config = bundle / "target" / "config.json"
    change(config, lambda whole: whole["quantization"].update({path: stored}))


def same(pair: Pair) -> None:
    assert mx.array_equal(pair.logits([5, 6, 7]), load().logits([5, 6, 7]))


@pytest.mark.parametrize("seed", range(24))
def test_nonsense_in_what_is_not_read_loads(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    bundle = Path(shutil.copytree(NANO, tmp_path / "b"))

    def spoil(whole: dict[str, Any], keys: list[str]) -> None:
        whole |= {key: rng.choice(NONSENSE) for key in rng.sample(keys, 4)}

    for part in ("target", "assistant"):
        config = bundle / part / "config.json"
        change(config, lambda whole: spoil(whole, TOP))
        change(config, lambda whole: spoil(whole.get("text_config", whole), TEXT))
        change(
            config,
            lambda whole: whole["quantization"].update(
                {path: rng.choice(STORED) for path in rng.sample(MODULES, 4)}
            ),
        )
    records = ["variant", "source", "made_by", "target_quantization", "anything"]
    change(bundle / MANIFEST, lambda whole: spoil(whole, records))
    records = ["transformers_version", "pad_token_id", "cache_implementation", "use_cache"]
    change(bundle / "target" / "generation_config.json", lambda whole: spoil(whole, records))
    settings = ["eos_token_id", "temperature", "top_k", "do_sample", "suppress_tokens"]
    change(bundle / "assistant" / "generation_config.json", lambda whole: spoil(whole, settings))
    files = ["processor_config.json", "preprocessor_config.json", "special_tokens_map.json"]
    for name in [*files, "video_preprocessor_config.json", "README.md"]:
        (bundle / "target" / name).write_bytes(rng.choice([b"", b"{", b"\xff\xfe", b"[" * 9999]))
    (bundle / "assistant" / "tokenizer.json").write_text("{")
    same(load(bundle=bundle, text=True))


@pytest.mark.parametrize("path", MODULES)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_an_override_of_an_unread_module_refuses_nothing(
    path: str, stored: dict[str, Any], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(NANO, tmp_path / "b"))
    change(
        bundle / "target" / "config.json",
        lambda whole: whole["quantization"].update({path: stored}),
    )
    same(load(bundle=bundle))


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_the_same_override_of_a_module_that_is_read_refuses(
    stored: dict[str, Any], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(NANO, tmp_path / "b"))
    path = "model.layers.0.mlp.up_proj"
    change(
        bundle / "target" / "config.json",
        lambda whole: whole["quantization"].update({path: stored}),
    )
    with pytest.raises(ValueError, match=rf"^\[config\] `quantization\.{path}\.\w+` must be"):
        load(bundle=bundle)


@pytest.mark.parametrize("empty", ["quantization", "quantization_config"])
def test_an_empty_block_beside_a_filled_one_says_nothing(empty: str, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(NANO, tmp_path / "b"))

    def edit(whole: dict[str, Any]) -> None:
        block = whole.pop("quantization")
        whole |= {"quantization": block, "quantization_config": block, empty: None}

    change(bundle / "target" / "config.json", edit)
    same(load(bundle=bundle))


def test_unread_tensors_may_hold_anything(tmp_path: Path) -> None:
    src = FIXTURES / "dense31" / "target"
    folder = Path(shutil.copytree(src, tmp_path / "t"))
    tensors = mx.load(str(src / SINGLE))
    assert isinstance(tensors, dict)
    unread = {
        "model.vision_tower.patch.weight": mx.full((2, 3), float("nan")),
        "vision_tower.patch.weight": mx.zeros((2, 3), dtype=mx.complex64),
        "model.audio_tower.conv": mx.zeros((0, 7), dtype=mx.uint64),
        "model.embed_vision.scales": mx.zeros((1, 1, 1, 1, 1), dtype=mx.int8),
        "model.layers.0.mlp.up_proj.input_max": mx.full((1,), float("inf")),
        "lm_head.weight": mx.zeros((3,), dtype=mx.bool_),
    }
    mx.save_safetensors(str(folder / SINGLE), tensors | unread)
    expected = tiny_pair("dense31").logits([2, 7, 1])
    assert mx.array_equal(load(folder, dtype=mx.float32).logits([2, 7, 1]), expected)
    quantize_checkpoint(folder, tmp_path / "q")
    quantize_checkpoint(src, tmp_path / "plain")
    assert (tmp_path / "q" / SINGLE).read_bytes() == (tmp_path / "plain" / SINGLE).read_bytes()
