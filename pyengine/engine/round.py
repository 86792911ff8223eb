"""A round on the device: draft, verify, accept, commit.

It takes a block of each of several sequences, whose keys and values are in one arena. Models and
rules run once for the rows of all, each by the pages and settings of its own. So the bits of a
sequence do not depend on the others, and a single one is a list of one: no node of its graph is
there for the sake of more.

A round is one lazy graph of fixed shapes, recorded once and played again, and the host reads one
small array of it. Without drafts it is a step of plain decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, cast

import mlx.core as mx

from pyengine import mapped
from pyengine.drafters.drafter import Asked, Drafter, TargetLike
from pyengine.drafters.mixed import kind_of
from pyengine.engine.report import Report
from pyengine.model.cache import Arena, Cache, Placed
from pyengine.model.head import Logits, rows_at, whole
from pyengine.model.rows import apart, packed, picked
from pyengine.model.target import Branches, Processed, tapped_at, tell
from pyengine.ops import dispatch
from pyengine.ops.filter_logits import Filtered
from pyengine.ops.recorded import recorded
from pyengine.sampling.sampler import NO_TOKEN, Choices, Chooser, Form, Sampler, logprobs


class State(NamedTuple):
    """What a round of a sequence starts from, beside what it shares with others."""

    primary: mx.array  # int32 [1]: known, not processed
    drafter: list[mx.array]
    cache: list[mx.array]


class Start(NamedTuple):
    """What a round starts from: keys and values, a state per sequence, choices per group."""

    arena: Placed
    states: tuple[State, ...]
    choices: tuple[Choices, ...]


class Block(NamedTuple):
    """The primary token and the drafts of each sequence, and what these were drawn from."""

    ids: mx.array  # int32 [R], k + 1 of each
    qs: tuple[Filtered | None, ...]  # of each group, its R - Q rows; None where it drafts nothing


class Outcome(NamedTuple):
    """What a round gives a sequence: what its next one starts from."""

    primary: mx.array
    drafter: list[mx.array]
    cache: list[mx.array]


class Played(NamedTuple):
    """What a round gives: the host's array, the outcomes, and the arrays of the arena."""

    report: mx.array
    outcomes: tuple[Outcome, ...]
    arena: list[mx.array]  # none where they were written in place


@dataclass(frozen=True)
class Parts:
    """What the rounds of one sequence work with."""

    target: TargetLike
    drafter: Drafter | None  # None for plain decoding
    cache: Cache
    vocab: int
    logprobs: int | None  # how many to report per token, besides the token's own

    def state(self, primary: mx.array) -> State:
        arrays = [] if self.drafter is None else self.drafter.arrays
        return State(primary, arrays, self.cache.state)

    def with_state(self, state: State, arena: Arena, place: int) -> Parts:
        """The same over the arrays of a state, as that number ``place`` of a round's arena."""
        return Parts(
            self.target,
            None if self.drafter is None else self.drafter.with_arrays(state.drafter),
            self.cache.with_state(state.cache, arena, place),
            self.vocab,
            self.logprobs,
        )

    def without_arrays(self, arena: Arena, place: int) -> Parts:
        """What a recorded round keeps of them, which serves other sequences too."""
        none = mx.array(0, dtype=mx.int32)
        _, drafter, cache = self.state(none)
        state = State(none, [none] * len(drafter), [none] * len(cache))
        return self.with_state(state, arena, place)

    def take_results(self, outcome: Outcome, rows: int) -> None:
        """Go on with what a round of so many rows gave."""
        if self.drafter is not None:
            self.drafter.take_results(outcome.drafter)
        self.cache.take_results(outcome.cache, self.cache.length_limit + rows)


class Group(NamedTuple):
    """Sequences of a round whose candidates are of like number: with top-k, or with all V."""

    places: tuple[int, ...]
    form: Form


def groups_of(samplers: Sequence[Sampler]) -> tuple[Group, ...]:
    """The groups of a round's sequences; those without top-k must stand last."""
    dense = [sampler.top_k == 0 for sampler in samplers]
    assert dense == sorted(dense)
    all_places = range(len(samplers))
    each = [tuple(n for n in all_places if dense[n] is kind) for kind in (False, True)]
    return tuple([Group(own, Form.of([samplers[n] for n in own])) for own in each if own])


