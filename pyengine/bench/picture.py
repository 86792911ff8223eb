"""A card as a PNG: three plots under a heading, over the command. Needs matplotlib (extra plot)."""

from __future__ import annotations

import importlib.util
import io
from typing import TYPE_CHECKING, Any

from pyengine.bench.card import heading
from pyengine.bench.gemma_mtp import PLAIN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT, DPI = 1920, 1080, 160  # pixels
LONGEST = 240  # letters that a line may have
RIGHT = 0.97  # where text and plots end, of the width
INK, FAINT, GRID = "#1a1a1a", "#5f6368", "#e3e5e8"
# Okabe and Ito's colours, which the colour-blind tell apart too
BLUE, ORANGE, GREEN, PURPLE, SKY, RED = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00"),
)
DASHES = (0, (5, 3))
LINES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (SKY, "v"), (RED, "P"))


def available() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def check_available(command: str, otherwise: str) -> None:
    """Refuse to begin what could not be drawn at the end.

    Args:
        command: Who asks.
        otherwise: What to do without.

    Raises:
        RuntimeError: matplotlib is missing.
    """
    if not available():
        raise RuntimeError(
            f'[{command}] the picture needs matplotlib: pip install "pyengine-mlx[plot]", or '
            f"{otherwise}."
        )


