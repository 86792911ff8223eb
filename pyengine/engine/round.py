"""A round on the device: draft, verify, accept, commit.

It is one lazy graph of fixed shapes, recorded once and played again, and the host reads one small
array of it. Without drafts it is a step of plain decoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from pyengine.drafters.drafter import Drafter, TargetLike
from pyengine.engine.recorded import recorded
from pyengine.engine.report import Report
from pyengine.model.cache import Cache
from pyengine.model.head import Logits
from pyengine.ops import dispatch
from pyengine.ops.filter_logits import Filtered
from pyengine.sampling.sampler import Listed, Sampler


class State(NamedTuple):
    """What a round starts from."""

    primary: mx.array  # int32 [1]: known, not processed
    listed: Listed | None
    drafter: list[mx.array]
    cache: list[mx.array]


class Block(NamedTuple):
    """The primary token and its drafts, and what these were drawn from."""

    ids: mx.array  # int32 [k + 1]
    drafts: mx.array  # int32 [k]
    q: Filtered | None  # k rows; None where k is 0


class Outcome(NamedTuple):
    """What a round gives: the host's array, and what the next one starts from."""

    report: mx.array
    primary: mx.array
    drafter: list[mx.array]
    cache: list[mx.array]  # the length alone where the rest was written in place


@dataclass(frozen=True)
class Parts:
    """What the rounds of one generation work with."""

    target: TargetLike
    drafter: Drafter | None  # None for plain decoding
    cache: Cache
    sampler: Sampler

    def state(self, primary: mx.array) -> State:
        arrays = [] if self.drafter is None else self.drafter.arrays
        return State(primary, self.sampler.listed, arrays, self.cache.arrays)

    def with_state(self, state: State) -> Parts:
        """The same over the arrays of a state."""
        return Parts(
            self.target,
            None if self.drafter is None else self.drafter.with_arrays(state.drafter),
            self.cache.with_arrays(state.cache),
            self.sampler.with_listed(state.listed),
        )

    def take_results(self, outcome: Outcome, rows: int) -> None:
        """Go on with what a round of so many rows gave."""
        if self.drafter is not None:
            self.drafter.take_results(outcome.drafter)
        self.cache.take_results(outcome.cache, self.cache.length_limit + rows)


class RecordedRound:
    """A round with k drafts, recorded: in one, or its two halves with the host in between."""

    def __init__(self, parts: Parts, k: int) -> None:
        self.together = recorded(partial(_together, parts, k))
        self.draft = recorded(partial(_draft_half, parts, k))
        self.verify = recorded(partial(_verify_half, parts))


def _together(parts: Parts, k: int, state: State) -> Outcome:
    parts = parts.with_state(state)
    return complete(parts, draft(parts, k, state.primary))


def _draft_half(parts: Parts, k: int, state: State) -> Block:
    # A drafter's own state is that of the round's beginning until it reads what was verified
    return draft(parts.with_state(state), k, state.primary)


def _verify_half(parts: Parts, state: State, block: Block) -> Outcome:
    return complete(parts.with_state(state), block)


def draft(parts: Parts, k: int, primary: mx.array) -> Block:
    """Draw k drafts behind the primary token, each from what the drafter proposes there."""
    block, rows = [primary], []
    for i in range(k):
        assert parts.drafter is not None
        before = mx.concatenate(block)[1:]
        edited = partial(parts.sampler.filter, drafts=before, first=i)
        rows.append(parts.drafter.propose(i, block[i], parts.cache, edited))
        block.append(parts.sampler.draw_draft(rows[i], parts.cache.length, i))
    if not k:
        return Block(primary, mx.zeros(0, mx.int32), None)
    ids = mx.concatenate(block)
    q = Filtered(*(mx.concatenate(list(part)) for part in zip(*rows, strict=True)))
    return Block(ids, ids[1:], q)


def complete(parts: Parts, block: Block) -> Outcome:
    """Verify a block, accept, commit."""
    logits, hidden, p = verify(parts, block)
    accepted, token = accept(parts, block, p)
    commit(parts, hidden, accepted, block.ids.shape[0])
    return _outcome(parts, block, logits, p, accepted, token)


def verify(parts: Parts, block: Block) -> tuple[mx.array | Logits, mx.array, Filtered]:
    """The target's logits, hidden vectors and distributions of the block's k + 1 rows."""
    taps = () if parts.drafter is None else parts.drafter.taps
    logits, hidden = parts.target.forward(block.ids, parts.cache, taps)
    return logits, hidden, parts.sampler.filter(logits, block.drafts)


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


def first(parts: Parts, logits: mx.array | Logits) -> Outcome:
    """The token after the prefill, from its last row: logits ``[1, V]``."""
    p, none = parts.sampler.filter(logits), mx.array(0, mx.int32)
    token = parts.sampler.draw(p, parts.cache.length)
    return _outcome(parts, Block(token, mx.zeros(0, mx.int32), None), logits, p, none, token)


def _outcome(
    parts: Parts,
    block: Block,
    logits: mx.array | Logits,
    p: Filtered,
    accepted: mx.array,
    token: mx.array,
) -> Outcome:
    chosen = token  # per row: the draft that follows it, or what took its place
    if block.q is not None and parts.sampler.sampling.logprobs is not None:
        k = block.drafts.shape[0]
        drafts_and_token = mx.concatenate([block.drafts, token])
        chosen = mx.where(mx.arange(k + 1) == accepted, token, drafts_and_token)
    logprobs = parts.sampler.logprobs(logits, chosen)
    report = Report.pack(accepted, token, p, block.drafts, block.q, logprobs)
    state = parts.state(token)
    # What was written in place the caller has; MLX's work grows with the square of the results
    cache = [parts.cache.length] if dispatch.in_place() else state.cache
    return Outcome(report, token, state.drafter, cache)
