"""How the tokens of several texts are chosen: edit logits, filter them, draw, accept.

A distribution over the vocabulary is held as its candidates, best first: at most ``top_k`` ids per
row when top-k is on, all V otherwise. Greedy decoding is the distribution with one candidate of
probability 1, so no rule needs a second form for it.

What the settings of a text are is in arrays, an entry per text, so that one graph serves whoever
is in a round. The host part of a text is its :class:`Sampler`; a :class:`Chooser` is the texts of a
round, and nothing in it evaluates an array.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx

from pyengine import ops
from pyengine.model.head import Logits, candidates, whole
from pyengine.model.rows import packed, picked
from pyengine.ops.accept_block import RULES
from pyengine.ops.filter_logits import Edits, Filtered
from pyengine.sampling.settings import Sampling

# Lists of edited logits grow in steps, so that few rounds differ in their shapes
LIST_STEP = 64
NO_TOKEN = -1  # pads lists; no id of a vocabulary


class Logprob(NamedTuple):
    """Log-probability of a token, and the best tokens with theirs, best first."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


class Listed(NamedTuple):
    """The tokens whose logits are edited, ``[Q, L]`` each, ids rising; NO_TOKEN comes first."""

    ids: mx.array  # int32
    counts: mx.array  # in the text, float32
    seen: mx.array  # in the prompt or the text, bool
    bias: mx.array  # float32; -inf for suppressed tokens


class Sampler:
    """What the host knows of how the tokens of one text are chosen: settings, tokens so far.

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
        self.penalises = sampling.penalises
        self._bias = dict(sampling.logit_bias) | dict.fromkeys(sampling.suppress_tokens, -math.inf)
        self._counts: Counter[int] = Counter()
        self._ids = {*self._bias, *(prompt if self.penalises else ())}
        self._seen = set(prompt)
        self._made: Listed | None = None

    @property
    def top_k(self) -> int:
        """Candidates of a row, 0 for all."""
        return 1 if self.sampling.greedy else self.sampling.top_k

    @property
    def most_listed(self) -> int:
        """Room for the tokens to edit in the next round; 0 where there are none."""
        return -(-len(self._ids) // LIST_STEP) * LIST_STEP

    def add(self, tokens: Iterable[int]) -> None:
        """Count tokens of the text."""
        if self.penalises:
            self._counts.update(tokens)
            self._ids.update(self._counts)
            self._made = None

    def listed(self, room: int) -> Listed:
        """The tokens to edit in the next round, ``[1, room]``."""
        if self._made is None or self._made.ids.shape[1] != room:
            ids = sorted(self._ids)
            ids = [NO_TOKEN] * (room - len(ids)) + ids
            self._made = Listed(
                mx.array([ids], dtype=mx.int32),
                mx.array([[float(self._counts[i]) for i in ids]]),
                mx.array([[i in self._seen or self._counts[i] > 0 for i in ids]]),
                mx.array([[self._bias.get(i, 0.0) for i in ids]]),
            )
        return self._made


class Settings(NamedTuple):
    """Settings of Q texts, ``[Q]`` each."""

    temperature: mx.array
    top_k: mx.array
    top_p: mx.array
    min_p: mx.array
    seed: mx.array  # uint32
    rule: mx.array  # int32, place in RULES
    coupled: mx.array  # bool: drafts are drawn with the noise of the token that they stand for
    lead: mx.array  # int32, the same as a number: how far that is ahead of other drafts

    @staticmethod
    def of(samplers: Sequence[Sampler]) -> Settings:
        each = [sampler.sampling for sampler in samplers]
        rules = [RULES.index(s.verify) for s in each]
        return Settings(
            mx.array([1.0 if s.greedy else s.temperature for s in each]),
            mx.array([sampler.top_k for sampler in samplers], dtype=mx.int32),
            mx.array([s.top_p for s in each]),
            mx.array([s.min_p for s in each]),
            mx.array([s.seed or 0 for s in each], dtype=mx.uint32),
            mx.array(rules, dtype=mx.int32),
            mx.array([s.verify == "coupled" for s in each]),
            mx.array([int(s.verify == "coupled") for s in each], dtype=mx.int32),
        )


class Penalties(NamedTuple):
    """Of Q texts, float32 ``[Q, 1]`` each."""

    repetition: mx.array
    presence: mx.array
    frequency: mx.array

    @staticmethod
    def of(samplers: Sequence[Sampler]) -> Penalties:
        each = [sampler.sampling for sampler in samplers]
        return Penalties(
            mx.array([[s.repetition_penalty] for s in each]),
            mx.array([[s.presence_penalty] for s in each]),
            mx.array([[s.frequency_penalty] for s in each]),
        )


class Form(NamedTuple):
    """What a round's graph depends on of the settings of texts; their values are in arrays."""

    width: int  # the largest top_k; 0: all V
    room: int  # L, 0 where no text edits
    penalises: bool

    @staticmethod
    def of(samplers: Sequence[Sampler]) -> Form:
        return Form(
            0 if any(s.top_k == 0 for s in samplers) else max(s.top_k for s in samplers),
            max(sampler.most_listed for sampler in samplers),
            any(sampler.penalises for sampler in samplers),
        )


