"""Bytes that a step or a round of a pair must read, from the shapes of its tensors.

A target's weights and its cache are counted once per round, whatever the number of drafts; of
embedding tables that are no head a step reads a few rows, which are left out, as is what it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

from pyengine.checkpoint.weights import (
    Layout,
    Shape,
    assistant_layout,
    dflash_layout,
    target_layout,
)
from pyengine.drafters import exit_depth
from pyengine.model.config import AssistantConfig, DFlashConfig, TargetConfig

GROUP = 64
HEAD, ROWS_ONLY = "embed_tokens", "embed_tokens_per_layer"


def matrix_bytes(path: str, shape: Shape, bits: int) -> float:
    """Of a matrix: bfloat16, or affine with a scale and a bias per group; routers have 8 bits."""
    if bits == 16:
        return 2.0 * prod(shape)
    return prod(shape) * (bits_of(path, bits) / 8 + 2 * 2 / GROUP)


def bits_of(path: str, bits: int) -> int:
    """Those of one matrix in a bundle of so many bits."""
    return 8 if path.endswith("router.proj") else bits


def layout_bytes(layout: Layout, bits: int) -> float:
    """Memory of a model's tensors; vectors are bfloat16, integers have 32 bits."""
    integers = sum(prod(layout.vectors[name]) for name in layout.integers)
    vectors = sum(map(prod, layout.vectors.values()))
    matrices = sum(matrix_bytes(path, shape, bits) for path, shape in layout.matrices.items())
    return matrices + 2 * vectors + 2 * integers


def target_bytes(config: TargetConfig, bits: int, experts: float | None = None) -> float:
    """Matrices that a call of the target reads: layers and head.

    Of a mixture ``experts`` are read in each layer; None: as few as there may be, those of one row.
    """

    def read(path: str, shape: Shape) -> float:
        once = path != ROWS_ONLY and ".experts." not in path
        return matrix_bytes(path, shape, bits) if once else 0

    return _sum(target_layout(config), read) + expert_bytes(config, bits, experts)


def expert_bytes(config: TargetConfig, bits: int, experts: float | None = None) -> float:
    """What of :func:`target_bytes` are experts."""
    if not config.num_experts:
        return 0.0
    used = config.num_experts_used if experts is None else experts
    shapes = target_layout(config).matrices.items()
    stacks = [matrix_bytes(path, shape, bits) for path, shape in shapes if ".experts." in path]
    return sum(stacks) * used / config.num_experts


def assistant_bytes(config: AssistantConfig, bits: int) -> float:
    """Matrices that a draft reads; of a head with centroids the rows of the nearest."""
    share = config.num_centroids_used / config.num_centroids if config.num_centroids else 1

    def read(path: str, shape: Shape) -> float:
        return matrix_bytes(path, shape, bits) * (share if path == HEAD else 1)

    return _sum(assistant_layout(config), read)


def head_bytes(config: TargetConfig, bits: int) -> float:
    """What of :func:`target_bytes` is the head."""
    return matrix_bytes(HEAD, (config.vocab_size, config.hidden_size), bits)


def distinct_experts(config: TargetConfig, rows: int) -> float:
    """How many experts of a layer so many rows use, if each row picked its own by chance."""
    X, used = config.num_experts, config.num_experts_used
    return X * (1 - (1 - used / X) ** rows) if X else 0.0


def kept_bytes(config: TargetConfig, context: int, block_size: int) -> int:
    """Keys and values that a round sees, in bfloat16."""
    places = {True: min(config.window - 1, context) + block_size, False: context}
    own = [n for i, n in enumerate(config.layers) if n.kv_source == i]
    return sum(2 * 2 * n.num_kv_heads * n.head_dim * places[n.sliding] for n in own)


def seen_by(target: TargetConfig, assistant: AssistantConfig) -> TargetConfig:
    """The target as far as the assistant reads its cache: a layer for each of the assistant's."""
    return replace(
        target, layers=tuple(replace(n, kv_source=i) for i, n in enumerate(assistant.layers))
    )


def step_bytes(
    config: TargetConfig, bits: int, context: int, rows: int, experts: float | None = None
) -> float:
    """What one call of the target reads: weights, keys and values."""
    matrices = target_bytes(config, bits, experts)
    return matrices + _vector_bytes(target_layout(config)) + kept_bytes(config, context, rows)


def draft_bytes(
    target: TargetConfig, assistant: AssistantConfig, bits: int, context: int, block_size: int
) -> float:
    """What one draft reads: the assistant's weights, and its part of the target's cache."""
    kept = kept_bytes(seen_by(target, assistant), context, block_size)
    vectors = _vector_bytes(assistant_layout(assistant))
    return assistant_bytes(assistant, bits) + vectors + kept


def dflash_bytes(
    target: TargetConfig, dflash: DFlashConfig, bits: int, context: int, rows: int
) -> float:
    """What a DFlash drafter reads in a round, whatever the number of drafts: for the context of as
    many rows what gives features, keys and values; for the block all layers, the target's head, and
    keys and values of the context."""
    layout = dflash_layout(dflash)

    def read(path: str, shape: Shape) -> float:
        twice = path.endswith(("k_proj", "v_proj"))
        return matrix_bytes(path, shape, bits) * (2 if twice else 1)

    places = {True: min(dflash.window - 1, context) + rows, False: context + rows}
    kept = sum(2 * 2 * n.num_kv_heads * n.head_dim * places[n.sliding] for n in dflash.layers)
    return _sum(layout, read) + _vector_bytes(layout) + head_bytes(target, bits) + kept


def drafting_bytes(
    drafter: str,
    target: TargetConfig,
    models: tuple[AssistantConfig, DFlashConfig | None],
    bits: int,
    context: int,
    block_size: int,
) -> float:
    """What a drafter reads for the drafts of a block, by its name: lookup nothing, DFlash a pass
    however many they are, each other one as much per draft."""
    assistant, dflash = models
    drafts = block_size - 1
    if drafter == "lookup" or not drafts:
        return 0.0
    if drafter == "dflash":
        assert dflash is not None
        return dflash_bytes(target, dflash, bits, context, block_size)
    if (depth := exit_depth(drafter)) is not None:
        exit_ = replace(target, layers=target.layers[:depth])
        return drafts * step_bytes(exit_, bits, context, 1)
    return drafts * draft_bytes(target, assistant, bits, context, block_size)


def round_bytes(
    target: TargetConfig,
    assistant: AssistantConfig,
    bits: int,
    context: int,
    block_size: int,
    experts: float | None = None,
) -> float:
    """What a round reads; a plain step at block size 1."""
    drafts = drafting_bytes("assistant", target, (assistant, None), bits, context, block_size)
    return step_bytes(target, bits, context, block_size, experts) + drafts


def _vector_bytes(layout: Layout) -> int:
    floats = layout.vectors.keys() - layout.integers
    return 2 * sum(prod(layout.vectors[name]) for name in floats)


def _sum(layout: Layout, read: Callable[[str, Shape], float]) -> float:
    return sum(read(path, shape) for path, shape in layout.matrices.items())