class Texts(NamedTuple):
    """The sequences of a round under way."""

    each: Sequence[Parts]
    ks: Sequence[int]  # drafts of each
    groups: Sequence[Group]
    choosers: Sequence[Chooser]  # by group
    positions: Sequence[mx.array]  # by group: of each sequence's primary token, int32 [Q]

    @property
    def counts(self) -> list[int]:
        """Rows of each sequence."""
        return [k + 1 for k in self.ks]

    def rows(self, group: Group) -> list[int]:
        """A group's rows among those of all."""
        ends = [sum(self.counts[: n + 1]) for n in group.places]
        return [
            r
            for n, end in zip(group.places, ends, strict=True)
            for r in range(end - self.ks[n] - 1, end)
        ]

    def drafts(self, group: Group, ids: mx.array) -> mx.array:
        """A group's drafts among the ids of all rows."""
        first = [sum(self.counts[:n]) for n in range(len(self.ks))]
        return picked(ids, [r for r in self.rows(group) if r not in first])


class RecordedRound:
    """A round with ks[n] drafts of sequence n, recorded: in one, or its two halves with the host in
    between. ``open_texts`` makes of a start what other parts of it begin with."""

    def __init__(self, each: Sequence[Parts], ks: Sequence[int], groups: Sequence[Group]) -> None:
        self.open_texts = partial(_texts, _bare(each), ks, groups)
        self.together = recorded(partial(_together, self.open_texts))
        self.draft = recorded(partial(_draft_half, self.open_texts))
        self.verify = recorded(partial(_verify_half, self.open_texts))


def _bare(each: Sequence[Parts]) -> list[Parts]:
    """What a recorded function keeps of them."""
    none, arena = mx.array(0, dtype=mx.int32), each[0].cache.arena
    arena = arena.with_placed(Placed([none] * len(arena.arrays), *4 * [none]))
    return [parts.without_arrays(arena, place) for place, parts in enumerate(each)]


class RecordedDraft:
    """Draft i of each of several sequences, recorded: the host stands behind each draft."""

    def __init__(self, each: Sequence[Parts], i: int, groups: Sequence[Group]) -> None:
        bare, ks = _bare(each), [i + 1] * len(each)
        self.draw = recorded(partial(_draw, partial(_texts, bare, ks, groups), i))


class Drawn(NamedTuple):
    """One draft of each of several sequences, group by group."""

    report: mx.array  # int32 [2 * Q]: the drafts, then the flags of what they were drawn from
    qs: tuple[Filtered, ...]  # of each group, a row per sequence
    drafters: tuple[list[mx.array], ...]  # what each sequence's carries on


def _texts(
    bare: Sequence[Parts], ks: Sequence[int], groups: Sequence[Group], start: Start
) -> Texts:
    arena, lengths = bare[0].cache.arena.with_placed(start.arena), start.arena.lengths
    own = zip(bare, start.states, strict=True)
    each = [parts.with_state(state, arena, place) for place, (parts, state) in enumerate(own)]
    choosers = [
        Chooser(group.form, each[0].vocab, choices)
        for group, choices in zip(groups, start.choices, strict=True)
    ]
    positions = [picked(lengths, group.places) for group in groups]
    return Texts(each, ks, groups, choosers, positions)


def _together(open_texts: Callable[[Start], Texts], start: Start) -> Played:
    texts = open_texts(start)
    return complete(texts, draft(texts, _primary(start)))


def _draft_half(open_texts: Callable[[Start], Texts], start: Start) -> Block:
    # A drafter's own state is that of the round's beginning until it reads what was verified
    return draft(open_texts(start), _primary(start))


def _verify_half(open_texts: Callable[[Start], Texts], start: Start, block: Block) -> Played:
    return complete(open_texts(start), block)


def _draw(open_texts: Callable[[Start], Texts], i: int, start: Start, before: mx.array) -> Drawn:
    """Draft i behind the tokens ``[Q, i + 1]`` of each block so far; masks have a row per text."""
    texts = open_texts(start)
    tokens = [before[:, j] for j in range(i + 1)]
    rows = [q for q in _propose(i, texts, tokens, before) if q is not None]
    drawn = [
        chooser.draw_drafts(q, range(len(group.places)), chooser.draft_position(position), i)
        for q, chooser, group, position in zip(
            rows, texts.choosers, texts.groups, texts.positions, strict=True
        )
    ]
    drafters = [[] if parts.drafter is None else parts.drafter.arrays for parts in texts.each]
    report = mx.concatenate([*drawn, *(q.flags for q in rows)])
    return Drawn(report, tuple(rows), tuple(drafters))


