"""The training model of the embedded pair's DFlash drafter, in plain PyTorch.

Parameter names are those of the files that z-lab publishes for Gemma 4, so a state_dict is a
checkpoint; check_dflash.py compares it with other code. Table and head are the target's.
Letters: B rows, T positions of their context, A blocks of a row, N positions of a block, E width,
H query heads, K key/value heads of D.

Source: arXiv:2602.06036.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as fn
from model import FULL, KINDS, SLIDING, Layer, Norm, Target, additive, initialise, rope

BLOCK, MASK_ID, TAPS, THETA = 8, 4, 5, 1e6


def dflash_config(target: dict) -> dict:
    """A config in the published form, of a drafter for a target with this text config."""
    layers = target["num_hidden_layers"]
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "block_size": BLOCK,
        "num_target_layers": layers,
        "dflash_config": {
            "mask_token_id": MASK_ID,
            # Evenly from the second layer to the third last, as z-lab's are
            "target_layer_ids": [round(1 + i * (layers - 4) / (TAPS - 1)) for i in range(TAPS)],
        },
        "vocab_size": target["vocab_size"],
        "hidden_size": target["hidden_size"],
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": target["sliding_window"],
        "use_sliding_window": True,
        "rope_theta": THETA,
        "rope_scaling": None,
        "rms_norm_eps": target["rms_norm_eps"],
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "final_logit_softcapping": target["final_logit_softcapping"],
        "max_position_embeddings": target["max_position_embeddings"],
        "tie_word_embeddings": True,
        "pad_token_id": target["pad_token_id"],
        "eos_token_id": target["eos_token_id"],
        "bos_token_id": target["bos_token_id"],
    }


@torch.no_grad()
def features(target: Target, ids: torch.Tensor, taps: list[int]) -> tuple[torch.Tensor, ...]:
    """ids [B, T]: what left the tapped layers [B, T, taps * E], and the hidden [B, T, E] that the
    head reads."""
    h, geometry, out = target.embed(ids), target.geometry(ids.shape[1]), []
    for i, layer in enumerate(target.model.layers):
        run = target.compiled.get(layer.kind, Layer.whole)
        h, _, _ = run(layer, h, *geometry[layer.kind])
        if i in taps:
            out.append(h)
    return torch.cat(out, -1), target.model.norm(h)


def turns(positions: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [..., 1, D/2] at positions [...], for all heads alike."""
    freq = THETA ** -(torch.arange(0, width, 2).float() / width)
    angle = positions.float()[..., None, None] * freq
    return angle.cos(), angle.sin()


def visible(anchors: torch.Tensor, N: int, T: int, window: int) -> dict[str, tuple]:
    """Of each kind of layer two additive masks: [B, A, N, T] of the context, which ends before
    the anchor, and [N, N] of the block. A sliding layer's block is causal."""
    n, c = torch.arange(N), torch.arange(T)
    before = (c < anchors[..., None])[:, :, None]
    near = anchors[..., None, None] + n[:, None] - c < window
    context = {FULL: before.expand(-1, -1, N, -1), SLIDING: before & near}
    block = {FULL: torch.ones(N, N, dtype=torch.bool), SLIDING: n[None] <= n[:, None]}
    return {kind: (additive(context[kind]), additive(block[kind])) for kind in KINDS}


