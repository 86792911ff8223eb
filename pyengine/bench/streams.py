"""``bench streams``: what many requests at once get, at several numbers and block sizes."""

from __future__ import annotations

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
from pyengine.streams import MOST_SEQUENCES, Engine
from pyengine.task import Task, new_task

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair


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
    streams: Sequence[int], block_sizes: Sequence[int | str], repeats: int, max_tokens: int
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


def bench_streams(
    pair: Pair,
    cases: Sequence[Case],
    *,
    streams: Sequence[int],
    block_sizes: Sequence[int | str],
    max_tokens: int,
    sampling: Sampling,
    repeats: int,
    on_run: Callable[[int, int, str], None] = lambda done, total, label: None,
) -> list[Row]:
    """Time every number of streams at every block size, alternating in this process.

    Stream i has the prompt of case i, from the first on again where there are fewer, and the seed
    of ``sampling`` plus i. All come at once. A repeat runs each setting once; the next begins one
    further in their list. A run that is not timed comes first, and every text is compared with the
    one that :func:`pyengine.generate` gives.

    Returns:
        A row per setting, of medians over the repeats.
    """
    check_settings(streams, block_sizes, repeats, max_tokens)
    settings = [(count, block) for block in block_sizes for count in streams]
    alone: dict[tuple[int, int | str], list[int]] = {}
    loads: dict[tuple[int, int | str], list[Load]] = {setting: [] for setting in settings}
    total = len(settings) * (repeats + 1)
    for repeat in range(repeats + 1):
        for place in range(len(settings)):
            count, block = settings[(place + repeat) % len(settings)]
            on_run(repeat * len(settings) + place, total, f"{count} streams, block {block}")
            tasks = [_task(pair, cases, i, max_tokens, block, sampling) for i in range(count)]
            if not repeat:
                for i, task in enumerate(tasks):
                    if (i, block) not in alone:
                        alone[i, block] = _alone(pair, task)
            load = run(pair, tasks)
            if repeat:
                loads[count, block].append(load)
    rows = [_row(*setting, loads[setting], alone) for setting in settings]
    single = {row["block_size"]: row["tok_s"] for row in rows if row["streams"] == 1}
    for row in rows:
        one = single.get(row["block_size"])
        row["gain"] = row["tok_s"] / one if one else None
    return rows


def run(pair: Pair, tasks: Sequence[Task]) -> Load:
    """All at once on an engine of their own."""
    with Engine(pair, sequences=len(tasks)) as engine:
        begin = now = time.perf_counter()
        requests = [engine.add(task) for task in tasks]
        load = Load([[] for _ in tasks])
        newest: dict[int, float] = {}
        while True:
            before, going = now, dict(newest)
            blocks, drafted = engine.totals.blocks, engine.totals.drafted
            if not engine.step():
                break
            now = time.perf_counter()
            rows = engine.totals.blocks - blocks + engine.totals.drafted - drafted
            for i, request in enumerate(requests):
                for step in request.take():
                    if not step.tokens:
                        continue
                    load.tokens[i] += step.tokens
                    if i not in newest:
                        load.first_s.append(now - begin)
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
            stats = request.result.stats
            load.stream_tok_s.append(stats.tok_s)
            load.drafted += stats.drafted
            load.accepted += stats.accepted
        return load


def _task(
    pair: Pair, cases: Sequence[Case], i: int, max_tokens: int, block: int | str, sampling: Sampling
) -> Task:
    case = cases[i % len(cases)]
    return new_task(
        case.content,
        pair=pair,
        raw=case.raw,
        max_tokens=max_tokens,
        block_size=block,
        sampling=replace(sampling, seed=(sampling.seed or 0) + i),
    )


def _alone(pair: Pair, task: Task) -> list[int]:
    return generate(
        task.ids,
        pair=pair,
        max_tokens=task.max_tokens,
        block_size="auto" if task.auto else task.block_size,
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

    want = [alone[i, block] for i in range(count)]
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
