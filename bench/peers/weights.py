"""The embedded pair in Hugging Face's form: every weight as float32, dequantised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx

TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")


def write_plain(folder: Path, out: Path, tokenizer: Path) -> None:
    """A checkpoint without quantisation, beside the tokenizer's files."""
    out.mkdir(parents=True, exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    mode = config.pop("quantization")
    config.pop("quantization_config", None)
    (out / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2))
    shutil.copy(folder / "generation_config.json", out)
    for name in TOKENIZER:
        shutil.copy(tokenizer / name, out)
    weights = mx.load(str(folder / "model.safetensors"))
    plain = {
        name: dequantised(weights, name, mode["group_size"], mode["bits"])
        for name in weights
        if not name.endswith((".scales", ".biases"))
    }
    mx.save_safetensors(str(out / "model.safetensors"), plain, {"format": "pt"})


def dequantised(weights: dict[str, mx.array], name: str, group_size: int, bits: int) -> mx.array:
    stem = name.removesuffix(".weight")
    if f"{stem}.scales" not in weights:
        return weights[name].astype(mx.float32)
    scales, biases = (weights[f"{stem}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
    return mx.dequantize(weights[name], scales, biases, group_size=group_size, bits=bits)
