"""config.json of a checkpoint to :mod:`pyengine.model.config`.

Every value comes from the file. A missing key is an error that names it, never a default: defaults
of one variant (shared layers, per-layer embeddings, window) make nonsense of another.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pyengine.model.config import (
    AssistantConfig,
    DFlashConfig,
    LayerConfig,
    Quantization,
    Rope,
    TargetConfig,
)
from pyengine.untrusted import optional, read_object, shown

MAX_DIGITS = 8  # of a layer's index, with leading zeros

SLIDING, FULL = "sliding_attention", "full_attention"

# Top-level model types, and the text type each may wrap. A text-only export has the latter on top.
TARGET_TYPES = {"gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
ASSISTANT_TYPES = {
    "gemma4_assistant": "gemma4_text",
    "gemma4_unified_assistant": "gemma4_unified_text",
}

# Largest values believed; real ones are at least four times smaller.
LIMITS = {
    "vocab_size": 1 << 21,
    "hidden_size": 1 << 16,
    "backbone_hidden_size": 1 << 16,
    "intermediate_size": 1 << 18,
    "moe_intermediate_size": 1 << 18,
    "num_hidden_layers": 512,
    "num_attention_heads": 512,
    "num_key_value_heads": 512,
    "num_global_key_value_heads": 512,
    "head_dim": 2048,
    "global_head_dim": 2048,
    "sliding_window": 1 << 20,
    "max_position_embeddings": 1 << 24,
    "hidden_size_per_layer_input": 1 << 14,
    "vocab_size_per_layer_input": 1 << 21,
    "num_kv_shared_layers": 512,
    "num_experts": 4096,
    "top_k_experts": 4096,
    "num_centroids": 1 << 20,
    "centroid_intermediate_top_k": 1 << 20,
    "block_size": 1 << 10,
    "num_target_layers": 512,
    "mask_token_id": 1 << 21,
}
# The same for numbers, with the smallest.
RANGES = {
    "rms_norm_eps": (1e-12, 1e-2),
    "final_logit_softcapping": (1e-3, 1e6),
    "rope_theta": (1.0, 1e12),
    "factor": (1e-3, 1e6),
    "partial_rotary_factor": (1e-6, 1.0),
    "input_embedding_scale": (1e-6, 1e6),
}


class _Section:
    """One object of config.json; every get names the key in its complaint."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def fail(self, key: str, rule: str) -> ValueError:
        return ValueError(
            f"[config] `{self.prefix}{key}` must {rule} but got {shown(self.values.get(key))}."
        )

    def get(self, key: str) -> Any:
        if key not in self.values:
            raise ValueError(f"[config] config.json misses `{self.prefix}{key}`.")
        return self.values[key]

    def integer(self, key: str, low: int = 1) -> int:
        value = self.get(key)
        if type(value) is not int or not low <= value <= LIMITS[key]:
            raise self.fail(key, f"be an integer from {low} to {LIMITS[key]}")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        low, high = RANGES[key]
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.fail(key, f"be a number from {low:g} to {high:g}")
        return float(value)

    def word(self, key: str) -> str:
        """The value if it is a string, else ''."""
        value = self.get(key)
        return value if isinstance(value, str) else ""

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if type(value) is not bool:
            raise self.fail(key, "be true or false")
        return value

    def section(self, key: str) -> "_Section":
        value = self.get(key)
        if not isinstance(value, dict):
            raise self.fail(key, "be an object")
        return _Section(value, f"{self.prefix}{key}.")


