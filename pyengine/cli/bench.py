"""``pyengine bench``: time a pair against plain decoding."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from pyengine.cli import common, tables
from pyengine.cli.hosts import HostFile
from pyengine.cli.options import (
    AUTO,
    AssistantDir,
    BundleDir,
    OpsName,
    Position,
    TargetDir,
    Verify,
    VerifyRule,
)
from pyengine.cli.output import check_output

if TYPE_CHECKING:
    from rich.console import Console

    from pyengine.bench.gemma_mtp import Row
    from pyengine.checkpoint.pair import Pair

EXAMPLES = (
    "pyengine bench gemma-mtp",
    "pyengine bench gemma-mtp --target ./target --assistant ./assistant "
    "--prompt-suite prompts.jsonl --max-tokens 1000 --block-sizes 6 --output report.json",
)
STREAMS_EXAMPLES = (
    "pyengine bench streams",
    "pyengine bench streams --bundle ./pair --streams 1,2,4,8,16 --block-sizes 1,2,4",
    "pyengine bench streams --load long-prompt --streams 4 --plot streams.png",
)
# As the published card's command line spells them
PUBLISHED = {
    "--target-model": "--target",
    "--assistant-model": "--assistant",
    "--draft-block-sizes": "--block-sizes",
}
HEADS = (
    "block",
    "verify",
    "tok/s",
    "acceptance",
    "tokens/round",
    "speedup_vs_ar",
    "round cost",
)


class PublishedNames(TyperCommand):
    """A command that also takes options by their published names; its help shows ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_our_name(arg) for arg in args])


