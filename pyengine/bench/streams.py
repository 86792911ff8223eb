"""``bench streams``: what many requests at once get, at several numbers and block sizes."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pyengine.arguments import whole
from pyengine.bench.gemma_mtp import Row
from pyengine.bench.suite import Case
from pyengine.drafters.drafter import MAX_BLOCK
from pyengine.generation import generate
from pyengine.sampling.settings import Sampling
from pyengine.streams import MOST_SEQUENCES, Engine, Request
from pyengine.task import Task, new_task

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair


LOADS = {
    "suite": "the suite's prompts, from the first on again, at once",
    "equal": "its first prompt, at once",
    "mixed": "prompts of 5 to 2000 tokens, at once",
    "arrivals": "its prompts, four per stream, at random times (--rate)",
    "long-prompt": "its prompts, and one of 8000 tokens when all write",
    "several": "texts of its first prompt, as n of one request",
}
PER_STREAM = 4  # requests that arrive one by one
LENGTHS = (5, 2000, 40, 600, 150, 1000, 15, 300)  # of mixed prompts, tokens
LONG = 8000  # tokens of the one that comes late

# Of a terminal of 80 columns; times in milliseconds
HEADS = (
    "streams",
    "block",
    "tok/s",
    "gain",
    "each",
    "first",
    "p50",
    "p95",
    "max",
    "rows",
    "acc.",
    "same",
)


@dataclass(frozen=True)
class Asked:
    """The requests of a run.

    Attributes:
        tasks: Of the texts that are timed.
        sequences: Most at once.
        arrivals: When each is submitted, in seconds; at once where there are none.
        late: Comes when all others have begun to write, and is not timed itself.
        is_several: Whether all are texts of one request.
    """

    tasks: Sequence[Task]
    sequences: int
    arrivals: Sequence[float] = ()
    late: Task | None = None
    is_several: bool = False


@dataclass
class Load:
    """One timed run: the times at which each request's tokens came, and what the rounds took."""

    tokens: list[list[int]]
    first_s: list[float] = field(default_factory=list)  # from the submission to the first token
    gaps_s: list[float] = field(default_factory=list)  # between two rounds' tokens of a request
    stream_tok_s: list[float] = field(default_factory=list)
    round_tokens: int = 0
    rounds: int = 0
    rounds_s: float = 0.0
    rows: int = 0
    drafted: int = 0
    accepted: int = 0


def check_settings(
    streams: Sequence[int],
    block_sizes: Sequence[int | str],
    repeats: int,
    max_tokens: int,
    load: str = "suite",
    rate: float = 1.0,
) -> None:
    """Refuse what cannot be timed.

    Raises:
        ValueError: A setting is impossible or named twice.
    """
    for name, values, most in (
        ("--streams", streams, MOST_SEQUENCES),
        ("--block-sizes", block_sizes, MAX_BLOCK),
    ):
        for value in values:
            if isinstance(value, int) and not 1 <= value <= most:
                raise ValueError(f"[bench] {name} must be 1 to {most} but got {value}.")
        if len({*values}) < len(values):
            raise ValueError(f"[bench] {name} must name each once but got {list(values)}.")
    for name, value, least in (("--repeats", repeats, 1), ("--max-tokens", max_tokens, 2)):
        if whole("bench", name, value) < least:
            raise ValueError(f"[bench] {name} must be at least {least} but got {value}.")
    if load not in LOADS:
        raise ValueError(f"[bench] --load must be one of {', '.join(LOADS)} but got {load!r}.")
    if not 0 < rate < math.inf:
        raise ValueError(f"[bench] --rate must be more than 0 but got {rate}.")


