"""The Gemma 4 assistant: four shallow layers over the target's own keys and values.

A step is a pure function of a token's embedding, a hidden vector and the cache; the assistant has
no cache of its own. It reads the committed positions 0..n-2, in sliding layers the newest
window - 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from pyengine import ops
from pyengine.model.cache import Batch, Cache
from pyengine.model.config import AssistantConfig, LayerConfig, TargetConfig
from pyengine.model.head import Logits
from pyengine.model.linear import Linear, Weights, gated
from pyengine.model.rows import apart, packed
from pyengine.ops.filter_logits import MAX_TOP_K

# Where the assistant's query sits when n tokens are known, the newest one unprocessed: at that
# token (transformers, LiteRT-LM) or at the last processed one (vLLM, mlx-vlm). Only acceptance
# can differ.
Position = Literal["n-1", "n-2"]
POSITIONS: tuple[Position, ...] = ("n-1", "n-2")


@dataclass(frozen=True)
class Layer:
    config: LayerConfig
    kv_source: int
    q: Linear
    o: Linear
    q_norm: mx.array
    inv_freq: mx.array
    gate: Linear
    up: Linear
    down: Linear
    input_norm: mx.array
    post_attention_norm: mx.array
    pre_mlp_norm: mx.array
    post_mlp_norm: mx.array
    scalar: mx.array


class Assistant:
    """A Gemma 4 assistant for the target of the given config."""

    def __init__(
        self,
        config: AssistantConfig,
        target: TargetConfig,
        weights: Weights,
        position: Position = "n-1",
    ) -> None:
        if position not in POSITIONS:
            raise ValueError(f"[assistant] position must be n-1 or n-2 but got {position!r}.")
        self.config = config
        self.dtype = weights.dtype
        self.position = position
        matrix, vector = weights.matrices, weights.vectors
        self.pre_projection = matrix["pre_projection"]
        self.post_projection = matrix["post_projection"]
        self.norm = vector["norm.weight"]
        self.layers = [_layer(config, target, weights, i) for i in range(len(config.layers))]
        if config.num_centroids:
            self.centroids = matrix["masked_embedding.centroids"]
            order = vector["masked_embedding.token_ordering"]
            self.token_ordering = order.reshape(config.num_centroids, -1)
            # In place of the table, which nothing else of an assistant reads
            self.stack = matrix["embed_tokens"].take(order).stacked(config.num_centroids)
        else:
            self.table = matrix["embed_tokens"]

    def forward(
        self, embedding: mx.array, hidden: mx.array, caches: Sequence[Cache]
    ) -> tuple[mx.array | Logits, mx.array]:
        """Draft one token of each of Q sequences.

        Args:
            embedding: The newest tokens' scaled embeddings, from the target, [Q, E].
            hidden: The target's hidden vectors that produced those tokens, after its last norm, or
                the hidden vectors of the step before, [Q, E].
            caches: The target's, of one arena; only committed positions are read.

        Returns:
            Logits [Q, V], float32, -inf where a centroid head did not look, made when they are
            asked for where there is no such head; hidden vectors [Q, E].
        """
        eps, batch = self.config.eps, caches[0].arena.batch(caches)
        h = self.pre_projection(mx.concatenate([embedding, hidden], axis=-1))
        x = ops.rms_norm(h, self.layers[0].input_norm, eps)
        for i, layer in enumerate(self.layers):
            is_last = i + 1 == len(self.layers)
            next_norm = self.norm if is_last else self.layers[i + 1].input_norm
            y = layer.o(self._attend(layer, layer.q(x), batch))
            weight, following = layer.post_attention_norm, layer.pre_mlp_norm
            h, x = ops.residual_norm(h, y, weight, next_weight=following, eps=eps)
            y = layer.down(gated(layer.gate, layer.up, x))
            weight, scalar = layer.post_mlp_norm, layer.scalar
            h, x = ops.residual_norm(h, y, weight, scalar=scalar, next_weight=next_norm, eps=eps)
        logits, hidden = self._head(x), self.post_projection(x)
        batch.arena.note_read(hidden)
        return logits, hidden

    def _attend(self, layer: Layer, q: mx.array, batch: Batch) -> mx.array:
        sliding, Q = layer.config.sliding, q.shape[0]
        positions = batch.lengths if self.position == "n-1" else batch.newest
        q = q.reshape(Q, -1, layer.config.head_dim)
        q = ops.norm_rope(q, layer.q_norm, positions, layer.inv_freq, self.config.eps)
        out = ops.block_attention(
            q,
            *batch.arena.slots(layer.kv_source),
            batch.newest,
            batch.tables[sliding],
            [1] * Q,
            # The query stands behind the newest key, so one position of its window is its own
            window=self.config.window - 1 if sliding else None,
        )
        return out.reshape(Q, -1)

    def _head(self, x: mx.array) -> mx.array | Logits:
        if not self.config.num_centroids:
            return Logits(x, self.table)
        ids = self._nearest(x)
        selected = self._of_centroids(x, ids)
        logits = mx.full((x.shape[0], self.config.vocab_size), -mx.inf, dtype=mx.float32)
        tokens = mx.take(self.token_ordering, ids, axis=0).reshape(selected.shape)
        return mx.put_along_axis(logits, tokens, selected, axis=1)

    def _nearest(self, x: mx.array) -> mx.array:
        """Each row's centroids of the highest scores, ties by lower id: int32 [Q, used].

        They are the candidates of a vocabulary of centroids.
        """
        used = self.config.num_centroids_used
        top_k = used if used <= MAX_TOP_K else 0
        return Logits(x, self.centroids).filter(temperature=1.0, top_k=top_k).ids[:, :used]

    def _of_centroids(self, x: mx.array, ids: mx.array) -> mx.array:
        """Logits [Q, used * tokens] of the tokens of each row's own centroids [Q, used]."""
        stack, packing = self.stack.packed, self.stack.packing
        if stack is None or packing is None:
            each = zip(apart(x, [1] * x.shape[0]), ids, strict=True)
            return packed([self.stack.take(own).joined()(row, mx.float32) for row, own in each])
        y = ops.quantized_expert_matmul(x, stack, ids, *packing, out_dtype=mx.float32)
        return y.reshape(x.shape[0], -1)


def _layer(config: AssistantConfig, target: TargetConfig, weights: Weights, i: int) -> Layer:
    matrix, vector = weights.matrices, weights.vectors
    at, layer = f"layers.{i}", config.layers[i]
    frequencies = config.rope(layer.sliding).frequencies(layer.head_dim)
    return Layer(
        config=layer,
        kv_source=target.last_source(layer.sliding),
        q=matrix[f"{at}.self_attn.q_proj"],
        o=matrix[f"{at}.self_attn.o_proj"],
        q_norm=vector[f"{at}.self_attn.q_norm.weight"],
        inv_freq=mx.array(frequencies),
        gate=matrix[f"{at}.mlp.gate_proj"],
        up=matrix[f"{at}.mlp.up_proj"],
        down=matrix[f"{at}.mlp.down_proj"],
        input_norm=vector[f"{at}.input_layernorm.weight"],
        post_attention_norm=vector[f"{at}.post_attention_layernorm.weight"],
        pre_mlp_norm=vector[f"{at}.pre_feedforward_layernorm.weight"],
        post_mlp_norm=vector[f"{at}.post_feedforward_layernorm.weight"],
        scalar=vector[f"{at}.layer_scalar"],
    )
