"""``pyengine doctor``: is everything there, and does each op give what it should?"""

from __future__ import annotations

import importlib.util
import json
import platform
import sys
import time
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from pyengine.cli import common
from pyengine.cli.hosts import HostFile
from pyengine.cli.output import check_output

EXAMPLES = (
    "pyengine doctor",
    "pyengine doctor --quick --json",
    "pyengine doctor --op block_attention --op copy_pages --output attention.json",
    "pyengine doctor --hostfile hosts.json --bundle ./gemma-4-31B-pair",
)
# Extra of pyproject.toml, the modules it brings, and what they serve.
EXTRAS = {
    "hub": (("huggingface_hub",), "names of the Hugging Face hub in place of folders"),
    "serve": (("fastapi", "uvicorn"), "pyengine serve"),
    "plot": (("matplotlib",), "the pictures of pyengine bench card and streams"),
    "eval": (("lm_eval",), "python -m pyengine.evaluate, for lm-eval"),
}
CHECK_TOKENS = 24
MOST_PROFILES = 3  # that are told in the text; the JSON has all


class DeviceName(str, Enum):
    """What may be examined."""

    gpu = "gpu"
    processor = "processor"
    workbench = "workbench"


def run(
    quick: Annotated[
        bool, typer.Option("--quick", help="Use the shapes of the embedded pair only.")
    ] = False,
    op: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="Examine this op only; may be repeated.", show_default=False
        ),
    ] = None,
    device: Annotated[
        DeviceName | None,
        typer.Option(
            help="What to examine; workbench is the Metal kernels on the processor, slowly, from a "
            "checkout.",
            show_default="what the ops run on",
        ),
    ] = None,
    hostfile: HostFile = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="With ranks: the pair that they are to share.",
            show_default="the embedded pair",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="Where to write the whole report, as JSON.")
    ] = Path("pyengine-doctor.json"),
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the report as one line of JSON too.")
    ] = False,
) -> None:
    """Examine every op on this machine, each in a process of its own.

    At the shapes of the embedded and the published pairs, with 1, 4, 6 and 16 rows: compile,
    compare with other kernels, compare rows with the same rows alone, look for hazards, time.
    An op that fails runs as MLX's own from then on, in generate and the other commands too.

    Prints at most forty lines for a bug report and writes the whole as JSON. Exit code 1 if an op
    fails or the embedded pair does not run.

    With --hostfile, and under mlx.launch, it examines the group in place of the ops: versions and
    weights on each host, what messages between them take, and what that bounds. Exit code 1 if
    ranks could not share the pair.
    """
    with common.sentences():
        from pyengine.checkpoint.manifest import check_folder
        from pyengine.ranks.launched import follows, is_started
        from pyengine.untrusted import write_whole

        if bundle is not None and not is_started():
            raise ValueError("[doctor] --bundle must come with --hostfile but stands alone.")
        if not follows():
            check_output("doctor", output)
            if bundle is not None:
                check_folder(bundle, "bundle")
        if is_started():
            if quick or op or device:
                raise ValueError(
                    "[doctor] --quick, --op and --device must be left out where ranks are examined."
                )
            report = examine_group(bundle)
            from pyengine.doctor.group import lines
        else:
            report = examine(
                quick=quick, only=op or [], device=None if device is None else device.value
            )
            from pyengine.doctor.report import lines
        if follows():
            raise typer.Exit(0 if report["ok"] else common.BROKEN)
        write_whole(output, json.dumps(report, indent=1) + "\n")
        if as_json:
            typer.echo(json.dumps(report))
        else:
            for line in lines(report):
                typer.echo(line)
        typer.echo(f"Report: {output}", err=True)
        if not report["ok"]:
            raise typer.Exit(common.BROKEN)


def examine_group(bundle: Path | None) -> dict[str, Any]:
    """Every rank's host, the messages between them, and what these bound; on each rank. Evaluates.

    Returns:
        A report ready for JSON; ``ok`` says that the ranks could share the pair.

    Raises:
        RuntimeError: The others cannot be reached.
    """
    import pyengine
    from pyengine.bench.bandwidth import bandwidth
    from pyengine.doctor import group
    from pyengine.ranks.group import joined

    ranks = joined()
    if ranks is None:
        raise ValueError("[doctor] the group must have two ranks or more but has one.")
    path = Path(pyengine.__file__).parent / "nano" if bundle is None else bundle
    report = group.examine(
        ranks, path, bandwidth, lambda what: typer.echo(f"Examining {what}", err=True)
    )
    return {**report, "ok": not report["problems"]}


