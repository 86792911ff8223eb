"""The report of ``bench sweep`` as a PNG: six plots by block size or draft (extra plot)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyengine.bench import picture
from pyengine.bench.gemma_mtp import PLAIN, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, DPI = 1920, 1150, 140  # pixels
STYLES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)))  # of rules
PLOTS = (
    ("tok_s", "Tokens per second", "decoding alone; dashes: plain decoding"),
    ("speedup_vs_ar", "Speedup", "times plain decoding in the same run"),
    ("round_cost_in_plain_steps", "Cost of a round", "in steps of plain decoding"),
    ("tokens_per_round", "Tokens per round", "kept drafts and one more"),
    ("acceptance_rate", "Acceptance", "drafts kept of all that were made"),
)
Line = tuple[str, str]  # a drafter, or its trees, and a rule


def draw(report: dict[str, Any]) -> bytes:
    """A PNG of WIDTH x HEIGHT pixels, a line per drafter and rule; the same report gives the same
    bytes.

    Args:
        report: Of :func:`pyengine.bench.report.make_report`.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summary, settings, sampler = report["summary"], report["settings"], report["sampler"]
    machine, repeats = report["machine"], settings["repeats"]
    with style.context("default", after_reset=True):  # not the user's own settings
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 3, left=0.05, right=0.98, top=0.8, bottom=0.07)
        grid.update(wspace=0.2, hspace=0.5)
        ink, faint = picture.INK, picture.FAINT
        title = f"{report['pair']['name']}: how many drafts pay"
        figure.text(0.05, 0.95, title, fontsize=15, fontweight="bold", color=ink, parse_math=False)
        note = (
            f"{len(report['prompts'])} prompts, at most {settings['max_tokens']} tokens each, "
            f"temperature {sampler['temperature']:g}, top-p {sampler['top_p']:g}, top-k "
            f"{sampler['top_k']}; medians of {repeats} by turns; {machine['chip']}, "
            f"{machine['cores']} cores, {report['started_at'][:10]}, pyengine "
            f"{report['versions']['pyengine']}, load average {machine['load_average'][0]:.1f}"
            f"{'' if report['complete'] else '; not complete'}"
        )
        figure.text(0.05, 0.92, note, fontsize=8.5, color=faint, parse_math=False)
        places = [figure.add_subplot(grid[n // 3, n % 3]) for n in range(6)]
        for axes, (key, name, explained) in zip(places, PLOTS, strict=False):
            _by_block(axes, summary, key, name, explained)
        _by_depth(places[5], summary)
        places[0].legend(loc="best", fontsize=8, frameon=False, labelcolor=ink)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def lines(summary: Sequence[Row]) -> dict[Line, list[Row]]:
    """Rows of each drafter and rule by rising block size, those of trees apart; chains whose size
    is "auto" are no points of a line."""
    found: dict[Line, list[Row]] = {}
    for row in summary:
        if row["tree"] is not None:
            found.setdefault((f"trees of {row['drafter']}", row["verify"]), []).append(row)
        elif row["block_size"] != PLAIN and isinstance(row["block_size"], int):
            found.setdefault((row["drafter"], row["verify"]), []).append(row)
    return {line: sorted(own, key=size) for line, own in found.items()}


def size(row: Row) -> int:
    """Rows that a round of it verifies: its block, or a tree's drafts and the primary token."""
    return int(row["block_size"] if row["tree"] is None else row["tree"] + 1)


def by_depth(row: Row) -> list[float | None]:
    """Of the drafts at each depth the part that was kept; of a tree, which has several there and
    keeps at most one, the part of the rounds that kept one."""
    key = "acceptance_by_depth" if row["tree"] is None else "kept_by_depth"
    return list(row[key])


def longest(summary: Sequence[Row]) -> list[Row]:
    """Of each drafter and rule the row of the longest block, and that of the largest tree."""
    return [own[-1] for own in lines(summary).values()]


def _look(line: Line, every: Sequence[Line]) -> dict[str, Any]:
    """A colour and a mark per drafter, a style per rule."""
    drafters, rules = (list(dict.fromkeys(names)) for names in zip(*every, strict=True))
    color, marker = picture.LINES[drafters.index(line[0]) % len(picture.LINES)]
    label = line[0] if len(rules) == 1 else f"{line[0]}, {line[1]}"
    look = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.7, "label": label}
    return {**look, "linestyle": STYLES[rules.index(line[1]) % len(STYLES)]}


def _by_block(axes: Axes, summary: Sequence[Row], key: str, title: str, explained: str) -> None:
    picture.style_axes(axes, title, explained, "y")
    every = lines(summary)
    sizes = sorted({size(row) for own in every.values() for row in own})
    most = 1e-9
    for line, own in every.items():
        points = [(size(row), row[key]) for row in own if row[key] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **_look(line, list(every)))
            most = max(most, *(value for _, value in points))
    for row in summary:
        if (
            row["block_size"] == PLAIN
            and row[key] is not None
            and key in ("tok_s", "speedup_vs_ar")
        ):
            axes.axhline(row[key], color=picture.FAINT, linewidth=1.2, linestyle=picture.DASHES)
            most = max(most, row[key])
    axes.set_ylim(0, 1.1 * most)
    if key == "acceptance_rate":
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    _log_axis(axes, sizes, "block size")


def _by_depth(axes: Axes, summary: Sequence[Row]) -> None:
    """Part of the drafts at each depth that were kept, in the longest block of each line."""
    explained = "kept of those made, longest block"
    picture.style_axes(axes, "Acceptance by draft", explained, "y")
    every, deepest = lines(summary), 2
    for line, own in every.items():
        rates = enumerate(by_depth(own[-1]), 1)
        points = [(depth, rate) for depth, rate in rates if rate is not None]
        if points:
            axes.plot(*zip(*points, strict=True), **{**_look(line, list(every)), "marker": ""})
            deepest = max(deepest, points[-1][0])
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    ticks = [2**n for n in range(deepest.bit_length())]
    _log_axis(axes, ticks, "draft")


def _log_axis(axes: Axes, ticks: Sequence[int], name: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=7)  # 100 and 128 are near
    axes.minorticks_off()
    axes.set_xlabel(name, fontsize=9, color=picture.FAINT)