class Choices(NamedTuple):
    """What a round is told of its texts: arrays that a recorded one gets anew."""

    settings: Settings
    penalties: Penalties | None  # None where no text penalises
    listed: tuple[Listed, ...]  # [1, L] of each text; none where no text edits
    masks: mx.array | None = None  # what grammars leave of each row, as filter_logits takes it

    @staticmethod
    def of(samplers: Sequence[Sampler], form: Form) -> Choices:
        penalties = Penalties.of(samplers) if form.penalises else None
        return Choices(Settings.of(samplers), penalties, ()).with_lists(samplers, form)

    def with_lists(self, samplers: Sequence[Sampler], form: Form) -> Choices:
        """The same for the tokens so far: settings do not change."""
        if not form.room:
            return self
        return self._replace(listed=tuple([s.listed(form.room) for s in samplers]))


@dataclass(frozen=True)
class Chooser:
    """How the tokens of Q texts are chosen, which all have top-k or all have none."""

    form: Form
    vocab: int
    choices: Choices

    @staticmethod
    def of(samplers: Sequence[Sampler]) -> Chooser:
        form = Form.of(samplers)
        return Chooser(form, samplers[0].vocab, Choices.of(samplers, form))

    def filter(
        self,
        logits: mx.array | Logits,
        owner: Sequence[int],
        drafts: mx.array | None = None,
        before: Sequence[int] = (),
    ) -> Filtered:
        """The distributions that are sampled. Logits that are not made yet stay so. Where there are
        masks there must be one per row.

        Args:
            logits: ``[R, V]`` float32, after the softcap.
            owner: The text of each row.
            drafts: Of each text's block, int32 ``[Q, K]``, NO_TOKEN past its own; None where there
                are none. Penalties count those before a row.
            before: How many of them stand before each row; none is the same as 0 of all.
        """
        settings = self.choices.settings
        how: dict[str, Any] = {
            "temperature": settings.temperature,
            "top_k": settings.top_k,
            "top_p": settings.top_p,
            "min_p": settings.min_p,
            "owner": mx.array(list(owner), dtype=mx.int32),
            "width": self.form.width,
            "mask": self.choices.masks,
            "edits": self._edits(owner, drafts, before),
        }
        return candidates(logits, **how)

    def for_texts(self, places: Sequence[int]) -> Chooser:
        """The same with the masks of these texts, where each text has one row."""
        masks = self.choices.masks
        if masks is None:
            return self
        return replace(self, choices=self.choices._replace(masks=picked(masks, places)))

    def _edits(
        self, owner: Sequence[int], drafts: mx.array | None, before: Sequence[int]
    ) -> Edits | None:
        """Penalties, bias and suppressed tokens of rows."""
        if not self.form.room:
            return None
        each = self.choices.listed
        ids, counts, seen, bias = (packed(list(parts)) for parts in zip(*each, strict=True))
        Q, R = len(each), len(owner)

        def of_rows(a: mx.array) -> mx.array:  # of one text they broadcast
            return a if Q == 1 else picked(a, owner)

        penalties = self.choices.penalties
        if penalties is None:
            shape = (R, self.form.room)
            return Edits(ids, mx.ones(shape), mx.broadcast_to(of_rows(bias), shape))
        if drafts is not None and any(before):
            # A draft that is not listed yet has no count, no bias
            match = drafts[:, :, None] == ids[:, None]  # [Q, K, L]
            known, at = match.any(axis=-1), mx.argmax(match, axis=-1)
            ids = mx.concatenate([ids, drafts], axis=1)
            counts = _with_drafts(counts, known, at)
            seen = _with_drafts(seen, known, at)
            bias = _with_drafts(bias, known, at)
            own = (drafts[:, :, None] == ids[:, None]).astype(mx.float32)  # [Q, K, L + K]
            counted = mx.arange(drafts.shape[1]) < mx.array(list(before))[:, None]  # [R, K]
            own = mx.where(counted[:, :, None], of_rows(own), 0).sum(axis=1)
            counts, seen = of_rows(counts) + own, of_rows(seen) | (own > 0)
        else:
            counts, seen = of_rows(counts), of_rows(seen)
        bias = of_rows(bias)
        deltas = mx.where(counts > 0, bias - of_rows(penalties.presence), bias)
        deltas = deltas - of_rows(penalties.frequency) * counts
        factors = mx.where(seen, of_rows(penalties.repetition), 1.0)
        shape = (R, ids.shape[1])
        return Edits(ids, mx.broadcast_to(factors, shape), mx.broadcast_to(deltas, shape))

    def ranking(self, width: int) -> Chooser:
        """The same without temperature and cuts: so many candidates of each row, best first."""
        settings = self.choices.settings
        one = mx.ones(settings.seed.shape)
        cut = {"top_k": mx.full(one.shape, width, mx.int32), "top_p": one, "min_p": 0 * one}
        settings = settings._replace(temperature=one, **cut)
        choices = self.choices._replace(settings=settings)
        return replace(self, form=self.form._replace(width=width), choices=choices)

    def draw(
        self,
        rows: Filtered,
        position: mx.array,
        index: int = 0,
        owner: Sequence[int] | None = None,
    ) -> mx.array:
        """Draw each row's token for its absolute position ``position + index``, as plain decoding
        does: int32 ``[R]``. Row n is text n's, or that of text ``owner[n]``."""
        seed = self.choices.settings.seed
        if owner is not None:
            seed = picked(seed, owner)
        return _drawn(rows, position, index, seed, mx.full(seed.shape, True))

    def draw_drafts(
        self, rows: Filtered, own: Sequence[int], position: mx.array, i: int
    ) -> mx.array:
        """Draw draft i, from 0, of the blocks of some texts: int32 ``[len(own)]``.

        Args:
            rows: Of these texts.
            own: Their places.
            position: Where draft i is drawn at with index i, of all texts
                (:meth:`draft_position`).
            i: Which one.
        """
        settings = self.choices.settings
        position, seed, shared = (
            picked(a, own) for a in (position, settings.seed, settings.coupled)
        )
        return _drawn(rows, position, i, seed, shared)

    def draft_position(self, position: mx.array) -> mx.array:
        """Where drafts of blocks that begin at ``position`` are drawn: those that are coupled are
        the tokens behind the first, which is drawn already."""
        return position + self.choices.settings.lead

    def accept(
        self,
        p: Filtered,
        q: Filtered | None,
        drafts: mx.array,
        position: mx.array,
        ks: Sequence[int],
    ) -> tuple[mx.array, mx.array]:
        """Drafts kept of each text's block, and the token that follows them, int32 ``[Q]`` each; q
        is None where there are no drafts."""
        settings = self.choices.settings
        if q is None:
            return mx.zeros(len(ks), dtype=mx.int32), self.draw(p, position, 1)
        state = (drafts, position, settings.seed, settings.rule)
        counts = [k + 1 for k in ks]
        return ops.accept_block(*p[:2], *q[:2], *state, counts=counts, vocab=self.vocab)