def _primary(start: Start) -> mx.array:
    return packed([state.primary for state in start.states])


def draft(texts: Texts, primary: mx.array) -> Block:
    """Draw k drafts behind each primary token, each from what the sequence's drafter proposes."""
    ks, groups = texts.ks, texts.groups
    order = [(n, 0) for n in range(len(ks))]  # sequence of each token, and its place in the block
    tokens = [primary]  # of each step
    qs: list[list[Filtered]] = [[] for _ in groups]
    positions = [
        chooser.draft_position(position)
        for chooser, position in zip(texts.choosers, texts.positions, strict=True)
    ]
    for i in range(max(ks)):
        rows, drawn = _propose(i, texts, tokens), []
        for g, group in enumerate(groups):
            if (q := rows[g]) is not None:
                own = [j for j, n in enumerate(group.places) if i < ks[n]]
                qs[g].append(q)
                drawn.append(texts.choosers[g].draw_drafts(q, own, positions[g], i))
        tokens.append(packed(drawn))
        order += [(n, i + 1) for n in _drafting(texts, i)]
    ids = picked(packed(tokens), _sorted(order))
    of_groups = []
    for group, parts in zip(groups, qs, strict=True):
        drafted = [(n, i) for n, i in order if i and n in group.places]
        of_groups.append(_joined(parts, _sorted(drafted)) if drafted else None)
    return Block(ids, tuple(of_groups))


def _drafting(texts: Texts, i: int) -> list[int]:
    """The sequences that have a draft i."""
    return [n for n, k in enumerate(texts.ks) if i < k]


def _sorted(keys: Sequence[tuple[int, int]]) -> list[int]:
    """Places of keys in rising order."""
    return sorted(range(len(keys)), key=keys.__getitem__)


def _joined(parts: Sequence[Filtered], places: Sequence[int]) -> Filtered:
    """Rows at these places of parts behind one another, which may be of unlike widths."""
    if len(parts) == 1 and places == list(range(parts[0].ids.shape[0])):
        return parts[0]  # one text: as it is
    width = max(part.ids.shape[1] for part in parts)
    each = zip(*(widened(part, width) for part in parts), strict=True)
    return Filtered(*(picked(packed(list(part)), places) for part in each))


def widened(rows: Filtered, width: int) -> Filtered:
    """The same with more candidates, which are none."""
    if (more := width - rows.ids.shape[1]) == 0:
        return rows
    wider = [(0, 0), (0, more)]
    ids = mx.pad(rows.ids, wider, constant_values=NO_TOKEN)
    return Filtered(ids, mx.pad(rows.probs, wider), rows.flags)


def _propose(
    i: int, texts: Texts, tokens: Sequence[mx.array], block: mx.array | None = None
) -> list[Filtered | None]:
    """Draft i's distributions of each group that has one; drafters of one kind propose together.
    ``block`` as :class:`pyengine.drafters.drafter.Asked` has it, of all sequences."""
    drafting = _drafting(texts, i)
    newest = picked(tokens[-1], [_drafting(texts, i - 1).index(n) for n in drafting])
    parts: list[list[Filtered]] = [[] for _ in texts.groups]
    order: list[list[tuple[int, int]]] = [[] for _ in texts.groups]
    for kind in dict.fromkeys(kind_of(texts.each[n].drafter) for n in drafting):
        own = [n for n in drafting if kind_of(texts.each[n].drafter) == kind]
        drafters = [drafter for n in own if (drafter := texts.each[n].drafter) is not None]
        asked = Asked(
            picked(newest, [drafting.index(n) for n in own]),
            [texts.each[n].cache for n in own],
            partial(_filter_drafts, i, texts, own, tokens[1:]),
            [texts.ks[n] for n in own],
            None if block is None else picked(block, [drafting.index(n) for n in own]),
        )
        rest = own
        for rows in drafters[0].propose(i, drafters, asked):
            theirs, rest = rest[: rows.ids.shape[0]], rest[rows.ids.shape[0] :]
            [g] = [g for g, group in enumerate(texts.groups) if theirs[0] in group.places]
            parts[g].append(rows)
            order[g] += [(n, i) for n in theirs]
    return [_joined(p, _sorted(o)) if p else None for p, o in zip(parts, order, strict=True)]


