"""Gemma 4 in NumPy, in float64, rounded to bfloat16 at named points and nowhere else.

The arithmetic is written once; which points round is a set. With those of transformers it gives
transformers' own bfloat16 numbers, which shows that the arithmetic is right; with ours it says what
target.py and assistant.py must give, each point of them. Nothing of pyengine is used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from odd_pairs import FULL, SLIDING, Array, Weights, bfloat16

# What a checkpoint of ours is kept in between ops: one rounding for each named output.
OURS = frozenset(
    {
        "embedding_scale",  # sqrt(E), a number of the table's dtype
        "embedding",
        "per_layer_scale",  # sqrt(P), the same
        "per_layer_input",  # table and context, normed, added and scaled
        "norm",  # of the stream, before a branch or the head
        "product",  # with any matrix but those below
        "turned",  # queries and keys, normed and at their position
        "value",  # normed
        "attended",
        "gated",  # gelu(gate) * up
        "stream",  # after attention, after the MLP, after a whole layer
        "routed",  # the sum over experts
        "branches",  # dense and routed branch, each normed and rounded as "norm", added
    }
)
# What transformers rounds besides, as its tensors are bfloat16 between any two operations.
TRANSFORMERS = OURS | {
    "per_layer_embedding",
    "per_layer_product",
    "per_layer_product_scaled",
    "per_layer_norm",
    "per_layer_sum",
    "head_norm",  # of queries and keys, before they are turned
    "angle",  # sine and cosine
    "turned_half",
    "score",
    "probability",
    "gelu",
    "branch_norm",  # of a branch's output, before it is added to the stream
    "stream_unscaled",  # before layer_scalar
    "router_norm",
    "router_scaled",
    "router_root",
    "router_logit",
    "expert_output",
    "expert_weighted",
    "expert_sum",
    "centroid_score",
    "logit",
    "logit_divided",
    "logit_bent",
    "logit_capped",
}
# Where a processor multiplies quantised weights with whole numbers (csrc/cpu/planes.h), the rows of
# bfloat16 that they meet.
WHOLE = "whole"


def in_units(x: Array) -> Array:
    """Every 64 elements of a row as 15 bits and a sign under the largest of them."""
    K = x.shape[-1]
    chunks = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -K % 64)])
    chunks = chunks.reshape(*x.shape[:-1], -1, 64)
    mantissa, exponent = np.frexp(np.abs(chunks).max(axis=-1, keepdims=True))
    unit = np.exp2(exponent + (mantissa >= 255 / 256) - 15.0)
    return np.asarray((np.rint(chunks / unit) * unit).reshape(*x.shape[:-1], -1)[..., :K])


def rms(x: Array) -> Array:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class Layers:
    """What target and assistant share. Weights are named as in a checkpoint, without ``model.``."""

    def __init__(self, config: dict[str, Any], weights: Weights, points: frozenset[str]) -> None:
        self.config, self.points = config, points
        self.w = {name.removeprefix("model."): w for name, w in weights.items()}

    def at(self, point: str, x: Any) -> Any:
        assert point in TRANSFORMERS, point
        return bfloat16(x) if point in self.points else np.asarray(x)

    def norm(self, x: Array, name: str, point: str = "norm") -> Array:
        return self.at(point, rms(x) * self.w[f"{name}.weight"])

    def times(self, x: Array, name: str, point: str = "product") -> Array:
        return self.at(point, self.row(x) @ self.w[f"{name}.weight"].T)

    def row(self, x: Array) -> Array:
        """As weights meet it: a router's is float32."""
        if WHOLE not in self.points or not np.array_equal(x, bfloat16(x)):
            return x
        return in_units(x)

    def head_dim(self, kind: str) -> int:
        return int(self.config["global_head_dim" if kind == FULL else "head_dim"])

    def turned(self, x: Array, name: str, kind: str, first: int) -> Array:
        """Heads [T, H * D], normed and turned to positions from ``first`` on: [T, H, D]."""
        T, D = x.shape[0], self.head_dim(kind)
        n = self.norm(x.reshape(T, -1, D), name, "head_norm")
        rope = self.config["rope_parameters"][kind]
        exponents = np.arange(0, D, 2) / D
        inv_freq = rope["rope_theta"] ** -exponents
        inv_freq[int(rope.get("partial_rotary_factor", 1) * D / 2) :] = 0
        angles = (first + np.arange(T))[:, None, None] * inv_freq
        cos, sin = (self.at("angle", np.tile(f(angles), 2)) for f in (np.cos, np.sin))
        low, high = np.split(n, 2, axis=-1)
        across = np.concatenate([-high, low], axis=-1)
        halves = self.at("turned_half", n * cos), self.at("turned_half", across * sin)
        return self.at("turned", halves[0] + halves[1])

    def attend(self, q: Array, keys: Array, values: Array, first: int, window: int | None) -> Array:
        """q [T, H, D] at positions from ``first`` on over keys [K, S, D] at those from 0 on."""
        T, H, _ = q.shape
        group = H // keys.shape[0]
        keys, values = (np.repeat(a, group, axis=0) for a in (keys, values))
        scores = self.at("score", np.einsum("thd,hsd->hts", q, keys))
        rows, seen = first + np.arange(T)[:, None], np.arange(keys.shape[1])
        visible = (seen <= rows) & ((window is None) | (seen > rows - (window or 0)))
        weights = self.at("probability", softmax(np.where(visible, scores, -np.inf)))
        return self.at("attended", np.einsum("hts,hsd->thd", weights, values)).reshape(T, -1)

    def residual(self, h: Array, y: Array, norm: str, scalar: str | None = None) -> Array:
        total = h + self.norm(y, norm, "branch_norm")
        if scalar is None:
            return self.at("stream", total)
        return self.at("stream", self.at("stream_unscaled", total) * self.w[scalar])

    def gated(self, gate: Array, up: Array) -> Array:
        return self.at("gated", self.at("gelu", gelu(gate)) * up)

    def mlp(self, x: Array, at: str) -> Array:
        gate, up = (self.times(x, f"{at}.mlp.{name}_proj") for name in ("gate", "up"))
        return self.times(self.gated(gate, up), f"{at}.mlp.down_proj")

    def head(self, x: Array) -> Array:
        logits = self.times(x, "embed_tokens", "logit")
        cap = self.config["final_logit_softcapping"]
        if cap is None:
            return logits
        bent = self.at("logit_bent", np.tanh(self.at("logit_divided", logits / cap)))
        return np.asarray(self.at("logit_capped", bent * cap))


