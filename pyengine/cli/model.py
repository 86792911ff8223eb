"""``pyengine bench model``: times of a published shape, on weights that are made in memory."""

from __future__ import annotations

import json
import sys
import time
from enum import Enum
from typing import Annotated, Any

import typer

from pyengine.cli import common, tables
from pyengine.cli.bench import read_block_sizes

EXAMPLES = (
    "pyengine bench model --shape e2b",
    "pyengine bench model --shape 31b --layers 6 --block-sizes 2,4,6,8",
    "pyengine bench model --shape 31b --layers 6 --drafter assistant,dflash,early:1,lookup",
)


class Shape(str, Enum):
    """The published pairs."""

    e2b = "e2b"
    e4b = "e4b"
    b12 = "12b"
    b26 = "26b"
    b31 = "31b"


def run(
    shape: Annotated[Shape, typer.Option(help="Published pair to take the shapes of.")],
    layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Make the target with N of its layers only; figures for the whole target are "
            "extrapolated beside those that are measured.",
            show_default="all",
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="Of the weights: 8, 6 or 4.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    block_sizes: Annotated[
        str, typer.Option(help="Block sizes to time beside plain decoding.")
    ] = "2,4,6",
    drafter: Annotated[
        str,
        typer.Option(help="Whose rounds to time: assistant, dflash, lookup, early:N, or several."),
    ] = "assistant",
    acceptance: Annotated[
        str,
        typer.Option(
            help="Acceptances to assume for tok/s: generated weights keep next to no drafts."
        ),
    ] = "0.4,0.8",
    rounds: Annotated[
        int, typer.Option(help="Timed rounds per block size; figures are their medians.")
    ] = 10,
    as_json: Annotated[
        bool, typer.Option("--json", help="Also print the report as one line.")
    ] = False,
) -> None:
    """Time a pair of a published shape on generated weights, without a file.

    Weights are quantised as in a bundle and take as much memory. A prompt is timed once; then plain
    steps and rounds by turns, whole and in parts: drafts, the verify call and of it the head with
    the filter, acceptance with what a drafter reads of the rows. Lookup is given drafts where it
    finds none. host is the part of a whole round that is no evaluation. Parts are
    evaluated one by one, so together they may take longer than the round. tok/s follows from the
    round and an acceptance that is assumed.

    GB/s counts the bytes that a round must read; "of it" is the share of the machine's bandwidth.
    The mixture of 26b is taken to choose its experts by chance.
    """
    with common.sentences():
        blocks, drafters = read_block_sizes(block_sizes), tuple(drafter.split(","))
        shares = read_shares(acceptance)
        from pyengine.bench import bandwidth, generated, model, report
        from pyengine.doctor import first_use

        model.check_settings(prompt_tokens, blocks, rounds, shares, drafters)
        plan = generated.plan(shape.value, layers, bits, drafters)
        block = max(blocks)
        context = prompt_tokens + (model.WARM_UP + rounds) * block
        generated.check_memory(plan, context, block)
        run_on = report.environment()
        limit = bandwidth.bandwidth(run_on["machine"]["chip"])
        start = time.perf_counter()
        with common.progress("weights", 10) as on_matrix:
            pair = generated.make(plan, context, block, on_matrix)
        made_s = time.perf_counter() - start
        first_use.ready(pair, lambda line: typer.echo(line, err=True))
        for line in report.heading(run_on, pair):
            typer.echo(line)
        with common.progress() as on_run:
            measured = model.measure(
                pair,
                prompt_tokens=prompt_tokens,
                block_sizes=blocks,
                rounds=rounds,
                drafters=drafters,
                on_run=on_run,
            )
        rows = model.rows_of(plan, measured, shares, limit.gb_s)
        whole = {
            "bench": "model",
            "report_version": 1,
            **run_on,
            "drafter": drafters,
            "shape": plan.name,
            "bits": plan.bits,
            "layers": len(plan.target.layers),
            "layers_of_whole_model": len(plan.whole.layers),
            "settings": {"command": sys.argv[1:], "rounds": rounds, "acceptance": shares},
            "made_s": made_s,
            "weight_bytes": plan.nbytes,
            "cache_bytes": measured.cache_bytes,
            "peak_memory_bytes": measured.peak_bytes,
            "resident_bytes": measured.resident_bytes,
            "bandwidth": limit._asdict(),
            "prompt_tokens": prompt_tokens,
            "prefill_s": measured.prefill_s,
            "prefill_tok_s": prompt_tokens / measured.prefill_s,
            "whole_model_prefill_tok_s": prompt_tokens / measured.prefill_s / plan.layers_share,
            "rows": rows,
        }
        _show(whole, plan.is_whole)
        if as_json:
            typer.echo(json.dumps(whole))


def _show(report: dict[str, Any], is_whole: bool) -> None:
    """The report as lines and tables."""
    from pyengine.bench import model

    out, rows, limit = common.console(sys.stdout), report["rows"], report["bandwidth"]
    size = common.size
    tables.say(
        out,
        f"weights {size(report['weight_bytes'])}, made in {report['made_s']:.1f} s; cache "
        f"{size(report['cache_bytes'])}; most memory: {size(report['peak_memory_bytes'])} by MLX, "
        f"{size(report['resident_bytes'])} resident",
    )
    tables.say(
        out,
        f"prompt of {report['prompt_tokens']} tokens, once: {report['prefill_tok_s']:.1f} tok/s "
        f"({report['prefill_s']:.2f} s)",
    )
    tables.say(out, "")
    count = report["settings"]["rounds"]
    title = (
        f"ms per round, medians of {count}; bandwidth {limit['gb_s']:.1f} GB/s, {limit['source']}"
    )
    tables.show(out, title, model.HEADS, model.cells(rows), right=True)
    shares = [f"tok/s at {name}" for name in rows[0]["tok_s"]]
    heads = ("block", "ms", "in plain", *shares)
    title = "tok/s from the round and an assumed acceptance"
    tables.show(out, title, heads, model.rate_cells(rows, False), right=True)
    if is_whole:
        return
    title = (
        f"extrapolated to all {report['layers_of_whole_model']} layers by the bytes of layers, not "
        f"measured; prompt {report['whole_model_prefill_tok_s']:.1f} tok/s"
    )
    tables.show(out, title, heads, model.rate_cells(rows, True), right=True)


def read_shares(text: str) -> list[float]:
    """Acceptances between commas.

    Raises:
        ValueError: A part is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"[bench] --acceptance must be numbers like 0.4,0.8 but got {text!r}."
        ) from None
