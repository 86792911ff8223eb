"""The DFlash model against one made of transformers' Qwen3 parts, in float32: `pytest -m parity`.

Norms, MLP and rotary embedding are Qwen3's own; who sees what, the context and the head are written
here from the published description. Weights are drawn; shapes are those of the published drafters,
scaled down by one factor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tiny_dflash import MASK, config_of, weights_of, write
from tiny_pairs import tiny_pair

pytest.importorskip("torch", reason="needs the parity extra: torch")
pytest.importorskip("transformers", reason="needs the parity extra: transformers")

import torch
from torch import nn
from transformers import Qwen3Config
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from pyengine.checkpoint.config_json import read_dflash_config
from pyengine.checkpoint.weights import load_dflash_weights
from pyengine.model.config import TargetConfig
from pyengine.model.dflash import DFlash
from pyengine.model.linear import Linear
from pyengine.model.target import Target

pytestmark = pytest.mark.parity
FLOAT32 = 5e-4
SLIDING, FULL = "sliding_attention", "full_attention"
# Of the published drafters by 1/16: width, query heads, feed-forward, layers of the target, taps
SHAPES = {
    "12B": (240, 4, 480, 48, (1, 10, 19, 27, 36, 45)),
    "26B-A4B": (176, 4, 352, 30, (1, 6, 11, 17, 22, 27)),
    "31B": (336, 8, 672, 60, (1, 12, 23, 35, 46, 57)),
}
KV_HEADS, WIDTH, WINDOW, V = 2, 32, 96, 256


def published_shape(name: str) -> dict[str, Any]:
    E, heads, ffn, layers, taps = SHAPES[name]
    return config_of(
        "dense31",
        hidden_size=E,
        num_attention_heads=heads,
        num_key_value_heads=KV_HEADS,
        head_dim=WIDTH,
        intermediate_size=ffn,
        num_hidden_layers=5,
        layer_types=[SLIDING] * 4 + [FULL],
        sliding_window=WINDOW,
        num_target_layers=layers,
        block_size=16,
        dflash_config={"target_layer_ids": list(taps), "mask_token_id": MASK},
    )


class Layer(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads * D, config.num_key_value_heads * D
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(E, H, bias=False),
                "k_proj": nn.Linear(E, K, bias=False),
                "v_proj": nn.Linear(E, K, bias=False),
                "o_proj": nn.Linear(H, E, bias=False),
                "q_norm": qwen3.Qwen3RMSNorm(D, config.rms_norm_eps),
                "k_norm": qwen3.Qwen3RMSNorm(D, config.rms_norm_eps),
            }
        )
        self.mlp = qwen3.Qwen3MLP(config)
        self.input_layernorm = qwen3.Qwen3RMSNorm(E, config.rms_norm_eps)
        self.post_attention_layernorm = qwen3.Qwen3RMSNorm(E, config.rms_norm_eps)


class Drafter(nn.Module):
    def __init__(self, raw: dict[str, Any]) -> None:
        super().__init__()
        self.raw, taps = raw, len(raw["dflash_config"]["target_layer_ids"])
        self.config = Qwen3Config(
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_attention_heads=raw["num_attention_heads"],
            num_key_value_heads=raw["num_key_value_heads"],
            head_dim=raw["head_dim"],
            rms_norm_eps=raw["rms_norm_eps"],
            hidden_act=raw["hidden_act"],
            rope_parameters={"rope_type": "default", "rope_theta": float(raw["rope_theta"])},
        )
        E = raw["hidden_size"]
        self.fc = nn.Linear(taps * E, E, bias=False)
        self.hidden_norm = qwen3.Qwen3RMSNorm(E, raw["rms_norm_eps"])
        self.norm = qwen3.Qwen3RMSNorm(E, raw["rms_norm_eps"])
        self.layers = nn.ModuleList([Layer(self.config) for _ in raw["layer_types"]])
        self.rotary = qwen3.Qwen3RotaryEmbedding(self.config)

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        """[n, heads * D] to [1, heads, n, D]."""
        return x.view(1, x.shape[0], -1, self.raw["head_dim"]).transpose(1, 2)

    @torch.no_grad()
    def forward(self, tapped: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
        """Context [L, taps * E] and embeddings [T, E] to the normed rows [T, E]."""
        L, T = len(tapped), len(block)
        context = self.hidden_norm(self.fc(tapped))
        cos, sin = self.rotary(block, torch.arange(L + T)[None])
        rows, places = torch.arange(L, L + T)[:, None], torch.arange(L + T)[None]
        group = self.raw["num_attention_heads"] // self.raw["num_key_value_heads"]
        h = block
        for kind, layer in zip(self.raw["layer_types"], self.layers, strict=True):
            own, x = layer.self_attn, layer.input_layernorm(h)
            known = torch.cat([context, x])  # context rows without the layer's norm
            q = own["q_norm"](self.heads(own["q_proj"](x)))
            k = own["k_norm"](self.heads(own["k_proj"](known)))
            v = self.heads(own["v_proj"](known))
            # The function turns both by one table; each is turned by its own part of it
            q, _ = qwen3.apply_rotary_pos_emb(q, q, cos[:, L:], sin[:, L:])
            k, _ = qwen3.apply_rotary_pos_emb(k, k, cos, sin)
            seen = torch.ones(T, L + T, dtype=torch.bool)
            if kind == SLIDING:
                seen = (places <= rows) & (rows - places < self.raw["sliding_window"])
            out = nn.functional.scaled_dot_product_attention(
                q, qwen3.repeat_kv(k, group), qwen3.repeat_kv(v, group), attn_mask=seen
            )
            h = h + own["o_proj"](out.transpose(1, 2).reshape(T, -1))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        return self.norm(h)


class TableOnly(Target):
    """As much of a target as a drafter has to do with."""

    def __init__(self, config: TargetConfig, table: np.ndarray, scale: float) -> None:
        self.config, self.dtype = config, mx.float32
        self.table, self.embedding_scale = Linear(mx.array(table)), scale


@pytest.mark.parametrize("name", SHAPES)
def test_logits(name: str, tmp_path: Path) -> None:
    """Contexts to past the window and several pages; blocks to past 16."""
    torch.set_num_threads(1)
    raw = published_shape(name)
    weights, E = weights_of(raw, seed=5), raw["hidden_size"]
    folder = write(tmp_path / "dflash", raw, weights)
    theirs = Drafter(raw)
    theirs.load_state_dict({k: torch.from_numpy(x) for k, x in weights.items()}, strict=False)
    missing = {k for k, _ in theirs.named_parameters()} ^ weights.keys()
    assert not missing  # the published names, and no others
    rng = np.random.default_rng(1)
    table = (rng.normal(size=(V, E)) * E**-0.5).astype(np.float32)
    tiny = tiny_pair("dense31").target
    config = read_dflash_config(folder)
    target = TableOnly(tiny.config, table, E**0.5)
    ours = DFlash(config, target, load_dflash_weights(folder, config))
    worst = 0.0
    for L, T in ((1, 2), (60, 16), (95, 8), (200, 5), (300, 16), (130, 33)):
        tapped = rng.normal(size=(L, len(config.taps) * E)).astype(np.float32)
        block = [77] + [MASK] * (T - 1)
        arena = tiny.new_arena()
        arena.extend(config.kept)
        cache = arena.new_cache()
        cache.reserve(L)
        ours.read([mx.array(tapped)], [cache])
        cache.settle(L)
        mx.eval(arena.arrays)
        cache.reserve(T)
        found = np.array(ours.forward([mx.array(block, dtype=mx.int32)], [cache]).array)
        embedded = torch.from_numpy(table)[block] * E**0.5
        z = theirs(torch.from_numpy(tapped), embedded) @ torch.from_numpy(table).T
        cap = raw["final_logit_softcapping"]
        wanted = (cap * torch.tanh(z / cap)).numpy()
        assert found.shape == wanted.shape == (T, V)
        worst = max(worst, float(np.abs(found - wanted).max()))
    print(f"{name}: logits within {worst:.2e}")
    assert worst <= FLOAT32
