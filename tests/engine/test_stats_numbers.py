"""Published numbers: counts, seconds and ratios of one generation, worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import mlx.core as mx
import pytest
from models import decode
from scripted_runs import Clock
from text_fakes import LengthCache
from tiny_pairs import tiny_pair

from pyengine.engine.prefix import Prefix
from pyengine.engine.sequence import Round
from pyengine.engine.stats import Nodes, Stats, nodes_of
from pyengine.generation import generate
from pyengine.model.target import Processed, Reader
from pyengine.sampling.settings import Sampling

VOCAB = 64
STATS = Stats(
    block_size=4,
    seed=11,
    prompt_tokens=120,
    reused_tokens=20,
    generated_tokens=31,
    prefill_s=0.5,
    decode_s=12.0,
    rounds=8,
    drafted=25,
    accepted=16,
    forced=3,
    drafted_by_depth=[10, 8, 4],
    accepted_by_depth=[9, 2, 3],
    bonus_tokens=5,
    correction_tokens=6,
    peak_memory_bytes=123_456_789,
    by_drafter={"lookup": {"rounds": 2, "drafted": 9, "accepted": 7}},
    exits={6: 20, 24: 10},
    tree=15,
)
TOLD = {
    "block_size": 4,
    "seed": 11,
    "prompt_tokens": 120,
    "reused_tokens": 20,
    "generated_tokens": 31,
    "prefill_s": 0.5,
    "decode_s": 12.0,
    "rounds": 8,
    "drafted": 25,
    "accepted": 16,
    "forced": 3,
    "drafted_by_depth": [10, 8, 4],
    "accepted_by_depth": [9, 2, 3],
    "bonus_tokens": 5,
    "correction_tokens": 6,
    "peak_memory_bytes": 123_456_789,
    "by_drafter": {"lookup": {"rounds": 2, "drafted": 9, "accepted": 7}},
    "exits": {"6": 20, "24": 10},
    "tree": 15,
    # 20 of 6 layers and 10 of 24
    "mean_layers": 12.0,
    # 30 tokens after the first in 12 s; 100 new ones in half a second; 16 of 25; 30 in 8 rounds
    "tok_s": 2.5,
    "prefill_tok_s": 200.0,
    "acceptance": 0.64,
    "acceptance_by_depth": [0.9, 0.25, 0.75],
    # Of 8 rounds
    "kept_by_depth": [1.125, 0.25, 0.375],
    # 25 in 8 rounds
    "drafts_per_round": 3.125,
    "tokens_per_round": 3.75,
}


def test_every_field_and_ratio_is_told() -> None:
    assert STATS.to_dict() == TOLD == json.loads(json.dumps(STATS.to_dict()))
    ratios = {name for name, what in vars(Stats).items() if isinstance(what, property)}
    assert set(TOLD) == ratios | {field.name for field in fields(Stats)}
    for name in ratios:
        assert getattr(STATS, name) == TOLD[name], name


def test_a_generation_begins_with_nothing() -> None:
    """Plain decoding, no seed yet, and every count and second 0; lists of its own."""
    each = ("drafted", "accepted", "acceptance", "kept")
    lists = [f"{name}_by_depth" for name in each]
    none: dict[str, Any] = dict.fromkeys(TOLD, 0) | {name: [] for name in lists}
    others: dict[str, Any] = {"exits": {}, "mean_layers": None, "by_drafter": {}, "tree": None}
    assert Stats().to_dict() == {**none, **others, "block_size": 1, "seed": None}
    assert Stats().drafted_by_depth is not Stats().drafted_by_depth


def test_nothing_measured_divides_by_nothing() -> None:
    none = Stats(prompt_tokens=5, generated_tokens=1)
    ratios = ("tok_s", "prefill_tok_s", "acceptance", "tokens_per_round", "drafts_per_round")
    assert [getattr(none, name) for name in ratios] == [0.0] * 5
    assert none.acceptance_by_depth == none.kept_by_depth == []
    assert Stats(generated_tokens=1, decode_s=2.0, rounds=3).tok_s == 0.0
    assert Stats(drafted=3).acceptance == 0.0
    half = Stats(prompt_tokens=8, reused_tokens=8, prefill_s=4.0)
    assert half.prefill_tok_s == 0.0


@pytest.mark.parametrize(
    ("rounds", "told"),
    [
        # Drafted and accepted of each round; then rounds, drafted, accepted, both by depth, bonus,
        # correction
        ([(0, 0), (0, 0)], (2, 0, 0, [], [], 0, 0)),
        ([(3, 3)], (1, 3, 3, [1, 1, 1], [1, 1, 1], 1, 0)),
        ([(3, 0)], (1, 3, 0, [1, 1, 1], [0, 0, 0], 0, 1)),
        ([(3, 2), (3, 1), (3, 3), (3, 0), (3, 2)], (5, 15, 8, [5, 5, 5], [4, 3, 1], 1, 4)),
        ([(2, 2), (4, 3), (1, 1), (0, 0)], (4, 7, 6, [3, 2, 1, 1], [3, 2, 1, 0], 2, 1)),
    ],
)
def test_rounds_are_counted(rounds: list[tuple[int, int]], told: tuple[Any, ...]) -> None:
    s = Stats()
    for drafted, accepted in rounds:
        s.count_round(drafted, accepted)
    counts = (s.rounds, s.drafted, s.accepted, s.drafted_by_depth, s.accepted_by_depth)
    assert (*counts, s.bonus_tokens, s.correction_tokens) == told
    assert s.by_drafter == {}


def test_rounds_of_trees_are_counted() -> None:
    """Three trees of 7: a path of two drafts whose end is a leaf, one that is not gone on from
    though it could be, and none; then a tree that is deeper."""
    s = Stats()
    for accepted, nodes in (
        (2, Nodes([4, 3], True)),
        (1, Nodes([2, 4, 1], False)),
        (0, Nodes([3, 2, 2], False)),
        (4, Nodes([1, 2, 3, 1], True)),
    ):
        s.count_round(7, accepted, nodes=nodes)
    assert (s.rounds, s.drafted, s.accepted) == (4, 28, 7)
    assert s.drafted_by_depth == [10, 11, 6, 1] and s.accepted_by_depth == [3, 2, 1, 1]
    assert s.acceptance_by_depth == [0.3, 2 / 11, 1 / 6, 1.0]
    assert s.kept_by_depth == [0.75, 0.5, 0.25, 0.25] and s.drafts_per_round == 7.0
    assert (s.bonus_tokens, s.correction_tokens) == (2, 2)


def test_a_rounds_numbers_of_trees() -> None:
    """Behind what else a round tells: of each of two trees three depths, and how it ended."""
    row = [9, 9, 9, 2, 3, 2, 0, 7, 0, 0, 1]
    assert nodes_of(row, 2, 3) == [Nodes([2, 3, 2], False), Nodes([7], True)]


def test_rounds_of_a_mix_are_counted_by_drafter() -> None:
    s = Stats()
    for drafted, accepted, drafter in ((3, 1, "lookup"), (2, 2, "assistant"), (0, 0, None)):
        s.count_round(drafted, accepted, drafter=drafter)
    s.count_round(7, 6, 2, "lookup")
    assert s.by_drafter == {
        "lookup": {"rounds": 2, "drafted": 10, "accepted": 7},
        "assistant": {"rounds": 1, "drafted": 2, "accepted": 2},
    }
    assert (s.rounds, s.drafted, s.accepted, s.forced) == (4, 12, 9, 2)


class CountingTarget:
    """Says the number after the last one; calls of it take the seconds they are given."""

    context = 5000
    waiting = staticmethod(nullcontext)  # for nobody

    def __init__(self, clock: Clock, chunks: list[float], rounds: list[float]) -> None:
        self.clock, self.chunks, self.rounds = clock, list(chunks), list(rounds)
        self.events: list[str] = []

    def embed(self, ids: mx.array) -> mx.array:
        return ids.astype(mx.float32)[:, None]

    def new_cache(self) -> LengthCache:
        self.events.append("cache")
        self.clock.now += 0.25

        def on_round(rows: int) -> None:
            self.clock.now += self.rounds.pop(0)

        return LengthCache(on_round)

    def prefill(
        self, ids: list[int], cache: LengthCache, *, reader: Reader | None = None
    ) -> tuple[mx.array, mx.array]:
        self.events.append(f"chunk of {len(ids)}")
        self.clock.now += self.chunks.pop(0)
        cache.commit(mx.array(len(ids), mx.int32), cache.length_limit + len(ids))
        hidden = mx.array([[0.0]])
        if reader is not None:
            reader.read([reader], [Processed(hidden, mx.array(0, mx.int32), cache)])
        return after(mx.array(ids[-1:]))[0], hidden

    def forward(
        self, ids: list[mx.array], caches: list[LengthCache], taps: tuple[int, ...] = ()
    ) -> tuple[mx.array, mx.array]:
        [tokens] = ids
        return after(tokens), self.embed(tokens)


class CountingAssistant:
    """Counts too, but gets the numbers in ``wrong`` wrong, and goes on from there."""

    def __init__(self, *wrong: int) -> None:
        self.wrong = mx.array(wrong)

    def forward(self, embedding: mx.array, hidden: mx.array, caches: object) -> tuple:
        ids = embedding[:, 0].astype(mx.int32)
        right = after(ids)
        missed = (ids[:, None] + 1 == self.wrong).any(axis=-1, keepdims=True)
        return mx.where(missed, mx.roll(right, 30, axis=-1), right), embedding


def after(ids: mx.array) -> mx.array:
    return mx.where(mx.arange(VOCAB) == (ids[:, None] + 1) % VOCAB, 60.0, 0.0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Time passes in calls of the target, and an eighth of a second in each evaluation."""
    made, evaluate = Clock(), mx.eval

    def slow(*arrays: Any) -> None:
        made.now += 0.125
        evaluate(*arrays)

    monkeypatch.setattr("time.perf_counter", made)
    monkeypatch.setattr(mx, "eval", slow)
    return made


