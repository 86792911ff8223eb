"""DFlash: all drafts of a block in one pass of a few layers over the target's inner vectors.

What it knows of a text are keys and values made of what left some of the target's layers, a row per
committed position: its context. A block is the primary token and mask tokens; the row of each mask
gives the draft for its own place. Table and head are the target's.

Keys and values lie in the target's arena, in pages of its full layers. A block's stand where the
context of the same positions is written once the target has processed them, so nothing is moved,
and what is refused is rolled back with the target's.

Source: arXiv:2602.06036; z-lab/dflash (MIT), whose published files it reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from pyengine import ops
from pyengine.model.cache import Batch, Cache
from pyengine.model.config import DFlashConfig, LayerConfig
from pyengine.model.head import Logits
from pyengine.model.linear import MLP, Linear, Weights, side_by_side
from pyengine.model.rows import packed, picked
from pyengine.model.target import Target


@dataclass(frozen=True)
class Layer:
    config: LayerConfig
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: mx.array
    k_norm: mx.array
    mlp: MLP
    input_norm: mx.array
    post_attention_norm: mx.array


class DFlash:
    """A DFlash drafter for a target."""

    def __init__(self, config: DFlashConfig, target: Target, weights: Weights) -> None:
        self.config = config
        self.dtype = weights.dtype
        self.table, self.softcap = target.table, target.config.softcap
        scale = config.embedding_scale
        self.embedding_scale = target.embedding_scale if scale is None else scale
        self.fuse = weights.matrices["fc"]
        self.hidden_norm = weights.vectors["hidden_norm.weight"]
        self.norm = weights.vectors["norm.weight"]
        self.inv_freq = mx.array(config.rope.frequencies(config.layers[0].head_dim))
        self.layers = [_layer(config, weights, i) for i in range(len(config.layers))]

    def read(self, tapped: Sequence[mx.array], caches: Sequence[Cache]) -> mx.array:
        """Write the context of rows that the target has processed, behind the committed positions.

        Args:
            tapped: Of each sequence what left the tapped layers, ``[T, taps * E]``.
            caches: The target's, of one arena that has our layers.

        Returns:
            int32 ``[1]``, 0 once all of it is written: nothing else of a round asks for that.
        """
        arena = caches[0].arena
        batch = arena.batch(caches)
        at = batch.rows([rows.shape[0] for rows in tapped])
        x = self.fuse(arena.after_reads(packed(tapped)))
        x = ops.rms_norm(x, self.hidden_norm, self.config.eps)
        for i, layer in enumerate(self.layers):
            k, v = side_by_side([layer.k, layer.v], x)
            self._write(i, k, k, v, batch, at)  # the op wants queries; these are nobody's
        arena.note_read(x)
        first = len(arena.config.layers)
        written = [a for i in range(len(self.layers)) for a in arena.slots(first + i)]
        done: mx.array = mx.depends([mx.zeros(1, mx.int32)], written)[0]
        return done

    def forward(self, blocks: Sequence[mx.array], caches: Sequence[Cache]) -> Logits:
        """The drafts of one block of each sequence, behind the committed positions.

        Args:
            blocks: Ids ``[T]``, the primary token first.
            caches: The target's, of one arena that has our layers.

        Returns:
            Of all rows, sequence by sequence: logits ``[R, V]``, made when they are asked for. A
            row's are for its own place; that of a primary token means nothing.
        """
        arena, counts = caches[0].arena, [block.size for block in blocks]
        batch, eps = arena.batch(caches), self.config.eps
        at = batch.rows(counts)
        h = self.table.rows(arena.after_reads(packed(blocks)), self.embedding_scale)
        for i, layer in enumerate(self.layers):
            x = ops.rms_norm(h, layer.input_norm, eps)
            q, k, v = side_by_side([layer.q, layer.k, layer.v], x)
            q = self._write(i, q, k, v, batch, at)
            h = h + layer.o(self._attend(i, q, batch, counts))
            x = ops.rms_norm(h, layer.post_attention_norm, eps)
            h = h + layer.mlp(x)
        x = ops.rms_norm(h, self.norm, eps)
        arena.note_read(x)
        return Logits(x, self.table, self.softcap)

    def _write(
        self,
        i: int,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        batch: Batch,
        at: tuple[mx.array, mx.array],
    ) -> mx.array:
        """Keys and values of rows at these positions to layer i's slots; their queries, turned."""
        layer, arena = self.layers[i], batch.arena
        norms, to = (layer.q_norm, layer.k_norm), (*at, batch.tables[False])
        slots, eps = arena.slots(self._place(batch, i)), self.config.eps
        q, keys, values = ops.prepare_qkv(
            q, k, v, *norms, self.inv_freq, *slots, *to, eps, norm_values=False
        )
        arena.store(self._place(batch, i), keys, values)
        return q

    @staticmethod
    def _place(batch: Batch, i: int) -> int:
        """Where the arena has layer i."""
        return len(batch.arena.config.layers) + i

    def _attend(self, i: int, q: mx.array, batch: Batch, counts: Sequence[int]) -> mx.array:
        """Attention of rows ``[R, H, D]`` in layer i: ``[R, H * D]``."""
        config, layer = self.config, self.layers[i].config
        scale, R = layer.head_dim**-0.5, q.shape[0]
        keys, values = batch.arena.slots(self._place(batch, i))
        if layer.sliding and config.is_causal:
            at = batch.lengths, batch.tables[False], counts
            out = ops.block_attention(q, keys, values, *at, scale=scale, window=config.window)
            return out.reshape(R, -1)
        # A block whose rows see all of it is one row at its end, with the heads of all: blocks of
        # one length at a time
        outs, order = [], []
        for T in dict.fromkeys(counts):
            own = [s for s, count in enumerate(counts) if count == T]
            rows = [sum(counts[:s]) + t for s in own for t in range(T)]
            part = batch.part(own)
            outs.append(
                ops.block_attention(
                    _folded(picked(q, rows), T, layer.num_kv_heads),
                    keys,
                    values,
                    part.lengths + (T - 1),
                    part.tables[False],
                    [1] * len(own),
                    scale=scale,
                    # What the block's first row sees, all see
                    window=config.window + T - 1 if layer.sliding else None,
                )
            )
            outs[-1] = _unfolded(outs[-1], T, layer.num_kv_heads)
            order += rows
        back = sorted(range(R), key=order.__getitem__)
        return picked(packed(outs), back)


