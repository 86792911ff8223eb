"""The server's queue: one thread generates, one request after the other, in the order of arrival.

What a generation says goes to its request through a bounded queue. A client that reads slowly
slows its own generation down; who reads nothing at all is http.py's to drop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from pyengine.engine.prefix import Prefix
from pyengine.engine.stats import Stats
from pyengine.serve.protocol import Ask, Refused
from pyengine.task import Result, Step

MAX_UNHEARD = 64  # steps that a generation may be ahead of its client

Said = Step | Result | Exception  # rounds, then one of the others


class Cut(Exception):
    """The generation under way is wanted by nobody any more."""


class Job:
    """A generation in the queue. The worker's thread says, the request's task hears."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.is_cut = False
        self._loop = asyncio.get_running_loop()
        self._said: deque[Said] = deque()
        self._room = threading.Condition()
        self._news = asyncio.Event()

    def say(self, said: Said) -> None:
        """From the worker's thread; waits while the client is too far behind."""
        with self._room:
            while len(self._said) >= MAX_UNHEARD and not self.is_cut:
                self._room.wait()
            if self.is_cut:
                return
            self._said.append(said)
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:  # the loop has been closed meanwhile
            self.is_cut = True

    async def hear(self, wait_s: float | None) -> Said | None:
        """What it says next; None when it says nothing for so long."""
        while not self._said:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
            except asyncio.TimeoutError:
                return None
        with self._room:
            self._room.notify()
            return self._said.popleft()

    def cut(self, reason: Exception) -> None:
        """End it after the round or chunk under way; the request hears ``reason`` at once."""
        with self._room:
            self.is_cut = True
            self._said.clear()
            self._said.append(reason)
            self._room.notify()
        self._news.set()

    def check(self, *_: int) -> None:
        if self.is_cut:
            raise Cut


class Worker:
    """The thread that generates, and the jobs that wait for it."""

    def __init__(self, waiting: int) -> None:
        self._places = waiting + 1  # one is served
        self._jobs: deque[Job] = deque()
        self._current: Job | None = None
        self._changed = threading.Condition()
        self._prefix = Prefix()
        self._ended = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="pyengine-serve")
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    @property
    def running(self) -> int:
        return int(self._current is not None)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among those who are read, wait or are served; taken before any work is done.

        Raises:
            Refused: All are taken, or the server ends.
        """
        if self._ended:
            raise ending()
        if not self._places:
            raise Refused(
                429, "[serve] too many requests are waiting; try again later.", retry=True
            )
        self._places -= 1
        try:
            yield
        finally:
            self._places += 1

    def add(self, job: Job) -> None:
        with self._changed:
            if self._ended:
                raise ending()
            self._jobs.append(job)
            self._changed.notify()

    def cut(self, job: Job, reason: Exception) -> None:
        """End it after its round or chunk; give up its turn if it still waits."""
        job.cut(reason)
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def end(self) -> None:
        """Serve nobody any more: the requests hear so at once, the thread ends after its chunk."""
        with self._changed:
            self._ended = True
            jobs = [*self._jobs, *([self._current] if self._current else [])]
            self._jobs.clear()
            self._changed.notify()
        for job in jobs:
            job.cut(ending())

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                while not self._jobs and not self._ended:
                    self._changed.wait()
                if self._ended:
                    return
                job = self._current = self._jobs.popleft()
            try:
                self._run(job)
            except Cut:
                pass
            except Exception as error:  # the thread serves the next, whatever this one did
                job.say(error)

    def _run(self, job: Job) -> None:
        ask = job.ask
        job.check()
        if ask.echo is not None:
            job.say(ask.echoed(ask.echo, job.check))
        if not ask.max_tokens:
            job.say(Result("", [], "length", Stats()))
            return
        with ask.start(self._prefix) as running:
            for step in running.steps():
                job.check()
                if step.prompt_done is None:
                    job.say(step)
            job.say(running.result)


def ending() -> Refused:
    return Refused(503, "[serve] the server is ending; try again later.", retry=True)