def examine(
    *, quick: bool = False, only: list[str] | None = None, device: str | None = None
) -> dict[str, Any]:
    """Versions, machine, every op, extras, and a short run of the embedded pair. Evaluates.

    Returns:
        A report ready for JSON. ``ok`` says that all works here; ``problems`` lists what does not,
        each with the line that fixes it, and ``hints`` what is merely absent.
    """
    from pyengine import __version__, _ext, ops
    from pyengine.checkpoint import memory, on_metal
    from pyengine.doctor import device as devices
    from pyengine.doctor import examination, first_use, profile, quarantine

    began = time.perf_counter()

    def tell(line: str) -> None:
        typer.echo(line, err=True)

    name = device or devices.default()
    with common.progress() as on_run:
        found = examination.examine(
            name,
            quick=quick,
            only=only or [],
            tell=tell,
            on_op=lambda done, total, op: on_run(done + 1, total, op),
        )
    found["machine"]["available_bytes"] = memory.available_bytes()
    if name == devices.Metal.name:
        _compare_with_bandwidth(found)
    report: dict[str, Any] = {
        "versions": {
            "pyengine": __version__,
            "mlx": metadata.version("mlx"),
            "python": platform.python_version(),
            "sources": _ext.built_from[:12],
        },
        **found,
        "profiles": [one.to_dict() for one in profile.here()],
        "extras": {},
        "notes": [],
        "problems": [],
        "hints": [],
    }
    bad = [row["op"] for row in report["ops"] if row["verdict"] != "ok"]
    if bad and name == devices.default():
        first_use.set_aside(quarantine.read(name, tell), tell)
    status = {row["op"]: row for row in ops.status()}
    for row in report["ops"]:
        row |= {f"now_{key}": value for key, value in status[row["op"]].items() if key != "op"}
    report["notes"] += [one.line() for one in profile.here()[:MOST_PROFILES]]
    scaled = sum(len(row["scaled"]) for row in report["ops"])
    if scaled:
        report["notes"].append(
            f"scaled: {scaled} of {sum(row['cases'] for row in report['ops'])} cases have fewer "
            "columns than the model, to fit this machine; the JSON names them"
        )
    for extra, (modules, purpose) in EXTRAS.items():
        there = all(importlib.util.find_spec(module) is not None for module in modules)
        report["extras"][extra] = there
        if not there:
            report["hints"].append(
                f'{purpose}: {sys.executable} -m pip install "pyengine-mlx[{extra}]"'
            )
    if bad:
        report["problems"].append(
            f"{len(bad)} of {len(report['ops'])} ops failed; please report this text and the JSON. "
            + (
                "All commands run MLX's own in their place from now on."
                if name == devices.default()
                else "They are not what other commands run here."
            )
        )
    if not only:
        _run_pair(report)
    report["machine"]["wired"] = on_metal.wired_line()
    report["seconds"] = round(time.perf_counter() - began, 1)
    report["ok"] = not report["problems"]
    return report


def _compare_with_bandwidth(found: dict[str, Any]) -> None:
    """Add what part of the bandwidth that Apple publishes for the chip a kernel has."""
    from pyengine.bench import bandwidth

    limit = bandwidth.of_chip(found["machine"]["chip"], bandwidth.gpu_cores())
    found["machine"]["bandwidth_gb_s"] = limit
    for row in found["ops"]:
        for one in row.get("times", ()):
            if limit and "gb_s" in one:
                one["of_bandwidth"] = round(one["gb_s"] / limit, 3)


def _run_pair(report: dict[str, Any]) -> None:
    """Note how the embedded pair runs."""
    from pyengine import ops

    loose = [row["op"] for row in ops.status() if not row["row_stable"]]
    if loose:
        report["hints"].append(
            f"{', '.join(loose)} run as plain MLX here and are not row-stable: speculative greedy "
            "text may differ from plain text where two logits nearly tie"
        )
    try:
        check = report["check"] = _check()
    except (ValueError, RuntimeError, OSError) as error:
        report["problems"].append(f"the embedded pair does not run: {error}")
        return
    said = "the same text" if check["exact"] else "another text"
    report["notes"].append(
        f"embedded pair: {check['tokens']} tokens, {said} by plain and by speculative decoding"
    )
    if not check["exact"] and not loose:
        report["problems"].append(
            "greedy speculative text differs from plain text though every op is row-stable: "
            "please report this with the JSON"
        )


def _check() -> dict[str, Any]:
    """The same greedy text, plainly and speculatively, from the embedded pair."""
    from pyengine.generation import generate
    from pyengine.sampling.settings import Sampling
    from pyengine.task import embedded_pair

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
