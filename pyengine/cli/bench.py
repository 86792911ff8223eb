"""``pyengine bench``: time a pair against plain decoding."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
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
    DFlashDir,
    DrafterName,
    OpsName,
    Position,
    TargetDir,
    Verify,
    VerifyRule,
)
from pyengine.cli.output import check_output

if TYPE_CHECKING:
    from rich.console import Console

    from pyengine.bench.gemma_mtp import Certified, Row
    from pyengine.checkpoint.pair import Pair

EXAMPLES = (
    "pyengine bench gemma-mtp",
    "pyengine bench gemma-mtp --target ./target --assistant ./assistant "
    "--prompt-suite prompts.jsonl --max-tokens 1000 --block-sizes 6 --output report.json",
    "pyengine bench gemma-mtp --drafter dflash --verify coupled,greedy --block-sizes 4 --tree 7,15",
    "pyengine bench gemma-mtp --prompt-suite prompts.jsonl --certify --delta 0.1 --epsilon 0.05",
)
STREAMS_EXAMPLES = (
    "pyengine bench streams",
    "pyengine bench streams --bundle ./pair --streams 1,2,4,8,16 --block-sizes 1,2,4",
    "pyengine bench streams --drafter dflash --streams 1,4 --block-sizes 1,8",
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

# Options that several bench commands have
PromptSuite = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Prompts as JSONL: id, category, prompt, max_tokens.",
        show_default="the embedded suite",
    ),
]
Tokens = Annotated[
    int, typer.Option(help="Maximum number of new tokens; a prompt may ask for fewer.")
]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="1.0 is off.")]
TopK = Annotated[int, typer.Option(help="0 is off.")]
FirstSeed = Annotated[
    int, typer.Option(help="Seed of the first prompt; each further prompt adds 1.")
]
Rules = Annotated[
    str,
    typer.Option(
        help="Acceptance rules to compare: residual,block,coupled; greedy is temperature 0, with "
        "plain runs of its own."
    ),
]
Drafters = Annotated[
    str,
    typer.Option(
        help="Where drafts come from, to compare: assistant,dflash,lookup,early:6,assistant+lookup."
    ),
]
Trees = Annotated[
    str | None,
    typer.Option(
        "--tree",
        metavar="N,...",
        help="With --drafter dflash: trees of so many drafts, 1 to 15, beside the block sizes; "
        "for --verify coupled and greedy.",
        show_default="none",
    ),
]
Repeats = Annotated[
    int, typer.Option(help="Timed runs per prompt and setting; figures are their medians.")
]
AnyPair = Annotated[
    bool,
    typer.Option(
        "--allow-unverified-gemma",
        help="Also run a pair that is not one of the published ones.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw a PNG, which needs matplotlib.", show_default=False),
]
Output = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Write the report as JSON.", show_default=False),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Also print the report, without its rows, as one line.")
]


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
    dflash: DFlashDir = None,
    bundle: BundleDir = None,
    hostfile: HostFile = None,
    ops: OpsName = None,
    prompt_suite: PromptSuite = None,
    max_tokens: Tokens = 256,
    block_sizes: Annotated[
        str, typer.Option(help="Block sizes to compare with plain decoding; may name auto.")
    ] = "2,4,6",
    temperature: Temperature = 1.0,
    top_p: TopP = 0.95,
    top_k: TopK = 64,
    seed: FirstSeed = 0,
    verify: Rules = "residual",
    drafter: Drafters = "assistant",
    tree: Trees = None,
    repeats: Repeats = 3,
    certify: Annotated[
        bool,
        typer.Option(
            "--certify",
            help="Test in the order given which settings are not slower than plain decoding on "
            "prompts like these.",
        ),
    ] = False,
    delta: Annotated[
        float, typer.Option(help="With --certify: share of such prompts that may be slower.")
    ] = 0.1,
    epsilon: Annotated[
        float, typer.Option(help="With --certify: it is wrong with this probability at most.")
    ] = 0.05,
    allow_unverified_gemma: AnyPair = False,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Time exact speculative decoding against plain decoding, alternating in one process.

    Without --target or --bundle, the embedded pair runs the embedded suite. tok/s counts decoding
    only; speedup_vs_ar is relative to plain decoding; a round's cost is given in plain steps.
    Ctrl-C keeps the finished rows.
    """
    with common.sentences():
        common.check_dflash(dflash, assistant, drafter)
        compare(
            "gemma-mtp",
            lambda: common.load_pair(target, assistant, bundle, None, Position.last, ops, dflash),
            prompt_suite=prompt_suite,
            max_tokens=max_tokens,
            block_sizes=block_sizes,
            sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed},
            verify=verify,
            drafter=drafter,
            tree=tree,
            repeats=repeats,
            allow_unverified_gemma=allow_unverified_gemma,
            output=output,
            as_json=as_json,
            bounds=(delta, epsilon) if certify else None,
        )


