"""``--hostfile``: the same command on several hosts, started by MLX's own launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pyengine.cli import common

OPTION = "--hostfile"


def start_on(path: str | None) -> str | None:
    """Become MLX's launcher of this command on every host of the file, once.

    On these hosts the command runs as it stands, without the option.
    """
    from pyengine.ranks.launched import is_started

    if path is None or is_started():
        return path
    with common.sentences():
        check(Path(path))
    sys.stdout.flush()
    command = ["-m", "pyengine", *without_option(sys.argv[1:])]
    launcher = ["-m", "pyengine.ranks.launch", "--hostfile", path, "--python", sys.executable]
    os.execv(sys.executable, [sys.executable, *launcher, "--", *command])


def check(path: Path) -> None:
    """Refuse what the launcher would not read.

    Raises:
        ValueError: The file is no list of at least two hosts with addresses.
    """
    from pyengine.untrusted import parse

    try:
        content = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise ValueError(f"[ranks] {path} cannot be read: {reason}.") from None
    given = parse(content, f"[ranks] {path}")
    hosts = given.get("hosts") if isinstance(given, dict) else given
    good = [
        host
        for host in (hosts if isinstance(hosts, list) else [])
        if isinstance(host, dict) and isinstance(host.get("ssh"), str) and host.get("ips")
    ]
    if good != hosts or len(good) < 2:
        raise ValueError(
            f"[ranks] {path} must list two hosts or more, each as "
            '{"ssh": NAME, "ips": [ADDRESS]} (`mlx.distributed_config` writes it), but does not.'
        )


def without_option(arguments: Sequence[str]) -> list[str]:
    """A command's arguments without the option."""
    rest = iter(arguments)
    kept = []
    for argument in rest:
        if argument == OPTION:
            next(rest, None)
        elif not argument.startswith(f"{OPTION}="):
            kept.append(argument)
    return kept


HostFile = Annotated[
    str | None,
    typer.Option(
        OPTION,
        metavar="FILE",
        callback=start_on,
        is_eager=True,
        help="Hosts that share the target, as `mlx.distributed_config` writes them; needs the pair "
        "in the same place on each.",
        show_default=False,
        rich_help_panel="Pair",
    ),
]
