"""The processes that share a target, and what they tell each other."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import NoReturn, cast

import mlx.core as mx

from pyengine.ranks.launched import backend

MAGIC = 0x67656D61
HEADER = 8  # numbers
TEXT = 4096  # bytes
TIMEOUT = 60.0  # seconds that a rank waits for the others within a call
WATCH = 0.25  # seconds between two looks at them
GONE = (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT)
ENDED = 3  # exit code of a rank that lost the others


class Ranks:
    """A group of processes, each with a share of the target.

    Attributes:
        rank: This one's number, from 0.
        size: How many there are.
        timeout: Seconds that it waits for the others within a call.
    """

    def __init__(self, group: mx.distributed.Group, sockets: Iterable[int] = ()) -> None:
        self._group, self._sockets = group, tuple(sockets)
        self.rank, self.size = group.rank(), group.size()
        self.timeout = _timeout(os.environ)
        self._since: float | None = None
        threading.Thread(target=self._watch, daemon=True, name="ranks").start()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def total(self, part: mx.array) -> mx.array:
        """The sum of every rank's ``part``, float32, added in the order of ranks: whatever the
        number of rows, a row's sum has the same bits on all of them.

        A sum of MLX's own adds pieces of the array in different orders.
        """
        every = self.gathered(part)
        total = every[0]
        for other in every[1:]:
            total = total + other
        return total

    def gathered(self, part: mx.array) -> list[mx.array]:
        """Every rank's array, all of one shape, by rank."""
        rows = part.reshape(1, *part.shape)
        every = mx.distributed.all_gather(rows, group=self._group)
        return [every[r] for r in range(self.size)]

    def said(self, text: str) -> list[str]:
        """Every rank's text, by rank, cut to 4096 bytes. Waits for the others."""
        own = text.encode()[:TEXT].ljust(TEXT, b"\0")
        with self.waiting():
            every = self.gathered(mx.array(list(own), dtype=mx.uint8))
            mx.eval(every)
        found = [bytes(cast("list[int]", a.tolist())).rstrip(b"\0") for a in every]
        return [own.decode("utf-8", "replace") for own in found]  # a cut one may end amid a letter

    def told(self, value: mx.array) -> mx.array:
        """Rank 0's array, on every rank; the others give zeros of its shape and dtype."""
        return mx.distributed.all_sum(value, group=self._group)

    def tell(self, kind: int, numbers: Sequence[int], *values: mx.array) -> list[mx.array]:
        """Begin a call on the other ranks: up to six numbers of its own, then arrays, which each
        come after the one before. Lazy: who uses what is returned uses it after it was sent."""
        header = [MAGIC, kind, *numbers]
        header += [0] * (HEADER - len(header))
        # Behind its values: what depends on nothing a recorded round sends once, and never again
        [begin] = mx.depends([mx.array(header, dtype=mx.int32)], list(values))
        sent = self.told(begin)
        given = []
        for value in values:
            [value] = mx.depends([value], [sent])
            given.append(sent := self.told(value))
        return given or [sent]

    def heard(self) -> list[int]:
        """Kind and numbers of the next call. Waits for as long as rank 0 has none.

        Raises:
            RuntimeError: Rank 0 is gone, or said something else.
        """
        header = self.told(mx.zeros(HEADER, mx.int32))
        mx.eval(header)
        magic, *rest = cast("list[int]", header.tolist())
        if magic != MAGIC:
            raise RuntimeError("[ranks] a call must begin with its header but got other numbers.")
        return rest

    def numbers(self, count: int) -> list[int]:
        """So many numbers that rank 0 tells next."""
        found = self.told(mx.zeros(count, mx.int32))
        mx.eval(found)
        return cast("list[int]", found.tolist())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A wait for the others that must end in time; else the process does."""
        outer, self._since = self._since, time.monotonic()
        try:
            yield
        finally:
            self._since = outer

    def alone(self) -> bool:
        """Whether another rank is known to have ended."""
        return any(is_closed(socket) for socket in self._sockets)

    def _watch(self) -> None:
        # What MLX has queued behind a call that failed waits for ever, and cannot be called off
        while True:
            time.sleep(WATCH)
            since = self._since
            if since is None:
                continue
            if self.alone():
                self._give_up("every rank must stay but one has ended")
            if time.monotonic() - since > self.timeout:
                self._give_up(
                    f"every rank must answer within {self.timeout:g} s "
                    "(PYENGINE_RANKS_TIMEOUT) but one does not"
                )

    def _give_up(self, why: str) -> NoReturn:
        line = f"pyengine: [ranks] {why}; rank {self.rank} of {self.size} ends."
        print(line, file=sys.__stderr__, flush=True)  # the command's own may be silent
        os._exit(ENDED)


def is_closed(descriptor: int) -> bool:
    """Whether the other side of a socket is gone; what it sent stays to be read."""
    try:
        copy = socket.socket(fileno=os.dup(descriptor))
    except OSError:
        return False  # it is no connection any more
    with copy:
        try:
            return copy.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError as error:
            return error.errno in GONE


def _open_sockets() -> set[int]:
    found = set()
    for name in os.listdir("/dev/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.add(int(name))
        except OSError:
            continue
    return found


@cache
def joined() -> Ranks | None:
    """The group that a launcher started this process in; None for a process of its own.

    Raises:
        RuntimeError: The others cannot be reached.
    """
    name = backend()
    if name is None:
        return None
    before = _open_sockets()
    try:
        group = mx.distributed.init(strict=True, backend=name)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().rstrip(".")
        raise RuntimeError(f"[ranks] the group of processes cannot be joined: {reason}.") from error
    return None if group.size() == 1 else Ranks(group, _open_sockets() - before)


def _timeout(environ: Mapping[str, str]) -> float:
    given = environ.get("PYENGINE_RANKS_TIMEOUT")
    if given is None:
        return TIMEOUT
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise ValueError(
            f"[ranks] PYENGINE_RANKS_TIMEOUT must be a number of seconds but got {given}."
        )
    return seconds
