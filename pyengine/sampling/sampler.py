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
from pyengine.ops.filter_logits import Edits, Filtered
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

    The host keeps what the settings ask to know of the text (:meth:`add`); a round gets it as
    arrays (:attr:`listed`, :meth:`with_listed`), and all other methods build on those.

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

    def add(self, tokens: Iterable[int]) -> None:
        """Count tokens of the text."""
        if self._penalises:
            self._counts.update(tokens)
            self._ids.update(self._counts)
            self.listed = self._list()

    def with_listed(self, listed: Listed | None) -> Sampler:
        """The same over other arrays: those of a recorded round."""
        other = copy.copy(self)
        other.listed = listed
        return other

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
        sampling = self.sampling
        drafts = mx.zeros(0, mx.int32) if drafts is None else drafts
        settings: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "edits": self.edits(drafts, first),
        }
        if isinstance(logits, Logits) and sampling.logprobs is None:
            return logits.filter(**settings)
        return ops.filter_logits(whole(logits), **settings)

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