def _folded(q: mx.array, T: int, K: int) -> mx.array:
    """Blocks ``[Q * T, H, D]`` as rows ``[Q, K * T * (H / K), D]``, so that query heads of all T
    rows stand at their key head."""
    D = q.shape[-1]
    return q.reshape(-1, T, K, q.shape[1] // K, D).swapaxes(1, 2).reshape(q.shape[0] // T, -1, D)


def _unfolded(out: mx.array, T: int, K: int) -> mx.array:
    """What :func:`_folded` folded, ``[Q * T, H * D]``."""
    Q, heads, D = out.shape
    return out.reshape(Q, K, T, heads // (K * T), D).swapaxes(1, 2).reshape(Q * T, -1)


def _layer(config: DFlashConfig, weights: Weights, i: int) -> Layer:
    matrix, vector = weights.matrices, weights.vectors
    at, names = f"layers.{i}", ("gate", "up", "down")
    return Layer(
        config=config.layers[i],
        q=matrix[f"{at}.self_attn.q_proj"],
        k=matrix[f"{at}.self_attn.k_proj"],
        v=matrix[f"{at}.self_attn.v_proj"],
        o=matrix[f"{at}.self_attn.o_proj"],
        q_norm=vector[f"{at}.self_attn.q_norm.weight"],
        k_norm=vector[f"{at}.self_attn.k_norm.weight"],
        mlp=MLP(*(matrix[f"{at}.mlp.{name}_proj"] for name in names), activation="silu"),
        input_norm=vector[f"{at}.input_layernorm.weight"],
        post_attention_norm=vector[f"{at}.post_attention_layernorm.weight"],
    )
