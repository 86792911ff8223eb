"""Two network namespaces with a link of a given delay and rate between them; wants root.

The link is a tun device in each. A process beside each passes packets on to the other when their
delay is over, for not every kernel has netem; the rate is tc's (tbf).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

TUN = "/dev/net/tun"
IFF_TUN, IFF_NO_PI, TUNSETIFF = 0x1, 0x1000, 0x400454CA  # linux/if_tun.h
DEVICE, LARGEST = "link0", 65535


class Side(NamedTuple):
    """A namespace, and the address of its end of the link."""

    name: str
    address: str

    @property
    def inside(self) -> list[str]:
        """What runs a command in it."""
        return ["ip", "netns", "exec", self.name]


def lacking() -> str | None:
    """What this machine lacks for it; None if nothing."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"there is no {tool} (iproute2)"
    if not os.path.exists(TUN):
        return f"there is no {TUN}"
    name = f"pyengine-{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"ip netns add fails: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None


@contextmanager
def link(delay_s: float, rate: str) -> Iterator[tuple[Side, Side]]:
    """Both sides; the namespaces and what runs in them are gone afterwards.

    Args:
        delay_s: Seconds of each packet's way, at least.
        rate: What tc's tbf lets pass, such as "200mbit", each way.
    """
    stem = f"pyengine-{uuid.uuid4().hex[:8]}"
    sides = Side(f"{stem}-a", "10.77.0.1"), Side(f"{stem}-b", "10.77.0.2")
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    started = []
    with ExitStack() as undo:
        for side, end in zip(sides, ends, strict=True):
            undo.callback(end.close)
            _run("ip", "netns", "add", side.name)
            undo.callback(_run, "ip", "netns", "del", side.name)
            passing = subprocess.Popen(
                [*side.inside, sys.executable, __file__, str(end.fileno()), str(delay_s)],
                pass_fds=[end.fileno()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            started.append(passing)
            undo.callback(passing.wait)
            undo.callback(passing.kill)
            assert passing.stdout is not None and passing.stdout.readline() == b"ready\n"
            inside = *side.inside, "ip"
            _run(*inside, "link", "set", "lo", "up")
            _run(*inside, "addr", "add", f"{side.address}/24", "dev", DEVICE)
            _run(*inside, "link", "set", DEVICE, "mtu", "9000", "up")
            shaped = "rate", rate, "burst", "64kb", "latency", "1s"
            _run(*side.inside, "tc", "qdisc", "add", "dev", DEVICE, "root", "tbf", *shaped)
        for passing in started:
            assert passing.stdin is not None
            passing.stdin.write(b"go\n")
            passing.stdin.flush()
        yield sides


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def pass_on(other: socket.socket, delay_s: float) -> None:
    """Between this namespace's device and the other's process, until that is gone."""
    device = os.open(TUN, os.O_RDWR)
    name = struct.pack("16sH", DEVICE.encode(), IFF_TUN | IFF_NO_PI)
    fcntl.ioctl(device, TUNSETIFF, name.ljust(40, b"\0"))
    print("ready", flush=True)
    sys.stdin.readline()  # both are up: one that is not takes no packet

    def outwards() -> None:
        while True:
            packet = os.read(device, LARGEST)
            other.send(struct.pack("d", time.monotonic() + delay_s) + packet)

    threading.Thread(target=outwards, daemon=True).start()
    while message := other.recv(LARGEST + 8):
        (due,) = struct.unpack("d", message[:8])
        time.sleep(max(0.0, due - time.monotonic()))
        os.write(device, message[8:])


if __name__ == "__main__":
    pass_on(socket.socket(fileno=int(sys.argv[1])), float(sys.argv[2]))
