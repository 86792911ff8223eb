"""Groups of processes on this machine, started as MLX's launcher starts them."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from shaped import Side

PROGRAM = Path(__file__).with_name("rank.py")
FIXTURES = Path(__file__).parents[1] / "fixtures"
SECONDS = 300.0  # a group on a busy machine


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [own.getsockname()[1] for own in held]
    for own in held:
        own.close()
    return ports


def start(
    folder: Path,
    size: int,
    *arguments: str,
    command: list[str] | None = None,
    sides: Sequence[Side] = (),
    **environment: str,
) -> list[subprocess.Popen[str]]:
    """Processes by rank, each on its side of a link if there is one; of one there is no group."""
    hosts = folder / "hosts.json"
    addresses = [side.address for side in sides] or size * ["127.0.0.1"]
    ports = zip(addresses, free_ports(size), strict=True)
    hosts.write_text(json.dumps([[f"{address}:{port}"] for address, port in ports]))
    started = []
    for rank in range(size):
        own = {**os.environ, **environment}
        inside = sides[rank].inside if sides else []
        if size > 1:
            own |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
        started.append(
            subprocess.Popen(
                [*inside, *(command or [sys.executable, str(PROGRAM)]), *arguments],
                env=own,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str, str]]:
    """Exit code, standard output and error of each; what has not ended by then is killed."""
    found = []
    try:
        for process in started:
            out, err = process.communicate(timeout=seconds)
            found.append((process.returncode, out, err))
    finally:
        for process in started:
            process.kill()
            process.wait()
    return found


def changed_weights(pair: Path, changed: Path) -> None:
    """A copy of a pair with one norm of the target doubled."""
    shutil.copytree(pair, changed)
    file = changed / "target/model.safetensors"
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    [norm] = [name for name in tensors if name.endswith("language_model.norm.weight")]
    tensors[norm] = tensors[norm] * 2
    mx.save_safetensors(str(file), tensors)
