"""A round on the device: draft, verify, accept, commit.

It takes a block of each of several sequences. What treats rows alone runs once for the rows of all;
what has to do with one sequence's cache, settings or noise runs for each. So the bits of a sequence
do not depend on the others, and a single one is a list of one: no node of its graph is there for
the sake of more.

A round is one lazy graph of fixed shapes, recorded once and played again, and the host reads one
small array of it. Without drafts it is a step of plain decoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from pyengine.drafters.drafter import Asked, Drafter, TargetLike
from pyengine.engine.recorded import recorded
from pyengine.engine.report import Report
from pyengine.model.cache import Cache
from pyengine.model.head import Logits, whole
from pyengine.model.rows import apart, packed
from pyengine.ops import dispatch
from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.sampler import Listed, Sampler, filter_together


class State(NamedTuple):
    """What a round of a sequence starts from."""

    primary: mx.array  # int32 [1]: known, not processed
    seed: mx.array
    listed: Listed | None
    drafter: list[mx.array]
    cache: list[mx.array]
    masks: mx.array | None = None  # of the rows that are filtered, where a grammar says


class Block(NamedTuple):
    """The primary token and its drafts, and what these were drawn from."""

    ids: mx.array  # int32 [k + 1]
    drafts: mx.array  # int32 [k]
    q: Filtered | None  # k rows; None where k is 0


class Outcome(NamedTuple):
    """What a round gives a sequence: what its next one starts from."""

    primary: mx.array
    drafter: list[mx.array]
    cache: list[mx.array]  # the length alone where the rest was written in place


class Played(NamedTuple):
    """What a round gives: the host's array, report after report, and the outcomes."""

    report: mx.array
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class Parts:
    """What the rounds of one sequence work with."""

    target: TargetLike
    drafter: Drafter | None  # None for plain decoding
    cache: Cache
    sampler: Sampler

    def state(self, primary: mx.array) -> State:
        arrays = [] if self.drafter is None else self.drafter.arrays
        own = self.sampler
        return State(primary, own.seed, own.listed, arrays, self.cache.arrays, own.masks)

    def with_state(self, state: State) -> Parts:
        """The same over the arrays of a state."""
        return Parts(
            self.target,
            None if self.drafter is None else self.drafter.with_arrays(state.drafter),
            self.cache.with_arrays(state.cache),
            self.sampler.with_arrays(state.seed, state.listed, state.masks),
        )

    def without_arrays(self) -> Parts:
        """What a recorded round keeps of them, which serves other sequences too."""
        none = mx.array(0, dtype=mx.int32)
        _, _, listed, drafter, cache, _ = self.state(none)
        bare = self.with_state(
            State(
                none,
                none,
                None if listed is None else Listed(none, none, none, none),
                [none] * len(drafter),
                [none] * len(cache),
            )
        )
        bare.cache.length_limit = 0  # whoever plays the round has made room for it
        return bare

    def take_results(self, outcome: Outcome, rows: int) -> None:
        """Go on with what a round of so many rows gave."""
        if self.drafter is not None:
            self.drafter.take_results(outcome.drafter)
        self.cache.take_results(outcome.cache, self.cache.length_limit + rows)


class RecordedRound:
    """A round with ks[n] drafts of sequence n, recorded: in one, or its two halves with the host in
    between."""

    def __init__(self, each: Sequence[Parts], ks: Sequence[int]) -> None:
        bare = [parts.without_arrays() for parts in each]
        self.together = recorded(partial(_together, bare, ks))
        self.draft = recorded(partial(_draft_half, bare, ks))
        self.verify = recorded(partial(_verify_half, bare))


class RecordedDraft:
    """Draft i of each of several sequences, recorded: the host stands behind each draft."""

    def __init__(self, each: Sequence[Parts], i: int) -> None:
        self.draw = recorded(partial(_draw, [parts.without_arrays() for parts in each], i))


class Drawn(NamedTuple):
    """One draft of each of several sequences."""

    report: mx.array  # int32 [2 * Q]: the drafts, then the flags of what they were drawn from
    qs: tuple[Filtered, ...]  # a row each
    drafters: tuple[list[mx.array], ...]  # what these carry on