def _filter_drafts(
    i: int, texts: Texts, own: Sequence[int], drafts: Sequence[mx.array], logits: mx.array | Logits
) -> list[Filtered]:
    """Distributions of draft i of these sequences, a part per group; ``drafts`` are those of all
    before it, step by step."""
    parts = []
    for group, chooser in zip(texts.groups, texts.choosers, strict=True):
        rows = [r for r, n in enumerate(own) if n in group.places]
        owner = [group.places.index(own[r]) for r in rows]
        before = None
        if i and chooser.form.penalises:
            order = [(n, j) for j in range(i) for n in _drafting(texts, j)]
            known = [(n, j) for n in group.places for j in range(i)]
            before = _table(
                packed(drafts), [order.index(at) if at in order else -1 for at in known], i
            )
        if rows:
            own_rows = chooser.for_texts(owner)
            parts.append(own_rows.filter(rows_at(logits, rows), owner, before, [i] * len(rows)))
    return parts


def _table(tokens: mx.array, places: Sequence[int], width: int) -> mx.array:
    """Tokens at these places in rows of that width, NO_TOKEN where a place is -1."""
    if -1 in places:
        tokens = mx.concatenate([tokens, mx.array([NO_TOKEN], dtype=mx.int32)])
        places = [tokens.shape[0] - 1 if at < 0 else at for at in places]
    return picked(tokens, places).reshape(-1, width)


def complete(texts: Texts, block: Block) -> Played:
    """Verify a block of each sequence, accept, commit."""
    return accept(texts, block, *verify(texts, block))


def accept(
    texts: Texts,
    block: Block,
    logits: mx.array | Logits,
    hidden: Sequence[mx.array],
    ps: Sequence[Filtered],
) -> Played:
    """Accept and commit, by what the target made of a block: its logits, hidden vectors of each
    sequence, distributions of each group."""
    drafts = [texts.drafts(group, block.ids) for group in texts.groups]
    decided = [
        chooser.accept(p, q, own, position, [texts.ks[n] for n in group.places])
        for group, chooser, position, p, q, own in zip(
            texts.groups, texts.choosers, texts.positions, ps, block.qs, drafts, strict=True
        )
    ]
    accepted, token = (packed(list(each)) for each in zip(*decided, strict=True))
    return finish(texts, block, logits, hidden, [p.flags for p in ps], accepted, token)


def finish(
    texts: Texts,
    block: Block,
    logits: mx.array | Logits,
    hidden: Sequence[mx.array],
    flags: Sequence[mx.array],
    accepted: mx.array,
    token: mx.array,
) -> Played:
    """Commit so many drafts of each block and the token that follows them, int32 ``[Q]`` each;
    ``flags`` are those of the target's distributions, of each group."""
    firsts = apart(token, [1] * len(texts.ks))
    kept = [n.squeeze() for n in apart(accepted, [1] * len(texts.ks))]
    commit(texts.each, hidden, kept, texts.counts)
    report = Report.pack(
        accepted,
        token,
        packed(list(flags)),
        packed([texts.drafts(group, block.ids) for group in texts.groups]),
        [q.flags for q in block.qs if q is not None],
        _logprobs(texts, logits, block, kept, firsts),
    )
    outcomes = [_outcome(parts, first) for parts, first in zip(texts.each, firsts, strict=True)]
    # What was written in place the caller has; MLX's work grows with the square of the results
    arena = [] if dispatch.in_place() else texts.each[0].cache.arena.arrays
    return Played(report, tuple(outcomes), arena)


def verify(texts: Texts, block: Block) -> tuple[mx.array | Logits, list[mx.array], list[Filtered]]:
    """The target's logits of all rows, the hidden vectors of each sequence's, and distributions of
    each group's."""
    logits, hidden = run_target(texts, block)
    return logits, hidden, target_rows(texts, block, logits)