def rounds_of(
    clock: Clock,
    target: CountingTarget,
    prompt: list[int],
    each: Callable[[Round, Stats], None],
    **settings: Any,
) -> Stats:
    """Generate; between rounds the caller takes a thousand seconds, which are nobody's."""
    stats = Stats()
    assistant = CountingAssistant(13, 14, 21)
    greedy = Sampling(temperature=0.0, seed=3)
    for r in decode(target, assistant, prompt, sampling=greedy, stats=stats, **settings):
        each(r, stats)
        clock.now += 1000
    return stats


def test_counts_and_clocks_of_a_generation(clock: Clock) -> None:
    """Blocks of 4 after 10: 11 comes from the prefill; then, where the drafts go wrong at 13, 14
    and 21, the rounds are 12 13 | 14 | 15 16 17 18 | 19 20 21 | 22 23, cut by the limit."""
    # The evaluation's eighth makes these 0.5, 1.5, 0.25, 2.75 and 1 s
    target = CountingTarget(clock, [3.0], [0.375, 1.375, 0.125, 2.625, 0.875])
    seen: list[Any] = []

    def each(r: Round, s: Stats) -> None:
        seen.append((r.tokens, r.num_drafted, r.num_accepted, r.finish_reason, s.decode_s))
        assert (s.prefill_s, s.generated_tokens) == (3.375, sum(len(row[0]) for row in seen))

    stats = rounds_of(clock, target, [5, 10], each, block_size=4, max_tokens=13)
    assert seen == [
        ([11], 0, 0, None, 0.0),
        ([12, 13], 3, 1, None, 0.5),
        ([14], 3, 0, None, 2.0),
        ([15, 16, 17, 18], 3, 3, None, 2.25),
        ([19, 20, 21], 3, 2, None, 5.0),
        ([22, 23], 3, 3, "length", 6.0),
    ]
    told = stats.to_dict()
    assert told.pop("peak_memory_bytes") >= 0
    assert told == {
        "block_size": 4,
        "seed": 3,
        "prompt_tokens": 2,
        "reused_tokens": 0,
        "generated_tokens": 13,
        "prefill_s": 3.375,
        "decode_s": 6.0,
        "rounds": 5,
        "drafted": 15,
        "accepted": 9,
        "forced": 0,
        "drafted_by_depth": [5, 5, 5],
        "accepted_by_depth": [4, 3, 2],
        "bonus_tokens": 2,
        "correction_tokens": 3,
        "by_drafter": {},
        "exits": {},
        "tree": None,
        "mean_layers": None,
        "tok_s": 2.0,
        "prefill_tok_s": pytest.approx(2 / 3.375),
        "acceptance": 0.6,
        "acceptance_by_depth": [0.8, 0.6, 0.4],
        "kept_by_depth": [0.8, 0.6, 0.4],
        "drafts_per_round": 3.0,
        "tokens_per_round": 2.4,
    }


