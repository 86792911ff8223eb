"""The ``pyengine`` command: options in, text out; the work is done by generate.py and bench.py.

Generated text and results go to standard output, everything else to standard error. The heavy
imports sit inside the commands, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from io import TextIOWrapper
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from pyengine.generate import Result
    from pyengine.pair import Pair

USER_ERROR, BROKEN, INTERRUPTED = 2, 1, 130


def examples(*commands: str) -> str:
    """The end of a help text, a paragraph a command."""
    return "\n\n".join(("Examples:", *commands))


app = typer.Typer(
    name="pyengine",
    help="Exact speculative decoding for Gemma 4 and its assistant, on MLX.",
    epilog=examples('pyengine generate "Write a Snake game in one HTML file."'),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(
    help="Time a pair against plain decoding.",
    epilog=examples("pyengine bench gemma-mtp"),
    no_args_is_help=True,
)
app.add_typer(bench_app, name="bench")


class Dtype(str, Enum):
    """Storage types a pair can be loaded in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Position(str, Enum):
    """Where the assistant's query stands, seen from the n committed tokens."""

    last = "n-1"
    before_last = "n-2"


class Verify(str, Enum):
    """Rules that accept drafts."""

    residual = "residual"
    block = "block"
    coupled = "coupled"


@contextmanager
def sentences() -> Iterator[None]:
    """Turn the package's own errors into one sentence and an exit code; the rest is a bug's trace.

    Our messages begin with what was being done, in brackets. A wrong argument (ValueError) and a
    file that cannot be read give 2, a machine or weights that fail give 1, Ctrl-C gives 130.
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
    except (ValueError, RuntimeError, OSError) as error:
        ours = re.match(r"\[[\w. -]+\] ", str(error))
        if not ours and not isinstance(error, OSError):
            raise
        typer.echo(f"pyengine: {error}", err=True)
        raise typer.Exit(BROKEN if isinstance(error, RuntimeError) else USER_ERROR) from None


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


TargetDir = Annotated[
    Path | None, typer.Option(help="Folder of the target checkpoint.", show_default=False)
]
AssistantDir = Annotated[
    Path | None, typer.Option(help="Folder of the assistant checkpoint.", show_default=False)
]
VerifyRule = Annotated[
    Verify,
    typer.Option(
        help="Rule that accepts drafts: block keeps more of them, coupled gives the very text of "
        "plain decoding with that seed."
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of the random numbers; one seed gives one text.")]


@app.command(
    epilog=examples(
        'pyengine generate "Write a Pong game in one HTML file." --stats',
        "cat prompt.txt | pyengine generate --bundle ./pair --temperature 0",
        "pyengine generate --raw --block-size 1 --max-tokens 64 'import json'",
    )
)
def generate(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to say to the model; standard input when left out or '-'."),
    ] = None,
    target: TargetDir = None,
    assistant: AssistantDir = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="Folder that holds target/ and assistant/.", show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message before the prompt.", show_default=False)
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without the template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="At most this many new tokens.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy.", show_default="the pair's")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="1.0 is off.", show_default="the pair's")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="0 is off.", show_default="the pair's")] = None,
    min_p: Annotated[float, typer.Option(help="0.0 is off.")] = 0.0,
    seed: Seed = 0,
    verify: VerifyRule = Verify.residual,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Primary token and its drafts, 2 to 128; 1 is plain decoding.",
            show_default="the pair's",
        ),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End before this text; may be given again.", show_default=False),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print counts and speed to standard error.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON in place of the text.")
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Storage type of the activations.", show_default="the checkpoint's"),
    ] = None,
    position: Annotated[
        Position, typer.Option(help="Position of the assistant's query; n-2 is rarely wanted.")
    ] = Position.last,
) -> None:
    """Generate text after a prompt and stream it to standard output.

    Without --target, --assistant or --bundle the small pair inside the package answers.
    """
    with sentences():
        text = read_prompt(prompt)
        if raw and system is not None:
            raise ValueError("[generate] --system must go with the template but got --raw too.")
        from dataclasses import replace

        from pyengine.generate import resolve_sampling, stream

        pair = load_pair(target, assistant, bundle, dtype, position)
        given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
        chosen |= {"min_p": min_p, "seed": seed, "verify": verify.value}
        running = stream(
            text if system is None else [_turn("system", system), _turn("user", text)],
            pair=pair,
            max_tokens=max_tokens,
            sampling=replace(resolve_sampling(pair, None), **chosen),
            block_size=block_size,
            stop=stop,
            raw=raw,
        )
        try:
            with waiting("Reading the prompt"):
                first = next(running, "")
            for piece in chain((first,), running):
                if not as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        finally:
            # After Ctrl-C or a failure too: what was generated so far is kept.
            if running.result.tokens:
                finish(running.result, as_json, stats)


@bench_app.command(
    "gemma-mtp",
    epilog=examples(
        "pyengine bench gemma-mtp",
        "pyengine bench gemma-mtp --target-model ./target --assistant-model ./assistant "
        "--prompt-suite flappy.jsonl --max-tokens 1000 --draft-block-sizes 6 --output report.json",
    ),
)
def gemma_mtp(
    target_model: TargetDir = None,
    assistant_model: AssistantDir = None,
    prompt_suite: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of id, category, prompt, max_tokens.", show_default="the embedded suite"
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Token budget of a case, if its own is not lower.")
    ] = 256,
    draft_block_sizes: Annotated[
        str, typer.Option(help="Block sizes to compare with plain decoding.")
    ] = "2,4,6",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="1.0 is off.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 64,
    seed: Annotated[int, typer.Option(help="Case i of the suite uses this seed + i.")] = 0,
    verify: Annotated[
        str, typer.Option(help="Rules that accept drafts, compared side by side: residual,block.")
    ] = "residual",
    repeats: Annotated[int, typer.Option(help="Timed runs of each setting; medians count.")] = 3,
    allow_unverified_gemma: Annotated[
        bool,
        typer.Option(
            "--allow-unverified-gemma", help="Run pairs that are none of the published ones."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write the JSON report here.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with the report, without its rows, on one line.")
    ] = False,
) -> None:
    """Time exact speculative decoding against plain decoding, alternating in one process.

    Without model options the small pair inside the package runs the embedded suite. tok/s is
    decode only; speedup_vs_ar is over plain decoding; round cost is in plain steps.
    """
    with sentences():
        blocks = read_block_sizes(draft_block_sizes)
        from pyengine import bench, report, suite
        from pyengine.sampling import Sampling

        rules = verify.split(",")
        bench.check_settings(blocks, repeats, max_tokens, rules)
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        cases = suite.load_suite(prompt_suite or suite.EMBEDDED)
        if output:
            report.check_output(output)
        pair = load_pair(target_model, assistant_model, None, None, Position.last)
        if not (pair.verified or pair.embedded or allow_unverified_gemma):
            raise ValueError(
                "[bench] the pair must be one of the five published geometries, or "
                "--allow-unverified-gemma must be given."
            )
        out, run_on = console(sys.stdout), report.environment()
        for line in report.heading(run_on, pair):
            typer.echo(line)
        with progress() as on_run:
            rows, summary = bench.gemma_mtp(
                pair,
                cases,
                max_tokens=max_tokens,
                block_sizes=blocks,
                sampling=sampling,
                repeats=repeats,
                rules=rules,
                on_run=on_run,
            )
        settings = {
            "command": sys.argv[1:],
            "prompt_suite": str(prompt_suite or suite.EMBEDDED.name),
            "max_tokens": max_tokens,
            "draft_block_sizes": blocks,
            "verify": rules,
            "repeats": repeats,
        }
        whole = report.make_report(run_on, pair, cases, rows, summary, settings, sampling)
        for case in cases:
            own = [row for row in rows if row["prompt_id"] == case.id]
            out.print(report.table(f"{case.id}, {own[0]['prompt_tokens']} prompt tokens", own))
        if len(cases) > 1:
            out.print(report.table(f"all {len(cases)} prompts", summary))
        if output:
            report.write_report(output, whole)
            typer.echo(f"Report: {output}", err=True)
        if as_json:
            typer.echo(json.dumps({k: v for k, v in whole.items() if k != "rows"}))


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


def read_prompt(prompt: str | None) -> str:
    """The argument, or all of standard input when there is none or it is ``-``."""
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise ValueError(
            "[generate] prompt must be an argument or come on standard input but got neither."
        )
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError("[generate] standard input must be UTF-8 text but is not.") from error


def read_block_sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"[bench] --draft-block-sizes must be whole numbers like 2,4,6 but got {text!r}."
        ) from None


def finish(result: Result, as_json: bool, stats: bool) -> None:
    """End the streamed text, or print the result in its place."""
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    elif not result.text.endswith("\n"):
        typer.echo()
    if stats:
        print_stats(result)


def print_stats(result: Result) -> None:
    """Counts and speed of one generation, on standard error."""
    from rich.table import Table

    s = result.stats
    out = Table(show_header=False, box=None)
    rows = [
        ("finish", result.finish_reason or "unfinished"),
        ("prompt", f"{s.prompt_tokens} tokens in {s.prefill_s:.2f} s"),
        ("generated", f"{s.generated_tokens} tokens in {s.decode_s:.2f} s, {s.tok_s:.1f} tok/s"),
        ("block size", str(s.block_size)),
        ("rounds", f"{s.rounds}, {s.tokens_per_round:.2f} tokens each"),
        ("peak memory", f"{s.peak_memory_bytes / 1e6:.0f} MB"),
    ]
    if s.drafted:
        depths = " ".join(f"{a:.2f}" for a in s.acceptance_by_depth)
        rows.insert(5, ("acceptance", f"{s.acceptance:.3f} of {s.drafted} drafts"))
        rows.insert(6, ("by depth", depths))
    for row in rows:
        out.add_row(*row)
    console(sys.stderr).print(out)


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
def progress() -> Iterator[Any]:
    """A bar on standard error; on a pipe, one line a run."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    if not sys.stderr.isatty():
        yield lambda done, total, label: typer.echo(f"[{done}/{total}] {label}", err=True)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Drawn between runs only, so that no thread of the bar's disturbs a timed run.
    with Progress(*columns, console=console(sys.stderr), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("warm-up")
        yield lambda done, total, label: bar.update(
            task, completed=done, total=total, description=label, refresh=True
        )


def console(file: Any) -> Console:
    from rich.console import Console

    return Console(file=file)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def main() -> None:
    """Entry point of the ``pyengine`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that lacks a character shows another
            stream.reconfigure(errors="replace")
    try:
        app()
    except KeyboardInterrupt:  # before a command had begun
        sys.exit(INTERRUPTED)
