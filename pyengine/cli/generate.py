"""``pyengine generate``: a prompt in, text out as it comes."""

from __future__ import annotations

import json
import sys
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyengine.cli import common
from pyengine.cli.common import (
    AssistantDir,
    BundleDir,
    Dtype,
    Position,
    Seed,
    TargetDir,
    Verify,
    VerifyRule,
)

if TYPE_CHECKING:
    from pyengine.generate import Result


EXAMPLES = (
    'pyengine generate "Write a Pong game in one HTML file." --stats',
    "cat prompt.txt | pyengine generate --bundle ./pair --temperature 0",
    "pyengine generate --raw --block-size 1 --max-tokens 64 'import json'",
)


def run(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to say to the model; standard input when left out or '-'."),
    ] = None,
    target: TargetDir = None,
    assistant: AssistantDir = None,
    bundle: BundleDir = None,
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
    with common.sentences():
        text = read_prompt(prompt)
        if raw and system is not None:
            raise ValueError("[generate] --system must go with the template but got --raw too.")
        from dataclasses import replace

        from pyengine.generate import resolve_sampling, stream

        pair = common.load_pair(target, assistant, bundle, dtype, position)
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
            with common.waiting("Reading the prompt"):
                first = next(running, "")
            for piece in chain((first,), running):
                if not as_json:
                    sys.stdout.write(piece)
                    sys.stdout.flush()
        finally:
            # After Ctrl-C or a failure too: what was generated so far is kept.
            if running.result.tokens:
                finish(running.result, as_json, stats)


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
    common.console(sys.stderr).print(out)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
