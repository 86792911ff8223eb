"""Tables that fold: where a terminal is too narrow for one, each row becomes a block of lines.

No figure is ever cut or broken.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyengine.cli.common import printable

if TYPE_CHECKING:
    from rich.console import Console


def show(
    out: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, right: bool
) -> None:
    """Print rows under headings; ``right`` aligns them as figures."""
    say(out, title)
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    if sum(widths) + 2 * len(widths) - 1 > out.width:
        for row in rows:
            for head, value in zip(heads, row, strict=True):
                say(out, f"  {head}: {value}")
            say(out, "")
        return
    for row in (heads, ["-" * width for width in widths], *rows):
        cells = zip(row, widths, strict=True)
        line = "  ".join(f"{cell:>{w}}" if right else f"{cell:<{w}}" for cell, w in cells)
        _print(out, f" {line}".rstrip())
    say(out, "")


def two_columns(out: Console, title: str, rows: dict[str, Any]) -> None:
    """Print names and values under a title; without one, the rows alone."""
    texts = {name.replace("_", " "): printable(_said(value)) for name, value in rows.items()}
    if title:
        say(out, title)
    names = max(map(len, texts), default=0)
    longest = max((len(word) for value in texts.values() for word in value.split()), default=0)
    for name, value in texts.items():
        if names + 3 + longest > out.width:
            say(out, f"  {name}: {value}")
        else:
            say(out, f" {name:<{names}}  {value}", " " * (names + 3))


def say(out: Console, text: str, indent: str = "    ") -> None:
    """Print a line, broken between words only."""
    lines = textwrap.wrap(
        text, out.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    for line in lines or [""]:
        _print(out, line)


def _print(out: Console, line: str) -> None:
    out.print(line, soft_wrap=True, markup=False)


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{count} x {what}" for what, count in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
