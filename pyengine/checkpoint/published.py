"""Two configs as a pair: whether they fit, and which of the published pairs they are."""

from dataclasses import replace
from functools import partial
from typing import Any

from pyengine.model.config import (
    AssistantConfig,
    DFlashConfig,
    LayerConfig,
    Rope,
    TargetConfig,
)

# The five published pairs: (layers, hidden, heads, kv heads sliding and full, window, feed-forward,
# per-layer width, shared layers, experts), then the assistant's (hidden, heads, feed-forward,
# centroids). All have head widths 256 and 512 and a vocabulary of 262144.
PUBLISHED = {
    "E2B": ((35, 1536, 8, 1, 1, 512, 6144, 256, 20, 0), (256, 4, 2048, 2048)),
    "E4B": ((42, 2560, 8, 2, 2, 512, 10240, 256, 18, 0), (256, 4, 2048, 2048)),
    "12B": ((48, 3840, 16, 8, 1, 1024, 15360, 0, 0, 0), (1024, 16, 8192, 0)),
    "26B-A4B": ((30, 2816, 16, 8, 2, 1024, 2112, 0, 0, 128), (1024, 16, 8192, 0)),
    "31B": ((60, 5376, 32, 16, 4, 1024, 21504, 0, 0, 0), (1024, 32, 8192, 0)),
}

VOCABULARY = 262144
EXPERTS_USED, EXPERT_WIDTH = 8, 704  # of 26B-A4B, the only mixture


def published(name: str) -> tuple[TargetConfig, AssistantConfig]:
    """The geometry of a published pair; what no tensor's shape depends on is left at nothing."""
    ours, theirs = PUBLISHED[name]
    count, hidden, heads, kv_sliding, kv_full, window, ffn, per_layer, shared, experts = ours
    every = 5 if name == "E2B" else 6  # each such layer is full
    key_is_value = not per_layer
    last: dict[bool, int] = {}
    layers = []
    for i in range(count):
        sliding = i % every != every - 1
        if i < count - shared:
            last[sliding] = i
        wide = name == "E2B" and i >= count - shared
        layers.append(
            LayerConfig(
                sliding=sliding,
                head_dim=256 if sliding else 512,
                num_kv_heads=kv_sliding if sliding else kv_full,
                ffn_width=ffn * (2 if wide else 1),
                kv_source=last[sliding],
                key_is_value=key_is_value and not sliding,
            )
        )
    common: dict[str, Any] = {
        "model_type": "",
        "vocab_size": VOCABULARY,
        "window": window,
        "eps": 1e-6,
        "context_limit": 131072 if per_layer else 262144,
        "rope_sliding": Rope(1e4, 1.0, 1.0),
        "rope_full": Rope(1e6, 0.25, 1.0),
        "eos_ids": (),
        "quantization": None,
    }
    target = TargetConfig(
        **common,
        hidden_size=hidden,
        num_heads=heads,
        layers=tuple(layers),
        softcap=30.0,
        per_layer_width=per_layer,
        num_experts=experts,
        num_experts_used=EXPERTS_USED if experts else 0,
        expert_width=EXPERT_WIDTH if experts else 0,
    )
    own_hidden, own_heads, own_ffn, centroids = theirs
    sources = [layers[last[True]]] * 3 + [layers[last[False]]]
    assistant = AssistantConfig(
        **common,
        hidden_size=own_hidden,
        num_heads=own_heads,
        layers=tuple(replace(n, ffn_width=own_ffn, kv_source=-1) for n in sources),
        backbone_size=hidden,
        num_centroids=centroids,
        num_centroids_used=32 if centroids else 0,
    )
    return target, assistant


# Of the published DFlash drafters: heads, feed-forward, tapped layers. The 12B's are inferred: no
# config of it was seen, but these give the size of its file, and the taps follow the others' rule
DFLASH = {
    "12B": (32, 7680, (1, 10, 19, 27, 36, 45)),
    "26B-A4B": (32, 5632, (1, 6, 11, 17, 22, 27)),
    "31B": (64, 10752, (1, 12, 23, 35, 46, 57)),
}