def _with_states(each: Sequence[Parts], states: Sequence[State]) -> list[Parts]:
    return [parts.with_state(state) for parts, state in zip(each, states, strict=True)]


def _together(each: Sequence[Parts], ks: Sequence[int], states: tuple[State, ...]) -> Played:
    each = _with_states(each, states)
    return complete(each, draft(each, ks, [state.primary for state in states]))


def _draft_half(
    each: Sequence[Parts], ks: Sequence[int], states: tuple[State, ...]
) -> tuple[Block, ...]:
    # A drafter's own state is that of the round's beginning until it reads what was verified
    primaries = [state.primary for state in states]
    return tuple(draft(_with_states(each, states), ks, primaries))


def _verify_half(
    each: Sequence[Parts], states: tuple[State, ...], blocks: tuple[Block, ...]
) -> Played:
    return complete(_with_states(each, states), blocks)


def _draw(
    each: Sequence[Parts], i: int, states: tuple[State, ...], before: tuple[mx.array, ...]
) -> Drawn:
    """Draft i behind the tokens ``[i + 1]`` of each block so far; a state's mask is its row's."""
    each = _with_states(each, states)
    asked = [
        Asked(ids[i:], ids[1:], parts.cache, parts.sampler)
        for parts, ids in zip(each, before, strict=True)
    ]
    qs = _propose(i, each, asked)
    tokens = [
        parts.sampler.draw_draft(q, parts.cache.length, i)
        for parts, q in zip(each, qs, strict=True)
    ]
    drafters = [[] if parts.drafter is None else parts.drafter.arrays for parts in each]
    report = mx.concatenate([*tokens, *(q.flags for q in qs)])
    return Drawn(report, tuple(qs), tuple(drafters))


def draft(each: Sequence[Parts], ks: Sequence[int], primaries: Sequence[mx.array]) -> list[Block]:
    """Draw k drafts behind each primary token, each from what the sequence's drafter proposes."""
    blocks = [[primary] for primary in primaries]
    rows: list[list[Filtered]] = [[] for _ in each]
    for i in range(max(ks)):
        drafting = [n for n, k in enumerate(ks) if i < k]
        own = [each[n] for n in drafting]
        asked = [
            Asked(blocks[n][i], mx.concatenate(blocks[n])[1:], each[n].cache, each[n].sampler)
            for n in drafting
        ]
        for n, row in zip(drafting, _propose(i, own, asked), strict=True):
            rows[n].append(row)
            blocks[n].append(each[n].sampler.draw_draft(row, each[n].cache.length, i))
    return [_block(tokens, q) for tokens, q in zip(blocks, rows, strict=True)]


def _propose(i: int, each: Sequence[Parts], asked: Sequence[Asked]) -> list[Filtered]:
    """Draft i's distribution of each sequence; drafters of one kind propose together."""
    found: dict[int, Filtered] = {}
    for kind in dict.fromkeys(type(parts.drafter) for parts in each):
        own = [n for n, parts in enumerate(each) if type(parts.drafter) is kind]
        drafters = [drafter for n in own if (drafter := each[n].drafter) is not None]
        rows = drafters[0].propose(i, drafters, [asked[n] for n in own])
        found.update(zip(own, rows, strict=True))
    return [found[n] for n in range(len(each))]


def _block(tokens: list[mx.array], rows: list[Filtered]) -> Block:
    if not rows:
        return Block(tokens[0], mx.zeros(0, mx.int32), None)
    ids = mx.concatenate(tokens)
    q = Filtered(*(mx.concatenate(list(part)) for part in zip(*rows, strict=True)))
    return Block(ids, ids[1:], q)