def test_counts_of_plain_decoding(clock: Clock) -> None:
    target = CountingTarget(clock, [1.0], [0.375] * 3)
    stats = rounds_of(clock, target, [10], lambda *_: None, block_size=1, max_tokens=4)
    told = (stats.generated_tokens, stats.rounds, stats.drafted, stats.drafted_by_depth)
    assert told == (4, 3, 0, [])
    assert (stats.prefill_s, stats.decode_s, stats.tok_s) == (1.375, 1.5, 2.0)
    assert (stats.bonus_tokens, stats.correction_tokens, stats.tokens_per_round) == (0, 0, 1.0)


def test_the_prefill_clock_stops_between_chunks(clock: Clock) -> None:
    """A prompt of 1100 tokens in chunks of 512; the last is evaluated with the first token."""
    target = CountingTarget(clock, [1.0, 2.0, 4.0], [0.5])
    seen: list[Any] = []

    def each(r: Round, s: Stats) -> None:
        seen.append((r.prompt_done, r.tokens, s.prefill_s, s.decode_s))

    prompt = [0] * 1099 + [10]
    stats = rounds_of(clock, target, prompt, each, block_size=4, max_tokens=2)
    assert seen == [
        (512, [], 1.25, 0.0),
        (1024, [], 3.25, 0.0),
        (None, [11], 7.375, 0.0),
        (None, [12], 7.375, 0.625),
    ]
    assert target.events == ["cache", "chunk of 512", "chunk of 512", "chunk of 76"]
    assert stats.prompt_tokens == 1100
    assert stats.prefill_tok_s == pytest.approx(1100 / 7.375)


