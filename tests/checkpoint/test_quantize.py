"""Conversion to MLX affine form: names, config, bits, and what a failure leaves behind."""

import errno
import json

import mlx.core as mx
import numpy as np
import pytest
from tiny_pairs import FIXTURES, FLAVOURS, gap, greedy_text, quantized_fixtures, tiny_pair

from pyengine.checkpoint.config_json import read_target_config
from pyengine.checkpoint.pair import load
from pyengine.checkpoint.quantize import quantize_checkpoint
from pyengine.checkpoint.weights import load_target_weights


def tensors_of(folder):
    return mx.load(str(folder / "model.safetensors"))


def test_values_are_those_of_mlx():
    """Word by word what mx.quantize gives, and near the original."""
    plain = tensors_of(FIXTURES / "dense31" / "target")
    ours = tensors_of(quantized_fixtures() / "dense31" / "target")
    matrix = plain["model.language_model.layers.1.mlp.down_proj.weight"]
    at = "language_model.model.layers.1.mlp.down_proj"
    for part, expected in zip(
        ("weight", "scales", "biases"), mx.quantize(matrix, 64, 8), strict=True
    ):
        assert mx.array_equal(ours[f"{at}.{part}"], expected)
    norm = ours["language_model.model.layers.1.input_layernorm.weight"]
    assert norm.dtype == mx.bfloat16
    assert mx.array_equal(norm, plain["model.language_model.layers.1.input_layernorm.weight"])


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_matrix_and_nothing_else_is_quantised(flavour):
    folder = quantized_fixtures() / flavour / "target"
    weights = load_target_weights(folder, read_target_config(folder))
    assert all(matrix.bits == 8 for matrix in weights.matrices.values())
    names = set(tensors_of(folder))
    packed = {name.removesuffix(".scales") for name in names if name.endswith(".scales")}
    assert len(packed) == len(weights.matrices)
    loose = {name for name in names if name.rpartition(".")[0] not in packed}
    assert all("norm" in n or n.endswith(("layer_scalar", "scale")) for n in loose)
    # Dead tensors of sharing layers stay behind
    assert len(loose) == len(weights.vectors)


def test_names_follow_mlx():
    multimodal = tensors_of(quantized_fixtures() / "e2b" / "target")
    assert all(name.startswith("language_model.model.") for name in multimodal)
    text_only = tensors_of(quantized_fixtures() / "moe26" / "target")
    assert all(name.startswith("model.layers.") or name.startswith("model.") for name in text_only)
    stack = text_only["model.layers.0.experts.switch_glu.gate_proj.weight"]
    assert stack.shape == (8, 64, 16)
    assistant = tensors_of(quantized_fixtures() / "e2b" / "assistant")
    originals = tensors_of(FIXTURES / "e2b" / "assistant")
    assert {n for n in assistant if not n.endswith((".scales", ".biases"))} == set(originals)
    assert assistant["masked_embedding.token_ordering"].dtype == mx.int64


def test_config_block():
    config = json.loads((quantized_fixtures() / "moe26" / "target" / "config.json").read_text())
    block = config["quantization"]
    assert block == config["quantization_config"]
    assert (block["bits"], block["group_size"], block["mode"]) == (8, 64, "affine")
    assert block["model.layers.1.router.proj"] == {"bits": 8, "group_size": 64}
    original = json.loads((FIXTURES / "moe26" / "target" / "config.json").read_text())
    assert {key: config[key] for key in original} == original
    assert (quantized_fixtures() / "moe26" / "target" / "generation_config.json").is_file()


@pytest.mark.parametrize("bits, group_size", [(8, 32), (6, 64), (4, 64), (4, 32)])
def test_other_sizes_load_and_lose_more(tmp_path, bits, group_size):
    for part in ("target", "assistant"):
        quantize_checkpoint(FIXTURES / "moe26" / part, tmp_path / part, bits, group_size)
    pair = load(tmp_path / "target", tmp_path / "assistant", dtype=mx.float32)
    layer = pair.target.layers[0]
    assert (layer.mlp.gate.bits, layer.mlp.gate.group_size) == (bits, group_size)
    assert (layer.experts.router.bits, layer.experts.router.group_size) == (8, 64)
    exact = tiny_pair("moe26").target.layers[0].mlp.gate.values()
    worst = gap(layer.mlp.gate.values(), exact)
    step = float(mx.abs(exact).max().item()) * 2 / (2**bits - 1)
    assert worst <= 1.1 * step
    assert pair.logits(greedy_text("moe26")[:9]).shape == (9, 256)


def test_matrices_too_narrow_for_a_group_stay_dense(tmp_path):
    quantize_checkpoint(FIXTURES / "dense31" / "target", tmp_path / "q", 8, 128)
    weights = load_target_weights(tmp_path / "q", read_target_config(tmp_path / "q"))
    assert weights.matrices["layers.0.mlp.gate_proj"].bits == 0  # 64 inputs
    assert weights.matrices["layers.2.self_attn.o_proj"].group_size == 128
    assert np.isfinite(np.array(weights.matrices["layers.2.self_attn.o_proj"].values())).all()


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr("pyengine.checkpoint.quantize._converted", fail)
    with pytest.raises(OSError, match="disk full"):
        quantize_checkpoint(FIXTURES / "uni12" / "target", tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_errors(tmp_path):
    src = FIXTURES / "uni12" / "target"
    with pytest.raises(ValueError, match=r"\[convert\] bits must be 4, 6 or 8 but got 5"):
        quantize_checkpoint(src, tmp_path / "q", bits=5)
    with pytest.raises(ValueError, match=r"group_size must be 32, 64 or 128 but got 16"):
        quantize_checkpoint(src, tmp_path / "q", group_size=16)
    with pytest.raises(ValueError, match=r"\[convert\] dst must not exist yet"):
        quantize_checkpoint(src, tmp_path)
    with pytest.raises(ValueError, match=r"\[convert\] src must not be quantised already"):
        quantize_checkpoint(quantized_fixtures() / "uni12" / "target", tmp_path / "q")
    with pytest.raises(ValueError, match=r"does not exist; is this a checkpoint folder"):
        quantize_checkpoint(tmp_path, tmp_path / "q")
