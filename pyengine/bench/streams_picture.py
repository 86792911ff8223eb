"""The rows of ``bench streams`` as a PNG: what all get, the gain, the gaps (extra plot)."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pyengine.bench import picture
from pyengine.bench.gemma_mtp import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, DPI = 1600, 640, 130  # pixels


def draw(rows: Sequence[Row], heading: str, note: str) -> bytes:
    """A PNG of WIDTH x HEIGHT pixels, a line per block size; the same rows give the same bytes.

    Args:
        rows: Of :func:`pyengine.bench.streams.bench_streams`.
        heading: What was timed.
        note: Where, and how.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context("default", after_reset=True):  # not the user's own settings
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(1, 3, left=0.05, right=0.98, top=0.7, bottom=0.15, wspace=0.22)
        ink, faint = picture.INK, picture.FAINT
        figure.text(
            0.05, 0.92, heading, fontsize=14, fontweight="bold", color=ink, parse_math=False
        )
        figure.text(0.05, 0.86, note, fontsize=8.5, color=faint, parse_math=False)
        places = [figure.add_subplot(grid[0, column]) for column in range(3)]
        plots: tuple[tuple[str, str, Callable[[Row], Any]], ...] = (
            ("Tokens per second", "of all streams", lambda row: row["tok_s"]),
            ("Gain", "times one stream at that block size", lambda row: row["gain"]),
            ("Gaps", "ms between a stream's rounds, 95 of 100", lambda row: row["gap_p95_ms"]),
        )
        for axes, (title, explained, value) in zip(places, plots, strict=True):
            _lines(axes, rows, title, explained, value)
        places[0].legend(loc="upper left", fontsize=8.5, frameon=False, labelcolor=ink)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def points(rows: Sequence[Row], value: Callable[[Row], Any]) -> dict[str, dict[int, float]]:
    """By block size and streams, what is drawn: rows without a value are left out."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        block = row["block_size"]
        name = {1: "plain", "auto": "auto"}.get(block, f"block {block}")
        own = found.setdefault(name, {})
        if (at := value(row)) is not None:
            own[row["streams"]] = at
    return found


def _lines(
    axes: Axes, rows: Sequence[Row], title: str, explained: str, value: Callable[[Row], Any]
) -> None:
    picture.style_axes(axes, title, explained, "y")
    lines = points(rows, value)
    counts = sorted({row["streams"] for row in rows})
    for number, (name, own) in enumerate(lines.items()):
        color, marker = picture.LINES[number % len(picture.LINES)]
        places = [counts.index(count) for count in sorted(own)]
        values = [own[count] for count in sorted(own)]
        axes.plot(places, values, color=color, marker=marker, markersize=6, label=name)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_ylim(0, 1.15 * max([1e-9, *(at for own in lines.values() for at in own.values())]))
    axes.set_xlabel("streams", fontsize=9, color=picture.FAINT)