def test_peak_memory_is_this_generations_own(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from its start, and read anew after every round."""
    target, peaks = CountingTarget(clock, [1.0], [1.0, 1.0]), [700, 500, 900]
    monkeypatch.setattr(mx, "reset_peak_memory", lambda: target.events.append("reset"))
    monkeypatch.setattr(mx, "get_peak_memory", lambda: peaks.pop(0))
    seen: list[int] = []
    kw = {"block_size": 1, "max_tokens": 3}
    stats = rounds_of(clock, target, [10], lambda _, s: seen.append(s.peak_memory_bytes), **kw)
    assert seen == [700, 500, 900] and stats.peak_memory_bytes == 900
    assert target.events == ["reset", "cache", "chunk of 1"]


def test_peak_memory_is_bytes_of_the_machine() -> None:
    """What lay in memory before and is freed is not in it; what the run itself needs is."""
    pair = tiny_pair("dense31")
    kw: dict[str, Any] = {"pair": pair, "max_tokens": 4, "sampling": {"temperature": 0}}
    big = mx.zeros((64 << 20) // 4)
    mx.eval(big)
    del big
    held_by_others = mx.get_active_memory()  # of tests before, until Python collects it
    alone = peak_of([5, 6, 7], **kw)
    assert held_by_others < alone < held_by_others + (64 << 20)
    held = mx.zeros((64 << 20) // 4)
    mx.eval(held)
    assert alone + (60 << 20) < peak_of([5, 6, 7], **kw) < alone + (70 << 20)


def peak_of(ids: list[int], *, pair: Any, max_tokens: int, sampling: Any) -> int:
    """Peak memory of a run on token ids alone: the tiny pairs have no tokenizer."""
    stats = Stats()
    settings = Sampling(**sampling)
    kw: Any = {"sampling": settings, "block_size": 2, "max_tokens": max_tokens, "stats": stats}
    assert sum(len(r.tokens) for r in decode(pair.target, pair.assistant, ids, **kw)) == max_tokens
    return stats.peak_memory_bytes


def test_reused_tokens_are_those_of_the_prefix() -> None:
    """And no others count in the prefill's rate."""
    pair, prefix, prompt = tiny_pair("dense31"), Prefix(), list(range(3, 23))
    told = []
    for ids in (prompt, prompt, [*prompt, 60, 61], [9, *prompt]):
        stats = Stats()
        kw: Any = {"sampling": Sampling(temperature=0.0), "block_size": 2, "max_tokens": 1}
        list(decode(pair.target, pair.assistant, ids, stats=stats, prefix=prefix, **kw))
        told.append((stats.prompt_tokens, stats.reused_tokens))
        new = stats.prompt_tokens - stats.reused_tokens
        assert stats.prefill_tok_s * stats.prefill_s == pytest.approx(new)
    assert told == [(20, 0), (20, 19), (22, 20), (21, 0)]


def test_a_result_has_the_numbers_of_its_generation() -> None:
    """The embedded pair twice: the same counts, and the seed that was given."""
    kw: dict[str, Any] = {"max_tokens": 12, "block_size": 3, "sampling": {"seed": 2**31 + 5}}
    one, two = (generate("Write a Snake game.", **kw).stats.to_dict() for _ in range(2))
    for told in (one, two):
        seconds = {key: told.pop(key) for key in ("prefill_s", "decode_s", "tok_s")}
        assert all(value > 0 for value in seconds.values())
        assert told.pop("prefill_tok_s") > 0 and told.pop("peak_memory_bytes") > 2**20
    assert one == two
    assert (one["seed"], one["block_size"], one["generated_tokens"]) == (2**31 + 5, 3, 12)
    assert one["drafted"] == 2 * one["rounds"] > 0