def published_dflash(name: str) -> DFlashConfig:
    """The geometry of a published DFlash drafter: four sliding layers and a full one."""
    target, _ = published(name)
    heads, ffn, taps = DFLASH[name]
    layers = tuple(LayerConfig(i < 4, 128, 8, ffn, i, False) for i in range(5))
    return DFlashConfig(
        vocab_size=VOCABULARY,
        hidden_size=target.hidden_size,
        num_heads=heads,
        window=2048,
        eps=1e-6,
        layers=layers,
        rope=Rope(1e6, 1.0, 1.0),
        taps=taps,
        block_size=16,
        mask_id=4,
        target_layers=len(target.layers),
        softcap=target.softcap,
        embedding_scale=None,
        is_causal=True,
        quantization=None,
    )


def published_name(target: TargetConfig, assistant: AssistantConfig) -> str | None:
    """Name of the published pair with this geometry, or None."""
    sliding = [layer for layer in target.layers if layer.sliding]
    full = [layer for layer in target.layers if not layer.sliding]
    widths = {(layer.sliding, layer.head_dim) for layer in target.layers}
    kinds = [layer.sliding for layer in assistant.layers]
    if (
        widths != {(True, 256), (False, 512)}
        or kinds != [True, True, True, False]
        or target.vocab_size != 262144
    ):
        return None
    geometry = (
        (
            len(target.layers),
            target.hidden_size,
            target.num_heads,
            sliding[0].num_kv_heads,
            full[0].num_kv_heads,
            target.window,
            target.layers[0].ffn_width,
            target.per_layer_width,
            sum(layer.kv_source != i for i, layer in enumerate(target.layers)),
            target.num_experts,
        ),
        (
            assistant.hidden_size,
            assistant.num_heads,
            assistant.layers[0].ffn_width,
            assistant.num_centroids,
        ),
    )
    return next((name for name, known in PUBLISHED.items() if known == geometry), None)


def check_pair(target: TargetConfig, assistant: AssistantConfig) -> None:
    """Refuse an assistant that was not made for this target.

    Raises:
        ValueError: The two disagree; the message says on what.
    """

    same = partial(_same, "assistant")
    same("backbone hidden size", target.hidden_size, assistant.backbone_size)
    same("vocabulary size", target.vocab_size, assistant.vocab_size)
    same("sliding window", target.window, assistant.window)
    for layer in assistant.layers:
        kind = "sliding" if layer.sliding else "full"
        sources = [own for own in target.layers if own.sliding == layer.sliding]
        if not sources:
            raise ValueError(f"[load] the target has no {kind} layer for the assistant to read.")
        own = target.layers[target.last_source(layer.sliding)]
        same(f"{kind} head width", own.head_dim, layer.head_dim)
        same(f"{kind} key/value heads", own.num_kv_heads, layer.num_kv_heads)
        same(f"{kind} rope", target.rope(layer.sliding), assistant.rope(layer.sliding))


def check_dflash(target: TargetConfig, dflash: DFlashConfig) -> None:
    """Refuse a DFlash drafter that was not made for this target.

    Raises:
        ValueError: The two disagree; the message says on what.
    """
    same = partial(_same, "DFlash drafter")
    same("hidden size", target.hidden_size, dflash.hidden_size)
    same("vocabulary size", target.vocab_size, dflash.vocab_size)
    count = len(target.layers)
    if dflash.target_layers is not None:
        same("`num_target_layers`", count, dflash.target_layers)
    if dflash.softcap is not None:
        same("softcap", target.softcap, dflash.softcap)
    if dflash.taps[-1] >= count:
        raise ValueError(
            f"[load] `target_layer_ids` must be below the target's {count} layers but got "
            f"{dflash.taps[-1]}."
        )


def _same(part: str, what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise ValueError(
            f"[load] the {part}'s {what} must equal the target's {ours} but got {theirs}; "
            "are these two a pair?"
        )
