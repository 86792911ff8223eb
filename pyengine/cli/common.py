"""What the commands share: exit codes, errors as sentences, loading, the terminal."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

import typer

from pyengine.cli.options import Dtype, Ops, Position

if TYPE_CHECKING:
    from rich.console import Console

    from pyengine.checkpoint.pair import Pair
    from pyengine.task import Result, Step
    from pyengine.text.tool_calls import ToolCall

USER_ERROR, BROKEN, INTERRUPTED = 2, 1, 130
LONGEST_MESSAGE = 600
NARROWEST, WIDTH = 20, 80
WORTH_TELLING_S = 5.0  # of reading weights
_OURS = re.compile(r"\[[\w. -]+\] ")


EXIT_CODES = (
    "Exit codes: 0 done, 1 the machine or a run failed, 2 an argument or a file cannot be used, "
    "130 interrupted."
)


def ending(*commands: str) -> str:
    """The end of a help text, one paragraph per command."""
    return "\n\n".join(("Examples:", *commands, EXIT_CODES))


def help_of(command: Callable[..., None]) -> str:
    """A command's docstring, its paragraphs without line ends: terminals differ in width."""
    paragraphs = (command.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(text.split()) for text in paragraphs)


def open_streams() -> None:
    """Standard streams for the whole run.

    A closed one is opened on the null device; otherwise the next file that is opened would get its
    number. Input that is not text is an error; a terminal that lacks a character shows another.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            nowhere = open(os.devnull, "w" if number else "r", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, nowhere)
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace" if number else "strict")


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
        # The reader has disconnected, as in `pyengine generate ... | head`.
        _drop_output()
        raise typer.Exit(BROKEN) from None
    except (ValueError, RuntimeError, OSError, MemoryError) as error:
        text = sentence(error)
        if text is None:
            raise
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            _drop_output()
        typer.echo(f"pyengine: {text}", err=True)
        broken = isinstance(error, (RuntimeError, MemoryError)) and not _by_input(error)
        raise typer.Exit(BROKEN if broken else USER_ERROR) from None


def _drop_output() -> None:
    """What standard output still holds goes nowhere: Python would try once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def sentence(error: Exception) -> str | None:
    """The error as one line without control characters; None where it is a bug's.

    A file name or a tensor's may hold anything, and a terminal obeys what it is sent.
    """
    text = str(error)
    if isinstance(error, MemoryError):
        text = f"[memory] the machine must have more free memory: {text or 'none is left'}."
    elif isinstance(error, OSError) and (error.errno is not None or not _OURS.match(text)):
        # The command's own files are named
        what = error.filename if error.filename is not None else "standard output"
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
    from pyengine.engine.report import NonFinite

    return isinstance(error, NonFinite)


def load_pair(
    target: str | None,
    assistant: str | None,
    bundle: str | None,
    dtype: Dtype | None,
    position: Position,
    implementation: Ops | None,
    dflash: str | None = None,
) -> Pair:
    """Choose what runs the ops, and read a pair."""
    import mlx.core as mx

    from pyengine import ops
    from pyengine.checkpoint.pair import load
    from pyengine.doctor import first_use

    if implementation is not None:
        ops.use(implementation.value)
    start = time.perf_counter()
    with waiting("Reading the weights") as tell:
        pair = load(
            target,
            assistant,
            bundle,
            dflash=dflash,
            dtype=getattr(mx, dtype.value) if dtype else None,
            position="n-1" if position is Position.last else "n-2",
            text=True,
            on_progress=tell,
        )

    if (took := time.perf_counter() - start) >= WORTH_TELLING_S:
        typer.echo(f"The weights were read in {took:.1f} s.", err=True)

    def on_op(done: int, total: int, op: str) -> None:
        typer.echo(f"First use on this device: checking {op} ({done + 1} of {total})", err=True)

    first_use.ready(pair, lambda line: typer.echo(line, err=True), on_op)
    return pair


def check_dflash(dflash: str | None, assistant: str | None, drafter: str | None) -> None:
    """Refuse a DFlash drafter that would be read and not used; ``drafter`` may name several.

    Raises:
        ValueError: None of them is it.
    """
    from pyengine.drafters import first_of

    if dflash is None or (drafter is None and assistant is None):
        return
    names = "assistant" if drafter is None else drafter
    if "dflash" not in map(first_of, names.split(",")):
        raise ValueError(f"[load] --dflash must go with --drafter dflash but got {names}.")


def introduce(pair: Pair) -> None:
    """Say on a terminal that the demo pair answers: its answers are often beside the point."""
    if pair.embedded and sys.stderr.isatty():
        console(sys.stderr).print(
            "The embedded demo pair (10 MB) answers. It knows single-file canvas games and a "
            "little Python; --bundle takes real weights."
        )


@contextmanager
def waiting(what: str) -> Iterator[Callable[[int, int], None]]:
    """Say on a terminal what is being waited for, and how far it is where that is known.

    A spinner's thread would disturb the clock.
    """
    if not moves():
        yield lambda done, total: None
        return

    def tell(done: int, total: int) -> None:
        share = f" {100 * done // max(total, 1)} %" if done else ""
        typer.echo(f"\r{what} ...{share}", nl=False, err=True)

    tell(0, 0)
    try:
        yield tell
    finally:
        typer.echo("\r\x1b[K", nl=False, err=True)