def bench_streams(
    pair: Pair,
    cases: Sequence[Case],
    *,
    streams: Sequence[int],
    block_sizes: Sequence[int | str],
    max_tokens: int,
    sampling: Sampling,
    repeats: int,
    drafter: str | None = None,
    load: str = "suite",
    rate: float = 1.0,
    on_run: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> list[Row]:
    """Time every number of streams at every block size, alternating in this process.

    Text i has the seed of ``sampling`` plus i, and a prompt by :data:`LOADS`; ``rate`` is how many
    arrive per second where they come one by one. A repeat runs each setting once; the next begins
    one further in their list. A run that is not timed comes first, and every text is compared with
    the one that :func:`pyengine.generate` gives.

    Returns:
        A row per setting, of medians over the repeats.
    """
    check_settings(streams, block_sizes, repeats, max_tokens, load, rate)
    settings = [(count, block) for block in block_sizes for count in streams]
    alone: dict[tuple[int, int | str], list[int]] = {}
    loads: dict[tuple[int, int | str], list[Load]] = {setting: [] for setting in settings}
    total = len(settings) * (repeats + 1)
    for repeat in range(repeats + 1):
        for place in range(len(settings)):
            count, block = settings[(place + repeat) % len(settings)]
            on_run(repeat * len(settings) + place, total, f"{count} streams, block {block}")
            asked = _asked(pair, cases, load, count, block, max_tokens, sampling, rate, drafter)
            if not repeat:
                for i, task in enumerate(asked.tasks):
                    if (i, block) not in alone:
                        alone[i, block] = _alone(pair, task)
            timed = run(pair, asked)
            if repeat:
                loads[count, block].append(timed)
    rows = [_row(*setting, loads[setting], alone) for setting in settings]
    single = {row["block_size"]: row["tok_s"] for row in rows if row["streams"] == 1}
    for row in rows:
        one = single.get(row["block_size"])
        row["gain"] = row["tok_s"] / one if one else None
    return rows


def run(pair: Pair, asked: Asked) -> Load:
    """Requests on an engine of their own."""
    tasks, load = asked.tasks, Load([[] for _ in asked.tasks])
    requests: list[Request] = []
    came: list[float] = []
    newest: dict[int, float] = {}
    late = asked.late
    with Engine(pair, sequences=asked.sequences) as engine:
        begin = now = time.perf_counter()
        while True:
            if not asked.arrivals and not requests:
                requests = engine.add_several(tasks) if asked.is_several else []
                requests = requests or [engine.add(task) for task in tasks]
                came = [now] * len(tasks)
            while len(requests) < len(tasks) and now - begin >= asked.arrivals[len(requests)]:
                requests.append(engine.add(tasks[len(requests)]))
                came.append(now)
            if late is not None and len(newest) == len(tasks):
                requests.append(engine.add(late))
                late = None
            before, going = now, dict(newest)
            blocks, drafted = engine.totals.blocks, engine.totals.drafted
            worked = engine.step()
            now = time.perf_counter()
            if not worked:
                if len(requests) >= len(tasks):
                    break
                time.sleep(max(0.0, begin + asked.arrivals[len(requests)] - now))
                now = time.perf_counter()
                continue
            rows = engine.totals.blocks - blocks + engine.totals.drafted - drafted
            for i, request in enumerate(requests[: len(tasks)]):
                for step in request.take():
                    if not step.tokens:
                        continue
                    load.tokens[i] += step.tokens
                    if i not in newest:
                        load.first_s.append(now - came[i])
                    else:
                        load.gaps_s.append(now - going[i])
                        load.round_tokens += len(step.tokens)
                    newest[i] = now
            if rows:
                load.rounds += 1
                load.rounds_s += now - before
                load.rows += rows
        for request in requests:
            if request.error is not None:
                raise request.error
        for request in requests[: len(tasks)]:
            stats = request.result.stats
            load.stream_tok_s.append(stats.tok_s)
            load.drafted += stats.drafted
            load.accepted += stats.accepted
        return load


def _asked(
    pair: Pair,
    cases: Sequence[Case],
    load: str,
    count: int,
    block: int | str,
    max_tokens: int,
    sampling: Sampling,
    rate: float,
    drafter: str | None = None,
) -> Asked:
    """The requests of a load, the same in each repeat."""

    def task(i: int, length: int | None = None) -> Task:
        case = cases[0 if load in ("equal", "several") else i % len(cases)]
        asked: dict[str, Any] = {
            "pair": pair,
            "max_tokens": max_tokens,
            "block_size": block,
            "drafter": drafter,
            "sampling": replace(sampling, seed=(sampling.seed or 0) + i),
        }
        made = new_task(case.content, raw=case.raw, **asked)
        if length is None:
            return made
        most = min(length, pair.target.context - max_tokens - MAX_BLOCK)
        ids = [token for one in cases for token in new_task(one.content, raw=one.raw, **asked).ids]
        return new_task((ids[i % len(ids) :] + ids * (most // len(ids) + 1))[:most], **asked)

    if load == "mixed":
        return Asked([task(i, LENGTHS[i % len(LENGTHS)]) for i in range(count)], count)
    if load == "arrivals":
        rng, at, times = random.Random(sampling.seed), 0.0, list[float]()
        for _ in range(PER_STREAM * count):
            at += rng.expovariate(rate)
            times.append(at)
        return Asked([task(i) for i in range(len(times))], count, times)
    tasks = [task(i) for i in range(count)]
    if load == "long-prompt":
        return Asked(tasks, count + 1, late=task(count, LONG))
    return Asked(tasks, count, is_several=load == "several")


def _alone(pair: Pair, task: Task) -> list[int]:
    return generate(
        task.ids,
        pair=pair,
        max_tokens=task.max_tokens,
        block_size="auto" if task.auto else task.block_size,
        drafter=task.drafter if task.block_size > 1 else None,
        sampling=task.sampling,
    ).tokens


def _row(
    count: int,
    block: int | str,
    loads: Sequence[Load],
    alone: dict[tuple[int, int | str], list[int]],
) -> Row:
    def median(of: Callable[[Load], float]) -> float:
        return statistics.median(of(load) for load in loads)

    def gap(part: float) -> Callable[[Load], float]:
        return lambda load: quantile(load.gaps_s, part) * 1e3

    want = [alone[i, block] for i in range(len(loads[0].tokens))]
    return {
        "streams": count,
        "block_size": block,
        "tok_s": median(lambda load: _over(load.round_tokens, load.rounds_s)),
        "stream_tok_s": median(lambda load: statistics.median(load.stream_tok_s)),
        "first_token_ms": median(lambda load: statistics.median(load.first_s) * 1e3),
        "gap_p50_ms": median(gap(0.5)),
        "gap_p95_ms": median(gap(0.95)),
        "gap_max_ms": median(gap(1.0)),
        "rows_per_round": median(lambda load: _over(load.rows, load.rounds)),
        "acceptance": median(lambda load: _over(load.accepted, load.drafted)),
        "texts_equal_to_alone": all(load.tokens == want for load in loads),
    }


def quantile(values: Sequence[float], part: float) -> float:
    """The least value that so large a part of them does not exceed; 0 of none."""
    ordered = sorted(values)
    place = max(0, -int(-part * len(ordered) // 1) - 1)
    return ordered[place] if ordered else 0.0


def _over(a: float, b: float) -> float:
    return a / b if b else 0.0


def cells(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    """Cells of a table, under :data:`HEADS`."""
    return [
        (
            str(row["streams"]),
            "plain" if row["block_size"] == 1 else str(row["block_size"]),
            f"{row['tok_s']:.0f}",
            "-" if row["gain"] is None else f"{row['gain']:.2f}",
            f"{row['stream_tok_s']:.0f}",
            f"{row['first_token_ms']:.0f}",
            f"{row['gap_p50_ms']:.1f}",
            f"{row['gap_p95_ms']:.1f}",
            f"{row['gap_max_ms']:.0f}",
            f"{row['rows_per_round']:.1f}",
            "-" if row["block_size"] == 1 else f"{row['acceptance']:.2f}",
            "yes" if row["texts_equal_to_alone"] else "NO",
        )
        for row in rows
    ]
