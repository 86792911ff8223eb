"""The training model: Gemma 4 (31B-like) target and assistant in plain PyTorch.

Parameter names are those of transformers' Gemma4ForCausalLM and Gemma4AssistantForCausalLM, so a
state_dict is a checkpoint; check_parity.py compares the logits of both with transformers.
Letters: B rows, T positions, S keys, D head width, E model width. One key/value head throughout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
import torch.nn.functional as fn

SLIDING, FULL = "sliding_attention", "full_attention"
KINDS = (SLIDING, FULL)
ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
EPS = 1e-6
MASKED = -1e9


def text_config(
    layers: list[str],
    hidden: int,
    ffn: int,
    vocab: int,
    window: int = 256,
    softcap: float | None = 30.0,
    shared: int = 0,
) -> dict:
    """A text config in the published form: 31B-like, one query and one key/value head."""
    return {
        "model_type": "gemma4_text",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": len(layers),
        "layer_types": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": window,
        "rope_parameters": ROPE,
        "final_logit_softcapping": softcap,
        "tie_word_embeddings": True,
        "num_kv_shared_layers": shared,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "max_position_embeddings": 8192,
        "rms_norm_eps": EPS,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }


def target_config(num_layers: int, vocab: int, hidden: int = 128, ffn: int = 384) -> dict:
    return text_config(([SLIDING] * 5 + [FULL]) * (num_layers // 6), hidden, ffn, vocab)


def assistant_config(vocab: int, hidden: int = 128, ffn: int = 512) -> dict:
    layers = [SLIDING] * 3 + [FULL]
    return text_config(layers, hidden, ffn, vocab, softcap=None, shared=4)


def head_width(config: dict, kind: str) -> int:
    return config["global_head_dim"] if kind == FULL else config["head_dim"]


def rms(x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)
    return x if weight is None else x * weight


def rope_angles(kind: str, width: int, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cosine and sine [T, D/2] of the half-split rotation at the given positions."""
    if kind == SLIDING:
        freq = 10000.0 ** -(torch.arange(0, width, 2).float() / width)
    else:
        # Only a quarter of the pairs turn; the exponent's denominator stays the whole width.
        turning = int(0.25 * width // 2)
        freq = 1e6 ** -(torch.arange(0, 2 * turning, 2).float() / width)
        freq = torch.cat([freq, torch.zeros(width // 2 - turning)])
    angle = positions.float()[:, None] * freq
    return angle.cos(), angle.sin()


def rope(x: torch.Tensor, angles: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Rotate x [B, T, D]."""
    cos, sin = angles
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q [B, T, D], k and v [B, S, D], additive mask [T, S]; scores are not scaled."""
    scores = torch.matmul(q, k.transpose(1, 2)) + mask
    return torch.matmul(scores.softmax(-1), v)


def attend_banded(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """Sliding attention in blocks of half a window: a block sees itself and the two before it.

    mask is [blocks, block, 3 * block]; T is a multiple of the block.
    """
    blocks, block, _ = mask.shape
    B, _, D = q.shape

    def with_previous(x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(B, blocks, block, D)
        zeros = torch.zeros_like(x[:, :2])
        return torch.cat([torch.cat([zeros, x], 1)[:, i : i + blocks] for i in range(3)], 2)

    scores = torch.matmul(q.reshape(B, blocks, block, D), with_previous(k).transpose(2, 3))
    out = torch.matmul((scores + mask).softmax(-1), with_previous(v))
    return out.reshape(B, blocks * block, D)


def additive(visible: torch.Tensor) -> torch.Tensor:
    return torch.where(visible, 0.0, MASKED)


def full_mask(T: int) -> torch.Tensor:
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    return additive(j <= i)


def banded_mask(T: int, window: int, newest: int) -> torch.Tensor:
    """Each position sees the `newest` keys up to its own: W for the target, W - 1 for the
    assistant, whose query sits one position later."""
    block = window // 2
    i, j = torch.arange(block)[:, None], torch.arange(3 * block)[None]
    band = (j <= window + i) & (j > window + i - newest)
    # The first two blocks have nothing before position 0.
    return torch.stack([additive(band & (j >= window - b * block)) for b in range(T // block)])


class Norm(nn.Module):
    def __init__(self, width: int, value: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms(x, self.weight)


class Attention(nn.Module):
    def __init__(self, config: dict, kind: str, own_kv: bool):
        super().__init__()
        D, E = head_width(config, kind), config["hidden_size"]
        self.q_proj, self.o_proj = nn.Linear(E, D, bias=False), nn.Linear(D, E, bias=False)
        # Unscaled scores of unit-rms q and k would have a spread of sqrt(D); start at about 1.
        self.q_norm = Norm(D, D**-0.25)
        if own_kv:
            self.k_proj, self.k_norm = nn.Linear(E, D, bias=False), Norm(D, D**-0.25)
            if kind == SLIDING:
                self.v_proj = nn.Linear(E, D, bias=False)

    def queries(self, x: torch.Tensor, angles: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return rope(self.q_norm(self.q_proj(x)), angles)

    def keys_values(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k = self.k_proj(x)
        v = self.v_proj(x) if hasattr(self, "v_proj") else k  # k_eq_v: the raw projection
        return rope(self.k_norm(k), angles), rms(v)


class MLP(nn.Module):
    def __init__(self, E: int, F: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(E, F, bias=False), nn.Linear(E, F, bias=False)
        self.down_proj = nn.Linear(F, E, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(fn.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: dict, kind: str, own_kv: bool, post_norm: float):
        super().__init__()
        E = config["hidden_size"]
        self.kind = kind
        self.self_attn = Attention(config, kind, own_kv)
        self.mlp = MLP(E, config["intermediate_size"])
        self.input_layernorm, self.pre_feedforward_layernorm = Norm(E), Norm(E)
        self.post_attention_layernorm = Norm(E, post_norm)
        self.post_feedforward_layernorm = Norm(E, post_norm)
        self.register_buffer("layer_scalar", torch.ones(1))

    def finish(self, h: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        h = h + self.post_attention_layernorm(self.self_attn.o_proj(attended))
        h = h + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(h)))
        return h * self.layer_scalar

    def whole(
        self, h: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The target's layer over whole sequences [B, T, E]; also returns keys and values."""
        x = self.input_layernorm(h)
        q = self.self_attn.queries(x, (cos, sin))
        k, v = self.self_attn.keys_values(x, (cos, sin))
        attention = attend_banded if self.kind == SLIDING else attend
        return self.finish(h, attention(q, k, v, mask)), k, v

    def borrow(
        self,
        h: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> torch.Tensor:
        """The assistant's layer: own queries, the target's keys and values."""
        q = self.self_attn.queries(self.input_layernorm(h), (cos, sin))
        attention = attend_banded if mask.dim() == 3 else attend
        return self.finish(h, attention(q, k, v, mask))


class Body(nn.Module):
    def __init__(self, config: dict, own_kv: bool, post_norm: float):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(
            Layer(config, kind, own_kv, post_norm) for kind in config["layer_types"]
        )
        self.norm = Norm(config["hidden_size"])


def initialise(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.dim() == 2:
            gain = 0.5 if "embed_tokens" in name else 1.0
            nn.init.normal_(p, std=gain * p.shape[1] ** -0.5)


class Target(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.model = Body(config, True, (2 * config["num_hidden_layers"]) ** -0.5)
        initialise(self)
        self.compiled: dict[str, Callable] = {}
        self.tables: dict[int, dict] = {}

    def geometry(self, T: int) -> dict:
        """Rope angles and mask of each kind for whole sequences of T positions."""
        if T not in self.tables:
            window, at = self.config["sliding_window"], torch.arange(T)
            masks = {SLIDING: banded_mask(T, window, window), FULL: full_mask(T)}
            self.tables[T] = {
                kind: (*rope_angles(kind, head_width(self.config, kind), at), masks[kind])
                for kind in KINDS
            }
        return self.tables[T]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_tokens(ids) * self.config["hidden_size"] ** 0.5

    def head(self, x: torch.Tensor) -> torch.Tensor:
        logits = x @ self.model.embed_tokens.weight.T
        cap = self.config["final_logit_softcapping"]
        return torch.tanh(logits / cap) * cap

    def hidden(self, ids: torch.Tensor) -> tuple[torch.Tensor, dict]:
        """ids [B, T], T a multiple of the window: post-final-norm hidden [B, T, E], and keys and
        values of the last layer of each kind."""
        h, geometry, kv = self.embed(ids), self.geometry(ids.shape[1]), {}
        for layer in self.model.layers:
            run = self.compiled.get(layer.kind, Layer.whole)
            h, k, v = run(layer, h, *geometry[layer.kind])
            kv[layer.kind] = (k, v)
        return self.model.norm(h), kv

    def decode(
        self, ids: torch.Tensor, cache: list, offset: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """ids [B, T] at positions offset..; cache: (k, v) or None per layer, appended to.

        Returns logits [B, T, V] and hidden [B, T, E].
        """
        T, window = ids.shape[1], self.config["sliding_window"]
        at, j = torch.arange(offset, offset + T), torch.arange(offset + T)[None]
        causal = j <= at[:, None]
        masks = {FULL: additive(causal), SLIDING: additive(causal & (j > at[:, None] - window))}
        angles = {kind: rope_angles(kind, head_width(self.config, kind), at) for kind in KINDS}
        h = self.embed(ids)
        for i, layer in enumerate(self.model.layers):
            x = layer.input_layernorm(h)
            q = layer.self_attn.queries(x, angles[layer.kind])
            k, v = layer.self_attn.keys_values(x, angles[layer.kind])
            if cache[i] is not None:
                k, v = torch.cat([cache[i][0], k], 1), torch.cat([cache[i][1], v], 1)
            cache[i] = (k, v)
            h = layer.finish(h, attend(q, k, v, masks[layer.kind]))
        x = self.model.norm(h)
        return self.head(x), x


class Assistant(nn.Module):
    def __init__(self, config: dict, backbone: int):
        super().__init__()
        self.config, self.backbone = config, backbone
        E = config["hidden_size"]
        self.model = Body(config, False, 0.35)
        self.pre_projection = nn.Linear(2 * backbone, E, bias=False)
        self.post_projection = nn.Linear(E, backbone, bias=False)
        initialise(self)
        self.compiled: dict[str, Callable] = {}

    def step(
        self, embedding: torch.Tensor, hidden: torch.Tensor, geometry: dict, kv: dict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One draft step for every row [B, T]: logits [B, T, V] and the next hidden [B, T, E]."""
        h = self.pre_projection(torch.cat([embedding, hidden], -1))
        for layer in self.model.layers:
            run = self.compiled.get(layer.kind, Layer.borrow)
            h = run(layer, h, *geometry[layer.kind], *kv[layer.kind])
        x = self.model.norm(h)
        logits = x @ self.model.embed_tokens.weight.T
        return logits, self.post_projection(x)


def compile_layer(method: Callable) -> dict[str, Callable]:
    """One compiled layer per kind, shared by all layers of that kind."""
    return {
        kind: torch.compile(lambda layer, *args: method(layer, *args), dynamic=False)
        for kind in KINDS
    }
