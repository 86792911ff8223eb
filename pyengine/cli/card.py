"""``pyengine bench card``: a machine's figures as a JSON file and a picture, made to be shared."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyengine.cli import common, tables
from pyengine.cli.bench import check_published, read_block_sizes, show_settings
from pyengine.cli.options import AssistantDir, BundleDir, DFlashDir, OpsName, Position, TargetDir
from pyengine.cli.output import check_folder

if TYPE_CHECKING:
    from pyengine.bench.gemma_mtp import Row

EXAMPLES = (
    "pyengine bench card",
    "pyengine bench card --quick --no-plot",
    "pyengine bench card --bundle ./gemma-4-31B-pair --output cards",
)
HEADS = ("place", "op", "rows", "us", "GB/s", "of bandwidth", "MLX's GB/s", "speedup")
MAX_TOKENS, REPEATS, ROUNDS = 256, 3, 7
QUICK_TOKENS, QUICK_REPEATS, QUICK_ROUNDS = 48, 1, 3
MOST_ROWS = 16  # of one launch
MOST_BLOCKS = 6


def run(
    target: TargetDir = None,
    assistant: AssistantDir = None,
    dflash: DFlashDir = None,
    bundle: BundleDir = None,
    ops: OpsName = None,
    block_sizes: Annotated[
        str, typer.Option(help="Block sizes to compare with plain decoding.")
    ] = "2,4,6",
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer tokens and repeats; the card says so.")
    ] = False,
    plot: Annotated[
        bool, typer.Option("--plot/--no-plot", help="Draw the PNG, which needs matplotlib.")
    ] = True,
    allow_unverified_gemma: Annotated[
        bool,
        typer.Option(
            "--allow-unverified-gemma",
            help="Also run a pair that is not one of the published ones.",
        ),
    ] = False,
    output: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where to write the card's files.")
    ] = Path("."),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the card as one line in place of the tables.")
    ] = False,
) -> None:
    """Run the published benchmark and time the kernels; write a card as JSON and PNG.

    A pair with a DFlash drafter runs with its drafts too, which the picture leaves out. Without
    --target or --bundle, the embedded pair runs, and the kernels have the shapes of E2B.
    Files are named by chip, pair and day, and written when all is measured: Ctrl-C leaves none.
    """
    with common.sentences():
        blocks = read_block_sizes(block_sizes)
        from pyengine.bench import bandwidth, gemma_mtp, kernels, picture, report, suite
        from pyengine.bench.card import make_card, stem
        from pyengine.sampling.settings import Sampling
        from pyengine.untrusted import write_whole

        tokens = QUICK_TOKENS if quick else MAX_TOKENS
        repeats = QUICK_REPEATS if quick else REPEATS
        gemma_mtp.check_settings(blocks, repeats, tokens)
        if len(blocks) > MOST_BLOCKS:
            raise ValueError(
                f"[card] block sizes must be at most {MOST_BLOCKS}, to be told apart in the "
                f"picture, but got {len(blocks)}."
            )
        check_folder("card", output)
        if plot:
            picture.check_available("card", "give --no-plot for the JSON alone")
        pair = common.load_pair(target, assistant, bundle, None, Position.last, ops, dflash)
        check_published(pair, allow_unverified_gemma)
        cases = suite.load_suite(suite.EMBEDDED)
        sampling = Sampling(temperature=1.0, top_p=0.95, top_k=64, seed=0)
        run_on = report.environment()
        for line in report.heading(run_on, pair):
            typer.echo(line, err=True)
        with common.progress() as on_run:
            rows, summary = gemma_mtp.gemma_mtp(
                pair,
                cases,
                max_tokens=tokens,
                block_sizes=blocks,
                sampling=sampling,
                repeats=repeats,
                drafters=("assistant",) if pair.dflash is None else ("assistant", "dflash"),
                on_run=on_run,
            )
        chip = run_on["machine"]["chip"]
        limit = bandwidth.bandwidth(chip)
        shapes = kernels.shapes_of(pair)
        with common.progress() as on_run:
            timed = kernels.time_kernels(
                shapes,
                [1, min(max(blocks), MOST_ROWS)],
                QUICK_ROUNDS if quick else ROUNDS,
                on_run,
            )
        limit = max(limit, bandwidth.bandwidth(chip))  # where it is measured, on a busy machine
        settings = {
            "prompt_suite": suite.EMBEDDED.name,
            "max_tokens": tokens,
            "draft_block_sizes": blocks,
            "repeats": repeats,
            "kernel_rounds": QUICK_ROUNDS if quick else ROUNDS,
        }
        whole = report.make_report(run_on, pair, cases, rows, summary, settings, sampling)
        card = make_card(whole, timed, shapes, limit, sys.argv[1:], quick)
        drawn = picture.draw(card) if plot else None
        if as_json:
            typer.echo(json.dumps(card))
        else:
            _show(card, summary)
        name = stem(card)
        if drawn is not None:
            write_whole(output / f"{name}.png", drawn)
            typer.echo(f"Picture: {output / f'{name}.png'}", err=True)
        write_whole(output / f"{name}.json", json.dumps(card, indent=2) + "\n")
        typer.echo(f"Card: {output / f'{name}.json'}", err=True)


def _show(card: dict[str, Any], summary: list[Row]) -> None:
    """The card's figures as tables."""
    out = common.console(sys.stdout)
    show_settings(out, f"all {len(card['prompts'])} prompts", summary)
    cells = [
        (
            row["place"],
            row["op"],
            str(row["rows"]),
            f"{row['us']:.0f}",
            f"{row['gb_s']:.1f}",
            f"{100 * row['share']:.0f} %",
            f"{row['mlx_gb_s']:.1f}",
            f"{row['speedup']:.2f}",
        )
        for row in card["kernels"]
    ]
    limit = card["bandwidth"]
    title = (
        f"kernels, shapes of {card['kernel_shapes']}; {limit['gb_s']:.0f} GB/s, {limit['source']}"
    )
    tables.show(out, title, HEADS, cells, right=True)
