"""``pyengine inspect``: what a folder is, what it needs, what would be refused."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from pyengine.cli import common, tables

EXAMPLES = (
    "pyengine inspect ./gemma-4-31B-pair",
    "pyengine inspect google/gemma-4-31B-it --context 32768",
    "pyengine inspect ./target --context 131072 --json",
    "pyengine inspect ./gemma-4-31B-pair --ranks 2",
)


def run(
    path: Annotated[
        str, typer.Argument(help="Checkpoint folder or bundle, or owner/name on the hub.")
    ],
    context: Annotated[
        int | None,
        typer.Option(
            help="Context length for the cache estimate.",
            show_default="8192, or the model's context",
        ),
    ] = None,
    ranks: Annotated[
        int, typer.Option(help="Machines that share the target: tells what each needs.")
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON in place of the tables.")
    ] = False,
) -> None:
    """Show a checkpoint's variant, sizes, quantisation and memory without loading it.

    Of a name on the hub it fetches configuration, tokenizer and the headers of the weights, not
    the weights. Exit code 2 if loading would be refused; the reasons are in the output.
    """
    with common.sentences():
        from pyengine.checkpoint.inspect import inspect

        with common.waiting("Reading headers") as tell:
            report = inspect(path, context, ranks=ranks, on_progress=tell)
        if as_json:
            typer.echo(json.dumps(report))
        else:
            _print(report)
        if report["refused"]:
            raise typer.Exit(common.USER_ERROR)


def _print(report: dict[str, Any]) -> None:
    out = common.console(sys.stdout)
    name = report["name"] or "not one of the published pairs"
    out.print(f"{report['path']}: {report['kind'] or 'unknown'}, {name}", soft_wrap=True)
    for part in ("target", "assistant", "dflash"):
        if part in report:
            tensors = report[part].get("tensors", {})
            rows = {k: v for k, v in report[part].items() if k not in ("path", "tensors")}
            rows |= {k: v for k, v in tensors.items() if k != "bytes"}
            if tensors:
                rows["weights"] = common.size(tensors["bytes"])
            tables.two_columns(out, part, rows)
    if "text" in report:
        notes = report["text"]["notes"]
        rows = {key: value for key, value in report["text"].items() if key != "notes"}
        tables.two_columns(out, "text", rows)
        for note in notes:
            out.print(f"note: {common.printable(note)}", soft_wrap=True, markup=False)
    if "memory" in report:
        m = report["memory"]
        free = "unknown" if m["available"] is None else common.size(m["available"])
        rows = {
            "weights": common.size(m["weights"]),
            f"cache of {m['context']} tokens": common.size(m["cache"]),
            "work on such a prompt": common.size(m["prompt"]),
            "free here": free,
            "all fit": "unknown" if m["fits"] is None else m["fits"],
        }
        tables.two_columns(out, "memory", rows)
    if "ranks" in report:
        rows = {}
        for own in report["ranks"]:
            weights, cache = common.size(own["weights"]), common.size(own["cache"])
            rows[f"rank {own['rank']}"] = f"weights {weights}, cache {cache}"
        tables.two_columns(out, "ranks", rows)
    for sentence in report["refused"]:
        out.print(f"refused: {common.printable(sentence)}", soft_wrap=True, markup=False)
