"""What a job's texts say and its request hears."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from pyengine.serve.queue import MAX_UNHEARD, Job, Said, Worker
from pyengine.task import Step

ASK: Any = SimpleNamespace(all=())


def step(number: int) -> Said:
    return Said(0, Step(str(number), "", [number], []))


def test_a_job_has_no_room_until_its_client_reads() -> None:
    """And tells the worker so, once for each time that it was full."""
    woken = []

    async def heard() -> list[Any]:
        job = Job(ASK, lambda: woken.append(1))
        for number in range(MAX_UNHEARD):
            assert job.has_room
            job.say(step(number))
        assert not job.has_room and not woken
        parts = [await job.hear(20)]
        assert job.has_room and len(woken) == 1
        job.say(step(MAX_UNHEARD))
        assert not job.has_room
        return [*parts, *[await job.hear(20) for _ in range(MAX_UNHEARD)]]

    assert asyncio.run(heard()) == [step(number) for number in range(MAX_UNHEARD + 1)]
    assert len(woken) == 2


def test_a_job_that_is_cut_says_why_and_nothing_else() -> None:
    async def heard() -> list[Any]:
        job = Job(ASK)
        job.say(step(1))
        job.cut(error)
        job.say(step(2))
        return [await job.hear(20), await job.hear(0.01)]

    error = ValueError("gone")
    assert asyncio.run(heard()) == [error, None]


class Texts:
    """In place of a job's request: makes a step whenever there is room for it."""

    def __init__(self, count: int) -> None:
        self.left = [step(number).what for number in range(count)]
        self.error, self.result = None, "the result"

    @property
    def ended(self) -> bool:
        return not self.left

    def take(self) -> list[Any]:
        return [self.left.pop(0)]


def test_a_text_is_held_while_its_client_is_too_far_behind() -> None:
    async def run() -> int:
        worker: Any = SimpleNamespace(_leave=lambda job: None)
        job: Any = Job(ASK)
        job.texts[0] = texts = Texts(2 * MAX_UNHEARD)
        for _ in range(3 * MAX_UNHEARD):
            Worker._tell(worker, job)
        held = len(texts.left)
        heard = []
        while job.texts or job._said:
            heard.append(await job.hear(20))
            if job.texts:
                Worker._tell(worker, job)
        assert heard == [*map(step, range(2 * MAX_UNHEARD)), Said(0, "the result")]
        return held

    assert asyncio.run(run()) == MAX_UNHEARD