def _our_name(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return PUBLISHED.get(name, name) + equals + value


def gemma_mtp(
    target: TargetDir = None,
    assistant: AssistantDir = None,
    bundle: BundleDir = None,
    hostfile: HostFile = None,
    ops: OpsName = None,
    prompt_suite: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts as JSONL: id, category, prompt, max_tokens.",
            show_default="the embedded suite",
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Maximum number of new tokens; a prompt may ask for fewer.")
    ] = 256,
    block_sizes: Annotated[
        str, typer.Option(help="Block sizes to compare with plain decoding; may name auto.")
    ] = "2,4,6",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="1.0 is off.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 64,
    seed: Annotated[
        int, typer.Option(help="Seed of the first prompt; each further prompt adds 1.")
    ] = 0,
    verify: Annotated[
        str, typer.Option(help="Acceptance rules to compare: residual,block,coupled.")
    ] = "residual",
    drafter: Annotated[
        str, typer.Option(help="Where drafts come from, to compare: assistant,lookup,early:6.")
    ] = "assistant",
    repeats: Annotated[
        int, typer.Option(help="Timed runs per prompt and setting; figures are their medians.")
    ] = 3,
    allow_unverified_gemma: Annotated[
        bool,
        typer.Option(
            "--allow-unverified-gemma",
            help="Also run a pair that is not one of the published ones.",
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the report as JSON.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Also print the report, without its rows, as one line.")
    ] = False,
) -> None:
    """Time exact speculative decoding against plain decoding, alternating in one process.

    Without --target or --bundle, the embedded pair runs the embedded suite. tok/s counts decoding
    only; speedup_vs_ar is relative to plain decoding; a round's cost is given in plain steps.
    Ctrl-C keeps the finished rows.
    """
    with common.sentences():
        blocks = read_blocks(block_sizes)
        from pyengine.bench import gemma_mtp, report, suite
        from pyengine.sampling.settings import MAX_SEED, Sampling

        rules, drafters = verify.split(","), drafter.split(",")
        gemma_mtp.check_settings(blocks, repeats, max_tokens, rules, drafters)
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        cases = suite.load_suite(prompt_suite or suite.EMBEDDED)
        if seed + len(cases) - 1 > MAX_SEED:
            raise ValueError(
                f"[bench] seed must be at most {MAX_SEED} in the last of {len(cases)} cases but "
                f"got {seed} for the first."
            )
        if output:
            check_output("bench", output)
        pair = common.load_pair(target, assistant, bundle, None, Position.last, ops)
        check_published(pair, allow_unverified_gemma)
        run_on = report.environment()
        for line in report.heading(run_on, pair):
            typer.echo(line)
        rows: list[Row] = []
        ended: BaseException | None = None
        try:
            with common.progress() as on_run:
                gemma_mtp.gemma_mtp(
                    pair,
                    cases,
                    max_tokens=max_tokens,
                    block_sizes=blocks,
                    sampling=sampling,
                    repeats=repeats,
                    rules=rules,
                    drafters=drafters,
                    on_run=on_run,
                    on_rows=rows.extend,
                )
        except (KeyboardInterrupt, ValueError, RuntimeError, MemoryError) as error:
            if not rows:
                raise
            ended = error
        settings = {
            "command": sys.argv[1:],
            "prompt_suite": str(prompt_suite or suite.EMBEDDED.name),
            "max_tokens": max_tokens,
            "draft_block_sizes": blocks,
            "verify": rules,
            "drafter": drafters,
            "repeats": repeats,
        }
        summary = gemma_mtp.summarise(rows)
        whole = report.make_report(
            run_on, pair, cases, rows, summary, settings, sampling, complete=ended is None
        )
        out = common.console(sys.stdout)
        finished = _show_cases(out, rows)
        if ended is not None:
            last = len(rows[-1]["samples"])
            typer.echo(
                f"Not complete: {finished} of {len(cases)} prompts, the last with {last} of "
                f"{repeats} repeats.",
                err=True,
            )
        if len(cases) > 1:
            left = "all" if finished == len(cases) else f"{finished} of"
            show_settings(out, f"{left} {len(cases)} prompts", summary)
        if output:
            from pyengine.untrusted import write_whole

            write_whole(output, json.dumps(whole, indent=2) + "\n")
            typer.echo(f"Report: {output}", err=True)
        if as_json:
            typer.echo(json.dumps({k: v for k, v in whole.items() if k != "rows"}))
        if ended is not None:
            raise ended


def streams(
    target: TargetDir = None,
    assistant: AssistantDir = None,
    bundle: BundleDir = None,
    ops: OpsName = None,
    streams: Annotated[str, typer.Option(help="Numbers of texts at once.")] = "1,2,4,8",
    block_sizes: Annotated[
        str, typer.Option(help="Block sizes, 1 for plain decoding, or auto.")
    ] = "1,4,auto",
    max_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens per text.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the first text; each further adds 1.")] = 0,
    verify: VerifyRule = Verify.coupled,
    repeats: Annotated[
        int, typer.Option(help="Timed runs per setting; figures are their medians.")
    ] = 3,
    prompt_suite: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts as JSONL: id, category, prompt, max_tokens.",
            show_default="the embedded suite",
        ),
    ] = None,
    load: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="suite, equal, mixed, arrivals, long-prompt or several: what is asked, and when.",
        ),
    ] = "suite",
    rate: Annotated[
        float, typer.Option(help="Requests per second of --load arrivals, on average.")
    ] = 1.0,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw a PNG, which needs matplotlib.", show_default=False
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the report as JSON.", show_default=False),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Also print the report as one line.")
    ] = False,
) -> None:
    """Time many texts at once: in all, per text, to the first token, between tokens.

    tok/s counts the tokens of all texts over the time of the rounds, and gain compares it with one
    text at that block size. Then: tok/s of each text; milliseconds to the first token, and between
    a text's rounds (p50, p95, max); rows per round; acceptance; whether every text is the same as
    alone. Loads: equal prompts; mixed ones of 5 to 2000 tokens; arrivals at random times, four per
    stream; long-prompt, where one of 8000 tokens comes when all write; several texts of one prompt.
    """
    with common.sentences():
        counts = read_numbers("--streams", streams)
        blocks = read_blocks(block_sizes)
        from pyengine.bench import picture, report, streams_picture, suite
        from pyengine.bench import streams as bench
        from pyengine.sampling.settings import Sampling
        from pyengine.untrusted import write_whole

        bench.check_settings(counts, blocks, repeats, max_tokens, load, rate)
        sampling = Sampling(temperature=temperature, seed=seed, verify=verify.value)
        cases = suite.load_suite(prompt_suite or suite.EMBEDDED)
        for file in (output, plot):
            if file:
                check_output("bench", file)
        if plot:
            picture.check_available("bench", "leave --plot out")
        pair = common.load_pair(target, assistant, bundle, None, Position.last, ops)
        run_on = report.environment()
        for line in report.heading(run_on, pair):
            typer.echo(line)
        with common.progress() as on_run:
            rows = bench.bench_streams(
                pair,
                cases,
                streams=counts,
                block_sizes=blocks,
                max_tokens=max_tokens,
                sampling=sampling,
                repeats=repeats,
                load=load,
                rate=rate,
                on_run=on_run,
            )
        title = f"{load}: {max_tokens} tokens per text, medians of {repeats} runs"
        tables.show(common.console(sys.stdout), title, bench.HEADS, bench.cells(rows), right=True)
        whole = {
            "bench": "streams",
            "report_version": 1,
            **run_on,
            "pair": report.describe_pair(pair),
            "sampler": sampling.to_dict(),
            "settings": {
                "command": sys.argv[1:],
                "max_tokens": max_tokens,
                "repeats": repeats,
                "load": load,
                "rate": rate if load == "arrivals" else None,
            },
            "rows": rows,
        }
        if plot:
            heading = f"{whole['pair']['name']}: {bench.LOADS[load]}"
            note = (
                f"{title}; {run_on['machine']['chip']}, pyengine {run_on['versions']['pyengine']}"
            )
            write_whole(plot, streams_picture.draw(rows, heading, note))
            typer.echo(f"Picture: {plot}", err=True)
        if output:
            write_whole(output, json.dumps(whole, indent=2) + "\n")
            typer.echo(f"Report: {output}", err=True)
        if as_json:
            typer.echo(json.dumps(whole))
        if not all(row["texts_equal_to_alone"] for row in rows):
            raise RuntimeError("[bench] texts must be those alone but differ.")


