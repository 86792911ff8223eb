"""``pyengine doctor``: is everything there, and what does each op run?"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
from importlib import metadata
from typing import Annotated, Any

import typer

from pyengine.cli import common, tables

EXAMPLES = ("pyengine doctor", "pyengine doctor --json")
# Extra of pyproject.toml, the modules it brings, and what they serve.
EXTRAS = {
    "hub": (("huggingface_hub",), "names of the Hugging Face hub in place of folders"),
    "serve": (("fastapi", "uvicorn"), "pyengine serve"),
    "plot": (("matplotlib",), "the picture of pyengine bench card"),
    "eval": (("lm_eval",), "python -m pyengine.evaluate, for lm-eval"),
}
CHECK_TOKENS = 24


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
        report = examine()
        if as_json:
            typer.echo(json.dumps(report))
        else:
            _print(report)
        if not report["ok"]:
            raise typer.Exit(common.BROKEN)


def _print(report: dict[str, Any]) -> None:
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


def examine() -> dict[str, Any]:
    """Versions, device, ops, extras, and a short run of the embedded pair. Evaluates.

    Returns:
        A report ready for JSON. ``ok`` says that the engine works here; ``problems`` lists what
        does not, each with the line that fixes it, and ``hints`` what is merely absent.
    """
    import mlx.core as mx

    from pyengine import __version__, ops
    from pyengine.checkpoint import memory

    rows = ops.status()
    report: dict[str, Any] = {
        "versions": {
            "pyengine": __version__,
            "mlx": metadata.version("mlx"),
            "python": platform.python_version(),
        },
        "machine": {
            "os": platform.platform(),
            "device": str(mx.default_device()),
            "metal": mx.metal.is_available(),
            "available_bytes": memory.available_bytes(),
        },
        "ops": rows,
        "extras": {},
        "problems": [],
        "hints": [],
    }
    for extra, (modules, purpose) in EXTRAS.items():
        there = all(importlib.util.find_spec(module) is not None for module in modules)
        report["extras"][extra] = there
        if not there:
            report["hints"].append(
                f'{purpose}: {sys.executable} -m pip install "pyengine-mlx[{extra}]"'
            )
    loose = [row["op"] for row in rows if not row["row_stable"]]
    if loose:
        report["hints"].append(
            f"{', '.join(loose)} run as plain MLX here and are not row-stable: speculative greedy "
            "text may differ from plain text where two logits nearly tie"
        )
    try:
        report["check"] = _check()
        if not report["check"]["exact"] and not loose:
            report["problems"].append(
                "greedy speculative text differs from plain text though every op is row-stable: "
                "please report this with the output of pyengine doctor --json"
            )
    except (ValueError, RuntimeError, OSError) as error:
        report["problems"].append(
            f"the embedded pair does not run: {error} Install again, from the folder of the "
            f"source: {sys.executable} -m pip install --force-reinstall ."
        )
    report["ok"] = not report["problems"]
    return report


def _check() -> dict[str, Any]:
    """The same greedy text, plainly and speculatively, from the embedded pair."""
    from pyengine.generation import embedded_pair, generate
    from pyengine.sampling.settings import Sampling

    prompt = "Create a single-file HTML5 canvas Snake game."
    plain, speculative = (
        generate(
            prompt,
            pair=embedded_pair(),
            max_tokens=CHECK_TOKENS,
            sampling=Sampling(temperature=0.0),
            block_size=block_size,
        )
        for block_size in (1, 4)
    )
    return {
        "tokens": len(plain.tokens),
        "exact": plain.tokens == speculative.tokens,
        "acceptance": speculative.stats.acceptance,
    }
