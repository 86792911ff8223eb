"""What comes next for many sequences: over random states, and as time passes."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

import pytest

from pyengine.engine.schedule import MOST_ROWS, SLOWDOWN, Load, groups, plan

NOTHING = Load((), 1, None, 0, 0, 0, 0.0, 0.0)


def random_load(rng: random.Random) -> Load:
    prompts, texts, held = (rng.choice([0, 0, 1, 3]) for _ in range(3))
    return Load(
        waiting=[rng.choice([0, 1, 5, 40]) for _ in range(rng.randrange(5))],
        places=rng.randrange(5),
        free=rng.choice([None, -3, 0, 4, 10, 100]),
        active=prompts + texts + held,
        prompts=prompts,
        texts=texts,
        chunk_s=rng.choice([0.0, 0.5, 2.0]),
        rounds_s=rng.choice([0.0, 0.4, 0.5, 3.0]),
    )


def test_every_plan_keeps_the_rules() -> None:
    rng, joined, works = random.Random(1), 0, set()
    for _ in range(10_000):
        load = random_load(rng)
        joining, work = plan(load)
        taken = load.waiting[:joining]
        assert joining <= min(load.places, len(load.waiting))
        if load.free is not None and (load.active or joining > 1):
            assert sum(taken) <= max(load.free, 0) or (not load.active and taken[0] > load.free)
        # Whoever comes first and stays out had no place, or not the memory
        if joining < len(load.waiting):
            assert (
                load.free is None
                or joining == load.places
                or (sum(load.waiting[: joining + 1]) > load.free)
            )
            assert load.places == joining or load.active or joining
        prompts = load.prompts + joining
        assert (work is None) == (not prompts and not load.texts)
        if work == "chunk":
            assert prompts
            assert not load.texts or load.rounds_s >= load.chunk_s / (SLOWDOWN - 1)
        if work == "round":
            assert load.texts
            assert not prompts or load.rounds_s < load.chunk_s / (SLOWDOWN - 1)
        joined, works = joined + joining, works | {work}
    assert joined > 1000 and works == {"chunk", "round", None}


@pytest.mark.parametrize(
    ("load", "joining"),
    [
        (NOTHING._replace(waiting=[9], free=3), 1),  # alone: whatever it needs
        (NOTHING._replace(waiting=[9, 1], free=3, places=4), 1),
        (NOTHING._replace(waiting=[2, 9, 1], free=3, places=4, active=1), 1),  # nobody overtakes
        (NOTHING._replace(waiting=[2, 1, 1], free=3, places=4, active=1), 2),
        (NOTHING._replace(waiting=[2, 1, 1], places=2, active=1), 2),
    ],
)
def test_who_joins(load: Load, joining: int) -> None:
    assert plan(load).joining == joining


@dataclass
class Day:
    """Requests that come, and seconds that pass: a chunk takes 0.5 and a round 0.02."""

    arrivals: list[tuple[float, int, int, int]]  # second, bytes, chunks, rounds
    now: float = 0.0
    joined: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    in_rounds: float = 0.0
    in_chunks: float = 0.0

    def pass_by(self, places: int, memory: int) -> None:
        coming, waiting, active = list(enumerate(self.arrivals)), [], {}
        chunk_s = rounds_s = last_round = 0.0
        while coming or waiting or active:
            while coming and coming[0][1][0] <= self.now:
                waiting.append(coming.pop(0))
            prompts = [n for n, left in active.items() if left[1]]
            texts = [n for n, left in active.items() if not left[1]]
            free = memory - sum(left[0] for left in active.values())
            joining, work = plan(
                Load(
                    [need for _, (_, need, _, _) in waiting],
                    places - len(active),
                    free,
                    len(active),
                    len(prompts),
                    len(texts),
                    chunk_s,
                    rounds_s,
                )
            )
            for _ in range(joining):
                number, (_, need, chunks, rounds) = waiting.pop(0)
                active[number] = [need, chunks, rounds]
                self.joined.append(number)
                prompts.append(number)
            if work == "chunk":
                active[prompts[0]][1] -= 1
                self.now += 0.5
                chunk_s, rounds_s = 0.5, 0.0
                self.in_chunks += 0.5 if texts else 0
            elif work == "round":
                self.gaps.append(self.now - last_round if rounds_s or chunk_s else 0)
                self.now += 0.02
                rounds_s += 0.02
                self.in_rounds += 0.02
                for number in texts:
                    active[number][2] -= 1
                    if not active[number][2]:
                        del active[number]
            else:
                self.now = coming[0][1][0]
            last_round = self.now if work == "round" or not texts else last_round


@pytest.mark.parametrize("seed", range(20))
def test_over_a_day_nobody_overtakes_or_starves(seed: int) -> None:
    """All join in order and end; prompts take no more than their share while texts run, and no text
    waits longer than a chunk."""
    rng, at = random.Random(seed), 0.0
    arrivals = []
    for _ in range(40):
        at += rng.expovariate(0.5)
        arrivals.append(
            (at, rng.choice([1, 5, 20]), rng.choice([1, 1, 2, 16]), rng.randrange(1, 300))
        )
    day = Day(arrivals)
    day.pass_by(places=4, memory=24)
    assert day.joined == list(range(40))
    assert 5 < day.in_chunks <= day.in_rounds * (SLOWDOWN - 1) + 0.5
    assert max(day.gaps) <= 0.5 + 0.02 + 1e-9


def test_groups_hold_all_in_order_and_few_rows() -> None:
    rng = random.Random(3)
    for _ in range(1000):
        rows = [rng.choice([1, 1, 4, 16, 128]) for _ in range(rng.randrange(20))]
        found = groups(rows)
        assert [n for places in found for n in places] == list(range(len(rows)))
        for places in found:
            assert len(places) == 1 or sum(rows[n] for n in places) <= MOST_ROWS
        for one, other in itertools.pairwise(found):
            assert sum(rows[n] for n in one) + rows[other[0]] > MOST_ROWS
    assert groups([]) == [] and groups([200]) == [range(1)]
