"""The DFlash model against one by hand: logits, who sees what, rows of several texts, and where its
keys and values lie."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from dflash_by_hand import ByHand, sees
from tiny_dflash import FULL, MASK, SLIDING, WINDOW, config_of, weights_of, write
from tiny_pairs import FLAVOURS, bits, tiny_pair

from pyengine import ops
from pyengine.checkpoint.config_json import read_dflash_config
from pyengine.checkpoint.weights import load_dflash_weights
from pyengine.model.cache import Arena, Cache
from pyengine.model.dflash import DFlash
from pyengine.model.target import Target

FLOAT32 = 2e-5  # of logits up to 30


class Made:
    """A drafter of a tiny target, and the same by hand."""

    def __init__(self, folder: Any, flavour: str = "dense31", **changes: Any) -> None:
        self.raw = config_of(flavour, **changes)
        weights = weights_of(self.raw)
        write(folder, self.raw, weights)
        self.target: Target = tiny_pair(flavour).target
        self.config = read_dflash_config(folder)
        self.model = DFlash(self.config, self.target, load_dflash_weights(folder, self.config))
        table = np.array(self.target.table.values())
        self.by_hand = ByHand(self.raw, weights, table, self.model.embedding_scale)

    def context(self, seed: int, L: int) -> np.ndarray:
        width = len(self.config.taps) * self.config.hidden_size
        return np.random.default_rng(seed).normal(size=(L, width)).astype(np.float32)

    def arena(self) -> Arena:
        arena = self.target.new_arena()
        arena.extend(self.config.kept)
        return arena

    def known(self, arena: Arena, tapped: np.ndarray, chunk: int = 50) -> Cache:
        """A text whose context was read, chunk by chunk."""
        cache = arena.new_cache()
        for begin in range(0, len(tapped), chunk):
            part = mx.array(tapped[begin : begin + chunk])
            cache.reserve(len(part))
            self.model.read([part], [cache])
            cache.settle(begin + len(part))
            mx.eval(arena.arrays)
        return cache

    def logits(self, caches: list[Cache], blocks: list[list[int]]) -> mx.array:
        for cache, block in zip(caches, blocks, strict=True):
            cache.reserve(len(block))
        logits = self.model.forward([mx.array(b, dtype=mx.int32) for b in blocks], caches).array
        mx.eval(logits)
        return logits


def block_of(T: int, primary: int = 77) -> list[int]:
    return [primary] + [MASK] * (T - 1)


def off(found: mx.array, wanted: np.ndarray) -> float:
    assert found.shape == wanted.shape
    return float(np.abs(np.array(found) - wanted).max())


@pytest.mark.engine
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_logits_are_those_by_hand(flavour: str, tmp_path: Any, implementation: str) -> None:
    """Contexts about the window of 12, pages of 64 and a chunk; blocks past what it was trained
    with."""
    made = Made(tmp_path / "dflash", flavour)
    lengths = (1, 11, 12, 13, 63, 64, 65, 130) if implementation == "native" else (13, 65)
    for L in lengths:
        tapped = made.context(L, L)
        for T in (2, 3, 8, 17) if implementation == "native" else (3,):
            found = made.logits([made.known(made.arena(), tapped)], [block_of(T)])
            assert off(found, made.by_hand.logits(tapped, block_of(T))) < FLOAT32, (L, T)


def test_a_text_without_context(tmp_path: Any) -> None:
    made = Made(tmp_path / "dflash")
    none = made.context(0, 0)
    found = made.logits([made.known(made.arena(), none)], [block_of(4)])
    assert off(found, made.by_hand.logits(none, block_of(4))) < FLOAT32


@pytest.mark.parametrize(
    "changes",
    [
        {"dflash_config": {"causal": False}},
        {"is_causal": False},
        {"dflash_config": {"input_embedding_scale": 1.0}},
        {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32},
        {"num_hidden_layers": 1, "layer_types": [FULL], "sliding_window": 3},
        {"num_hidden_layers": 2, "layer_types": [FULL, SLIDING], "rope_theta": 10000.0},
        {"dflash_config": {"target_layer_ids": [0, 1, 3, 4]}, "rms_norm_eps": 1e-3},
    ],
)
def test_what_a_file_may_say(changes: dict[str, Any], tmp_path: Any) -> None:
    usual = Made(tmp_path / "usual")
    made = Made(
        tmp_path / "dflash",
        **{k: dict(v) if k == "dflash_config" else v for k, v in changes.items()},
    )
    tapped = made.context(3, 40)
    found = made.logits([made.known(made.arena(), tapped)], [block_of(6)])
    causal = made.config.is_causal
    assert off(found, made.by_hand.logits(tapped, block_of(6), causal)) < FLOAT32
    if (
        made.raw["num_hidden_layers"] == 3
        and len(made.config.taps) == 2
        and "head_dim" not in changes
    ):
        plain = usual.logits([usual.known(usual.arena(), tapped)], [block_of(6)])
        assert off(plain, np.array(found)) > 0.1  # the setting does something


@pytest.mark.parametrize("kind", [SLIDING, FULL])
def test_rows_see_what_the_table_says(kind: str, tmp_path: Any) -> None:
    """With a layer alone, a row changes with what it sees, and with nothing else."""
    made = Made(tmp_path / "dflash", num_hidden_layers=1, layer_types=[kind])
    L, T = 20, 5
    tapped, table = made.context(5, L), sees(kind, WINDOW, L, T)
    block = [30, 31, 32, 33, 34]
    before = np.array(made.logits([made.known(made.arena(), tapped)], [block]))
    for j in range(L + T):
        other, changed = tapped.copy(), list(block)
        if j < L:
            other[j] += 1
        else:
            changed[j - L] = 99
        after = np.array(made.logits([made.known(made.arena(), other)], [changed]))
        differs = (after != before).any(axis=1)
        assert differs.tolist() == table[:, j].tolist(), j


def test_the_table() -> None:
    """Of a window of 4 behind 5 positions: row t sees 5 + t - 3 to 5 + t; full rows see all."""
    assert sees(SLIDING, 4, 5, 3).astype(int).tolist() == [
        [0, 0, 1, 1, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 1, 1, 1, 1],
    ]
    assert sees(FULL, 4, 5, 3).all()


@pytest.mark.engine
def test_rows_of_several_texts_have_the_bits_of_each_alone(
    tmp_path: Any, implementation: str
) -> None:
    """Blocks of like and unlike lengths, in one arena."""
    made = Made(tmp_path / "dflash")
    lengths, arena = (5, 64, 130, 13), made.arena()
    each = [made.context(n, L) for n, L in enumerate(lengths)]
    caches = [made.known(arena, tapped) for tapped in each]
    for rows in ((4, 4, 4, 4), (3, 8, 3, 5)) if implementation == "native" else ((3, 2, 3, 5),):
        blocks = [block_of(T, 60 + n) for n, T in enumerate(rows)]
        together = made.logits(caches, blocks)
        begin = 0
        for tapped, block in zip(each, blocks, strict=True):
            alone = made.logits([made.known(made.arena(), tapped)], [block])
            own = together[begin : begin + len(block)]
            begin += len(block)
            if implementation == "reference":
                assert mx.allclose(own, alone, rtol=1e-4, atol=1e-4)
            else:
                assert np.array_equal(bits(own), bits(alone))


def test_context_read_together_has_the_bits_of_each_alone(tmp_path: Any) -> None:
    made = Made(tmp_path / "dflash")
    arena, rows = made.arena(), (3, 1, 7)
    caches = [made.known(arena, made.context(n, 60 + n)) for n in range(3)]
    parts = [mx.array(made.context(9 + n, T)) for n, T in enumerate(rows)]
    for cache, T in zip(caches, rows, strict=True):
        cache.reserve(T)
    made.model.read(parts, caches)
    for cache, T in zip(caches, rows, strict=True):
        cache.settle(cache.committed + T)
    together = made.logits(caches, [block_of(4)] * 3)
    for n, T in enumerate(rows):
        whole = np.concatenate([made.context(n, 60 + n), made.context(9 + n, T)])
        alone = made.logits([made.known(made.arena(), whole)], [block_of(4)])
        assert np.array_equal(bits(together[4 * n : 4 * n + 4]), bits(alone))


def test_a_block_leaves_nothing_behind(tmp_path: Any) -> None:
    """Its keys and values lie where context is written later, and no length has changed."""
    made = Made(tmp_path / "dflash")
    tapped, later = made.context(1, 70), made.context(2, 3)
    used, fresh = (made.known(made.arena(), tapped) for _ in "ab")
    made.logits([used], [block_of(16)])
    assert used.committed == 70
    for cache in (used, fresh):
        cache.reserve(3)
        made.model.read([mx.array(later)], [cache])
        cache.settle(73)
    found, wanted = (made.logits([cache], [block_of(5)]) for cache in (used, fresh))
    assert np.array_equal(bits(found), bits(wanted))


def test_a_fork_has_the_context(tmp_path: Any) -> None:
    """Neither text sees what the other reads behind it."""
    made = Made(tmp_path / "dflash")
    cache = made.known(made.arena(), made.context(1, 70))
    wanted = bits(made.logits([cache], [block_of(5)]))
    other = cache.fork(70)
    other.reserve(8)
    made.model.read([mx.array(made.context(3, 8))], [other])
    other.settle(78)
    mx.eval(cache.arena.arrays)
    assert np.array_equal(bits(made.logits([cache], [block_of(5)])), wanted)
    again = cache.fork(70)
    assert np.array_equal(bits(made.logits([again], [block_of(5)])), wanted)


def test_an_arena_gets_the_layers_once(tmp_path: Any) -> None:
    """In pages that are there and in those to come; the target's bytes are told apart."""
    made = Made(tmp_path / "dflash")
    arena = made.target.new_arena()
    cache = arena.new_cache()
    cache.reserve(70)
    own, count = arena.page_bytes(False), len(arena.arrays)
    content = arena.content(False, cache.full[0])
    assert arena.beside == () and arena.page_bytes(False, own=True) == own == len(content)
    arena.extend(made.config.kept)
    arena.extend(made.config.kept)
    arena.extend(())
    assert arena.beside == made.config.kept and len(arena.arrays) == count + 6
    assert arena.page_bytes(False) == own + 3 * 2 * 2 * 64 * 16 * 4
    assert arena.page_bytes(False, own=True) == own
    assert arena.content(False, cache.full[0], own=True) == content
    assert arena.content(False, cache.full[0])[:own] == content
    assert all(a.shape[0] == arena.full.count for a in arena.arrays[-1:])
    whole = bytes(range(256)) * (arena.page_bytes(False) // 256)
    arena.fill(False, cache.full[1], whole)
    assert arena.content(False, cache.full[1]) == whole
    arena.fill(False, cache.full[1], bytes(own))  # without a drafter's
    assert arena.content(False, cache.full[1]) == bytes(own) + whole[own:]
    with pytest.raises(ValueError, match=r"the layers of one drafter but got two\."):
        arena.extend(made.config.kept[:1])
    small = made.target.new_arena(most_bytes=arena.page_bytes(True) * 64)
    small.new_cache().reserve(600)
    with pytest.raises(RuntimeError, match=r"GB of the arena but those there are need .* more for"):
        small.most_bytes = small.nbytes
        small.extend(made.config.kept)


def test_the_fold_is_attention_of_all_rows(tmp_path: Any) -> None:
    """A block's rows as one row's heads: the op gives them no other bits than a row alone."""
    rng = np.random.default_rng(0)
    for T, H, K, D in ((6, 16, 8, 64), (16, 8, 2, 128), (5, 4, 4, 16)):
        keys, values = (mx.array(rng.normal(size=(4, K, 64, D)).astype(np.float32)) for _ in "kv")
        q = mx.array(rng.normal(size=(T, H, D)).astype(np.float32))
        table, length = mx.array([[2, 0, 3]], dtype=mx.int32), mx.array([130], dtype=mx.int32)
        from pyengine.model.dflash import _folded, _unfolded

        args = (keys, values, length, table, [1])
        out = ops.block_attention(_folded(q, T, K), *args, scale=D**-0.5)
        rows = _unfolded(out, T, K).reshape(T, H, D)
        for t in range(T):
            alone = ops.block_attention(q[t : t + 1], *args, scale=D**-0.5)
            assert np.array_equal(bits(rows[t]), bits(alone[0]))
