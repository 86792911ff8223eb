"""``pyengine doctor``: is everything there, and what does each op run?"""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from pyengine.cli import common, tables

EXAMPLES = ("pyengine doctor", "pyengine doctor --json")


def run(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON in place of the tables.")
    ] = False,
) -> None:
    """Show versions, the device, which kernel each op runs, and what is missing.

    Runs the embedded pair briefly, with plain and with speculative decoding. Exit code 1 if the
    engine does not work here.
    """
    with common.sentences():
        from pyengine.doctor import examine

        report = examine()
        if as_json:
            typer.echo(json.dumps(report))
        else:
            out = common.console(sys.stdout)
            tables.two_columns(out, "versions", report["versions"])
            machine = dict(report["machine"])
            free = machine.pop("available_bytes")
            machine["free memory"] = "unknown" if free is None else common.size(free)
            tables.two_columns(out, "machine", machine)
            rows = [
                (
                    row["op"],
                    row["kernel"],
                    row["device"],
                    "yes" if row["row_stable"] else "not row-stable",
                )
                for row in report["ops"]
            ]
            tables.show(out, "ops", ("op", "kernel", "device", "row-stable"), rows, right=False)
            tables.two_columns(out, "extras", report["extras"])
            if "check" in report:
                tables.two_columns(out, "embedded pair", report["check"])
            for word in ("hints", "problems"):
                for line in report[word]:
                    out.print(f"{word[:-1]}: {line}", soft_wrap=True, markup=False)
        if not report["ok"]:
            raise typer.Exit(common.BROKEN)