def after_prompt(steps: Iterator[Step], total: Callable[[], int]) -> Iterator[Step]:
    """The steps of an answer; until the first, a terminal shows how much of the prompt is read."""
    with waiting("Reading the prompt") as tell:
        for first in steps:
            if first.prompt_done is None:
                break
            tell(first.prompt_done, total())
        else:
            return
    yield first
    yield from steps


def tell_cut(result: Result, pair: Pair, max_tokens: int | None) -> None:
    """Say what is amiss with an answer; and when a limit ended it, what lifts that."""
    if result.warning is not None:
        typer.echo(printable(result.warning), err=True)
    if result.finish_reason != "length":
        return
    if max_tokens is not None and len(result.tokens) >= max_tokens:
        way = "a larger --max-tokens lifts that"
        if result.early_exit is not None:
            way = "longer ones were not calibrated"
        typer.echo(f"The answer was cut at {max_tokens} tokens; {way}.", err=True)
    else:
        typer.echo(
            f"The answer was cut: the context of {pair.target.context} tokens is full.", err=True
        )


def read_input(command: str, one_line: bool = False) -> str:
    """All of standard input, or its next line with its end.

    Raises:
        ValueError: It is not text.
    """
    try:
        return sys.stdin.readline() if one_line else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"[{command}] standard input must be UTF-8 text but is not.") from error


class Printer:
    """Prints text as it comes, and thoughts, where they are wanted, to standard error."""

    def __init__(self, thoughts: bool) -> None:
        self.thoughts = thoughts
        self.dim, self.plain = dimmed()
        self.open_line = False
        self._newest = ""  # character of standard output

    def show(self, step: Step) -> None:
        """What a step added."""
        if self.thoughts and step.thinking:
            typer.echo(f"{self.dim}{step.thinking}{self.plain}", nl=False, err=True, color=True)
            self.open_line = not step.thinking.endswith("\n")
        if step.text:
            self.end_thought()
            self._write(step.text)

    def end(self, calls: Sequence[ToolCall] = ()) -> None:
        """End the line of text that is open, and print a line per call.

        An empty text has a line too, unless there are calls.
        """
        self.end_thought()
        if self._newest != "\n" and (self._newest or not calls):
            self._write("\n")
        for call in calls:
            self._write(f"{call.name}({call.arguments})\n")

    def end_thought(self) -> None:
        """Begin a new line on standard error if a thought left one open."""
        if self.open_line:
            typer.echo(err=True)
            self.open_line = False

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()
        self._newest = text[-1]


def dimmed() -> tuple[str, str]:
    """What makes text on standard error dim, and what ends that; nothing without colours."""
    colours = moves() and not os.environ.get("NO_COLOR")
    return ("\x1b[2m", "\x1b[0m") if colours else ("", "")


def result_dict(pair: Pair, result: Result) -> dict[str, Any]:
    """A result for JSON; its log-probabilities with the tokens' texts."""

    def spelled(token: int, logprob: float) -> dict[str, Any]:
        return {"token": token, "text": pair.tokenizer.decode([token]), "logprob": logprob}

    out = result.to_dict()
    if result.logprobs is not None:
        out["logprobs"] = [
            spelled(row.token, row.logprob) | {"top": [spelled(*best) for best in row.top]}
            for row in result.logprobs
        ]
    return out


@contextmanager
def progress(what: str = "warm-up", parts: int | None = None) -> Iterator[Any]:
    """A bar on standard error; on a pipe one line per step, or ``parts`` lines in all."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    if not moves():
        told = -1

        def line(done: int, total: int, label: str) -> None:
            nonlocal told
            if parts is None:
                typer.echo(f"[{done}/{total}] {label}", err=True)
            elif done * parts // max(total, 1) > told:
                told = done * parts // max(total, 1)
                typer.echo(f"{what}: {100 * done // max(total, 1)} % {label}", err=True)

        yield line
        return
    # In a narrow terminal the text is cut, not the figure
    text = Column(no_wrap=True, overflow="ellipsis")
    bar_column = BarColumn(20, table_column=Column(min_width=8))
    percent = TaskProgressColumn(table_column=Column(min_width=4, no_wrap=True))
    columns = (percent, bar_column, TextColumn("{task.description}", table_column=text))
    # Drawn between steps only, so that no thread of the bar's disturbs a timed run.
    with Progress(*columns, console=console(sys.stderr), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(what)
        yield lambda done, total, label: bar.update(
            task, completed=done, total=total, description=label, refresh=True
        )


def moves() -> bool:
    """Whether standard error is a terminal that can do more than print lines."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def console(file: Any) -> Console:
    from rich.console import Console

    out = Console(file=file, highlight=False)
    # Nothing would fit, and some terminals and CI machines say 0
    return out if out.width >= NARROWEST else Console(file=file, highlight=False, width=WIDTH)


def size(count: float) -> str:
    """Bytes for a reader."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
