"""Many requests at once: each round processes a block of every text that is under way."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import mlx.core as mx

from pyengine.arguments import whole
from pyengine.checkpoint import memory
from pyengine.checkpoint.fingerprint import fingerprint
from pyengine.engine import schedule
from pyengine.engine.beginnings import Beginnings
from pyengine.engine.early_exit import EarlyRounds, Exit
from pyengine.engine.page_files import PageFiles
from pyengine.engine.prefill import Shared
from pyengine.engine.prefix import Prefix
from pyengine.engine.prompts import process
from pyengine.engine.rounds import Rounds
from pyengine.engine.sequence import Round, TokenSequence
from pyengine.engine.stats import Totals, add_counts
from pyengine.engine.stored import Stored
from pyengine.model.plan import most_together
from pyengine.ops.dispatch import borrows
from pyengine.sampling.settings import MAX_SEED
from pyengine.task import Answer, Result, Step, Task, embedded_pair, new_task
from pyengine.text.prompt import Prompt
from pyengine.untrusted import shown

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

MOST_SEQUENCES = 128
CACHE_DIR_BYTES = 20_000_000_000
LITTLE = 1_000_000_000  # bytes of keys and values

_log = logging.getLogger("pyengine")


class Request(Iterator[str]):
    """One text of an engine: pieces of it as they are committed. Made by :meth:`Engine.submit`.

    It has the face of :class:`pyengine.Stream`. To ask for a piece advances everybody's text, or
    waits for the thread of an engine that was started.
    """

    def __init__(self, engine: Engine, task: Task, needs: int, most_unheard: int | None) -> None:
        self.task = task
        self.answer = Answer(task)
        self.needs = needs  # bytes at worst
        self.most_unheard = most_unheard
        self.unheard: deque[Step] = deque()
        self.error: Exception | None = None
        self.ended = False
        self.cancelled = False
        self.sequence: TokenSequence | None = None  # once it has joined
        self.prefix: Prefix | None = None  # while it is active
        self.shared: Shared | None = None  # its prompt, where other texts begin with it
        self.at_end = ExitStack()
        self._engine = engine

    def __next__(self) -> str:
        for step in self.steps():
            if step.text:
                return step.text
        raise StopIteration

    def __enter__(self) -> Request:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()

    def steps(self) -> Iterator[Step]:
        """What each round adds, and each chunk of a long prompt; see :class:`Stream`."""
        # No generator, which an error would end: who asks again shall hear of it again
        return iter(self._next_step, None)

    def cancel(self) -> None:
        """End it after the round under way. :attr:`result` keeps what there is."""
        self.cancelled = True
        self._engine.wake()

    def close(self) -> None:
        """The same as :meth:`cancel`, for those who have a Stream in mind."""
        self.cancel()

    @property
    def result(self) -> Result:
        """The finished result; before the end, what was made so far."""
        return self.answer.result

    @property
    def reads(self) -> bool:
        """Whether it has joined and its prompt is under way."""
        return self.sequence is not None and self.sequence.reads

    @property
    def is_held(self) -> bool:
        """Whether it waits for its reader."""
        return self.most_unheard is not None and len(self.unheard) >= self.most_unheard

    def take(self) -> list[Step]:
        """What was made since and not heard yet; does not wait, and does not raise ``error``."""
        return [self.unheard.popleft() for _ in range(len(self.unheard))]

    def _next_step(self) -> Step | None:
        while not self.cancelled:
            if self.unheard:
                step = self.unheard.popleft()
                self._engine.wake()
                return step
            if self.error is not None:
                raise self.error
            if self.ended:
                return None
            self._engine.advance(self)
        return None


class Engine:
    """Generates many texts at once, each the very one it is alone.

    A round processes a block of every text under way; target and assistant are read once for all.
    Requests are served in the order of arrival, as many at once as ``sequences`` and the memory
    allow: a request joins when all that it may need at worst is free. Prompts are processed chunk
    by chunk between rounds, short ones together, and slow running texts to a half at most. What a
    request asks and gets is as with :func:`pyengine.generate`: settings and seed give the text,
    whoever else is there.

    Without :meth:`start` nothing runs by itself: whoever iterates over a request, or calls
    :meth:`step`, moves all. Requests may come from several threads, and be cancelled from any.

    Args:
        pair: From :func:`pyengine.load`; the embedded pair when None.
        sequences: Most texts under way, 1 to 128.
        cache_bytes: Memory for the keys and values of all; None for what is free.
        cache_dir: A folder where pages of prompts are kept for the processes to come; None for
            none. They are written while nothing else is to be done, and when the engine is closed.
            Pages of other weights or another version are not used; damaged ones are told by the
            logger ``pyengine``.
        cache_dir_bytes: Most bytes of that folder; what was used longest ago goes first.

    Raises:
        ValueError: An argument is impossible, or the folder cannot be used.
    """

    def __init__(
        self,
        pair: Pair | None = None,
        *,
        sequences: int = 8,
        cache_bytes: int | None = None,
        cache_dir: str | Path | None = None,
        cache_dir_bytes: int = CACHE_DIR_BYTES,
    ) -> None:
        self.pair = embedded_pair() if pair is None else pair
        self.totals = Totals()
        if not hasattr(self.pair, "target"):
            raise ValueError(f"[engine] pair must come from pyengine.load but got {shown(pair)}.")
        count = whole("engine", "sequences", sequences)
        if not 1 <= count <= MOST_SEQUENCES:
            raise ValueError(f"[engine] sequences must be 1 to {MOST_SEQUENCES} but got {count}.")
        if cache_bytes is not None and whole("engine", "cache_bytes", cache_bytes) < 1:
            raise ValueError(f"[engine] cache_bytes must be at least 1 but got {cache_bytes}.")
        self._places, self._cache_bytes = count, cache_bytes
        # Where little is allowed, nothing is taken ahead
        is_little = cache_bytes is not None and cache_bytes < LITTLE
        self._arena = self.pair.target.new_arena(sequences=1 if is_little else count)
        stored = None
        if cache_dir is not None:
            self.pair.target.check_alone("cache_dir")
            stored = stored_pages(self.pair, cache_dir, cache_dir_bytes)
        self._rounds, self._known = Rounds(), Beginnings(self._arena, stored)
        self._early: dict[Exit, EarlyRounds] = {}
        self._incoming: deque[Request] = deque()  # from any thread
        self._waiting: deque[Request] = deque()  # by who steps, as all below
        self._active: list[Request] = []
        self._chunk_s = self._rounds_s = 0.0
        self._stepping = threading.RLock()
        self._news = threading.Condition()
        self._calls = 0  # of wake
        self._thread: threading.Thread | None = None
        self._closed = False

    @overload
    def submit(self, prompt: Prompt, *, n: None = None, **settings: Any) -> Request: ...

    @overload
    def submit(self, prompt: Prompt, *, n: int, **settings: Any) -> list[Request]: ...

    def submit(
        self, prompt: Prompt, *, n: int | None = None, **settings: Any
    ) -> Request | list[Request]:
        """Add a request, to be served when those before it leave room; what is wrong is told here.

        Args:
            prompt: A string, messages, or token ids.
            n: So many texts, with the seeds s, s + 1, ... from that of ``sampling`` on; the prompt
                is processed once.
            settings: ``max_tokens``, ``sampling``, ``block_size``, ``drafter``, ``stop``, ``raw``,
                ``variables``, ``tools``, ``tool_choice``, ``parallel_tool_calls``,
                ``response_format``, ``grammar``, ``regex``, ``early_exit`` and ``tree``, as
                :func:`pyengine.generate` takes them.

        Returns:
            The request; a list of n where ``n`` is given.

        Raises:
            ValueError: An argument is impossible, or the memory too small for the request alone.
            RuntimeError: The engine was closed.
        """
        task = new_task(prompt, pair=self.pair, **settings)
        if n is None:
            return self.add(task)
        return self.add_several(several(task, n))

    def add_several(self, tasks: Sequence[Task], most_unheard: int | None = None) -> list[Request]:
        """Add requests that have one prompt, which is processed once."""
        shared = Shared(len(tasks))
        return [self.add(task, most_unheard, shared) for task in tasks]

    def check(self, task: Task) -> None:
        """Refuse what would not fit if it were alone.

        Raises:
            ValueError: The message says what would.
        """
        self._needs(task)

    def add(
        self, task: Task, most_unheard: int | None = None, shared: Shared | None = None
    ) -> Request:
        """Add a request that was checked. It is held while so many of its steps are unheard."""
        request = Request(self, task, self._needs(task), most_unheard)
        request.shared = shared
        if shared is not None:
            request.at_end.callback(shared.end)
        with self._news:
            if self._closed:
                raise RuntimeError("[engine] the engine must be open but was closed.")
            self._incoming.append(request)
        self.wake()
        return request

    @property
    def waiting(self) -> int:
        """Requests that have not joined."""
        return len(self._incoming) + len(self._waiting)

    @property
    def active(self) -> int:
        """Requests whose prompt or text is under way."""
        return len(self._active)

    @property
    def cache_bytes(self) -> int:
        """Memory of keys and values: those of texts under way, and prefixes kept for others."""
        return self._arena.held_bytes

    @property
    def pages(self) -> dict[str, dict[str, int]]:
        """Pages of keys and values by kind of layer, "full" and "sliding": ``held`` by texts and
        beginnings, ``free``, and ``bytes`` of one."""
        arena = self._arena
        return {
            name: {
                "held": arena.pages(kind).count - arena.pages(kind).free,
                "free": arena.pages(kind).free,
                "bytes": arena.page_bytes(kind),
            }
            for name, kind in (("full", False), ("sliding", True))
        }

    def step(self) -> bool:
        """Do what comes next: a chunk of a prompt or a round of all texts. Evaluates.

        Returns:
            Whether there was anything to do. What fails, fails its own request alone.
        """
        with self._stepping:
            self._leave_out_cancelled()
            plan = schedule.plan(self._load())
            for _ in range(plan.joining):
                self._join(self._waiting.popleft())
            if plan.work == "chunk":
                self._chunk()
            elif plan.work == "round":
                self._round()
            elif not self._active:
                self._known.trim()
            return plan.work is not None

    def store(self) -> bool:
        """Write a page to ``cache_dir`` that is not there, if nothing else is to be done.

        Returns:
            Whether there may be more.
        """
        with self._stepping:
            return self._known.store()

    def advance(self, request: Request) -> None:
        """Step, or wait for the engine's thread, once or until the request has news."""
        if self._thread is None:
            self.step()
            return
        with self._news:
            while not (request.unheard or request.ended or request.cancelled):
                self._news.wait()

    def start(self) -> None:
        """Run in a thread of its own until :meth:`close`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="pyengine-engine")
            self._thread.start()

    def wake(self) -> None:
        """Tell the thread, and who waits for it, that something has changed."""
        with self._news:
            self._calls += 1
            self._news.notify_all()

    def close(self) -> None:
        """End every request after the round under way, and the thread."""
        with self._news:
            self._closed = True
        self.wake()
        if self._thread is not None:
            self._thread.join()
        with self._stepping:
            for request in [*self._incoming, *self._waiting, *self._active]:
                request.cancelled = True
            self._leave_out_cancelled()
            while self._known.store():
                pass
            self._known.shrink(0)
            self._known.trim()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        while not self._closed:
            before = self._calls
            worked = self.step() or self.store()
            with self._news:
                self._news.notify_all()
                while not worked and self._calls == before:
                    self._news.wait()

    def _budget(self) -> int | None:
        """Bytes that all requests together may have; None where nobody counts."""
        if self._cache_bytes is not None:
            return self._cache_bytes
        free = memory.free_bytes()
        return None if free is None else free + self._arena.nbytes

    def _needs(self, task: Task) -> int:
        """Bytes that a request needs at worst. One whose length nobody knows has all there are.

        Raises:
            ValueError: It would not fit if it were alone; the message says what would.
        """
        target, budget, none = self.pair.target, self._budget(), Prefix()
        if budget is None:
            return 0
        task.check_memory(none, budget)
        tokens = target.context
        if task.max_tokens is not None:
            tokens = min(len(task.ids) + task.max_tokens, target.context)
        layers = task.layers or self._arena.beside  # once there, all texts' pages have them
        return min(target.prompt_bytes(tokens, task.most_rows, none.marks, layers), budget)

    def _load(self) -> schedule.Load:
        budget = self._budget() if self._waiting else None
        return schedule.Load(
            waiting=[request.needs for request in self._waiting],
            places=self._places - len(self._active),
            free=None if budget is None else budget - sum(r.needs for r in self._active),
            active=len(self._active),
            prompts=sum(request.reads for request in self._active),
            texts=len(self._texts()),
            chunk_s=self._chunk_s,
            rounds_s=self._rounds_s,
        )

    def _texts(self) -> list[Request]:
        """Those that can have a round."""
        return [r for r in self._active if not r.reads and not r.is_held]

    def _join(self, request: Request) -> None:
        if not self._active:
            mx.reset_peak_memory()
        budget = self._budget()
        if budget is not None:
            promised = sum(r.needs for r in self._active) + request.needs
            self._known.shrink(max(0, budget - promised))
        task, pair = request.task, self.pair
        if task.exit is None:  # else others would get what its early tokens left
            request.prefix = Prefix(self._known)
            request.at_end.enter_context(request.prefix.in_use())
        self._active.append(request)
        request.sequence = TokenSequence(
            pair.target,
            task.new_drafter(),
            task.ids,
            **task.arguments,
            stats=request.answer.stats,
            prefix=request.prefix,
            shared=request.shared,
            arena=self._arena,
            matcher=task.new_matcher(),
        )
        request.at_end.callback(request.sequence.release)

    def _chunk(self) -> None:
        """The next chunk of the prompt that came first, and those of others that fit one call."""
        start, requests = time.perf_counter(), self._prompts()
        try:
            each = process([r.sequence for r in requests if r.sequence is not None])
        except BaseException as error:  # nobody knows what became of theirs
            for request in requests:
                self._fail(request, error, again=request is requests[-1])
        else:
            for request, done in zip(requests, each, strict=True):
                if isinstance(done, Exception):
                    self._fail(request, done)
                    continue
                if done.prompt_done is None:
                    self.totals.prompt_tokens += len(request.task.ids)
                    self.totals.reused_tokens += request.answer.stats.reused_tokens
                self._note(request, done)
        self._chunk_s, self._rounds_s = time.perf_counter() - start, 0.0

    def _prompts(self) -> list[Request]:
        """Prompts whose next parts fit one call, in the order of arrival."""
        taken: list[Request] = []
        others: list[TokenSequence] = []
        room = most_together(borrows())
        for request in [r for r in self._active if r.reads]:
            sequence = request.sequence
            assert sequence is not None
            try:
                if any(sequence.waits_for(other) for other in others):
                    continue  # it will begin with what that one leaves
                room -= sequence.next_rows()
            except BaseException as error:
                self._fail(request, error)
                continue
            if room < 0 and taken:
                break  # nobody overtakes
            taken.append(request)
            others.append(sequence)
        return taken

    def _round(self) -> None:
        """A round of every text that can have one; more than fit one call go in groups."""
        start, texts = time.perf_counter(), self._texts()
        exact = [r for r in texts if r.task.exit is None]
        self._rounds.choose([r.sequence for r in exact if r.sequence is not None])
        for group in [*_groups(exact), *([r] for r in texts if r.task.exit is not None)]:
            rounds = self._rounds_of(group[0])
            try:
                each = rounds.play([r.sequence for r in group if r.sequence is not None])
            except BaseException as error:  # nobody knows what became of theirs
                for request in group:
                    self._fail(request, error, again=request is group[-1])
                continue
            self.totals.rounds += 1
            for request, done in zip(group, each, strict=True):
                if isinstance(done, Exception):
                    self._fail(request, done)
                else:
                    self.totals.blocks += 1
                    self.totals.drafted += done.num_drafted
                    self.totals.accepted += done.num_accepted
                    if done.num_drafted:
                        name = done.drafter or request.task.drafter
                        of_all = self.totals.by_drafter
                        add_counts(of_all, name, done.num_drafted, done.num_accepted)
                    self._note(request, done)
        self._rounds_s += time.perf_counter() - start

    def _rounds_of(self, request: Request) -> Rounds:
        """What plays its rounds."""
        if (exit := request.task.exit) is None:
            return self._rounds
        if exit not in self._early:
            self._early[exit] = EarlyRounds(exit, waits=True)
        return self._early[exit]

    def _note(self, request: Request, done: Round) -> None:
        request.unheard.append(step := request.answer.add(done))
        self.totals.tokens += len(step.tokens)
        if request.answer.finish_reason:
            self._end(request)

    def _fail(self, request: Request, error: BaseException, again: bool = True) -> None:
        """End a request that failed. What is no Exception, such as Ctrl-C, is raised ``again``."""
        broken_off = RuntimeError("[engine] the generation was broken off.")
        request.error = error if isinstance(error, Exception) else broken_off
        if request.prefix is not None:
            request.prefix.forget()
        self._end(request)
        if again and request.error is broken_off:
            raise error

    def _end(self, request: Request) -> None:
        self._active.remove(request)
        request.at_end.close()
        request.sequence = request.prefix = None
        request.ended = True
        budget = self._budget()
        if budget is not None:
            self._known.shrink(budget // 2)

    def _leave_out_cancelled(self) -> None:
        while self._incoming:
            self._waiting.append(self._incoming.popleft())
        for request in [r for r in self._waiting if r.cancelled]:
            self._waiting.remove(request)
            request.at_end.close()
            request.ended = True
        for request in [r for r in self._active if r.cancelled]:
            self._end(request)


def stored_pages(
    pair: Pair,
    folder: str | Path,
    nbytes: int = CACHE_DIR_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Stored:
    """Files for the pages of a pair. Its weights are hashed, which may take as long as to read
    them; once.

    Args:
        pair: From :func:`pyengine.load`.
        folder: Made if it is not there.
        nbytes: Most bytes of all files.
        on_progress: Gets the bytes that were hashed, and all.

    Raises:
        ValueError: An argument is impossible, or the folder cannot be used.
    """
    if not isinstance(folder, (str, Path)):
        raise ValueError(f"[cache] the folder must be a path but got {shown(folder)}.")
    if whole("cache", "bytes", nbytes) < 1:
        raise ValueError(f"[cache] bytes must be at least 1 but got {nbytes}.")
    place = Path(folder)
    model = fingerprint(pair, place, on_progress)
    return Stored(PageFiles(place, model, nbytes, lambda line: _log.warning("[cache] %s", line)))


def _groups(texts: Sequence[Request]) -> list[list[Request]]:
    """Texts that go into one round each. Those without grammars go first, by themselves: they do
    not wait for masks. Of them those with trees are played by themselves too."""
    free = [r for r in texts if r.task.grammar is None]
    guided = [r for r in texts if r.task.grammar is not None]
    rows = [
        r.task.most_rows if r.task.tree else r.sequence.drafts + 1
        for r in free
        if r.sequence is not None
    ]
    each = ((free, rows), (guided, [r.task.most_rows for r in guided]))
    return [
        [kind[place] for place in places] for kind, own in each for places in schedule.groups(own)
    ]


def several(task: Task, n: int) -> list[Task]:
    """The task n times, with a seed each, one above the other.

    Raises:
        ValueError: n is not a number of texts.
    """
    if not 1 <= whole("generate", "n", n) <= MOST_SEQUENCES:
        raise ValueError(f"[generate] n must be 1 to {MOST_SEQUENCES} but got {n}.")
    first = task.sampling.seed or 0
    seeds = [(first + i) % (MAX_SEED + 1) for i in range(n)]
    return [replace(task, sampling=replace(task.sampling, seed=seed)) for seed in seeds]
