"""How much memory keys and values, and the work on a prompt, need."""

from __future__ import annotations

import mlx.core as mx

from pyengine import _ext
from pyengine.model.cache import CAPACITY_STEP
from pyengine.model.config import TargetConfig
from pyengine.model.plan import CHUNK
from pyengine.ops.dispatch import chosen

IN_FLIGHT = 24  # arrays of a chunk that are alive at once, measured: MLX runs ahead of its results


def cache_bytes(config: TargetConfig, context: int, block_size: int, size: int) -> int:
    """Memory of keys and values for ``context`` positions of ``size``-byte numbers.

    Sliding layers hold a window and a block, whatever the context.
    """
    steps = -(-context // CAPACITY_STEP) * CAPACITY_STEP
    slots = {True: config.window - 1 + block_size, False: steps}
    own = [layer for i, layer in enumerate(config.layers) if layer.kv_source == i]
    return sum(2 * n.num_kv_heads * n.head_dim * slots[n.sliding] * size for n in own)


def prompt_bytes(config: TargetConfig, tokens: int, max_block: int, marks: int, size: int) -> int:
    """Memory while ``tokens`` positions are processed and after: their keys and values, copies of
    the sliding layers' (marks), and what the last chunk needs in between.

    The last is an estimate from what was measured: a grown cache stands beside the old one, a layer
    at a time, and attention that is plain MLX keeps its scores.
    """
    rings = cache_bytes(config, 0, max_block, size)
    rows = min(tokens, CHUNK)
    steps = -(-tokens // CAPACITY_STEP) * CAPACITY_STEP
    full = [n for i, n in enumerate(config.layers) if not n.sliding and n.kv_source == i]
    layer = max((n.num_kv_heads * n.head_dim for n in full), default=0) * steps
    widest = max(
        config.hidden_size,
        len(config.layers) * config.per_layer_width,
        2 * config.num_experts_used * config.hidden_size,
        *(2 * n.ffn_width for n in config.layers),
        *(config.num_heads * n.head_dim for n in config.layers),
    )
    on_gpu = chosen() == "native" and mx.default_device() == mx.gpu
    plain = chosen() == "reference" or (on_gpu and rows > _ext.max_launch_rows)
    scores = 3 * 4 * config.num_heads * rows * steps if plain else 0
    chunk = (IN_FLIGHT * rows * widest + 2 * layer) * size + scores
    return cache_bytes(config, tokens, max_block, size) + marks * rings + chunk