def attend_block(
    q: torch.Tensor,
    context: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    masks: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """One softmax over context and block: q [B, A, N, H, D], context keys and values
    [B, T, K, D], the block's own [B, A, N, K, D]; gives [B, A, N, H * D]."""
    B, A, N, H, D = q.shape
    k, v = (x.transpose(1, 2) for x in context)  # [B, K, T, D]
    own_k, own_v = (x.permute(0, 3, 1, 2, 4) for x in own)  # [B, K, A, N, D]
    T, K = k.shape[2], k.shape[1]
    G = H // K
    q = q.view(B, A, N, K, G, D).permute(0, 3, 1, 2, 4, 5) * D**-0.5
    far = torch.matmul(q.reshape(B, K, A * N * G, D), k.transpose(2, 3))
    far = far.view(B, K, A, N, G, T) + masks[0][:, None, :, :, None]
    near = torch.matmul(q.reshape(B, K, A, N * G, D), own_k.transpose(3, 4))
    near = near.view(B, K, A, N, G, N) + masks[1][:, None]
    weights = torch.cat([far, near], -1).softmax(-1)
    out = torch.matmul(weights[..., :T].reshape(B, K, A * N * G, T), v).view(B, K, A, N, G, D)
    near = torch.matmul(weights[..., T:].reshape(B, K, A, N * G, N), own_v)
    out = out + near.view(B, K, A, N, G, D)
    return out.permute(0, 2, 3, 1, 4, 5).reshape(B, A, N, H * D)


class BlockAttention(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        E, D = config["hidden_size"], config["head_dim"]
        H, K = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj, self.o_proj = nn.Linear(E, H * D, bias=False), nn.Linear(H * D, E, bias=False)
        self.k_proj, self.v_proj = nn.Linear(E, K * D, bias=False), nn.Linear(E, K * D, bias=False)
        self.q_norm, self.k_norm = Norm(D), Norm(D)

    def keys_values(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = (-1, self.k_norm.weight.numel())
        k, v = self.k_proj(x).unflatten(-1, heads), self.v_proj(x).unflatten(-1, heads)
        return rope(self.k_norm(k), angles), v

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        angles: tuple[torch.Tensor, ...],
        context_angles: tuple[torch.Tensor, ...],
        masks: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        q = self.q_proj(x).unflatten(-1, (-1, self.q_norm.weight.numel()))
        q = rope(self.q_norm(q), angles)
        far = self.keys_values(context, context_angles)
        return self.o_proj(attend_block(q, far, self.keys_values(x, angles), masks))


class SiluMLP(nn.Module):
    def __init__(self, E: int, F: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(E, F, bias=False), nn.Linear(E, F, bias=False)
        self.down_proj = nn.Linear(F, E, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(fn.silu(self.gate_proj(x)) * self.up_proj(x))


class BlockLayer(nn.Module):
    def __init__(self, config: dict, kind: str):
        super().__init__()
        E = config["hidden_size"]
        self.kind = kind
        self.self_attn, self.mlp = BlockAttention(config), SiluMLP(E, config["intermediate_size"])
        self.input_layernorm, self.post_attention_layernorm = Norm(E), Norm(E)

    def forward(
        self, h: torch.Tensor, context: torch.Tensor, *geometry: tuple[torch.Tensor, ...]
    ) -> torch.Tensor:
        """h [B, A, N, E], context [B, T, E]: the context is not normed a second time."""
        h = h + self.self_attn(self.input_layernorm(h), context, *geometry)
        return h + self.mlp(self.post_attention_layernorm(h))


class DFlash(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        E = config["hidden_size"]
        self.taps: list[int] = config["dflash_config"]["target_layer_ids"]
        self.fc = nn.Linear(len(self.taps) * E, E, bias=False)
        self.hidden_norm, self.norm = Norm(E), Norm(E)
        self.layers = nn.ModuleList(BlockLayer(config, kind) for kind in config["layer_types"])
        initialise(self)

    def forward(
        self, target: Target, tapped: torch.Tensor, blocks: torch.Tensor, anchors: torch.Tensor
    ) -> torch.Tensor:
        """tapped [B, T, taps * E]; blocks: ids [B, A, N] at positions anchors [B, A] and on, of
        which the first is known and the others are masks: what the head reads, [B, A, N, E]."""
        (N, T), D = (blocks.shape[2], tapped.shape[1]), self.config["head_dim"]
        masks = visible(anchors, N, T, self.config["sliding_window"])
        angles = turns(anchors[..., None] + torch.arange(N), D)
        context, h = self.hidden_norm(self.fc(tapped)), target.embed(blocks)
        for layer in self.layers:
            h = layer(h, context, angles, turns(torch.arange(T), D), masks[layer.kind])
        return self.norm(h)
