"""The Gemma 4 forward pass, top to bottom: every published variant, text only.

All of it runs through :mod:`pyengine.ops`, whose rows do not depend on how many rows a call has, so
that verifying a block gives bit for bit the logits that single steps give. Between the ops stand
elementwise operations only. Values are kept in the checkpoint's dtype, rounded once per op.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

import mlx.core as mx

from pyengine import mapped, ops
from pyengine.model import memory
from pyengine.model.cache import Arena, Batch, Cache
from pyengine.model.config import LayerConfig, TargetConfig
from pyengine.model.experts import Experts, with_experts
from pyengine.model.head import Logits
from pyengine.model.linear import MLP, Linear, Weights, side_by_side
from pyengine.model.plan import ROWS, plan
from pyengine.model.rows import apart, packed, picked
from pyengine.ops.dispatch import borrows

if TYPE_CHECKING:
    from typing import Self


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


class Branches(NamedTuple):
    """Where the rows of a call stand that are nodes of trees, one of each sequence, in the form of
    :func:`pyengine.ops.block_attention`."""

    depths: mx.array  # int32 [R]
    ancestors: mx.array  # int32 [R, A]: of a row the one at each depth, as a row of its sequence


class Rows(NamedTuple):
    """The rows of a call, sequence by sequence."""

    batch: Batch
    counts: Sequence[int]  # of each sequence
    positions: mx.array  # int32 [R]
    owners: mx.array  # int32 [R]
    slots: mx.array | None = None  # int32 [R]: in whose places those of trees are kept
    branches: Branches | None = None


class Processed(NamedTuple):
    """Rows of a sequence that the target has processed: of a call of the prefill, or of a round.

    Attributes:
        hidden: The target's hidden vectors, after its last norm, ``[T, E]``. With n taps
            ``[T, (1 + n) * E]``: behind them in each row those that left the tapped layers, in the
            order of ``taps``.
        accepted: int32 ``[]``; rows 0 to ``accepted`` are committed, and what follows row
            ``accepted`` is the next primary token: after the prefill's last call and after a round.
        cache: Its keys and values. The rows stand behind the positions that are committed there as
            its arena places them (:meth:`pyengine.model.cache.Arena.batch`).
    """

    hidden: mx.array
    accepted: mx.array
    cache: Cache


class Reader(Protocol):
    """Who is told of the rows that the target processes: a drafter."""

    @property
    def taps(self) -> tuple[int, ...]:
        """The target's layers, from 0, whose output it reads too; () for none."""
        ...

    @classmethod
    def read(cls, readers: Sequence[Self], rows: Sequence[Processed]) -> None:
        """Rows that the target has processed, of each call of the prefill and of each round.

        Args:
            readers: Of the sequences, all of this class, and made for the same models.
            rows: Those of each.
        """
        ...


def tell(readers: Sequence[Reader | None], rows: Sequence[Processed]) -> None:
    """Have each reader read the rows of its sequence; those of one kind read together."""
    for kind in dict.fromkeys(type(reader) for reader in readers):
        own = [n for n, reader in enumerate(readers) if type(reader) is kind]
        theirs = [reader for n in own if (reader := readers[n]) is not None]
        if theirs:
            theirs[0].read(theirs, [rows[n] for n in own])


def tapped_at(hidden: mx.array, taps: tuple[int, ...], wanted: tuple[int, ...]) -> mx.array:
    """Hidden vectors with the tapped layers that are wanted, of those with all ``taps``."""
    if wanted == taps:
        return hidden
    last, *layers = mx.split(hidden, 1 + len(taps), axis=-1)
    return mx.concatenate([last, *(layers[taps.index(tap)] for tap in wanted)], axis=-1)


