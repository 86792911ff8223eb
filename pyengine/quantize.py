"""A float checkpoint to an MLX affine one, target or assistant, tensor by tensor.

The result has the names and config.json that mlx-lm writes: every matrix whose inputs are a
multiple of the group size is quantised, embedding tables and routers included; norms and scalars
are not.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from pyengine.config import (
    ASSISTANT_TYPES,
    TARGET_TYPES,
    read_assistant_config,
    read_json,
    read_target_config,
)
from pyengine.weights import Layout, Tensors, assistant_layout, target_layout

SAFETENSORS_NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.int64: "I64",
}
# Carried along as they are: tokenizer, chat template, generation settings, licence and card.
COPIED = {".json", ".jinja", ".model", ".txt", ".md"}
NOT_COPIED = {"config.json", "model.safetensors.index.json"}


def quantize_checkpoint(
    src: str | Path, dst: str | Path, bits: int = 8, group_size: int = 64
) -> None:
    """Write a quantised copy of a Gemma 4 target or assistant. Evaluates.

    Only one tensor is in memory at a time. The folder appears under its name when it is whole.

    Args:
        src: Checkpoint folder with float32, float16 or bfloat16 tensors, any published form.
        dst: Folder to make; must not exist.
        bits: 4, 6 or 8.
        group_size: 32, 64 or 128 inputs share a scale and a bias.

    Raises:
        ValueError: An argument breaks a rule above, or the checkpoint is damaged.
    """
    src, dst = Path(src), Path(dst)
    if bits not in (4, 6, 8):
        raise ValueError(f"[quantize] bits must be 4, 6 or 8 but got {bits}.")
    if group_size not in (32, 64, 128):
        raise ValueError(f"[quantize] group_size must be 32, 64 or 128 but got {group_size}.")
    if dst.exists():
        raise ValueError(f"[quantize] dst must not exist yet but {dst} does.")
    layout, prefix = _layout(src)
    entries, overrides = _entries(src, layout, prefix, bits, group_size)
    block = {"group_size": group_size, "bits": bits, "mode": "affine", **overrides}
    config = read_json(src) | {"quantization": block, "quantization_config": block}

    partial = dst.with_name(f".{dst.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for file in src.iterdir():
            if file.is_file() and file.suffix in COPIED and file.name not in NOT_COPIED:
                shutil.copyfile(file, partial / file.name)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(text, encoding="utf-8")
        write_safetensors(partial / "model.safetensors", entries)
        partial.rename(dst)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_safetensors(path: Path, entries: list[tuple[str, mx.array]]) -> None:
    """Write named arrays, evaluating one at a time; empties the list as it goes."""
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    end = 0
    for name, array in entries:
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    entries.reverse()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while entries:
            _, array = entries.pop()
            file.write(np.asarray(mx.contiguous(array).reshape(-1).view(mx.uint8)).data)


def _layout(src: Path) -> tuple[Layout, str]:
    """Layout of a checkpoint, and the prefix of its text model's names in MLX form."""
    if read_json(src).get("model_type") in ASSISTANT_TYPES:
        assistant = read_assistant_config(src)
        layout, prefix = assistant_layout(assistant), "model."
        quantization = assistant.quantization
    else:
        target = read_target_config(src)
        wrapped = target.model_type in TARGET_TYPES
        layout, prefix = target_layout(target), "language_model.model." if wrapped else "model."
        quantization = target.quantization
    if quantization is not None:
        raise ValueError(f"[quantize] src must not be quantised already but {src} is.")
    return layout, prefix


def _entries(
    src: Path, layout: Layout, prefix: str, bits: int, group_size: int
) -> tuple[list[tuple[str, mx.array]], dict[str, dict[str, int]]]:
    """What to write, lazily, and the router's entry in the quantisation block.

    mlx-lm names routers there and keeps them at 8 bits in groups of 64, whatever the rest has.
    """
    tensors = Tensors(src, layout)
    entries = []
    overrides = {}
    for path, shape in layout.matrices.items():
        array = tensors.take(f"{path}.weight", shape)
        name = _mlx_name(path, prefix)
        mode = {"group_size": group_size, "bits": bits}
        if path.endswith("router.proj"):
            mode = overrides[name] = {"group_size": 64, "bits": 8}
        if shape[-1] % mode["group_size"]:
            overrides.pop(name, None)
            entries.append((f"{name}.weight", array))
            continue
        parts = mx.quantize(array, mode["group_size"], mode["bits"])
        entries += [
            (f"{name}.{part}", value)
            for part, value in zip(("weight", "scales", "biases"), parts, strict=True)
        ]
    for name, shape in layout.vectors.items():
        array = tensors.take(name, shape, integer=name in layout.integers)
        entries.append((_mlx_name(name, prefix), array))
    tensors.check_all_used()
    return entries, overrides


def _mlx_name(name: str, prefix: str) -> str:
    """The name mlx-lm and mlx-vlm give a tensor or module."""
    if name.startswith(("pre_projection", "post_projection", "masked_embedding.")):
        return name
    return prefix + name.replace(".experts.", ".experts.switch_glu.")