class Target(Layers):
    """All positions of a prompt at once; each layer from a given stream."""

    keys: dict[str, tuple[Array, Array]]  # of the newest layer of a kind that has its own
    router_logits: Array  # of the newest layer

    def embed(self, ids: list[int]) -> Array:
        scale = self.at("embedding_scale", self.config["hidden_size"] ** 0.5)
        return np.asarray(self.at("embedding", self.w["embed_tokens.weight"][ids] * scale))

    def per_layer_inputs(self, ids: list[int], embedding: Array) -> Array:
        """[L, T, P]"""
        E, P = self.config["hidden_size"], self.config["hidden_size_per_layer_input"]
        scale = self.at("per_layer_scale", P**0.5)
        rows = self.at("per_layer_embedding", self.w["embed_tokens_per_layer.weight"][ids] * scale)
        context = self.times(embedding, "per_layer_model_projection", "per_layer_product")
        context = self.at("per_layer_product_scaled", context * E**-0.5).reshape(len(ids), -1, P)
        context = self.norm(context, "per_layer_projection_norm", "per_layer_norm")
        total = self.at("per_layer_sum", context + rows.reshape(context.shape))
        return np.asarray(self.at("per_layer_input", total * 2**-0.5)).swapaxes(0, 1)

    def layer(self, i: int, h: Array, per_layer: Array | None) -> Array:
        """The stream after layer i. Layers are called in order: later ones share keys."""
        at = f"layers.{i}"
        x = self.norm(h, f"{at}.input_layernorm")
        h = self.residual(h, self.attention(i, x), f"{at}.post_attention_layernorm")
        y = self.mlp(self.norm(h, f"{at}.pre_feedforward_layernorm"), at)
        if self.config["enable_moe_block"]:
            y = self.with_experts(h, y, at)
        after, scalar = f"{at}.post_feedforward_layernorm", f"{at}.layer_scalar"
        if per_layer is None:
            return self.residual(h, y, after, scalar)
        h = self.residual(h, y, after)
        y = self.gated(self.times(h, f"{at}.per_layer_input_gate"), per_layer)
        y = self.times(y, f"{at}.per_layer_projection")
        return self.residual(h, y, f"{at}.post_per_layer_input_norm", scalar)

    def attention(self, i: int, x: Array) -> Array:
        at, kind, T = f"layers.{i}.self_attn", self.config["layer_types"][i], x.shape[0]
        q = self.turned(self.times(x, f"{at}.q_proj"), f"{at}.q_norm", kind, 0)
        if f"{at}.k_proj.weight" in self.w:
            k = self.times(x, f"{at}.k_proj")
            v = self.times(x, f"{at}.v_proj") if f"{at}.v_proj.weight" in self.w else k
            v = self.at("value", rms(v.reshape(T, -1, self.head_dim(kind))))
            k = self.turned(k, f"{at}.k_norm", kind, 0)
            self.keys = {**getattr(self, "keys", {}), kind: (k.swapaxes(0, 1), v.swapaxes(0, 1))}
        window = self.config["sliding_window"] if kind == SLIDING else None
        return self.times(self.attend(q, *self.keys[kind], 0, window), f"{at}.o_proj")

    def with_experts(self, h: Array, dense: Array, at: str) -> Array:
        used = self.config["top_k_experts"]
        x = self.at("router_norm", rms(h))
        x = self.at("router_scaled", x * self.w[f"{at}.router.scale"])
        x = self.at("router_root", x * h.shape[-1] ** -0.5)
        self.router_logits = self.times(x, f"{at}.router.proj", "router_logit")
        shares = softmax(self.router_logits)
        z = self.norm(h, f"{at}.pre_feedforward_layernorm_2")
        routed = np.zeros_like(h)
        for t, row in enumerate(shares):
            chosen = sorted(np.argsort(-row)[:used])
            for expert in chosen:
                both = self.at(
                    "product", self.w[f"{at}.experts.gate_up_proj"][expert] @ self.row(z[t])
                )
                y = self.gated(*np.split(both, 2))
                y = self.at(
                    "expert_output", self.w[f"{at}.experts.down_proj"][expert] @ self.row(y)
                )
                scale = self.w[f"{at}.router.per_expert_scale"][expert]
                y = self.at("expert_weighted", y * (row[expert] / row[chosen].sum() * scale))
                routed[t] = self.at("expert_sum", routed[t] + y)
        routed = self.norm(self.at("routed", routed), f"{at}.post_feedforward_layernorm_2")
        dense = self.norm(dense, f"{at}.post_feedforward_layernorm_1")
        return np.asarray(self.at("branches", dense + routed))


