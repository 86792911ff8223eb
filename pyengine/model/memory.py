"""How much memory keys and values, and the work on a prompt, need."""

from __future__ import annotations

from collections.abc import Sequence

from pyengine.model.cache import window_pages
from pyengine.model.config import LayerConfig, TargetConfig
from pyengine.model.plan import CHUNK, ROWS, plan
from pyengine.ops.block_attention import TILE
from pyengine.ops.dispatch import borrows, runs
from pyengine.ops.prepare_qkv import PAGE

# Arrays of a chunk, and of a tile of its attention, that are alive at once. Measured: MLX runs
# ahead of its results
IN_FLIGHT = 24
TILES_IN_FLIGHT = 6


def cache_bytes(
    config: TargetConfig,
    context: int,
    block_size: int,
    size: int,
    beside: Sequence[LayerConfig] = (),
) -> int:
    """Memory of keys and values for ``context`` positions of ``size``-byte numbers: whole pages.

    Sliding layers hold a window and a block, whatever the context; ``beside``, the layers of a
    drafter, hold all of it.
    """
    pages = -(-(context + block_size - 1) // PAGE)
    own = _bytes(config, pages, min(pages, window_pages(config.window, block_size)), size)
    return own + pages * _page_bytes(beside, size)


def _page_bytes(layers: Sequence[LayerConfig], size: int) -> int:
    return sum(2 * n.num_kv_heads * PAGE * n.head_dim for n in layers) * size


def _bytes(config: TargetConfig, full: int, sliding: int, size: int) -> int:
    """Memory of so many pages of each kind."""
    pages = {False: full, True: sliding}
    own = [layer for i, layer in enumerate(config.layers) if layer.kv_source == i]
    return sum(2 * n.num_kv_heads * PAGE * n.head_dim * pages[n.sliding] * size for n in own)


def prompt_bytes(
    config: TargetConfig,
    tokens: int,
    block_size: int,
    marks: int,
    size: int,
    beside: Sequence[LayerConfig] = (),
) -> int:
    """Memory while ``tokens`` positions are processed and after: their keys and values, for each
    mark a window's pages and a copied one, and what the last chunk needs in between. ``beside`` are
    a drafter's layers, which have pages as full ones.

    The last is an estimate from what was measured: a grown arena stands beside the old one, a layer
    at a time; the reference's attention keeps its scores, and that of a GPU's whole chunks those of
    a tile of keys, with all of its rows, in float32.
    """
    rows = min(tokens, CHUNK)
    steps = -(-tokens // CHUNK) * CHUNK  # tables and arenas grow by chunks
    full = [n for i, n in enumerate(config.layers) if not n.sliding and n.kv_source == i]
    full += beside
    layer = max((n.num_kv_heads * n.head_dim for n in full), default=0) * steps
    widest = max(
        config.hidden_size,
        len(config.layers) * config.per_layer_width,
        2 * config.num_experts_used * config.hidden_size,
        *(2 * n.ffn_width for n in config.layers),
        *(config.num_heads * n.head_dim for n in config.layers),
    )
    calls = plan(0, rows, borrows())
    rows = max((call.rows for call in calls), default=0)
    work = IN_FLIGHT * rows * widest * size
    attention = runs("block_attention")
    if attention == "reference" or (attention == "mlx" and rows <= ROWS):
        work += 3 * 4 * config.num_heads * rows * steps
    elif attention == "mlx" or any(call.kernel == "mlx" for call in calls):
        tile = max(_tile_bytes(config.num_heads, n) for n in config.layers)
        work = max(work, TILES_IN_FLIGHT * tile)  # a layer's attention comes before the rest of it
    grown = 2 * layer * size
    pages = -(-(tokens + block_size - 1) // PAGE)
    window = min(pages, window_pages(config.window, max(rows, block_size)))
    mark = _bytes(config, 1, min(pages, window_pages(config.window, 1)), size)
    more = _page_bytes(beside, size)
    kept = _bytes(config, pages, window, size) + pages * more
    return kept + marks * (mark + more) + grown + work


def _tile_bytes(num_heads: int, layer: LayerConfig) -> int:
    """A tile of a whole chunk's attention, in float32: scores, rows, keys."""
    rows = num_heads * CHUNK
    return 4 * (rows * (TILE + layer.head_dim) + layer.num_kv_heads * TILE * layer.head_dim)
