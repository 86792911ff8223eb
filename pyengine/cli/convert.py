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
    "pyengine convert ./gemma-4-E2B-it ./e2b-8bit --json",
)


def run(
    src: Annotated[Path, typer.Argument(help="Checkpoint folder, or a folder that holds a pair.")],
    dst: Annotated[Path, typer.Argument(help="Folder to make; must not exist.")],
    assistant: Annotated[
        Path | None,
        typer.Option(help="The assistant of SRC: both make one bundle.", show_default=False),
    ] = None,
    bits: Annotated[int, typer.Option(help="4, 6 or 8.")] = 8,
    group_size: Annotated[
        int, typer.Option(help="32, 64 or 128 inputs share a scale and a bias.")
    ] = 64,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON in place of the text.")
    ] = False,
) -> None:
    """Quantise a bfloat16 checkpoint, or a pair of them, for pyengine, mlx-lm and mlx-vlm.

    Memory stays at some slices of the largest tensor. DST appears when it is whole; after Ctrl-C
    or a failure nothing is left, and the same command starts again.
    """
    with common.sentences():
        from pyengine.convert import convert

        with common.progress("converting", parts=10) as on_progress:
            done = convert(
                src,
                dst,
                assistant=assistant,
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