def _show_cases(out: Console, rows: Sequence[Row]) -> int:
    """A table for each prompt that has rows; how many there are."""
    names = dict.fromkeys(row["prompt_id"] for row in rows)
    for name in names:
        own = [row for row in rows if row["prompt_id"] == name]
        show_settings(out, f"{name}, {own[0]['prompt_tokens']} prompt tokens", own)
    return len(names)


def show_settings(out: Console, title: str, rows: Sequence[Row]) -> None:
    """One prompt's rows or the summary, one line per setting."""
    from pyengine.bench.gemma_mtp import PLAIN

    cells = []
    for row in rows:
        plain = row["block_size"] == PLAIN
        block = f"{row['block_size']} {row['drafter']}".removesuffix(" assistant")
        cells.append(
            (
                "plain" if plain else block,
                "-" if plain else row["verify"],
                _figure(row["tok_s"], ".1f"),
                "-" if plain else _figure(row["acceptance_rate"], ".3f"),
                _figure(row["tokens_per_round"], ".2f"),
                _figure(row["speedup_vs_ar"], ".2f"),
                _figure(row["round_cost_in_plain_steps"], ".2f"),
            )
        )
    tables.show(out, title, HEADS, cells, right=True)


def check_published(pair: Pair, allowed: bool) -> None:
    """Refuse a pair that nobody published, unless that is wanted.

    Raises:
        ValueError: It is none of the five, nor the embedded one.
    """
    if not (pair.verified or pair.embedded or allowed):
        raise ValueError(
            "[bench] the pair must be one of the five published geometries, or "
            "--allow-unverified-gemma must be given."
        )


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def read_block_sizes(text: str) -> list[int]:
    """See :func:`read_numbers`."""
    return read_numbers("--block-sizes", text)


def read_blocks(text: str) -> list[int | str]:
    """Block sizes between commas: numbers, or auto.

    Raises:
        ValueError: A part is neither.
    """
    parts = text.split(",")
    numbers = iter(read_block_sizes(",".join(part for part in parts if part != AUTO) or "0"))
    return [part if part == AUTO else next(numbers) for part in parts]


def read_numbers(name: str, text: str) -> list[int]:
    """Numbers between commas.

    Raises:
        ValueError: A part is none.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"[bench] {name} must be whole numbers like 2,4,6 but got {text!r}."
        ) from None