def run_target(
    texts: Texts, block: Block, branches: Branches | None = None
) -> tuple[mx.array | Logits, list[mx.array]]:
    """The target's logits of all rows, and the hidden vectors of each sequence's; of trees with
    ``branches``.

    Logits are made only where a sequence reports log-probabilities.
    """
    each = texts.each
    forward = each[0].target.forward
    if branches is not None:
        forward = partial(forward, branches=branches)
    wanted = [() if parts.drafter is None else parts.drafter.taps for parts in each]
    taps = tuple(dict.fromkeys(tap for own in wanted for tap in own))
    caches = [parts.cache for parts in each]
    logits, hidden = forward(apart(block.ids, texts.counts), caches, taps)
    if any(parts.logprobs is not None for parts in each):
        logits = whole(logits)
    owns = zip(apart(hidden, texts.counts), wanted, strict=True)
    return logits, [tapped_at(own, taps, theirs) for own, theirs in owns]


def target_rows(texts: Texts, block: Block, logits: mx.array | Logits) -> list[Filtered]:
    """The target's distributions of each group's rows."""
    return [
        _filter_rows(texts, group, chooser, logits, block)
        for group, chooser in zip(texts.groups, texts.choosers, strict=True)
    ]


def _filter_rows(
    texts: Texts, group: Group, chooser: Chooser, logits: mx.array | Logits, block: Block
) -> Filtered:
    """The target's distributions of a group's rows."""
    ks = [texts.ks[n] for n in group.places]
    owner = [j for j, k in enumerate(ks) for _ in range(k + 1)]
    before = [t for k in ks for t in range(k + 1)]
    drafts = None
    if any(ks) and chooser.form.penalises:
        firsts = [sum(ks[:j]) for j in range(len(ks))]
        places = [
            first + t if t < k else -1
            for first, k in zip(firsts, ks, strict=True)
            for t in range(max(ks))
        ]
        drafts = _table(texts.drafts(group, block.ids), places, max(ks))
    return chooser.filter(rows_at(logits, texts.rows(group)), owner, drafts, before)


def commit(
    each: Sequence[Parts],
    hidden: Sequence[mx.array],
    accepted: Sequence[mx.array],
    counts: Sequence[int],
) -> None:
    """Keep the primary token and the accepted drafts, int32 [], of each block of so many rows;
    drafters of one kind read together."""
    own = zip(hidden, accepted, each, strict=True)
    rows = [Processed(vectors, count, parts.cache) for vectors, count, parts in own]
    tell([parts.drafter for parts in each], rows)
    for parts, count, most in zip(each, accepted, counts, strict=True):
        parts.cache.commit(count + 1, parts.cache.length_limit + most)


def first(
    parts: Parts, sampler: Sampler, logits: mx.array | Logits, masks: mx.array | None = None
) -> Played:
    """The token after the prefill, from its last row: logits ``[1, V]``."""
    chooser = Chooser.of([sampler])
    chooser = replace(chooser, choices=chooser.choices._replace(masks=masks))
    p = chooser.filter(logits, [0])
    token = chooser.draw(p, parts.cache.length[None])
    none = mx.zeros(1, dtype=mx.int32)
    values = [] if parts.logprobs is None else [logprobs(logits, token, parts.logprobs)]
    report = Report.pack(none, token, p.flags, none[:0], [], values)
    return Played(report, (_outcome(parts, token),), [])


def _logprobs(
    texts: Texts,
    logits: mx.array | Logits,
    block: Block,
    kept: Sequence[mx.array],
    tokens: Sequence[mx.array],
) -> list[mx.array]:
    """Those of each sequence that reports some."""
    found = []
    ends = [sum(texts.counts[: n + 1]) for n in range(len(texts.ks))]
    for parts, k, end, accepted, token in zip(
        texts.each, texts.ks, ends, kept, tokens, strict=True
    ):
        if parts.logprobs is None:
            continue
        rows, chosen = range(end - k - 1, end), token
        if k:  # per row: the draft that follows it, or what took its place
            drafts_and_token = mx.concatenate([picked(block.ids, rows[1:]), token])
            chosen = mx.where(mx.arange(k + 1) == accepted, token, drafts_and_token)
        found.append(logprobs(rows_at(logits, rows), chosen, parts.logprobs))
    return found


def _outcome(parts: Parts, token: mx.array) -> Outcome:
    state = parts.state(token)
    return Outcome(token, state.drafter, state.cache)


def read(target: TargetLike, played: Played) -> list[int]:
    """Evaluate a round of the target and read its one small array; nothing else of it is read."""
    with target.waiting():
        mx.eval(played)
    mapped.check("generate")
    return cast("list[int]", played.report.tolist())
