"""What the commands share: exit codes, errors as sentences, options, loading, the terminal."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pyengine.pair import Pair

USER_ERROR, BROKEN, INTERRUPTED = 2, 1, 130
LONGEST_MESSAGE = 600
_OURS = re.compile(r"\[[\w. -]+\] ")


def examples(*commands: str) -> str:
    """The end of a help text, a paragraph a command."""
    return "\n\n".join(("Examples:", *commands))


class Dtype(str, Enum):
    """Storage types a pair can be loaded in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Verify(str, Enum):
    """Rules that accept drafts."""

    residual = "residual"
    block = "block"
    coupled = "coupled"


class Position(str, Enum):
    """Where the assistant's query stands, seen from the n committed tokens."""

    last = "n-1"
    before_last = "n-2"


@contextmanager
def sentences() -> Iterator[None]:
    """Turn the package's own errors into one sentence and an exit code; the rest is a bug's trace.

    Our messages begin with what was being done, in brackets. A wrong argument (ValueError) and a
    file that cannot be used give 2, a machine or a run that fails gives 1, Ctrl-C gives 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader has gone, as in `pyengine generate ... | head`; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(BROKEN) from None
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        text = _sentence(error)
        if text is None:
            raise
        typer.echo(f"pyengine: {text}", err=True)
        broken = isinstance(error, (RuntimeError, MemoryError)) and not _by_input(error)
        raise typer.Exit(BROKEN if broken else USER_ERROR) from None


def _sentence(error: Exception) -> str | None:
    """The error as one line without control characters; None where it is a bug's.

    A file name or a tensor's may hold anything, and a terminal obeys what it is sent.
    """
    text = str(error)
    if isinstance(error, MemoryError):
        text = f"[memory] the machine must have more free memory: {text or 'none is left'}."
    elif isinstance(error, OSError) and (error.errno is not None or not _OURS.match(text)):
        what = error.filename if error.filename is not None else "a file"
        text = f"[file] {what} must be usable but is not: {error.strerror or text}."
    elif not _OURS.match(text):
        return None
    return printable(text)


def printable(text: str) -> str:
    """One line without control characters, and not too long."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 4]} ..."


def _by_input(error: Exception) -> bool:
    """Whether a run failed because of what the weights hold."""
    from pyengine.speculate import NonFinite

    return isinstance(error, NonFinite)


TargetDir = Annotated[
    Path | None, typer.Option(help="Folder or hub name of the target.", show_default=False)
]
AssistantDir = Annotated[
    Path | None, typer.Option(help="Folder or hub name of the assistant.", show_default=False)
]
BundleDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder or hub name of a bundle: target/ and assistant/.", show_default=False
    ),
]
VerifyRule = Annotated[
    Verify,
    typer.Option(
        help="Rule that accepts drafts: block keeps more of them, coupled gives the very text of "
        "plain decoding with that seed."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers; one seed gives one text.")]


def load_pair(
    target: Path | None,
    assistant: Path | None,
    bundle: Path | None,
    dtype: Dtype | None,
    position: Position,
) -> Pair:
    import mlx.core as mx

    from pyengine.pair import load

    with waiting("Reading the weights"):
        return load(
            target,
            assistant,
            bundle,
            dtype=getattr(mx, dtype.value) if dtype else None,
            position="n-1" if position is Position.last else "n-2",
        )


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on a terminal why nothing comes yet; a spinner's thread would disturb the clock."""
    if not sys.stderr.isatty():
        yield
        return
    typer.echo(f"{what} ...", nl=False, err=True)
    try:
        yield
    finally:
        typer.echo("\r\x1b[K", nl=False, err=True)


@contextmanager
def progress(what: str = "warm-up") -> Iterator[Any]:
    """A bar on standard error; on a pipe, one line a step."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    if not sys.stderr.isatty():
        yield lambda done, total, label: typer.echo(f"[{done}/{total}] {label}", err=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    # Drawn between steps only, so that no thread of the bar's disturbs a timed run.
    with Progress(*columns, console=console(sys.stderr), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(what)
        yield lambda done, total, label: bar.update(
            task, completed=done, total=total, description=label, refresh=True
        )


def console(file: Any) -> Console:
    from rich.console import Console

    return Console(file=file)


def two_columns(title: str, rows: dict[str, Any]) -> Table:
    """Names and values under a title."""
    from rich.table import Table
    from rich.text import Text

    out = Table(show_header=False, box=None, title=title, title_justify="left")
    for name, value in rows.items():
        said = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if isinstance(value, dict):
            said = ", ".join(f"{count} x {what}" for what, count in value.items())
        out.add_row(name.replace("_", " "), Text(printable(said)))
    return out
