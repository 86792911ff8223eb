"""DFlash drafters for the tiny pairs, in the published form: drawn, not trained.

A pair's own words are hit by chance alone, so that blocks are refused anywhere; ``copying`` makes
one whose drafts are often right.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tiny_pairs import FIXTURES, FORMS

from pyengine.checkpoint.config_json import read_target_config
from pyengine.checkpoint.pair import Pair, load
from pyengine.checkpoint.quantize import quantize_checkpoint

SLIDING, FULL = "sliding_attention", "full_attention"
WINDOW, BLOCK, MASK = 12, 8, 4
HEADS, KV_HEADS, D, F = 4, 2, 16, 96
KINDS = (SLIDING, SLIDING, FULL)


def config_of(flavour: str, **changes: Any) -> dict[str, Any]:
    """config.json of a drafter for a tiny target; ``dflash_config`` may be changed key by key."""
    target = read_target_config(FIXTURES / flavour / "target")
    own = {"target_layer_ids": [0, len(target.layers) - 1], "mask_token_id": MASK}
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dtype": "float32",
        "hidden_act": "silu",
        "attention_bias": False,
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "num_hidden_layers": len(KINDS),
        "layer_types": list(KINDS),
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": D,
        "intermediate_size": F,
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "final_logit_softcapping": target.softcap,
        "num_target_layers": len(target.layers),
        "block_size": BLOCK,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dflash_config": own | changes.pop("dflash_config", {}),
    }
    return config | changes


def shapes_of(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a file, by the names under which they are published."""
    E, width = config["hidden_size"], config["head_dim"]
    H, K = (config[f"num_{kind}_heads"] * width for kind in ("attention", "key_value"))
    taps, ffn = len(config["dflash_config"]["target_layer_ids"]), config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (E, taps * E),
        "hidden_norm.weight": (E,),
        "norm.weight": (E,),
    }
    for i in range(config["num_hidden_layers"]):
        own = {
            "input_layernorm.weight": (E,),
            "post_attention_layernorm.weight": (E,),
            "self_attn.q_proj.weight": (H, E),
            "self_attn.k_proj.weight": (K, E),
            "self_attn.v_proj.weight": (K, E),
            "self_attn.o_proj.weight": (E, H),
            "self_attn.q_norm.weight": (width,),
            "self_attn.k_norm.weight": (width,),
            "mlp.gate_proj.weight": (ffn, E),
            "mlp.up_proj.weight": (ffn, E),
            "mlp.down_proj.weight": (E, ffn),
        }
        shapes |= {f"layers.{i}.{name}": shape for name, shape in own.items()}
    return shapes


def weights_of(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Norms around one, matrices of unit gain."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes_of(config).items():
        x = rng.normal(size=shape)
        found[name] = 1 + 0.3 * x if len(shape) == 1 else x * shape[-1] ** -0.5
    return {name: x.astype(np.float32) for name, x in found.items()}


def copying(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights whose every row says what the newest row of the context was: the last layer alone
    does anything, and it hands the last tap on."""
    rng, found = np.random.default_rng(1), weights_of(config, 1)
    E, taps = config["hidden_size"], len(config["dflash_config"]["target_layer_ids"])
    fuse = np.zeros((E, taps * E), np.float32)
    fuse[:, -E:] = np.eye(E)
    found["fc.weight"] = fuse
    for name, x in found.items():
        if "o_proj" in name or "down_proj" in name:
            found[name] = (0.05 * x).astype(np.float32)
    last = config["num_hidden_layers"] - 1
    wide = rng.normal(size=(E, E))
    q, _ = np.linalg.qr(wide)
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    width = config["head_dim"]
    v = q[: K * width]
    back = np.zeros((E, H * width))
    for head in range(H):  # each query head hands its key head's part back
        own = head // (H // K)
        part = slice(own * width, (own + 1) * width)
        back[:, head * width : (head + 1) * width] = v[part].T * (K / H) * 40
    found[f"layers.{last}.self_attn.v_proj.weight"] = v.astype(np.float32)
    found[f"layers.{last}.self_attn.o_proj.weight"] = back.astype(np.float32)
    return found


def write(folder: Path, config: dict[str, Any], weights: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: mx.array(x) for name, x in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})
    return folder


@functools.cache
def folder_of(flavour: str) -> Path:
    """A drafter of a tiny pair, float32."""
    root = Path(tempfile.mkdtemp(prefix="pyengine-dflash-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    config = config_of(flavour)
    return write(root / "dflash", config, weights_of(config))


@functools.cache
def dflash_pair(flavour: str, form: str = "float32") -> Pair:
    """A tiny pair with its assistant and such a drafter."""
    dtype, quantized = FORMS[form]
    dflash = folder_of(flavour)
    if quantized:
        dflash = dflash.parent / f"{flavour}-q8"
        if not dflash.exists():
            quantize_checkpoint(folder_of(flavour), dflash, 8, 32)
    folder = FIXTURES / flavour
    return load(folder / "target", folder / "assistant", dflash=dflash, dtype=dtype)
