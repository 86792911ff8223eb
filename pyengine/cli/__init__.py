"""The ``pyengine`` command: options in, text out; the work is done by the modules beside it.

Generated text and results go to standard output, everything else to standard error. One file a
command; the heavy imports sit inside them, so that ``--help`` and ``--version`` answer at once.

Exit codes: 0 done; 1 the machine or a run failed; 2 an argument or a file cannot be used; 130
Ctrl-C.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from pyengine.cli import bench, chat, common, convert, doctor, generate, inspect, serve

HELP = (
    "Exact speculative decoding for Gemma 4 and its assistant, on MLX.\n\n"
    "Exit codes: 0 done, 1 the machine or a run failed, 2 an argument or a file cannot be used, "
    "130 interrupted."
)

app = typer.Typer(
    name="pyengine",
    help=HELP,
    epilog=common.examples(
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
    help="Time a pair against plain decoding; count what the Metal kernels move.",
    epilog=common.examples("pyengine bench gemma-mtp"),
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")
bench_app.command("gemma-mtp", epilog=common.examples(*bench.EXAMPLES))(bench.gemma_mtp)
bench_app.command("kernels", epilog=common.examples(*bench.KERNELS_EXAMPLES))(bench.kernels)
COMMANDS = {
    "generate": generate,
    "chat": chat,
    "convert": convert,
    "inspect": inspect,
    "doctor": doctor,
    "serve": serve,
}
for name, command in COMMANDS.items():
    app.command(name, epilog=common.examples(*command.EXAMPLES))(command.run)


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


def main() -> None:
    """Entry point of the ``pyengine`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that lacks a character shows another
            stream.reconfigure(errors="replace")
    try:
        app()
    except KeyboardInterrupt:  # before a command had begun
        sys.exit(common.INTERRUPTED)
