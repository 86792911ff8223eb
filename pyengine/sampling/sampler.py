"""Sampling settings bound to one text: edit logits, filter them, draw, accept.

A distribution over the vocabulary is held as its candidates, best first: at most ``top_k`` ids per
row when top-k is on, all V otherwise. Greedy decoding is the distribution with one candidate of
probability 1, so no rule needs a second form for it. Nothing here evaluates an array.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from pyengine import ops
from pyengine.model.head import Logits, whole
from pyengine.model.rows import apart
from pyengine.ops.filter_logits import Edits, Filtered
from pyengine.sampling.mask import filter_masked
from pyengine.sampling.settings import Sampling

# Lists of edited logits grow in steps, so that few rounds differ in their shapes
LIST_STEP = 64


class Logprob(NamedTuple):
    """Log-probability of a token, and the best tokens with theirs, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Listed(NamedTuple):
    """The tokens whose logits are edited, ``[L]`` each, ids rising; the last may repeat."""

    ids: mx.array  # int32
    counts: mx.array  # in the text, float32
    seen: mx.array  # in the prompt or the text, bool
    bias: mx.array  # float32; -inf for suppressed tokens


class Sampler:
    """How the tokens of one text are chosen: its settings, its seed, and the tokens so far.

    The host keeps what the settings ask to know of the text (:meth:`add`); a round gets it and the
    seed as arrays (:attr:`listed`, :meth:`with_arrays`), and all other methods build on those.
    Where a grammar says what may come next, :attr:`masks` has a row for each row that is filtered,
    see :func:`pyengine.sampling.mask.filter_masked`.

    Args:
        sampling: The settings; with a seed, unless they are greedy.
        prompt: Token ids.
        vocab: V.

    Raises:
        ValueError: The settings name an id outside the vocabulary, or suppress all of it.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab: int) -> None:
        named = {*sampling.suppress_tokens, *sampling.logit_bias}
        wrong = sorted(token for token in named if token >= vocab)
        if wrong:
            raise ValueError(
                "[sampling] suppress_tokens and logit_bias must name ids below "
                f"{vocab} but got {wrong[0]}."
            )
        if len(set(sampling.suppress_tokens)) == vocab:
            raise ValueError("[sampling] suppress_tokens must leave a token but got all.")
        self.sampling = sampling
        self.vocab = vocab
        self.seed = mx.array(sampling.seed or 0, dtype=mx.uint32)
        self._penalises = sampling.penalises
        self._bias = dict(sampling.logit_bias) | dict.fromkeys(sampling.suppress_tokens, -math.inf)
        self._counts: Counter[int] = Counter()
        self._ids = {*self._bias, *(prompt if self._penalises else ())}
        self._seen = set(prompt)
        self.listed = self._list()
        self.masks: mx.array | None = None

    def add(self, tokens: Iterable[int]) -> None:
        """Count tokens of the text."""
        if self._penalises:
            self._counts.update(tokens)
            self._ids.update(self._counts)
            self.listed = self._list()

    def with_arrays(
        self, seed: mx.array, listed: Listed | None, masks: mx.array | None = None
    ) -> Sampler:
        """The same over other arrays: those of a recorded round."""
        other = copy.copy(self)
        other.seed, other.listed, other.masks = seed, listed, masks
        return other

    @property
    def settings(self) -> tuple[Any, ...]:
        """What a round's graph depends on: all but what it gets as arrays."""
        own, in_arrays = self.sampling, ("seed", "suppress_tokens", "logit_bias")
        return tuple(value for name, value in own.__dict__.items() if name not in in_arrays)

    @property
    def edits_rows(self) -> bool:
        """Whether logits are changed before they are filtered."""
        return self.listed is not None or self.masks is not None

    def _list(self) -> Listed | None:
        """The tokens to edit in the next round; None where there are none."""
        if not self._ids:
            return None
        ids = sorted(self._ids)
        ids += ids[-1:] * (-len(ids) % LIST_STEP)
        return Listed(
            mx.array(ids, dtype=mx.int32),
            mx.array([float(self._counts[i]) for i in ids]),
            mx.array([i in self._seen or self._counts[i] > 0 for i in ids]),
            mx.array([self._bias.get(i, 0.0) for i in ids]),
        )

    def edits(self, drafts: mx.array, first: int) -> Edits | None:
        """Penalties, bias and suppressed tokens of rows ``first`` to k.

        Row t follows drafts 1 to t of its own block, so they count in it.

        Args:
            drafts: The block's drafts, int32 ``[k]``; k may be 0.
            first: First row wanted, at most k.
        """
        if self.listed is None:
            return None
        k, sampling = drafts.shape[0], self.sampling
        rows = k + 1 - first
        if not self._penalises:
            shape = (rows, self.listed.ids.shape[0])
            bias = mx.broadcast_to(self.listed.bias, shape)
            return Edits(self.listed.ids, mx.ones(shape), bias)
        ids, counts, seen, bias = self.listed
        if k:
            # A draft that is not listed yet has no count, no bias
            match = drafts[:, None] == ids
            known, at = match.any(axis=-1), mx.argmax(match, axis=-1)
            ids = mx.concatenate([ids, drafts])
            counts = mx.concatenate([counts, mx.where(known, counts[at], 0)])
            seen = mx.concatenate([seen, known & seen[at]])
            bias = mx.concatenate([bias, mx.where(known, bias[at], 0)])
            own = (drafts[:, None] == ids).astype(mx.float32)  # [k, L + k]
            before = mx.arange(k) < mx.arange(first, k + 1)[:, None]  # [rows, k]
            own = mx.where(before[:, :, None], own, 0).sum(axis=1)
            counts, seen = counts + own, seen | (own > 0)
        else:
            counts, seen = counts[None], seen[None]
        deltas = mx.where(counts > 0, bias - sampling.presence_penalty, bias)
        deltas = deltas - sampling.frequency_penalty * counts
        return Edits(ids, mx.where(seen, sampling.repetition_penalty, 1.0), deltas)

    def filter(
        self, logits: mx.array | Logits, drafts: mx.array | None = None, first: int = 0
    ) -> Filtered:
        """The distribution that is sampled, of rows ``first`` to k of a block with these drafts.

        Logits that are not made yet stay so, unless logprobs want them too.

        Args:
            logits: ``[k + 1 - first, V]`` float32, after the softcap.
            drafts: int32 ``[k]``; None where there are none.
            first: The row of the block that ``logits`` begins with.
        """
        drafts = mx.zeros(0, mx.int32) if drafts is None else drafts
        settings = {**self._filter, "edits": self.edits(drafts, first)}
        if self.masks is not None:
            return filter_masked(whole(logits), self.masks, **settings)
        if isinstance(logits, Logits) and self.sampling.logprobs is None:
            return logits.filter(**settings)
        return ops.filter_logits(whole(logits), **settings)

    @property
    def _filter(self) -> dict[str, Any]:
        names = ("temperature", "top_k", "top_p", "min_p")
        return {name: getattr(self.sampling, name) for name in names}

    def draw(self, row: Filtered, position: mx.array, index: int = 0) -> mx.array:
        """Draw the token for the absolute position ``position + index``, as plain decoding does:
        int32 ``[1]``."""
        if self.sampling.greedy:
            return row.ids[:, 0]
        return ops.draw_token(row.ids, row.probs, position, self.seed, index=index, shared=True)

    def draw_draft(self, row: Filtered, position: mx.array, i: int) -> mx.array:
        """Draw draft i, from 0, of the block that begins at ``position``: int32 ``[1]``."""
        if self.sampling.verify == "coupled":
            # The block's first token is drawn already: draft i is the token at position + 1 + i
            return self.draw(row, position, i + 1)
        if self.sampling.greedy:
            return row.ids[:, 0]
        return ops.draw_token(row.ids, row.probs, position, self.seed, index=i, shared=False)

    def accept(
        self, p: Filtered, q: Filtered, drafts: mx.array, position: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Drafts kept, int32 ``[]``, and the token that follows them, int32 ``[1]``."""
        return ops.accept_block(
            p.ids,
            p.probs,
            q.ids,
            q.probs,
            drafts,
            position,
            self.seed,
            rule=self.sampling.verify,
            vocab=self.vocab,
        )

    def logprobs(self, logits: mx.array | Logits, tokens: mx.array) -> mx.array | None:
        """Log-probabilities of one token per row and of the best n: ``[T, 1 + 2 * n]``.

        As int32, to be read with the tokens: the token's, then ids, then theirs; floats by their
        bits. None where the settings do not ask for them.
        """
        count = self.sampling.logprobs
        if count is None:
            return None
        logits = whole(logits)
        total = mx.logsumexp(logits, axis=-1, keepdims=True)
        parts = [tokens[:, None]]
        if count:
            parts.append(ops.filter_logits(logits, top_k=count).ids)
        ids = mx.concatenate(parts, axis=-1)
        values = (mx.take_along_axis(logits, ids, axis=-1) - total).view(mx.int32)
        return mx.concatenate([values[:, :1], ids[:, 1:], values[:, 1:]], axis=-1)


def filter_together(
    logits: mx.array | Logits,
    samplers: Sequence[Sampler],
    drafts: Sequence[mx.array],
    first: int = 0,
) -> list[Filtered]:
    """:meth:`Sampler.filter` of each of several texts, whose rows stand one behind the other.

    One call filters the rows of all where their settings are the same and edit nothing. Else the
    logits are made once for all, and filtered text by text; the bits are the same.
    """
    one, *others = samplers
    if not others:
        return [one.filter(logits, drafts[0], first)]
    counts = [own.shape[0] + 1 - first for own in drafts]
    if all(s._filter == one._filter and not s.edits_rows for s in samplers):
        logprobs = any(s.sampling.logprobs is not None for s in samplers)
        found = one.filter(whole(logits) if logprobs else logits, first=0)
        parts = [apart(part, counts) for part in found]
        return [Filtered(*each) for each in zip(*parts, strict=True)]
    rows = apart(whole(logits), counts)
    each = zip(samplers, rows, drafts, strict=True)
    return [sampler.filter(own, before, first) for sampler, own, before in each]
