"""The server's queue: one thread runs an engine, requests join it in the order of arrival.

What a generation says goes to its request through a bounded queue. A client that reads slowly
holds its own generation, and nobody else's; who reads nothing at all is http.py's to drop.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from pyengine.engine.stats import Stats
from pyengine.serve.protocols.ask import Ask, Refused
from pyengine.serve.thinking import Budgeted
from pyengine.streams import Engine, Request
from pyengine.task import Result, Step, Task

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

MAX_UNHEARD = 64  # steps that a job's generations may be ahead of its client
SPEED_S = 10.0  # over which the server's speed is told


class Said(NamedTuple):
    """A step of one of a job's texts, or its result."""

    choice: int
    what: Step | Result


Hear = Callable[[float | None], Awaitable[Said | Exception | None]]  # as Job.hear


class Cut(Exception):
    """The generation under way is wanted by nobody any more."""


class Job:
    """A request in the queue, of one text or several. The worker's thread says, the request's task
    hears: steps and results of each text, or an exception that ends all."""

    def __init__(self, ask: Ask, wake: Callable[[], None] = lambda: None) -> None:
        self.asks = ask.all
        self.is_cut = False
        self.texts: dict[int, Request | Budgeted] = {}  # those under way, by index
        self._wake = wake
        self._loop = asyncio.get_running_loop()
        self._said: deque[Said | Exception] = deque()
        self._lock = threading.Lock()
        self._news = asyncio.Event()

    @property
    def has_room(self) -> bool:
        """Whether its client is not too far behind."""
        return len(self._said) < MAX_UNHEARD

    def say(self, said: Said | Exception) -> None:
        """From the worker's thread."""
        with self._lock:
            if self.is_cut:
                return
            self._said.append(said)
        try:
            self._loop.call_soon_threadsafe(self._news.set)
        except RuntimeError:  # the loop has been closed meanwhile
            self.is_cut = True

    async def hear(self, wait_s: float | None) -> Said | Exception | None:
        """What it says next; None when it says nothing for so long."""
        while not self._said:
            self._news.clear()
            try:
                await asyncio.wait_for(self._news.wait(), wait_s)
            except asyncio.TimeoutError:
                return None
        with self._lock:
            was_full = not self.has_room
            said = self._said.popleft()
        if was_full:
            self._wake()
        return said

    def cut(self, reason: Exception) -> None:
        """End it after the round or chunk under way; the request hears ``reason`` at once."""
        with self._lock:
            self.is_cut = True
            self._said.clear()
            self._said.append(reason)
        self._news.set()

    def check(self, *_: int) -> None:
        if self.is_cut:
            raise Cut


