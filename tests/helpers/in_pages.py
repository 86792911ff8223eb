"""Keys and values of a sequence in the order of its positions."""

from __future__ import annotations

import mlx.core as mx

from pyengine.model.cache import Cache

PAGE = 64


def in_a_row(cache: Cache, layer: int) -> tuple[mx.array, mx.array]:
    """Keys and values ``[1, K, C, D]`` of a layer, position p in place p; 0 where none is."""
    keys, values = (_joined(a, _pages(cache, layer)) for a in cache.arena.slots(layer))
    return keys, values


def put_in_a_row(cache: Cache, layer: int, keys: mx.array, values: mx.array) -> None:
    """Store what :func:`in_a_row` gave, changed."""
    stored = []
    for arena, whole in zip(cache.arena.slots(layer), (keys, values), strict=True):
        copy = mx.array(arena)
        for j, page in _pages(cache, layer).items():
            copy[page] = whole[0, :, PAGE * j : PAGE * (j + 1)]
        stored.append(copy)
    cache.arena.store(layer, *stored)


def _pages(cache: Cache, layer: int) -> dict[int, int]:
    sliding = cache.arena.config.layers[layer].sliding
    return cache.sliding if sliding else dict(enumerate(cache.full))


def _joined(arena: mx.array, pages: dict[int, int]) -> mx.array:
    none = mx.zeros_like(arena[0])
    each = [arena[pages[j]] if j in pages else none for j in range(max(pages) + 1)]
    return mx.concatenate(each, axis=1)[None]