class Assistant(Layers):
    """One draft step from a given embedding, hidden vector, keys and values."""

    def enter(self, embedding: Array, hidden: Array) -> Array:
        return self.times(np.concatenate([embedding, hidden], axis=-1), "pre_projection")

    def layer(self, i: int, h: Array, keys: Array, values: Array, position: int) -> Array:
        at, kind = f"layers.{i}", self.config["layer_types"][i]
        x = self.norm(h, f"{at}.input_layernorm")
        q = self.times(x, f"{at}.self_attn.q_proj")
        q = self.turned(q, f"{at}.self_attn.q_norm", kind, position)
        y = self.attend(q, keys, values, keys.shape[1], None)
        y = self.times(y, f"{at}.self_attn.o_proj")
        h = self.residual(h, y, f"{at}.post_attention_layernorm")
        y = self.mlp(self.norm(h, f"{at}.pre_feedforward_layernorm"), at)
        return self.residual(h, y, f"{at}.post_feedforward_layernorm", f"{at}.layer_scalar")

    def leave(self, x: Array, num_used: int) -> tuple[Array, Array]:
        """Logits [1, V], -inf where the centroid head did not look, and the hidden vector."""
        hidden = self.times(x, "post_projection")
        if "masked_embedding.centroids.weight" not in self.w:
            return self.head(x), hidden
        scores = self.times(x, "masked_embedding.centroids", "centroid_score")[0]
        order = self.w["masked_embedding.token_ordering"].reshape(scores.size, -1)
        ids = order[np.argsort(-scores)[:num_used]].reshape(-1)
        logits = np.full((1, self.w["embed_tokens.weight"].shape[0]), -np.inf)
        logits[:, ids] = self.head(x)[:, ids]
        return logits, hidden