def complete(each: Sequence[Parts], blocks: Sequence[Block]) -> Played:
    """Verify a block of each sequence, accept, commit."""
    logits, hidden, ps = verify(each, blocks)
    reports, outcomes = [], []
    for parts, block, rows, own, p in zip(each, blocks, logits, hidden, ps, strict=True):
        accepted, token = accept(parts, block, p)
        commit(parts, own, accepted, block.ids.shape[0])
        reports.append(_report(parts, block, rows, p, accepted, token))
        outcomes.append(_outcome(parts, token))
    return Played(packed(reports), tuple(outcomes))


def verify(
    each: Sequence[Parts], blocks: Sequence[Block]
) -> tuple[list[mx.array | Logits], list[mx.array], list[Filtered]]:
    """Of each block's k + 1 rows: the target's logits, hidden vectors and distributions.

    The logits of several sequences are made only where one reports log-probabilities.
    """
    counts = [block.ids.shape[0] for block in blocks]
    wanted = [() if parts.drafter is None else parts.drafter.taps for parts in each]
    taps = tuple(dict.fromkeys(tap for own in wanted for tap in own))
    caches = [parts.cache for parts in each]
    logits, hidden = each[0].target.forward([block.ids for block in blocks], caches, taps)
    samplers, drafts = [parts.sampler for parts in each], [block.drafts for block in blocks]
    ps = filter_together(logits, samplers, drafts)
    rows: list[mx.array | Logits] = [logits] * len(each)
    if len(each) > 1 and any(s.sampling.logprobs is not None for s in samplers):
        rows = [*apart(whole(logits), counts)]
    owns = zip(apart(hidden, counts), wanted, strict=True)
    return rows, [_tapped(own, taps, theirs) for own, theirs in owns], ps


def _tapped(hidden: mx.array, taps: tuple[int, ...], wanted: tuple[int, ...]) -> mx.array:
    """Hidden vectors with the tapped layers that are wanted, of those with all ``taps``."""
    if wanted == taps:
        return hidden
    last, *layers = mx.split(hidden, 1 + len(taps), axis=-1)
    return mx.concatenate([last, *(layers[taps.index(tap)] for tap in wanted)], axis=-1)


def accept(parts: Parts, block: Block, p: Filtered) -> tuple[mx.array, mx.array]:
    """How many drafts are kept, int32 ``[]``, and the token that follows them, ``[1]``."""
    position = parts.cache.length  # of the block's first token
    if block.q is None:
        return mx.array(0, mx.int32), parts.sampler.draw(p, position, 1)
    return parts.sampler.accept(p, block.q, block.drafts, position)


def commit(parts: Parts, hidden: mx.array, accepted: mx.array, rows: int) -> None:
    """Keep the primary token and the accepted drafts of a block of so many rows."""
    parts.cache.commit(accepted + 1, parts.cache.length_limit + rows)
    if parts.drafter is not None:
        parts.drafter.read(hidden, accepted)


def first(parts: Parts, logits: mx.array | Logits) -> Played:
    """The token after the prefill, from its last row: logits ``[1, V]``."""
    p, none = parts.sampler.filter(logits), mx.array(0, mx.int32)
    token = parts.sampler.draw(p, parts.cache.length)
    block = Block(token, mx.zeros(0, mx.int32), None)
    return Played(_report(parts, block, logits, p, none, token), (_outcome(parts, token),))


def _report(
    parts: Parts,
    block: Block,
    logits: mx.array | Logits,
    p: Filtered,
    accepted: mx.array,
    token: mx.array,
) -> mx.array:
    chosen = token  # per row: the draft that follows it, or what took its place
    if block.q is not None and parts.sampler.sampling.logprobs is not None:
        k = block.drafts.shape[0]
        drafts_and_token = mx.concatenate([block.drafts, token])
        chosen = mx.where(mx.arange(k + 1) == accepted, token, drafts_and_token)
    logprobs = parts.sampler.logprobs(logits, chosen)
    return Report.pack(accepted, token, p, block.drafts, block.q, logprobs)


def _outcome(parts: Parts, token: mx.array) -> Outcome:
    state = parts.state(token)
    # What was written in place the caller has; MLX's work grows with the square of the results
    cache = [parts.cache.length] if dispatch.in_place() else state.cache
    return Outcome(token, state.drafter, cache)
