"""The ``pyengine`` command: options in, text out; the work is done by the modules beside it.

Generated text and results go to standard output, everything else to standard error. One file per
command; the heavy imports sit inside them, so that ``--help`` and ``--version`` answer at once.

Exit codes: 0 done; 1 the machine or a run failed; 2 an argument or a file cannot be used; 130
Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from pyengine.cli import (
    bench,
    calibrate,
    card,
    chat,
    common,
    convert,
    doctor,
    generate,
    hosts,
    inspect,
    model,
    serve,
    sweep,
)

app = typer.Typer(
    name="pyengine",
    help="Exact speculative decoding for Gemma 4 and its assistant, on MLX.",
    epilog=common.ending(
        'pyengine generate "Write a Snake game in one HTML file."',
        "pyengine doctor",
        "pyengine generate --help",
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(
    help="Time a pair: against plain decoding, with many texts at once, at a published shape.",
    epilog=common.ending(
        "pyengine bench gemma-mtp",
        "pyengine bench sweep --plot sweep.png",
        "pyengine bench streams",
        "pyengine bench model --shape e2b",
        "pyengine bench card",
    ),
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")
COMMANDS: list[tuple[typer.Typer, str, Callable[..., None], tuple[str, ...]]] = [
    (bench_app, "gemma-mtp", bench.gemma_mtp, bench.EXAMPLES),
    (bench_app, "sweep", sweep.run, sweep.EXAMPLES),
    (bench_app, "streams", bench.streams, bench.STREAMS_EXAMPLES),
    (bench_app, "model", model.run, model.EXAMPLES),
    (bench_app, "card", card.run, card.EXAMPLES),
    (app, "generate", generate.run, generate.EXAMPLES),
    (app, "chat", chat.run, chat.EXAMPLES),
    (app, "convert", convert.run, convert.EXAMPLES),
    (app, "inspect", inspect.run, inspect.EXAMPLES),
    (app, "doctor", doctor.run, doctor.EXAMPLES),
    (app, "serve", serve.run, serve.EXAMPLES),
    (app, "calibrate", calibrate.run, calibrate.EXAMPLES),
]
for group, name, command, examples in COMMANDS:
    group.command(
        name,
        cls=bench.PublishedNames if command is bench.gemma_mtp else None,
        help=common.help_of(command),
        epilog=common.ending(*examples),
    )(command)


def show_version(wanted: bool) -> None:
    if wanted:
        from pyengine import __version__

        typer.echo(f"pyengine {__version__}")
        raise typer.Exit


@app.callback()
def pyengine(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def run() -> None:
    """What :func:`pyengine.__main__.main` runs."""
    common.open_streams()
    with hosts.one_voice():
        try:
            with common.sentences():  # also for what is said before and after a command
                app()
        except typer.Exit as end:
            sys.exit(end.exit_code)
