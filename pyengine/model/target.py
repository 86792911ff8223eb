"""The Gemma 4 forward pass, top to bottom: every published variant, text only.

All of it runs through :mod:`pyengine.ops`, whose rows do not depend on how many rows a call has, so
that verifying a block gives bit for bit the logits that single steps give. Between the ops stand
elementwise operations only. Values are kept in the checkpoint's dtype, rounded once per op.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import mlx.core as mx

from pyengine import mapped, ops
from pyengine.model import memory
from pyengine.model.cache import Arena, Batch, Cache
from pyengine.model.config import LayerConfig, TargetConfig
from pyengine.model.experts import Experts, with_experts
from pyengine.model.head import Logits
from pyengine.model.layers import MLP, residual
from pyengine.model.linear import Linear, Weights, side_by_side
from pyengine.model.plan import ROWS, plan
from pyengine.model.rows import packed
from pyengine.ops.dispatch import borrows


@dataclass(frozen=True)
class Attention:
    """One layer's attention weights; k, v and k_norm are None where a layer shares, v also where
    the keys double as values."""

    q: Linear
    k: Linear | None
    v: Linear | None
    o: Linear
    q_norm: mx.array
    k_norm: mx.array | None
    inv_freq: mx.array


@dataclass(frozen=True)
class PerLayer:
    """What a layer of E2B or E4B does with its own slice of the second embedding."""

    gate: Linear
    projection: Linear
    norm: mx.array


@dataclass(frozen=True)
class Layer:
    config: LayerConfig
    attention: Attention
    mlp: MLP
    experts: Experts | None
    per_layer: PerLayer | None
    input_norm: mx.array
    post_attention_norm: mx.array
    pre_mlp_norm: mx.array
    post_mlp_norm: mx.array
    scalar: mx.array


class Rows(NamedTuple):
    """The rows of a call, sequence by sequence."""

    batch: Batch
    counts: Sequence[int]  # of each sequence
    positions: mx.array  # int32 [R]
    owners: mx.array  # int32 [R]


class Reader(Protocol):
    """Who is told of the rows that the target processes: a drafter."""

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's layers, from 0, whose output it reads too; () for none."""
        ...

    def read(self, hidden: mx.array, accepted: mx.array) -> None:
        """Rows that the target has processed: of each call of the prefill, and of each round.

        Args:
            hidden: The target's hidden vectors, after its last norm, ``[T, E]``. With n taps
                ``[T, (1 + n) * E]``: behind them in each row those that left the tapped layers,
                in the order of ``taps``.
            accepted: int32 ``[]``; rows 0 to ``accepted`` are committed, and what follows row
                ``accepted`` is the next primary token: after the prefill's last call and after a
                round.
        """
        ...


