"""`bench streams`: figures by hand on a clock of the test, texts compared, settings refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from knowing import tiny
from tiny_pairs import greedy_text
from typer.testing import CliRunner

from pyengine import cli
from pyengine.bench import picture, streams_picture
from pyengine.bench import streams as bench
from pyengine.bench.streams import Asked, Load, quantile
from pyengine.bench.suite import Case
from pyengine.engine import schedule
from pyengine.engine.rounds import Rounds
from pyengine.sampling.settings import Sampling
from pyengine.task import new_task

SAMPLING = Sampling(seed=3, verify="coupled")


class Ids(Case):
    """A prompt of token ids: the tiny pairs have no tokenizer."""

    @property
    def content(self) -> Any:
        return [int(word) for word in self.prompt.split()]


CASES = [Ids(str(n), "ids", " ".join(map(str, greedy_text("uni12")[:n])), 9) for n in (5, 9)]


@pytest.mark.parametrize(
    ("values", "part", "want"),
    [([], 0.5, 0.0), ([3, 1, 2], 0.5, 2), ([3, 1, 2], 0.95, 3), ([3, 1, 2], 1.0, 3),
     (list(range(100)), 0.95, 94), (list(range(100)), 0.5, 49), ([7], 0.5, 7)],
)  # fmt: skip
def test_quantiles(values: list[float], part: float, want: float) -> None:
    assert quantile(values, part) == want


def test_figures_of_a_setting() -> None:
    loads = [
        Load([[1, 2], [3]], [0.5, 1.0], [0.1, 0.3], [5.0, 7.0], 6, 2, 0.5, 16, 8, 4),
        Load([[1, 2], [3]], [0.25, 0.75], [0.2, 0.4], [9.0, 11.0], 6, 3, 0.25, 12, 8, 6),
        Load([[1, 2], [3]], [2.0, 4.0], [0.6, 0.8], [1.0, 3.0], 6, 1, 1.0, 4, 8, 0),
    ]
    row = bench._row(2, 4, loads, {(0, 4): [1, 2], (1, 4): [3], (0, 1): []})
    assert row == {
        "streams": 2,
        "block_size": 4,
        "tok_s": 12.0,
        "stream_tok_s": 6.0,
        "first_token_ms": 750.0,
        "gap_p50_ms": pytest.approx(200.0),
        "gap_p95_ms": pytest.approx(400.0),
        "gap_max_ms": pytest.approx(400.0),
        "rows_per_round": 4.0,
        "acceptance": 0.5,
        "texts_equal_to_alone": True,
    }
    assert not bench._row(2, 4, loads, {(0, 4): [1, 2], (1, 4): [4]})["texts_equal_to_alone"]


def test_a_run_counts_tokens_rounds_and_rows() -> None:
    pair = tiny("uni12")
    tasks = [
        new_task(case.content, pair=pair, max_tokens=7, block_size=3, sampling=SAMPLING)
        for case in CASES
    ]
    load = bench.run(pair, Asked(tasks, 2))
    assert [len(tokens) for tokens in load.tokens] == [7, 7]
    assert len(load.first_s) == 2 and load.round_tokens == 12
    assert load.rows == 3 * len(load.gaps_s) and load.drafted == 2 * len(load.gaps_s)
    assert load.rounds <= len(load.gaps_s) <= 2 * load.rounds


def test_every_setting_is_run_and_compared_with_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "SLOWDOWN", 1e9)  # all prompts before a round: texts overlap
    pair, told = tiny("uni12"), []
    kw: dict[str, Any] = {"max_tokens": 6, "sampling": SAMPLING, "repeats": 2}
    rows = bench.bench_streams(
        pair, CASES, streams=[1, 3], block_sizes=[1, 4], on_run=lambda *a: told.append(a), **kw
    )
    assert [(row["streams"], row["block_size"]) for row in rows] == [(1, 1), (3, 1), (1, 4), (3, 4)]
    assert all(row["texts_equal_to_alone"] for row in rows)
    assert [row["gain"] == 1 for row in rows] == [True, False, True, False]
    assert len(told) == 12 and told[-1][:2] == (11, 12)
    assert [cells[-1] for cells in bench.cells(rows)] == ["yes"] * 4
    # A fault that shows in company alone is seen
    play = Rounds.play

    def swapped(self: Any, sequences: Any) -> Any:
        done = play(self, sequences)
        return done[::-1] if len(done) == 2 else done

    monkeypatch.setattr(Rounds, "play", swapped)
    rows = bench.bench_streams(pair, CASES, streams=[1, 2], block_sizes=[1], **kw)
    assert [cells[-1] for cells in bench.cells(rows)] == ["yes", "NO"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--streams", "0"], "--streams must be 1 to 128 but got 0."),
        (["--streams", "1,129"], "--streams must be 1 to 128 but got 129."),
        (["--streams", "2,2"], "--streams must name each once but got [2, 2]."),
        (["--streams", "two"], "--streams must be whole numbers like 2,4,6 but got 'two'."),
        (["--block-sizes", "129"], "--block-sizes must be 1 to 128 but got 129."),
        (["--repeats", "0"], "--repeats must be at least 1 but got 0."),
        (["--max-tokens", "1"], "--max-tokens must be at least 2 but got 1."),
        (["--load", "heavy"], "several but got 'heavy'."),
        (["--rate", "0"], "--rate must be more than 0 but got 0.0."),
        (["--plot", "/nowhere/x.png"], "output must lie in a folder that exists but got /nowhere"),
    ],
)
def test_what_cannot_be_timed_is_refused(options: list[str], message: str) -> None:
    done = CliRunner().invoke(cli.app, ["bench", "streams", *options])
    assert done.exit_code == 2 and message in done.output.replace("\n", " ")


def test_the_command_reports(tmp_path: Any) -> None:
    out = tmp_path / "report.json"
    words = "--streams 1,2 --block-sizes 3 --max-tokens 4 --repeats 1 --temperature 0 --json"
    words += f" --load several --plot {tmp_path / 'streams.png'} --output {out}"
    done = CliRunner().invoke(cli.app, ["bench", "streams", *words.split()])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "streams.png").read_bytes()[:4] == b"\x89PNG"
    report = json.loads(out.read_text())
    assert [row["streams"] for row in report["rows"]] == [1, 2]
    assert report["settings"]["load"] == "several" and report["settings"]["rate"] is None
    assert json.loads(done.stdout.splitlines()[-1]) == report


def asked(load: str, count: int, rate: float = 50.0) -> Asked:
    return bench._asked(tiny("uni12"), CASES, load, count, 2, 6, SAMPLING, rate)


def test_loads_ask_what_they_say() -> None:
    """By the lengths of prompts, the seeds, the times."""
    texts = {name: [len(task.ids) for task in asked(name, 3).tasks] for name in bench.LOADS}
    assert texts["suite"] == [5, 9, 5]
    assert texts["equal"] == texts["several"] == [5, 5, 5] and asked("several", 3).is_several
    assert texts["long-prompt"] == [5, 9, 5] and texts["arrivals"] == [5, 9] * 6
    context = tiny("uni12").target.context
    assert texts["mixed"] == [min(n, context - 6 - 128) for n in (5, 2000, 40)]
    late = asked("long-prompt", 3)
    assert late.late is not None and late.sequences == 4
    assert len(late.late.ids) == min(8000, context - 6 - 128)
    for name in bench.LOADS:
        one = asked(name, 3)
        seeds = [task.sampling.seed for task in one.tasks]
        assert seeds == [3 + i for i in range(len(seeds))]
        assert bool(one.arrivals) == (name == "arrivals")
    times = asked("arrivals", 40).arrivals
    assert times == asked("arrivals", 40).arrivals == sorted(times)
    assert 160 / 50 * 0.7 < times[-1] < 160 / 50 * 1.4  # so many per second
    assert len({task.ids[0] for task in asked("mixed", 8).tasks}) > 1  # nothing is shared


@pytest.mark.parametrize("load", bench.LOADS)
def test_a_load_is_run_and_its_texts_are_those_alone(load: str) -> None:
    rows = bench.bench_streams(
        tiny("uni12"),
        CASES,
        streams=[2],
        block_sizes=[2],
        max_tokens=6,
        sampling=SAMPLING,
        repeats=1,
        load=load,
        rate=500.0,
    )
    assert rows[0]["texts_equal_to_alone"] and rows[0]["streams"] == 2
    assert rows[0]["gap_max_ms"] > 0 < rows[0]["first_token_ms"]


def test_the_late_prompt_comes_when_all_write_and_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, told = asked("long-prompt", 2), []
    add = bench.Engine.add

    def noted(self: Any, task: Any, *args: Any) -> Any:
        told.append((task, [len(r.result.tokens) for r in self._active]))
        return add(self, task, *args)

    monkeypatch.setattr(bench.Engine, "add", noted)
    load = bench.run(tiny("uni12"), one)
    assert [task for task, _ in told] == [*one.tasks, one.late]
    assert min(told[-1][1]) >= 1
    assert [len(tokens) for tokens in load.tokens] == [6, 6] and len(load.first_s) == 2


ROWS = [
    {"streams": s, "block_size": b, "tok_s": 10.0 * s, "gain": gain, "gap_p95_ms": 2.0 * s}
    for s, b, gain in ((1, 1, 1.0), (4, 1, 3.5), (1, "auto", None), (4, "auto", None))
]


def test_what_is_drawn() -> None:
    assert streams_picture.points(ROWS, lambda row: row["tok_s"]) == {
        "plain": {1: 10.0, 4: 40.0},
        "auto": {1: 10.0, 4: 40.0},
    }
    assert streams_picture.points(ROWS, lambda row: row["gain"]) == {
        "plain": {1: 1.0, 4: 3.5},
        "auto": {},
    }


def test_the_picture_is_a_png_of_its_rows() -> None:
    png = streams_picture.draw(ROWS, "a pair: $x", "a note")
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    size = (streams_picture.WIDTH, streams_picture.HEIGHT)
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == size
    assert png == streams_picture.draw(ROWS, "a pair: $x", "a note")
    other = [{**row, "tok_s": 1.0} for row in ROWS]
    assert png != streams_picture.draw(other, "a pair: $x", "a note")


def test_no_run_begins_without_what_draws_its_picture(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture, "available", lambda: False)
    words = ["bench", "streams", "--plot", str(tmp_path / "x.png")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 1
    assert "[bench] the picture needs matplotlib" in done.output
    assert "or leave --plot out." in done.output.replace("\n", " ")