class Part(NamedTuple):
    """What comes next of a prompt: ids behind the positions that a cache has, and who is told of
    their rows."""

    ids: list[int]
    cache: Cache
    reader: Reader | None = None


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

    def check_alone(self, setting: str) -> None:
        """Refuse a setting that needs all of the target's keys and values here.

        Raises:
            ValueError: Other processes have parts of them.
        """

    def prompt_bytes(
        self, tokens: int, block_size: int, marks: int, beside: Sequence[LayerConfig] = ()
    ) -> int:
        """Memory for a prompt, see :func:`pyengine.model.memory.prompt_bytes`."""
        size = self.dtype.size
        return memory.prompt_bytes(self.config, tokens, block_size, marks, size, beside)

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

    def prefill_together(self, parts: Sequence[Part]) -> list[tuple[mx.array, mx.array]]:
        """Process and commit the next parts of several prompts, whose caches share an arena.
        Evaluates.

        One call does it where there are several, so these have at most as many ids as
        :func:`pyengine.model.plan.most_together` says.

        Returns:
            Of each what :meth:`prefill` gives: the bits do not depend on the others.
        """
        if len(parts) == 1:
            [(ids, cache, reader)] = parts
            return [self.prefill(ids, cache, reader=reader)]
        for ids, _, _ in parts:
            check_ids("prefill", ids, self.config.vocab_size)
        hidden = self._process(parts)
        ends = [sum(len(ids) for ids, _, _ in parts[: n + 1]) - 1 for n in range(len(parts))]
        lasts = picked(hidden, ends)
        logits = self._head(lasts).array
        return [(logits[n], lasts[n : n + 1]) for n in range(len(parts))]

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
            part = ids[start - first : start - first + rows]
            yield self._head(self._process([Part(part, cache, reader)]))

    def _process(self, parts: Sequence[Part]) -> mx.array:
        """Process and commit parts of prompts in one call: hidden vectors [R, E]. Evaluates."""
        caches = [part.cache for part in parts]
        counts = [len(part.ids) for part in parts]
        for cache, count in zip(caches, counts, strict=True):
            cache.reserve(count)  # an arena that grows has other arrays then
        arena = caches[0].arena
        arrays = arena.arrays
        try:
            wanted = [() if part.reader is None else part.reader.taps for part in parts]
            taps = tuple(dict.fromkeys(tap for own in wanted for tap in own))
            each = [mx.array(part.ids, dtype=mx.int32) for part in parts]
            hidden, tapped = self._hidden(each, caches, taps)
            owns = apart(tapped, counts)
            read = [
                Processed(tapped_at(own, taps, theirs), mx.array(count - 1, dtype=mx.int32), cache)
                for own, theirs, count, cache in zip(owns, wanted, counts, caches, strict=True)
            ]
            tell([part.reader for part in parts], read)  # before the lengths are others
            for cache, count in zip(caches, counts, strict=True):
                cache.settle(cache.committed + count)
            with self.waiting():
                mx.eval(hidden, tapped, arena.arrays, [cache.length for cache in caches])
            mapped.check("prefill")
        except Exception:  # what failed would fail again, and others have pages there
            arena.take_results(arrays)
            raise
        return hidden

    def forward(
        self,
        ids: Sequence[mx.array],
        caches: Sequence[Cache],
        taps: tuple[int, ...] = (),
        branches: Branches | None = None,
    ) -> tuple[Logits, mx.array]:
        """Run each sequence's ids [T] behind the committed positions of its cache; writes keys and
        values, commits nothing. The caches share an arena. Rows of all sequences are processed
        together.

        With ``branches`` the ids of a sequence, at most 16, are a tree behind those positions: each
        row has the bits of a plain step behind its ancestors. The path that is committed has its
        keys and values moved first (:meth:`pyengine.model.cache.Arena.keep_path`).

        Returns:
            Of the R rows, sequence by sequence: logits [R, V], float32, after the softcap, none of
            them made until they are asked for; hidden vectors [R, E], after the last norm; with n
            taps [R, (1 + n) * E], behind them those that left the tapped layers.
        """
        hidden, tapped = self._hidden(ids, caches, taps, branches=branches)
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

    def leave(
        self, depth: int, ids: Sequence[mx.array], caches: Sequence[Cache]
    ) -> tuple[Logits, mx.array]:
        """The first ``depth`` layers alone, as :meth:`exit`, of rows that may go on or not: behind
        it comes :meth:`go_on` or :meth:`skip`, before anything is committed.

        Returns:
            Of the R rows: logits [R, V] of the last norm and the head; the residual stream behind
            the layers [R, E], which the layer behind them reads.
        """
        hidden, tapped = self._hidden(ids, caches, (depth - 1,), depth)
        return self._head(hidden), tapped[:, self.config.hidden_size :]

    def go_on(
        self, depth: int, stream: mx.array, ids: Sequence[mx.array], caches: Sequence[Cache]
    ) -> Logits:
        """The layers behind the first ``depth``, on what :meth:`leave` gave for the same ids.

        Returns:
            The bits of :meth:`forward`: logits [R, V].
        """
        arena, rows = caches[0].arena, _rows([own.size for own in ids], caches)
        h, per_layer = arena.after_reads(stream), None
        if self.config.per_layer_width:
            tokens = packed(ids)
            per_layer = self._per_layer_inputs(tokens, self.embed(tokens))
        x = self._layers(depth, len(self.layers), h, per_layer, rows, [])
        arena.note_read(x)
        return self._head(x)

    def skip(self, depth: int, stream: mx.array, caches: Sequence[Cache]) -> list[mx.array]:
        """Keys and values of the layers behind the first ``depth``, for rows that left there, one
        per sequence: each layer makes them of ``stream`` as if it were its own input.

        Returns:
            The keys of the layers that were written, lazy; none where all of them share.

        Source: state propagation of CALM, https://arxiv.org/abs/2207.07061.
        """
        arena, rows = caches[0].arena, _rows([1] * len(caches), caches)
        h, written = arena.after_reads(stream), []
        for i, layer in list(enumerate(self.layers))[depth:]:
            attention = layer.attention
            if attention.k is None or attention.k_norm is None:
                continue
            x = ops.rms_norm(h, layer.input_norm, self.config.eps)
            k, *v = side_by_side([m for m in (attention.k, attention.v) if m is not None], x)
            self._write(i, k, attention.k_norm, k, v[0] if v else k, rows)  # no query is asked
            written.append(arena.slots(i)[0])
        return written

    def writes_behind(self, depth: int) -> bool:
        """Whether a layer behind the first ``depth`` has keys and values of its own."""
        return any(layer.attention.k is not None for layer in self.layers[depth:])

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
        branches: Branches | None = None,
    ) -> tuple[mx.array, mx.array]:
        """Post-final-norm hidden vectors [R, E] of each sequence's ids; the same with what left the
        tapped layers behind them, [R, (1 + taps) * E]. Keys and values go to the arena. ``depth``
        and ``ahead`` as :meth:`exit`, ``branches`` as :meth:`forward`."""
        layers = self.layers[:depth]
        for own, cache in zip(each, caches, strict=True):
            cache.reserve(ahead + own.size)
        arena = caches[0].arena
        rows = _rows([own.size for own in each], caches, ahead, branches)
        ids = arena.after_reads(packed(each))
        h, left = self.embed(ids), list[mx.array]()  # by layer, the residual stream behind it
        per_layer = self._per_layer_inputs(ids, h) if self.config.per_layer_width else None
        x = self._layers(0, len(layers), h, per_layer, rows, left)
        arena.note_read(x)
        return x, mx.concatenate([x, *(left[tap] for tap in taps)], axis=-1) if taps else x

    def _layers(
        self,
        first: int,
        end: int,
        h: mx.array,
        per_layer: list[mx.array] | None,
        rows: Rows,
        left: list[mx.array],
    ) -> mx.array:
        """Layers ``first`` to ``end - 1`` on a residual stream, and the last norm; to ``left`` goes
        the stream behind each."""
        eps = self.config.eps
        x = ops.rms_norm(h, self.layers[first].input_norm, eps)
        for i in range(first, end):
            layer = self.layers[i]
            next_norm = self.norm if i + 1 == end else self.layers[i + 1].input_norm
            y = self._attention(i, x, rows)
            weight, following = layer.post_attention_norm, layer.pre_mlp_norm
            h, x = ops.residual_norm(h, y, weight, next_weight=following, eps=eps)
            y = layer.mlp(x)
            if layer.experts is not None:
                y = with_experts(layer.experts, h, y, self.config.num_experts_used, eps)
            weight = layer.post_mlp_norm
            if layer.per_layer is not None and per_layer is not None:
                h, _ = ops.residual_norm(h, y, weight, eps=eps)
                y = ops.glu(layer.per_layer.gate(h), per_layer[i])
                y = layer.per_layer.projection(y)
                weight = layer.per_layer.norm
            h, x = ops.residual_norm(
                h, y, weight, scalar=layer.scalar, next_weight=next_norm, eps=eps
            )
            left.append(h)
        return x

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
            q = self._write(i, q, attention.q_norm, k, v, rows)
        out = ops.block_attention(
            q,
            *arena.slots(geometry.kv_source),
            rows.batch.lengths,
            tables,
            rows.counts,
            window=self.config.window if geometry.sliding else None,
            depths=None if rows.branches is None else rows.branches.depths,
            ancestors=None if rows.branches is None else rows.branches.ancestors,
        )
        return attention.o(out.reshape(R, -1))

    def _write(
        self, i: int, q: mx.array, q_norm: mx.array, k: mx.array, v: mx.array, rows: Rows
    ) -> mx.array:
        """Write keys and values of layer i, which has its own, made of what its matrices gave.

        Returns:
            The queries, normed and turned.
        """
        layer, arena = self.layers[i], rows.batch.arena
        attention, to = layer.attention, (rows.positions, rows.owners)
        assert attention.k_norm is not None
        norms, tables = (q_norm, attention.k_norm), rows.batch.tables[layer.config.sliding]
        own = (*norms, attention.inv_freq, *arena.slots(i), *to, tables, self.config.eps)
        q, keys, values = ops.prepare_qkv(q, k, v, *own, slots=rows.slots)
        arena.store(i, keys, values)
        return q

    def _per_layer_inputs(self, ids: mx.array, h: mx.array) -> list[mx.array]:
        """The second embedding of E2B and E4B, [T, P] a layer; float32 until its one rounding."""
        L, P = len(self.layers), self.config.per_layer_width
        table = self.per_layer_table.rows(ids, self.per_layer_scale, mx.float32)  # [T, L * P]
        context = self.per_layer_projection(h, mx.float32) * self.config.hidden_size**-0.5
        context = ops.rms_norm(context.reshape(-1, L, P), self.per_layer_norm, self.config.eps)
        both = (context.reshape(table.shape) + table) * 2**-0.5
        return list(mx.split(both.astype(self.dtype), L, axis=-1))


def _rows(
    counts: Sequence[int],
    caches: Sequence[Cache],
    ahead: int = 0,
    branches: Branches | None = None,
) -> Rows:
    """So many rows of each sequence, ``ahead`` positions behind those that are committed."""
    batch = caches[0].arena.batch(caches).ahead(ahead)
    positions, owners = batch.rows(counts)
    if branches is None:
        return Rows(batch, counts, positions, owners)
    steps = mx.array([t for T in counts for t in range(T)], dtype=mx.int32)
    return Rows(batch, counts, positions - steps + branches.depths, owners, positions, branches)


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
