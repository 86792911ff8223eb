"""Two configs as a pair: whether they fit, and which of the published pairs they are."""

from pyengine.model.config import AssistantConfig, TargetConfig

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

    def same(what: str, ours: object, theirs: object) -> None:
        if ours != theirs:
            raise ValueError(
                f"[load] the assistant's {what} must equal the target's {ours} but got {theirs}; "
                "are these two a pair?"
            )

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