def draw(card: dict[str, Any]) -> bytes:
    """A PNG of WIDTH x HEIGHT pixels; the same card gives the same bytes.

    Args:
        card: Of :func:`pyengine.bench.card.make_card`.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context("default", after_reset=True):  # not the user's own settings
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            1, 3, left=0.05, right=RIGHT, top=0.715, bottom=0.19, width_ratios=(1, 1, 1.25)
        )
        grid.update(wspace=0.4)
        _heading(figure, card)
        _speed(figure.add_subplot(grid[0]), card["decoding"])
        _depths(figure.add_subplot(grid[1]), card["decoding"])
        _kernels(figure.add_subplot(grid[2]), card)
        _ending(figure, card)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
    return out.getvalue()


def _text(figure: Figure, x: float, y: float, text: str, **how: Any) -> None:
    """Text on one line, cut where the picture ends."""
    how = {"color": INK, **how}
    drawn = figure.text(x, y, text, parse_math=False, va="baseline", **how)
    for most in range(min(len(text), LONGEST) - 4, 0, -4):
        if drawn.get_window_extent().x1 <= RIGHT * WIDTH:
            break
        drawn.set_text(f"{text[:most]}...")


def _heading(figure: Figure, card: dict[str, Any]) -> None:
    title, *lines = heading(card)
    _text(figure, 0.05, 0.925, title, fontsize=19, fontweight="bold")
    for i, line in enumerate(lines):
        _text(figure, 0.05, 0.885 - 0.033 * i, line, fontsize=9, color=FAINT)


def _ending(figure: Figure, card: dict[str, Any]) -> None:
    settings, sampler = card["settings"], card["sampler"]
    limit = card["bandwidth"]
    repeats, rounds = settings["repeats"], settings["kernel_rounds"]
    notes = (
        f"{'A quick run. ' if settings['quick'] else ''}Decoding: {len(card['prompts'])} prompts, "
        f"at most {settings['max_tokens']} tokens each, temperature {sampler['temperature']:g}, "
        f"top-p {sampler['top_p']:g}, top-k {sampler['top_k']}; median of {repeats} by turns, "
        "whiskers from the slowest to the fastest.",
        f"Ops: weights and cache that no cache of the processor holds, median of {rounds} by turns "
        f"with MLX's. Memory: {limit['gb_s']:.0f} GB/s, {limit['source']}.",
    )
    for i, line in enumerate(notes):
        _text(figure, 0.05, 0.1 - 0.026 * i, line, fontsize=7.5, color=FAINT)
    command = f"$ {card['command']}"
    _text(figure, 0.05, 0.03, command, fontsize=8.5, family="monospace")


def style_axes(axes: Axes, title: str, explained: str, along: str) -> None:
    """What the three plots have in common; values lie along one axis."""
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=26)
    axes.annotate(
        explained,
        (0, 1),
        (0, 10),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=FAINT,
    )
    axes.set_axisbelow(True)
    axes.grid(axis="x" if along == "x" else "y", color=GRID, linewidth=0.8)
    for side in ("top", "right", "left" if along == "y" else "bottom"):
        axes.spines[side].set_visible(False)
    for spine in axes.spines.values():
        spine.set_color(FAINT)
    axes.tick_params(colors=FAINT, labelsize=9, length=0)


def _speed(axes: Axes, decoding: list[dict[str, Any]]) -> None:
    """Tokens per second by block size, plain decoding first."""
    style_axes(axes, "Tokens per second", "and as a multiple of plain decoding", "y")
    names, most = [], 0.0
    for i, line in enumerate(decoding):
        plain, rate = line["block_size"] == PLAIN, line["tok_s"] or 0.0
        low, high = (line[f"tok_s_{which}_repeat"] for which in ("slowest", "fastest"))
        low, high = min(low, rate), max(high, rate)
        axes.bar(i, rate, 0.62, color=FAINT if plain else BLUE)
        axes.errorbar(i, rate, [[rate - low], [high - rate]], color=INK, capsize=4, linewidth=1.2)
        most = max(most, high)
        names.append("plain" if plain else str(line["block_size"]))
        told = f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}"
        ratio = "" if plain or not line["speedup_vs_ar"] else f"\n{line['speedup_vs_ar']:.2f}x"
        axes.annotate(
            told + ratio,
            (i, high),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9.5 if len(decoding) < 6 else 7,
            color=INK,
        )
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, most * 1.2 or 1)
    axes.set_xlabel("block size", fontsize=9, color=FAINT)


def _depths(axes: Axes, decoding: list[dict[str, Any]]) -> None:
    """Part of the drafts at each depth that were kept, a line per block size."""
    style_axes(axes, "Acceptance by depth", "drafts kept of those made, first draft to last", "y")
    deepest = 1
    blocks = [line for line in decoding if line["block_size"] != PLAIN]
    for (color, marker), line in zip(LINES * len(blocks), blocks, strict=False):
        points = [
            (depth, part)
            for depth, part in enumerate(line["acceptance_by_depth"], 1)
            if part is not None
        ]
        deepest = max([deepest, *(depth for depth, _ in points)])
        axes.plot(
            *zip(*points, strict=True),
            color=color,
            marker=marker,
            markersize=6,
            linewidth=1.8,
            label=f"block {line['block_size']}",
        )
    axes.set_xlim(0.7, deepest + 0.3)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xticks(range(1, deepest + 1, max(1, deepest // 7)))
    axes.set_xlabel("draft", fontsize=9, color=FAINT)
    axes.legend(loc="lower left", fontsize=9, frameon=False, labelcolor=INK, ncols=2)


def _kernels(axes: Axes, card: dict[str, Any]) -> None:
    """GB/s of each place by rows per call, MLX's op as a mark, the machine as a line."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    limit = card["bandwidth"]["gb_s"]
    style_axes(axes, f"GB/s per op, shapes of {card['kernel_shapes']}", "", "x")
    places = list(dict.fromkeys(row["place"] for row in card["kernels"]))
    counts = sorted({row["rows"] for row in card["kernels"]})
    height = 0.76 / len(counts)
    most = max([limit, *(max(row["gb_s"], row["mlx_gb_s"]) for row in card["kernels"])])
    for row in card["kernels"]:
        at = counts.index(row["rows"])
        y = places.index(row["place"]) - 0.38 + height * (at + 0.5)
        axes.barh(y, row["gb_s"], height * 0.86, color=(BLUE, SKY)[at % 2])
        axes.plot(
            row["mlx_gb_s"],
            y,
            "D",
            color=ORANGE,
            markersize=5,
            markeredgecolor=INK,
            markeredgewidth=0.7,
            clip_on=False,
        )
        axes.annotate(
            f"{100 * row['share']:.0f} %",
            (max(row["gb_s"], 0), y),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    axes.axvline(limit, color=INK, linewidth=1.2, linestyle=DASHES)
    axes.set_yticks(range(len(places)), places)
    axes.set_ylim(len(places) - 0.45, -0.55)
    axes.set_xlim(0, most * 1.15)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_xlabel("GB/s, and as a part of the machine's", fontsize=9, color=FAINT)
    rows = [
        Patch(color=(BLUE, SKY)[i % 2], label="1 row" if n == 1 else f"{n} rows")
        for i, n in enumerate(counts)
    ]
    mark = Line2D(
        [],
        [],
        marker="D",
        color="none",
        markerfacecolor=ORANGE,
        markeredgecolor=INK,
        markersize=5,
        label="MLX's op",
    )
    limit_line = Line2D([], [], color=INK, linewidth=1.2, linestyle=DASHES, label="memory")
    axes.legend(
        handles=[*rows, mark, limit_line],
        loc="lower left",
        bbox_to_anchor=(-0.02, 0.995),
        borderaxespad=0.3,
        handlelength=1.7,
        columnspacing=1.1,
        ncols=4,
        fontsize=8.5,
        frameon=False,
        labelcolor=INK,
    )