def read_target_config(folder: Path) -> TargetConfig:
    """Read ``folder/config.json`` as a Gemma 4 target, multimodal or text-only form."""
    top = _Section(read_json(folder))
    model_type = top.word("model_type")
    if model_type in TARGET_TYPES:
        text = _text_section(top, TARGET_TYPES[model_type])
    elif model_type in TARGET_TYPES.values():
        text = top
    else:
        kinds = ", ".join([*TARGET_TYPES, *TARGET_TYPES.values()])
        raise top.fail("model_type", f"be one of {kinds}")

    unified = text.get("model_type") == "gemma4_unified_text"
    # The unified class has neither per-layer embeddings nor experts, and so lacks their keys.
    per_layer_width = 0
    if "hidden_size_per_layer_input" in text or not unified:
        per_layer_width = text.integer("hidden_size_per_layer_input", 0)
    if per_layer_width and text.integer("vocab_size_per_layer_input") != text.integer("vocab_size"):
        raise text.fail("vocab_size_per_layer_input", "equal vocab_size")
    num_experts = num_experts_used = expert_width = 0
    if ("enable_moe_block" in text or not unified) and text.flag("enable_moe_block"):
        num_experts = text.integer("num_experts")
        num_experts_used = text.integer("top_k_experts")
        expert_width = text.integer("moe_intermediate_size")
        if num_experts_used > num_experts:
            raise text.fail("top_k_experts", f"be at most num_experts ({num_experts})")
    common = _common(top, text)
    shared = text.integer("num_kv_shared_layers", 0)
    if shared >= len(common["layers"]):
        raise text.fail("num_kv_shared_layers", "leave a layer with its own keys and values")
    softcap = text.get("final_logit_softcapping")
    return TargetConfig(
        **common,
        softcap=None if softcap is None else text.number("final_logit_softcapping"),
        per_layer_width=per_layer_width,
        num_experts=num_experts,
        num_experts_used=num_experts_used,
        expert_width=expert_width,
    )


def read_assistant_config(folder: Path) -> AssistantConfig:
    """Read ``folder/config.json`` as a Gemma 4 assistant."""
    top = _Section(read_json(folder))
    model_type = top.word("model_type")
    if model_type not in ASSISTANT_TYPES:
        raise top.fail("model_type", f"be one of {', '.join(ASSISTANT_TYPES)}")
    text = _text_section(top, ASSISTANT_TYPES[model_type])
    if text.integer("num_kv_shared_layers") != text.integer("num_hidden_layers"):
        raise text.fail("num_kv_shared_layers", "equal num_hidden_layers in an assistant")
    for key in ("hidden_size_per_layer_input", "enable_moe_block", "final_logit_softcapping"):
        if text.values.get(key):
            raise text.fail(key, "be off in an assistant")
    num_centroids = num_centroids_used = 0
    common = _common(top, text)
    if top.flag("use_ordered_embeddings"):
        num_centroids = top.integer("num_centroids")
        num_centroids_used = top.integer("centroid_intermediate_top_k")
        if common["vocab_size"] % num_centroids:
            raise top.fail("num_centroids", f"divide vocab_size ({common['vocab_size']})")
        if num_centroids_used > num_centroids:
            raise top.fail(
                "centroid_intermediate_top_k", f"be at most num_centroids ({num_centroids})"
            )
    return AssistantConfig(
        **common,
        backbone_size=top.integer("backbone_hidden_size"),
        num_centroids=num_centroids,
        num_centroids_used=num_centroids_used,
    )


