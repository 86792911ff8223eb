"""Pairs whose widths have no exact root in bfloat16, as tests/model/test_rounding.py needs them.

The published widths have none either (sqrt(5376) is 73.32, in bfloat16 73.5), but those of
tests/fixtures do: 8 is 8 in every dtype, and a rounding left out of it is not seen. Weights are not
stored. They come from the bits of a counter that NumPy promises to keep, so that these tests and
tests/parity/make_rounding.py, which asks transformers, draw the same ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

FLAVOURS = ("e2b", "moe26")
E, P, V, T = 96, 48, 64, 24  # widths, vocabulary, and a prompt of three windows
WINDOW, NUM_CENTROIDS = 8, 8
SLIDING, FULL = "sliding_attention", "full_attention"
REFERENCES = Path(__file__).parents[1] / "fixtures" / "rounding"
COMMON: dict[str, Any] = {
    "model_type": "gemma4_text",
    "dtype": "bfloat16",
    "vocab_size": V,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_attention_heads": 4,
    "sliding_window": WINDOW,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters": {
        SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
        FULL: {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1000000.0,
        },
    },
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
}
KEYS = {
    "e2b": {
        "attention_k_eq_v": False,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": None,
    },
    "moe26": {
        "attention_k_eq_v": True,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
    },
}
TARGETS: dict[str, dict[str, Any]] = {
    "e2b": {
        **COMMON,
        **KEYS["e2b"],
        "hidden_size": E,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": P,
        "vocab_size_per_layer_input": V,
        "enable_moe_block": False,
        "final_logit_softcapping": 30.0,
    },
    "moe26": {
        **COMMON,
        **KEYS["moe26"],
        "hidden_size": E,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "final_logit_softcapping": 30.0,
    },
}
ASSISTANTS: dict[str, dict[str, Any]] = {
    flavour: {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "dtype": "bfloat16",
        "backbone_hidden_size": E,
        "use_ordered_embeddings": flavour == "e2b",
        "num_centroids": NUM_CENTROIDS,
        "centroid_intermediate_top_k": 3,
        "tie_word_embeddings": True,
        "text_config": {
            **COMMON,
            **KEYS[flavour],
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 4,
            "layer_types": [SLIDING] * 3 + [FULL],
            "use_double_wide_mlp": False,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "enable_moe_block": False,
            "final_logit_softcapping": None,
        },
    }
    for flavour in FLAVOURS
}
Array = np.ndarray
Weights = dict[str, Array]


def bfloat16(x: Any) -> Array:
    """x rounded to bfloat16, ties to even, as float64."""
    single = np.ascontiguousarray(x, dtype=np.float32)
    whole = single.view(np.uint32).astype(np.uint64)
    whole = (whole + 0x7FFF + ((whole >> 16) & 1)) & 0xFFFF0000
    return whole.astype(np.uint32).view(np.float32).astype(np.float64)


def uniform(seed: int, place: int, *shape: int) -> Array:
    """Numbers from -1 to 1, of tensor ``place`` of a model."""
    raw = np.random.Philox(key=[seed, place]).random_raw(int(np.prod(shape)))
    return (raw >> np.uint64(11)).astype(np.float64).reshape(shape) * 2.0**-52 - 1


def prompt() -> list[int]:
    return (np.random.Philox(key=[11, 0]).random_raw(T) % np.uint64(V)).tolist()


def shapes_of_layer(config: dict[str, Any], i: int) -> dict[str, tuple[int, ...]]:
    width, full = config["hidden_size"], config["layer_types"][i] == FULL
    D = config["global_head_dim"] if full else config["head_dim"]
    H = config["num_attention_heads"]
    own = config["num_hidden_layers"] - config["num_kv_shared_layers"]
    alike = full and config["attention_k_eq_v"]
    K = config["num_global_key_value_heads"] if alike else config["num_key_value_heads"]
    F = config["intermediate_size"] * (2 if config["use_double_wide_mlp"] and i >= own else 1)
    shapes: dict[str, tuple[int, ...]] = {
        "layer_scalar": (1,),
        "self_attn.q_proj.weight": (H * D, width),
        "self_attn.q_norm.weight": (D,),
        "self_attn.o_proj.weight": (width, H * D),
        "mlp.gate_proj.weight": (F, width),
        "mlp.up_proj.weight": (F, width),
        "mlp.down_proj.weight": (width, F),
    }
    norms = ["input", "post_attention", "pre_feedforward", "post_feedforward"]
    if i < own:
        shapes |= {"self_attn.k_proj.weight": (K * D, width), "self_attn.k_norm.weight": (D,)}
        if not alike:
            shapes["self_attn.v_proj.weight"] = (K * D, width)
    if config["hidden_size_per_layer_input"]:
        shapes |= {
            "per_layer_input_gate.weight": (P, width),
            "per_layer_projection.weight": (width, P),
            "post_per_layer_input_norm.weight": (width,),
        }
    if config["enable_moe_block"]:
        X, M = config["num_experts"], config["moe_intermediate_size"]
        shapes |= {
            "router.proj.weight": (X, width),
            "router.scale": (width,),
            "router.per_expert_scale": (X,),
            "experts.gate_up_proj": (X, 2 * M, width),
            "experts.down_proj": (X, width, M),
            "pre_feedforward_layernorm_2.weight": (width,),
            "post_feedforward_layernorm_1.weight": (width,),
            "post_feedforward_layernorm_2.weight": (width,),
        }
    return shapes | {f"{name}_layernorm.weight": (width,) for name in norms}


def draw(seed: int, shapes: dict[str, tuple[int, ...]]) -> Weights:
    """Norms and scales around one, matrices of unit gain, every number a bfloat16."""
    weights: Weights = {}
    for place, (name, shape) in enumerate(shapes.items()):
        x = uniform(seed, place, *shape)
        if name.endswith("token_ordering"):
            weights[name] = np.argsort(x).astype(np.int64)
        elif name.endswith("layer_scalar"):
            weights[name] = bfloat16(0.85 + 0.25 * x)
        elif len(shape) == 1:  # a smaller query keeps attention from being all or nothing
            weights[name] = bfloat16((1 + 0.5 * x) * (0.5 if "q_norm" in name else 1))
        else:
            weights[name] = bfloat16((3 / shape[-1]) ** 0.5 * x)
    return weights


def target_weights(flavour: str) -> Weights:
    """Under the names of a published text-only checkpoint."""
    config = TARGETS[flavour]
    layers = config["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (V, E), "norm.weight": (E,)}
    if config["hidden_size_per_layer_input"]:
        shapes |= {
            "embed_tokens_per_layer.weight": (V, layers * P),
            "per_layer_model_projection.weight": (layers * P, E),
            "per_layer_projection_norm.weight": (P,),
        }
    for i in range(layers):
        shapes |= {f"layers.{i}.{k}": v for k, v in shapes_of_layer(config, i).items()}
    return draw(1, {f"model.{name}": shape for name, shape in shapes.items()})


def assistant_weights(flavour: str) -> Weights:
    config = ASSISTANTS[flavour]["text_config"]
    width = config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "pre_projection.weight": (width, 2 * E),
        "post_projection.weight": (E, width),
        "model.embed_tokens.weight": (V, width),
        "model.norm.weight": (width,),
    }
    if ASSISTANTS[flavour]["use_ordered_embeddings"]:
        shapes |= {
            "masked_embedding.centroids.weight": (NUM_CENTROIDS, width),
            "masked_embedding.token_ordering": (V,),
        }
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{k}": v for k, v in shapes_of_layer(config, i).items()}
    return draw(2, shapes)


def write_pair(flavour: str, folder: Path) -> None:
    """target/ and assistant/ of a flavour, in the published form."""
    target = {"architectures": ["Gemma4ForCausalLM"], **TARGETS[flavour]}
    for part, config, weights in (
        ("target", target, target_weights(flavour)),
        ("assistant", ASSISTANTS[flavour], assistant_weights(flavour)),
    ):
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(config))
        tensors = {
            name: mx.array(w) if w.dtype == np.int64 else mx.array(w).astype(mx.bfloat16)
            for name, w in weights.items()
        }
        path = str(folder / part / "model.safetensors")
        mx.save_safetensors(path, tensors, metadata={"format": "pt"})
