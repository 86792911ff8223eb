"""``--hostfile``: the same command on several hosts, started by MLX's own launcher."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from pyengine.cli import common

OPTION = "--hostfile"
SAID = "it has said why."
SHARING = (["generate"], ["chat"], ["serve"], ["doctor"], ["bench", "gemma-mtp"])


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


@contextmanager
def one_voice() -> Iterator[None]:
    """Around a command: where several hosts run it with the same arguments, rank 0 alone speaks.

    What keeps another rank from beginning is told to rank 0, and is its sentence then.
    """
    from pyengine.ranks.launched import follows, is_started

    words = sys.argv[1:3]
    if not is_started() or (words[:1] not in SHARING and words not in SHARING):
        yield
        return
    said = io.StringIO()
    try:
        with ExitStack() as silent:
            if follows():
                nowhere = silent.enter_context(open(os.devnull, "w", encoding="utf-8"))
                silent.enter_context(redirect_stdout(nowhere))
                silent.enter_context(redirect_stderr(said))
            yield
    except SystemExit as end:
        if end.code in (common.USER_ERROR, common.BROKEN):
            lines = [line.strip(" \u2502") for line in said.getvalue().splitlines()]
            own = [line for line in lines if any(c.isalpha() for c in line)]
            fault = own[-1].removeprefix("pyengine: ") if own else ""
            # What ranks have found together is rank 0's to say
            known = end.code == common.USER_ERROR and fault.startswith("[ranks] ")
            if not (known or _others_know(fault or SAID)) and fault:
                typer.echo(f"pyengine: {fault}", err=True)
        raise


def _others_know(fault: str) -> bool:
    """Whether the others end with this rank. Waits for them."""
    from pyengine.ranks import start
    from pyengine.ranks.group import joined

    if start.begun:
        return False
    try:
        if (ranks := joined()) is not None:
            start.begin(ranks, fault)
    except ValueError:
        return True
    except RuntimeError:
        pass  # they are gone
    return False


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
