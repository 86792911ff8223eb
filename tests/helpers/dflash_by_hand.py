"""A DFlash drafter in NumPy, float64, row by row: who sees what is a table here.

Written from the description of the published form, with nothing of ours in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


def rms(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def turned(x: Array, positions: Array, theta: float) -> Array:
    """Half-split rotary embedding of heads ``[n, H, D]``."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high = x[..., :half], x[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def sees(kind: str, window: int, L: int, T: int, causal: bool = True) -> Array:
    """Whether row t sees position j of the L + T, bool ``[T, L + T]``."""
    table = np.zeros((T, L + T), bool)
    for t in range(T):
        for j in range(L + T):
            if kind == "full_attention":
                table[t, j] = True
            elif causal:
                table[t, j] = j <= L + t and L + t - j < window
            else:  # all see what the first row's window leaves
                table[t, j] = L - j < window
    return table


class ByHand:
    """The weights of a file, by its names, and the target's table."""

    def __init__(
        self, config: dict[str, Any], weights: dict[str, Array], table: Array, scale: float
    ) -> None:
        self.config, self.scale = config, scale
        self.w = {name: x.astype(np.float64) for name, x in weights.items()}
        self.table = table.astype(np.float64)
        self.H, self.K = (config[f"num_{k}_heads"] for k in ("attention", "key_value"))
        self.D, self.eps = config["head_dim"], config["rms_norm_eps"]

    def features(self, tapped: Array) -> Array:
        """Of rows ``[n, taps * E]``: ``[n, E]``."""
        fused = tapped.astype(np.float64) @ self.w["fc.weight"].T
        return rms(fused, self.w["hidden_norm.weight"], self.eps)

    def keys_and_values(self, i: int, x: Array, positions: Array) -> tuple[Array, Array]:
        at = f"layers.{i}.self_attn"
        k = (x @ self.w[f"{at}.k_proj.weight"].T).reshape(-1, self.K, self.D)
        k = turned(
            rms(k, self.w[f"{at}.k_norm.weight"], self.eps), positions, self.config["rope_theta"]
        )
        return k, (x @ self.w[f"{at}.v_proj.weight"].T).reshape(-1, self.K, self.D)

    def logits(self, tapped: Array, block: list[int], causal: bool = True) -> Array:
        """Of a block behind L rows of context ``[L, taps * E]``: ``[T, V]``."""
        L, T = len(tapped), len(block)
        context, places = self.features(tapped), L + np.arange(T)
        h = self.table[block] * self.scale
        for i, kind in enumerate(self.config["layer_types"]):
            at = f"layers.{i}"
            x = rms(h, self.w[f"{at}.input_layernorm.weight"], self.eps)
            q = (x @ self.w[f"{at}.self_attn.q_proj.weight"].T).reshape(T, self.H, self.D)
            q = rms(q, self.w[f"{at}.self_attn.q_norm.weight"], self.eps)
            q = turned(q, places, self.config["rope_theta"])
            old, new = (
                self.keys_and_values(i, context, np.arange(L)),
                self.keys_and_values(i, x, places),
            )
            keys, values = (np.concatenate(both) for both in zip(old, new, strict=True))
            seen = sees(kind, self.config["sliding_window"], L, T, causal)
            out = np.zeros((T, self.H, self.D))
            for t in range(T):
                for head in range(self.H):
                    own = head // (self.H // self.K)
                    scores = keys[:, own] @ q[t, head] / np.sqrt(self.D)
                    weight = np.where(seen[t], np.exp(scores - scores[seen[t]].max()), 0)
                    out[t, head] = weight / weight.sum() @ values[:, own]
            h = h + out.reshape(T, -1) @ self.w[f"{at}.self_attn.o_proj.weight"].T
            x = rms(h, self.w[f"{at}.post_attention_layernorm.weight"], self.eps)
            gate, up = (x @ self.w[f"{at}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            h = h + (gate / (1 + np.exp(-gate)) * up) @ self.w[f"{at}.mlp.down_proj.weight"].T
        z = rms(h, self.w["norm.weight"], self.eps) @ self.table.T
        cap = self.config["final_logit_softcapping"]
        return z if cap is None else cap * np.tanh(z / cap)