def _drawn(
    rows: Filtered, position: mx.array, index: int, seed: mx.array, shared: mx.array
) -> mx.array:
    """A token of each row; of one candidate there is nothing to draw."""
    if rows.ids.shape[1] == 1:
        return rows.ids[:, 0]
    index_ = mx.full(seed.shape, index, mx.int32)
    return ops.draw_token(rows.ids, rows.probs, position, index_, seed, shared)


def _with_drafts(listed: mx.array, known: mx.array, at: mx.array) -> mx.array:
    """What is listed ``[Q, L]``, and behind it the same of drafts, which are listed at those places
    or are not known."""
    own = mx.where(known, mx.take_along_axis(listed, at, axis=1), 0)
    return mx.concatenate([listed, own.astype(listed.dtype)], axis=1)


def logprobs(logits: mx.array | Logits, tokens: mx.array, count: int) -> mx.array:
    """Log-probabilities of one token per row and of the best n: ``[T, 1 + 2 * n]``.

    As int32, to be read with the tokens: the token's, then ids, then theirs; floats by their bits.
    """
    logits = whole(logits)
    total = mx.logsumexp(logits, axis=-1, keepdims=True)
    parts = [tokens[:, None]]
    if count:
        parts.append(ops.filter_logits(logits, top_k=count).ids)
    ids = mx.concatenate(parts, axis=-1)
    values = (mx.take_along_axis(logits, ids, axis=-1) - total).view(mx.int32)
    return mx.concatenate([values[:, :1], ids[:, 1:], values[:, 1:]], axis=-1)