class Speed:
    """Tokens per second of all texts over the last seconds, or since the start if that is later."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._made: deque[tuple[float, int]] = deque()  # when, how many
        self._lock = threading.Lock()

    def note(self, tokens: int) -> None:
        with self._lock:
            self._made.append((time.monotonic(), tokens))
            self._forget()

    @property
    def tok_s(self) -> float:
        with self._lock:
            span = min(self._forget() - self._start, SPEED_S)
            return sum(count for _, count in self._made) / span if span else 0.0

    def _forget(self) -> float:
        """Leave out what is older; the time."""
        now = time.monotonic()
        while self._made and self._made[0][0] <= now - SPEED_S:
            self._made.popleft()
        return now


class Worker:
    """The thread that runs the engine, and the jobs that wait for it."""

    def __init__(self, pair: Pair, streams: int, waiting: int, **memory: Any) -> None:
        self._engine = Engine(pair, sequences=streams, **memory)
        self.streams, self.totals, self.speed = streams, self._engine.totals, Speed()
        self._places = waiting + streams
        self._jobs: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._calls = 0  # of wake
        self._ended = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="pyengine-serve")
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def texts(self) -> int:
        """Texts under way; a request may have several, and none while its prompt is scored."""
        return self._engine.active

    @property
    def cache_bytes(self) -> int:
        return self._engine.cache_bytes

    @property
    def pages(self) -> dict[str, dict[str, int]]:
        return self._engine.pages

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

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse what would not fit the memory if it were alone.

        Raises:
            ValueError: The message says what would.
        """
        for task in tasks:
            self._engine.check(task)

    def add(self, job: Job) -> None:
        with self._changed:
            if self._ended:
                raise ending()
            self._jobs.append(job)
        self.wake()

    def cut(self, job: Job, reason: Exception) -> None:
        """End it after its round or chunk; give up its turn if it still waits."""
        job.cut(reason)
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
        self.wake()

    def end(self) -> None:
        """Serve nobody any more: the requests hear so at once, the thread ends after its chunk."""
        with self._changed:
            self._ended = True
            jobs = [*self._jobs, *self._running]
            self._jobs.clear()
        self.wake()
        for job in jobs:
            job.cut(ending())

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread's end; whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def wake(self) -> None:
        """Tell the thread that something has changed."""
        with self._changed:
            self._calls += 1
            self._changed.notify()

    def _work(self) -> None:
        while not self._ended:
            before = self._calls
            worked = self._turn()
            with self._changed:
                while not worked and self._calls == before:
                    self._changed.wait()
        self._engine.close()

    def _turn(self) -> bool:
        """Step, tell, begin a job if there is a place for it; whether there was anything to do."""
        worked = self._step()
        with self._changed:
            is_place = self._engine.active + self._engine.waiting < self.streams
            job = self._jobs.popleft() if self._jobs and is_place else None
            if job is not None:
                self._running.append(job)
        if job is not None:
            self._begin(job)
        return worked or job is not None

    def _begin(self, job: Job) -> None:
        def between(*_: int) -> None:
            job.check()
            self._step()  # a prompt that is scored holds nobody up for longer than a block

        try:
            job.check()
            for index, ask in enumerate(job.asks):
                if ask.echo is not None:
                    job.say(Said(index, ask.echoed(ask.echo, between)))
                if not ask.max_tokens:
                    job.say(Said(index, Result("", [], "length", Stats())))
            asks = [(index, ask) for index, ask in enumerate(job.asks) if ask.max_tokens]
            for _, group in groupby(asks, lambda each: id(each[1].ids)):
                indices, own = zip(*group, strict=True)
                tasks = [ask.task() for ask in own]
                texts = self._engine.add_several(tasks, most_unheard=1)
                job.texts.update(
                    (index, _within_budget(self._engine, text, ask))
                    for index, text, ask in zip(indices, texts, own, strict=True)
                )
        except Cut:
            pass
        except Exception as error:  # the thread serves the others, whatever this one did
            job.say(error)
        if not job.texts:
            self._leave(job)

    def _step(self) -> bool:
        before = self.totals.tokens
        worked = self._engine.step() or self._engine.store()
        if made := self.totals.tokens - before:
            self.speed.note(made)
        for job in [job for job in self._running if job.texts]:
            self._tell(job)
        return worked

    def _tell(self, job: Job) -> None:
        """Say what a job's texts have made, as far as there is room."""
        for index, request in list(job.texts.items()):
            if job.is_cut:
                self._leave(job)
                return
            if not job.has_room:
                return
            for step in request.take():
                if step.prompt_done is None:
                    job.say(Said(index, step))
            if request.error is not None:
                job.say(request.error)
                self._leave(job)
                return
            if request.ended:
                job.say(Said(index, request.result))
                del job.texts[index]
        if not job.texts:
            self._leave(job)

    def _leave(self, job: Job) -> None:
        for request in job.texts.values():
            request.cancel()
        job.texts.clear()
        with self._changed:
            self._running.remove(job)
            self._calls += 1  # its texts leave the engine in the next step


def _within_budget(engine: Engine, text: Request, ask: Ask) -> Request | Budgeted:
    budget = ask.thinking_budget
    return text if budget is None else Budgeted(engine, text, budget)


def ending() -> Refused:
    return Refused(503, "[serve] the server is ending; try again later.", retry=True)
