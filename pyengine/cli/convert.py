"""``pyengine convert``: a float checkpoint, or a pair, to an MLX bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pyengine.cli import common

EXAMPLES = (
    "pyengine convert ./gemma-4-31B-it ./gemma-31B-8bit --assistant ./gemma-4-31B-it-assistant",
    "pyengine convert ./pair ./pair-4bit --bits 4",
    "pyengine convert ./gemma-4-31B-it ./bundle --dflash z-lab/gemma-4-31B-it-DFlash",
    "pyengine convert ./gemma-4-E2B-it ./e2b-8bit --json",
)


def run(
    src: Annotated[
        str, typer.Argument(help="Checkpoint or bundle: a folder, or owner/name on the hub.")
    ],
    dst: Annotated[Path, typer.Argument(help="Folder to create; must not exist.")],
    assistant: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Assistant of SRC; both go into one bundle.",
            show_default=False,
        ),
    ] = None,
    dflash: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="DFlash drafter of SRC, with or without an assistant, for the bundle.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[int, typer.Option(help="Bits per weight: 4, 6 or 8.")] = 8,
    group_size: Annotated[
        int, typer.Option(help="Weights that share a scale and a bias: 32, 64 or 128.")
    ] = 64,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON in place of the text.")
    ] = False,
) -> None:
    """Quantise a bfloat16 checkpoint, or a pair of them, for pyengine, mlx-lm and mlx-vlm.

    Needs memory for a few slices of the largest tensor only. DST appears once it is complete;
    Ctrl-C or a failure leaves nothing behind, and the same command starts over.
    """
    with common.sentences():
        from pyengine.checkpoint.convert import convert

        with common.progress("converting", parts=10) as on_progress:
            done = convert(
                src,
                dst,
                assistant=assistant,
                dflash=dflash,
                bits=bits,
                group_size=group_size,
                on_progress=on_progress,
            )
        if as_json:
            said = {**done.__dict__, "path": str(done.path), "bits": bits, "group_size": group_size}
            typer.echo(json.dumps(said))
        else:
            size = common.size(done.weight_bytes)
            typer.echo(f"{done.path}: {done.kind} {done.name}, {size} of weights")