def streams(
    target: TargetDir = None,
    assistant: AssistantDir = None,
    dflash: DFlashDir = None,
    bundle: BundleDir = None,
    ops: OpsName = None,
    streams: Annotated[str, typer.Option(help="Numbers of texts at once.")] = "1,2,4,8",
    block_sizes: Annotated[
        str, typer.Option(help="Block sizes, 1 for plain decoding, or auto.")
    ] = "1,4,auto",
    max_tokens: Annotated[int, typer.Option(help="Maximum number of new tokens per text.")] = 64,
    temperature: Temperature = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the first text; each further adds 1.")] = 0,
    verify: VerifyRule = Verify.coupled,
    drafter: DrafterName = None,
    repeats: Annotated[
        int, typer.Option(help="Timed runs per setting; figures are their medians.")
    ] = 3,
    prompt_suite: PromptSuite = None,
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
    plot: Plot = None,
    output: Output = None,
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
        from pyengine.task import check_drafter
        from pyengine.untrusted import write_whole

        bench.check_settings(counts, blocks, repeats, max_tokens, load, rate)
        check_drafter(drafter)
        common.check_dflash(dflash, assistant, drafter)
        sampling = Sampling(temperature=temperature, seed=seed, verify=verify.value)
        cases = suite.load_suite(prompt_suite or suite.EMBEDDED)
        for file in (output, plot):
            if file:
                check_output("bench", file)
        if plot:
            picture.check_available("bench", "leave --plot out")
        pair = common.load_pair(target, assistant, bundle, None, Position.last, ops, dflash)
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
                drafter=drafter,
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
                "drafter": drafter or "assistant",
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


def compare(
    name: str,
    load: Callable[[], Pair],
    *,
    prompt_suite: Path | None,
    max_tokens: int,
    block_sizes: str,
    sampling: dict[str, Any],
    verify: str,
    drafter: str,
    repeats: int,
    allow_unverified_gemma: bool,
    output: Path | None,
    as_json: bool,
    tree: str | None = None,
    plot: Path | None = None,
    bounds: tuple[float, float] | None = None,
    show_more: Callable[[Console, list[Row]], None] = lambda out, summary: None,
) -> None:
    """Run a bench command of that name: every setting against plain decoding, shown and written.

    Args:
        name: Of the command.
        load: Reads the pair, once all else is known to be possible.
        prompt_suite, max_tokens, block_sizes, verify, drafter, tree, repeats: As the options have
            them.
        allow_unverified_gemma, output, as_json: The same.
        sampling: Fields of the settings; the seed is that of the first prompt.
        plot: Where to draw a picture.
        bounds: Delta and epsilon of a test which settings are not slower than plain decoding.
        show_more: Shows what the command adds to the tables.

    Raises:
        ValueError, RuntimeError, MemoryError, KeyboardInterrupt: A setting is impossible, or the
            run ended early; rows that are finished then are shown and written first.
    """
    blocks = read_blocks(block_sizes)
    trees = [] if tree is None else read_numbers("--tree", tree)
    from pyengine.bench import gemma_mtp, picture, report, suite, sweep_picture
    from pyengine.risk import check_bounds, too_few
    from pyengine.sampling.settings import MAX_SEED, Sampling
    from pyengine.untrusted import write_whole

    rules, drafters = verify.split(","), drafter.split(",")
    gemma_mtp.check_settings(blocks, repeats, max_tokens, rules, drafters, trees)
    used = Sampling(**sampling)
    first = used.seed or 0
    cases = suite.load_suite(prompt_suite or suite.EMBEDDED)
    if bounds is not None:
        check_bounds("bench", *bounds)
        if warning := too_few(len(cases), *bounds):
            typer.echo(f"Warning: {warning}", err=True)
    if first + len(cases) - 1 > MAX_SEED:
        raise ValueError(
            f"[bench] seed must be at most {MAX_SEED} in the last of {len(cases)} cases but "
            f"got {first} for the first."
        )
    for file in (output, plot):
        if file:
            check_output("bench", file)
    if plot:
        picture.check_available("bench", "leave --plot out")
    pair = load()
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
                sampling=used,
                repeats=repeats,
                rules=rules,
                drafters=drafters,
                trees=trees,
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
        "tree": trees,
        "repeats": repeats,
    }
    summary = gemma_mtp.summarise(rows)
    whole = report.make_report(
        run_on, pair, cases, rows, summary, settings, used, ended is None, name
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
    _show_mixes(out, summary)
    show_more(out, summary)
    if bounds is not None and ended is None:
        found = gemma_mtp.certify(rows, *bounds)
        whole["certified"] = {
            "delta": bounds[0],
            "epsilon": bounds[1],
            "n": len(cases),
            "settings": [{**one.setting._asdict(), **_verdict(one)} for one in found],
        }
        show_certified(out, found, len(cases), *bounds)
    if plot:
        write_whole(plot, sweep_picture.draw(whole))
        typer.echo(f"Picture: {plot}", err=True)
    if output:
        write_whole(output, json.dumps(whole, indent=2) + "\n")
        typer.echo(f"Report: {output}", err=True)
    if as_json:
        typer.echo(json.dumps({k: v for k, v in whole.items() if k != "rows"}))
    if ended is not None:
        raise ended


def _show_mixes(out: Console, summary: Sequence[Row]) -> None:
    """Which drafter of each mix gave what, over all prompts."""
    cells = [
        (
            f"{row['block_size']} {row['drafter']}",
            row["verify"],
            name,
            str(own["rounds"]),
            str(own["drafted"]),
            str(own["accepted"]),
            _figure(own["accepted"] / own["drafted"], ".3f"),
        )
        for row in summary
        for name, own in row["by_drafter"].items()
    ]
    if cells:
        heads = ("block", "verify", "of it", "rounds", "drafted", "accepted", "acceptance")
        tables.show(out, "drafters of the mixes", heads, cells, right=True)


def _show_cases(out: Console, rows: Sequence[Row]) -> int:
    """A table for each prompt that has rows; how many there are."""
    names = dict.fromkeys(row["prompt_id"] for row in rows)
    for name in names:
        own = [row for row in rows if row["prompt_id"] == name]
        show_settings(out, f"{name}, {own[0]['prompt_tokens']} prompt tokens", own)
    return len(names)


def show_settings(out: Console, title: str, rows: Sequence[Row]) -> None:
    """One prompt's rows or the summary, one line per setting."""
    from pyengine.bench.gemma_mtp import GREEDY, PLAIN

    cells = []
    for row in rows:
        plain = row["block_size"] == PLAIN
        block = f"{drafts_of(row)} {row['drafter']}".removesuffix(" assistant")
        cells.append(
            (
                "plain" if plain else block,
                "-" if plain and row["verify"] != GREEDY else row["verify"],
                _figure(row["tok_s"], ".1f"),
                "-" if plain else _figure(row["acceptance_rate"], ".3f"),
                _figure(row["tokens_per_round"], ".2f"),
                _figure(row["speedup_vs_ar"], ".2f"),
                _figure(row["round_cost_in_plain_steps"], ".2f"),
            )
        )
    tables.show(out, title, HEADS, cells, right=True)


def drafts_of(row: Row) -> str:
    """A row's block size, or its tree."""
    return str(row["block_size"]) if row["tree"] is None else f"tree {row['tree']}"


def _verdict(one: Certified) -> dict[str, Any]:
    return {"slower": one.slower, "p_value": one.p_value, "certified": one.passed}


def show_certified(
    out: Console, found: Sequence[Certified], n: int, delta: float, epsilon: float
) -> None:
    """Which settings are not slower, one line each, in the order of the tests."""
    title = (
        f"certified: on prompts like these {n}, not slower than plain decoding on all but a share "
        f"{delta:g}, with confidence {1 - epsilon:g}"
    )
    cells = [
        (
            str(one.setting),
            f"{one.slower} of {n}",
            "not tested" if one.p_value is None else f"{one.p_value:.3g}",
            "yes" if one.passed else "no",
        )
        for one in found
    ]
    tables.show(out, title, ("setting", "slower", "p", "certified"), cells, right=True)


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