class Target:
    """A Gemma 4 target model. The T rows of a sequence are T consecutive positions of it."""

    def __init__(self, config: TargetConfig, weights: Weights) -> None:
        self.config = config
        self.dtype = weights.dtype
        self.context = config.context_limit
        matrix, vector = weights.matrices, weights.vectors
        self.table = matrix["embed_tokens"]
        self.norm = vector["norm.weight"]
        # As transformers keeps it: sqrt(E) rounded to the storage dtype
        self.embedding_scale = _rounded(config.hidden_size**0.5, self.dtype)
        if config.per_layer_width:
            self.per_layer_table = matrix["embed_tokens_per_layer"]
            self.per_layer_scale = _rounded(config.per_layer_width**0.5, self.dtype)
            self.per_layer_projection = matrix["per_layer_model_projection"]
            norm = vector["per_layer_projection_norm.weight"]
            self.per_layer_norm = norm.astype(mx.float32)
        inv_freq = {
            layer.sliding: mx.array(config.rope(layer.sliding).frequencies(layer.head_dim))
            for layer in config.layers
        }
        self.layers = [
            _layer(config, weights, i, inv_freq[layer.sliding])
            for i, layer in enumerate(config.layers)
        ]

    def embed(self, ids: mx.array) -> mx.array:
        """Scaled embeddings of ids [T]: [T, E]."""
        return self.table.rows(ids, self.embedding_scale)

    def new_arena(self, most_bytes: int | None = None, sequences: int = 1) -> Arena:
        """An arena without pages for any number of sequences."""
        return Arena(self.config, self.dtype, most_bytes, sequences)

    def new_cache(self) -> Cache:
        """A sequence without positions, in an arena of its own."""
        return self.new_arena().new_cache()

    def waiting(self) -> AbstractContextManager[None]:
        """For evaluations of its calls: other processes may take part in them."""
        return nullcontext()

    def check_stored(self) -> None:
        """Refuse to keep pages in files where they cannot be read back whole.

        Raises:
            ValueError: Other processes have parts of them.
        """

    def prompt_bytes(self, tokens: int, block_size: int, marks: int) -> int:
        """Memory for a prompt, see :func:`pyengine.model.memory.prompt_bytes`."""
        return memory.prompt_bytes(self.config, tokens, block_size, marks, self.dtype.size)

    def prefill(
        self,
        ids: list[int],
        cache: Cache,
        chunk: int | None = None,
        reader: Reader | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Process and commit a prompt. Evaluates, see :meth:`rows`.

        Args:
            ids: The prompt, or its next part.
            cache: What stands before it; gets its keys and values.
            chunk: Tokens of a whole chunk, in place of 512.
            reader: Is given each call's rows.

        Returns:
            Logits of the last position [V], float32, not evaluated: most callers that hand over a
            prompt in parts want only the last; and its hidden vector [1, E], as forward.

        Raises:
            ValueError: No ids, or an id outside the vocabulary.
        """
        check_ids("prefill", ids, self.config.vocab_size)
        if chunk is not None and chunk < 1:
            raise ValueError(f"[prefill] chunk must be at least 1 but got {chunk}.")
        for rows in self.rows(ids, cache, chunk, reader):
            hidden = rows.hidden[-1:]
        return self._head(hidden).array[0], hidden

    def rows(
        self,
        ids: list[int],
        cache: Cache,
        chunk: int | None = None,
        reader: Reader | None = None,
    ) -> Iterator[Logits]:
        """Process and commit ids by the calls that :func:`pyengine.model.plan.plan` gives for their
        positions; evaluates after each call, so that memory stays level. Arguments as `prefill`.

        Yields:
            Each call's rows, of which no logits are made until they are asked for.
        """
        first = cast(int, cache.length.item())
        cache.settle(first)
        for start, rows, _ in plan(first, first + len(ids), borrows(), chunk):
            part = mx.array(ids[start - first : start - first + rows], dtype=mx.int32)
            cache.reserve(rows)  # an arena that grows has other arrays then
            arrays = cache.arena.arrays
            try:
                taps = () if reader is None else reader.taps
                hidden, tapped = self._hidden([part], [cache], taps)
                cache.settle(start + rows)
                with self.waiting():
                    mx.eval(hidden, tapped, cache.arrays)
                mapped.check("prefill")
            except Exception:  # what failed would fail again, and others have pages there
                cache.arena.take_results(arrays)
                raise
            if reader is not None:
                reader.read(tapped, mx.array(rows - 1, dtype=mx.int32))
            yield self._head(hidden)

    def forward(
        self, ids: Sequence[mx.array], caches: Sequence[Cache], taps: tuple[int, ...] = ()
    ) -> tuple[Logits, mx.array]:
        """Run each sequence's ids [T] behind the committed positions of its cache; writes keys and
        values, commits nothing. The caches share an arena. Rows of all sequences are processed
        together.

        Returns:
            Of the R rows, sequence by sequence: logits [R, V], float32, after the softcap, none of
            them made until they are asked for; hidden vectors [R, E], after the last norm; with n
            taps [R, (1 + n) * E], behind them those that left the tapped layers.
        """
        hidden, tapped = self._hidden(ids, caches, taps)
        return self._head(hidden), tapped

    def exit(
        self, depth: int, ids: Sequence[mx.array], caches: Sequence[Cache], ahead: int = 0
    ) -> Logits:
        """What the first ``depth`` layers alone make of each sequence's ids [T], the last norm and
        the head behind them.

        The ids stand ``ahead`` positions behind the committed ones. Keys and values of these layers
        are written: for the same ids they are the bits that :meth:`forward` writes. All sequences
        have as many ids.

        Returns:
            Of the last row of each sequence: logits [Q, V], float32, after the softcap, none of
            them made until they are asked for.
        """
        hidden, _ = self._hidden(ids, caches, depth=depth, ahead=ahead)
        count = ids[0].size
        return self._head(hidden if count == 1 else hidden[count - 1 :: count])

    def logits(self, ids: list[int]) -> mx.array:
        """Logits [T, V], float32, of every position of ids. Evaluates, see :meth:`rows`."""
        check_ids("logits", ids, self.config.vocab_size)
        calls = self.rows(ids, self.new_cache())
        return mx.concatenate([part.array for rows in calls for part in rows.parts(ROWS)])

    def _head(self, x: mx.array) -> Logits:
        return Logits(x, self.table, self.config.softcap)

    def _hidden(
        self,
        each: Sequence[mx.array],
        caches: Sequence[Cache],
        taps: tuple[int, ...] = (),
        depth: int | None = None,
        ahead: int = 0,
    ) -> tuple[mx.array, mx.array]:
        """Post-final-norm hidden vectors [R, E] of each sequence's ids; the same with what left the
        tapped layers behind them, [R, (1 + taps) * E]. Keys and values go to the arena. ``depth``
        and ``ahead`` as :meth:`exit`."""
        layers = self.layers[:depth]
        for own, cache in zip(each, caches, strict=True):
            cache.reserve(ahead + own.size)
        arena, counts = caches[0].arena, [own.size for own in each]
        ids, batch = arena.after_reads(packed(each)), arena.batch(caches).ahead(ahead)
        rows = Rows(batch, counts, *batch.rows(counts))
        h = self.embed(ids)
        per_layer = self._per_layer_inputs(ids, h) if self.config.per_layer_width else None
        return self._run(h, per_layer, rows, layers, taps)

    def _run(
        self,
        h: mx.array,
        per_layer: list[mx.array] | None,
        rows: Rows,
        layers: Sequence[Layer],
        taps: tuple[int, ...] = (),
    ) -> tuple[mx.array, mx.array]:
        """These layers, from embeddings [R, E] on; as :meth:`_hidden`."""
        arena, eps = rows.batch.arena, self.config.eps
        x = ops.rms_norm(h, self.layers[0].input_norm, eps)
        left: list[mx.array] = []  # by layer, the residual stream behind it
        for i, layer in enumerate(layers):
            is_last = i + 1 == len(layers)
            next_norm = self.norm if is_last else self.layers[i + 1].input_norm
            y = self._attention(i, x, rows)
            h, x = residual(h, y, layer.post_attention_norm, layer.pre_mlp_norm, eps)
            y = layer.mlp(x)
            if layer.experts is not None:
                y = with_experts(layer.experts, h, y, self.config.num_experts_used, eps)
            if layer.per_layer is None or per_layer is None:
                h, x = residual(h, y, layer.post_mlp_norm, next_norm, eps, layer.scalar)
            else:
                h, _ = ops.residual_norm(h, y, layer.post_mlp_norm, eps=eps)
                y = ops.glu(layer.per_layer.gate(h), per_layer[i])
                y = layer.per_layer.projection(y)
                h, x = residual(h, y, layer.per_layer.norm, next_norm, eps, layer.scalar)
            left.append(h)
        arena.note_read(x)
        return x, mx.concatenate([x, *(left[tap] for tap in taps)], axis=-1) if taps else x

    def _attention(self, i: int, x: mx.array, rows: Rows) -> mx.array:
        """Attention of layer i: each sequence's rows to its own keys, in the pages of this layer or
        of the one that it shares with."""
        geometry, attention = self.layers[i].config, self.layers[i].attention
        parts = [m for m in (attention.q, attention.k, attention.v) if m is not None]
        q, *kv = side_by_side(parts, x)
        arena, tables = rows.batch.arena, rows.batch.tables[geometry.sliding]
        R, inv_freq, eps = q.shape[0], attention.inv_freq, self.config.eps
        if attention.k_norm is None:
            q = q.reshape(R, -1, geometry.head_dim)
            q = ops.norm_rope(q, attention.q_norm, rows.positions, inv_freq, eps)
        else:
            k, v = kv[0], kv[-1]  # keys may double as values
            norms, to = (attention.q_norm, attention.k_norm), (rows.positions, rows.owners, tables)
            q, keys, values = ops.prepare_qkv(q, k, v, *norms, inv_freq, *arena.slots(i), *to, eps)
            arena.store(i, keys, values)
        out = ops.block_attention(
            q,
            *arena.slots(geometry.kv_source),
            rows.batch.lengths,
            tables,
            rows.counts,
            window=self.config.window if geometry.sliding else None,
        )
        return attention.o(out.reshape(R, -1))

    def _per_layer_inputs(self, ids: mx.array, h: mx.array) -> list[mx.array]:
        """The second embedding of E2B and E4B, [T, P] a layer; float32 until its one rounding."""
        L, P = len(self.layers), self.config.per_layer_width
        table = self.per_layer_table.rows(ids, self.per_layer_scale, mx.float32)  # [T, L * P]
        context = self.per_layer_projection(h, mx.float32) * self.config.hidden_size**-0.5
        context = ops.rms_norm(context.reshape(-1, L, P), self.per_layer_norm, self.config.eps)
        both = (context.reshape(table.shape) + table) * 2**-0.5
        return list(mx.split(both.astype(self.dtype), L, axis=-1))


def check_ids(what: str, ids: list[int], vocab_size: int) -> None:
    """Refuse an empty list and ids that would read outside the embedding table."""
    if not ids:
        raise ValueError(f"[{what}] ids must not be empty.")
    bad = next((i for i in ids if not 0 <= i < vocab_size), None)
    if bad is not None:
        raise ValueError(f"[{what}] ids must be from 0 to {vocab_size - 1} but got {bad}.")


def _rounded(value: float, dtype: mx.Dtype) -> float:
    """value as a number of that dtype. Evaluates."""
    return cast(float, mx.array(value, dtype=dtype).astype(mx.float32).item())


def _layer(config: TargetConfig, weights: Weights, i: int, inv_freq: mx.array) -> Layer:
    matrix, vector = weights.matrices, weights.vectors
    at = f"layers.{i}"
    experts = per_layer = None
    if config.num_experts:
        scale = vector[f"{at}.router.scale"].astype(mx.float32)
        experts = Experts(
            router=matrix[f"{at}.router.proj"].astype(mx.float32),
            router_norm=scale * config.hidden_size**-0.5,
            scales=vector[f"{at}.router.per_expert_scale"].astype(mx.float32),
            gate=matrix[f"{at}.experts.gate_proj"],
            up=matrix[f"{at}.experts.up_proj"],
            down=matrix[f"{at}.experts.down_proj"],
            pre_norm=vector[f"{at}.pre_feedforward_layernorm_2.weight"],
            dense_norm=vector[f"{at}.post_feedforward_layernorm_1.weight"],
            routed_norm=vector[f"{at}.post_feedforward_layernorm_2.weight"],
        )
    if config.per_layer_width:
        per_layer = PerLayer(
            gate=matrix[f"{at}.per_layer_input_gate"],
            projection=matrix[f"{at}.per_layer_projection"],
            norm=vector[f"{at}.post_per_layer_input_norm.weight"],
        )
    attention = Attention(
        q=matrix[f"{at}.self_attn.q_proj"],
        k=matrix.get(f"{at}.self_attn.k_proj"),
        v=matrix.get(f"{at}.self_attn.v_proj"),
        o=matrix[f"{at}.self_attn.o_proj"],
        q_norm=vector[f"{at}.self_attn.q_norm.weight"],
        k_norm=vector.get(f"{at}.self_attn.k_norm.weight"),
        inv_freq=inv_freq,
    )
    return Layer(
        config=config.layers[i],
        attention=attention,
        mlp=MLP(*(matrix[f"{at}.mlp.{name}_proj"] for name in ("gate", "up", "down"))),
        experts=experts,
        per_layer=per_layer,
        input_norm=vector[f"{at}.input_layernorm.weight"],
        post_attention_norm=vector[f"{at}.post_attention_layernorm.weight"],
        pre_mlp_norm=vector[f"{at}.pre_feedforward_layernorm.weight"],
        post_mlp_norm=vector[f"{at}.post_feedforward_layernorm.weight"],
        scalar=vector[f"{at}.layer_scalar"],
    )