def names_dflash(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a DFlash drafter, or of something that is called so and is
    another: :func:`read_dflash_config` tells them apart."""
    names = config.get("architectures")
    named = [str(name).lower() for name in names] if isinstance(names, list) else []
    kin = any("dflash" in name or "dspark" in name for name in named)
    return kin or "dflash_config" in config or "speculators_model_type" in config


def read_dflash_config(folder: Path) -> DFlashConfig:
    """Read ``folder/config.json`` as a DFlash drafter, in the form that z-lab publishes.

    Others that are called so (of speculators, DFlash2, DSpark) differ in layers, tensors or in what
    a row predicts, and are refused by the key that says so.
    """
    top = _Section(read_json(folder))
    if top.values.get("architectures") != ["DFlashDraftModel"]:
        raise top.fail("architectures", 'be ["DFlashDraftModel"] in a DFlash drafter')
    if "speculators_model_type" in top:
        raise top.fail("speculators_model_type", "be absent in a DFlash drafter")
    own = top.section("dflash_config")
    for section in (top, own):
        for key, rule, allowed in (
            ("attention_sink_bias", "be off", (None, False)),
            ("output_multiplier", "be 1", (None, 1)),
            ("rope_scaling", "be null", (None,)),
            ("attention_bias", "be false", (None, False)),
            ("mlp_bias", "be false", (None, False)),
            ("use_swa", "be true", (None, True)),
            ("swa_window_size", "equal sliding_window", (None, top.values.get("sliding_window"))),
        ):
            if section.values.get(key) not in allowed:
                raise section.fail(key, f"{rule} in a DFlash drafter")
    if top.get("hidden_act") != "silu":
        raise top.fail("hidden_act", "be silu")

    def either(key: str) -> _Section | None:
        return next((s for s in (own, top) if s.values.get(key) is not None), None)

    size, layers = either("block_size"), either("num_target_layers")
    softcap, is_causal = either("final_logit_softcapping"), True
    for section, key in ((top, "is_causal"), (own, "causal")):
        is_causal = is_causal if section.values.get(key) is None else section.flag(key)
    mask, vocab = own.integer("mask_token_id", 0), top.integer("vocab_size")
    if mask >= vocab:
        raise own.fail("mask_token_id", f"be below vocab_size ({vocab})")
    taps = own.get("target_layer_ids")
    if not isinstance(taps, list) or not taps or not all(type(tap) is int for tap in taps):
        raise own.fail("target_layer_ids", "list layers of the target")
    if taps[0] < 0 or any(a >= b for a, b in pairwise(taps)):
        raise own.fail("target_layer_ids", "rise from 0")
    rope = top if "rope_parameters" not in top else top.section("rope_parameters")
    if rope.values.get("rope_type", "default") != "default":
        raise rope.fail("rope_type", "be default")
    scale = own.values.get("input_embedding_scale")
    return DFlashConfig(
        vocab_size=vocab,
        hidden_size=top.integer("hidden_size"),
        num_heads=top.integer("num_attention_heads"),
        window=top.integer("sliding_window", 2),
        eps=top.number("rms_norm_eps"),
        layers=_dflash_layers(top),
        rope=Rope(rope.number("rope_theta"), 1.0, 1.0),
        taps=tuple(taps),
        block_size=(size or top).integer("block_size", 2),
        mask_id=mask,
        target_layers=None if layers is None else layers.integer("num_target_layers"),
        softcap=None if softcap is None else softcap.number("final_logit_softcapping"),
        embedding_scale=None if scale is None else own.number("input_embedding_scale"),
        is_causal=is_causal,
        quantization=_quantization(top),
    )


def _dflash_layers(top: _Section) -> tuple[LayerConfig, ...]:
    count, kinds = top.integer("num_hidden_layers"), top.get("layer_types")
    known = isinstance(kinds, list) and all(kind in (SLIDING, FULL) for kind in kinds)
    if not known or len(kinds) != count:
        raise top.fail("layer_types", f"list {count} times {SLIDING} or {FULL}")
    heads, D = top.integer("num_key_value_heads"), top.integer("head_dim")
    if top.integer("num_attention_heads") % heads:
        raise top.fail("num_attention_heads", f"be a multiple of {heads}")
    if D % 16 or D > 512:
        raise top.fail("head_dim", "be a multiple of 16 and at most 512")
    width = top.integer("intermediate_size")
    return tuple(
        LayerConfig(
            sliding=kind == SLIDING,
            head_dim=D,
            num_kv_heads=heads,
            ffn_width=width,
            kv_source=i,
            key_is_value=False,
        )
        for i, kind in enumerate(kinds)
    )


def read_json(folder: Path) -> dict[str, Any]:
    """The object in ``folder/config.json``, as it is."""
    path = optional(Path(folder), "config.json", "config")
    if path is None:
        raise ValueError(
            f"[config] {Path(folder) / 'config.json'} does not exist; is this a checkpoint folder?"
        )
    return read_object(path, "config")


def _text_section(top: _Section, expected: str) -> _Section:
    text = top.section("text_config")
    if text.get("model_type") != expected:
        raise text.fail("model_type", f"be {expected}")
    return text


def _common(top: _Section, text: _Section) -> dict[str, Any]:
    """Fields of TextConfig, and the checks that hold for target and assistant alike."""
    if text.get("hidden_activation") != "gelu_pytorch_tanh":
        raise text.fail("hidden_activation", "be gelu_pytorch_tanh")
    if text.values.get("attention_bias"):
        raise text.fail("attention_bias", "be false")
    if text.values.get("use_bidirectional_attention") == "all":
        raise text.fail("use_bidirectional_attention", "leave text causal")
    # Written only where it differs from true; the embedding table is the head in every Gemma 4.
    for section in (top, text):
        if section.values.get("tie_word_embeddings", True) is not True:
            raise section.fail("tie_word_embeddings", "be true")
    layers = _layers(text)
    rope = text.section("rope_parameters")
    return {
        "model_type": top.get("model_type"),
        "vocab_size": text.integer("vocab_size"),
        "hidden_size": text.integer("hidden_size"),
        "num_heads": text.integer("num_attention_heads"),
        "window": text.integer("sliding_window", 2),
        "eps": text.number("rms_norm_eps"),
        "context_limit": text.integer("max_position_embeddings"),
        "layers": layers,
        "rope_sliding": _rope(rope, SLIDING),
        "rope_full": _rope(rope, FULL),
        "eos_ids": _eos_ids(top, text),
        "quantization": _quantization(top),
    }


def _layers(text: _Section) -> tuple[LayerConfig, ...]:
    num_layers = text.integer("num_hidden_layers")
    kinds = text.get("layer_types")
    known = isinstance(kinds, list) and all(kind in (SLIDING, FULL) for kind in kinds)
    if not known or len(kinds) != num_layers:
        raise text.fail("layer_types", f"list {num_layers} times {SLIDING} or {FULL}")
    num_heads = text.integer("num_attention_heads")
    num_shared = text.integer("num_kv_shared_layers", 0)
    if num_shared > num_layers:
        raise text.fail("num_kv_shared_layers", f"be at most num_hidden_layers ({num_layers})")
    first_shared = num_layers - num_shared
    ffn_width = text.integer("intermediate_size")
    double_wide = text.flag("use_double_wide_mlp")
    # Keys double as values in full layers only, and with them the number of key/value heads.
    key_is_value = text.flag("attention_k_eq_v")

    last_own: dict[str, int] = {}
    layers = []
    for i, kind in enumerate(kinds):
        sliding, shares = kind == SLIDING, i >= first_shared
        head_dim, num_kv_heads = _head_geometry(text, i, sliding, key_is_value)
        if num_heads % num_kv_heads:
            raise text.fail("num_attention_heads", f"be a multiple of {num_kv_heads} (layer {i})")
        if not shares:
            last_own[kind] = i
        elif first_shared and kind not in last_own:
            raise text.fail("num_kv_shared_layers", f"leave layer {i} a {kind} layer to share")
        layers.append(
            LayerConfig(
                sliding=sliding,
                head_dim=head_dim,
                num_kv_heads=num_kv_heads,
                ffn_width=ffn_width * (2 if double_wide and shares else 1),
                kv_source=last_own.get(kind, -1),
                key_is_value=key_is_value and not sliding,
            )
        )
        source = layers[last_own[kind]] if kind in last_own else layers[-1]
        if (source.head_dim, source.num_kv_heads) != (head_dim, num_kv_heads):
            raise text.fail("layer_types", f"give layer {i} the heads of the layer it shares with")
    return tuple(layers)


def _spellings(i: int) -> list[str]:
    """How a file may write the index of a layer."""
    return [str(i).zfill(width) for width in range(len(str(i)), MAX_DIGITS + 1)]


def _head_geometry(text: _Section, i: int, sliding: bool, key_is_value: bool) -> tuple[int, int]:
    """(head width, key/value heads) of layer i, from either published form."""
    head_dim = text.integer("head_dim")
    num_kv_heads = text.integer("num_key_value_heads")
    if "per_layer_config" in text:
        # Indices are written with leading zeros where there are ten layers or more
        layers = text.section("per_layer_config").values
        key = next((key for key in _spellings(i) if key in layers), None)
        layer = {} if key is None else layers[key]
        if not isinstance(layer, dict):
            raise text.fail("per_layer_config", "map a layer index to an object")
        own = _Section(layer, f"{text.prefix}per_layer_config.{key}.")
        head_dim = own.integer("head_dim") if "head_dim" in own else head_dim
        if "num_key_value_heads" in own:
            num_kv_heads = own.integer("num_key_value_heads")
    elif not sliding:
        head_dim = text.integer("global_head_dim")
        if text.get("num_global_key_value_heads") is not None and key_is_value:
            num_kv_heads = text.integer("num_global_key_value_heads")
    if head_dim % 2:
        raise text.fail("head_dim", f"be even (layer {i})")
    return head_dim, num_kv_heads


def _rope(section: _Section, kind: str) -> Rope:
    rope = section.section(kind)
    rope_type = rope.get("rope_type")
    if rope_type not in ("default", "proportional"):
        raise rope.fail("rope_type", "be default or proportional")
    # `factor` is an optional extra of the proportional kind; the published files have none.
    factor = rope.number("factor") if rope.values.get("factor") is not None else 1.0
    fraction = 1.0
    if rope_type == "proportional":
        fraction = rope.number("partial_rotary_factor")
    return Rope(rope.number("rope_theta"), fraction, factor)


def _eos_ids(top: _Section, text: _Section) -> tuple[int, ...]:
    """End ids of the config; generation_config.json, where present, knows better."""
    section = top if top.values.get("eos_token_id") is not None else text
    value = section.values.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise section.fail("eos_token_id", "be a token id or a list of them")
    return tuple(ids)


def _quantization(top: _Section) -> Quantization | None:
    key = "quantization" if top.values.get("quantization") is not None else "quantization_config"
    if top.values.get(key) is None:
        return None
    block = top.section(key)
    defaults = _bits_and_group(block, None)
    overrides: dict[str, tuple[int, int] | str | None] = {}
    for path, value in block.values.items():
        if isinstance(value, dict):
            try:
                overrides[path] = _bits_and_group(block.section(path), defaults)
            except ValueError as error:
                overrides[path] = str(error)
        elif value is False:
            overrides[path] = None
    return Quantization(*defaults, overrides)


def _bits_and_group(block: _Section, defaults: tuple[int, int] | None) -> tuple[int, int]:
    if block.values.get("mode", "affine") != "affine" or "quant_method" in block:
        key = "quant_method" if "quant_method" in block else "mode"
        raise block.fail(key, "be MLX affine quantisation")
    if defaults is not None:
        block = _Section(
            {"bits": defaults[0], "group_size": defaults[1], **block.values}, block.prefix
        )
    bits, group_size = block.get("bits"), block.get("group_size")
    if type(bits) is not int or bits not in (4, 6, 8):
        raise block.fail("bits", "be 4, 6 or 8")
    if type(group_size) is not int or group_size not in (32, 64, 128):
        raise block.fail("group_size", "be 32, 64 or 128")
    return bits, group_size
