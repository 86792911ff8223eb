"""``pyengine doctor``: is everything there, and what does each op run?"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from pyengine.cli import common

EXAMPLES = ("pyengine doctor", "pyengine doctor --json")


def run(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON in place of the tables.")
    ] = False,
) -> None:
    """Tell versions, device, which op runs which kernel, and what is missing.

    Runs the embedded pair for a moment, plainly and speculatively. Exit code 1 when the engine
    does not work here.
    """
    with common.sentences():
        from rich.table import Table

        from pyengine.doctor import examine

        report = examine()
        if as_json:
            typer.echo(json.dumps(report))
        else:
            out = common.console(sys.stdout)
            out.print(common.two_columns("versions", report["versions"]))
            machine = dict(report["machine"])
            free = machine.pop("available_bytes")
            machine["free memory"] = "unknown" if free is None else common.size(free)
            out.print(common.two_columns("machine", machine))
            table = Table(box=None, title="ops", title_justify="left")
            for head in ("op", "kernel", "device", "row-stable"):
                table.add_column(head)
            for row in report["ops"]:
                stable = "yes" if row["row_stable"] else "not row-stable"
                table.add_row(row["op"], row["kernel"], row["device"], stable)
            out.print(table)
            out.print(common.two_columns("extras", report["extras"]))
            if "check" in report:
                out.print(common.two_columns("embedded pair", report["check"]))
            for word in ("hints", "problems"):
                for line in report[word]:
                    out.print(f"{word[:-1]}: {line}", soft_wrap=True, markup=False)
        if not report["ok"]:
            raise typer.Exit(common.BROKEN)
