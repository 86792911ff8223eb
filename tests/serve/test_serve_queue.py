"""What a generation says and its request hears."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from pyengine.serve.queue import MAX_UNHEARD, Job
from pyengine.task import Step


def test_a_generation_that_is_too_far_ahead_goes_on_when_its_client_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As often as it has to wait."""
    waits, wait = threading.Semaphore(0), threading.Condition.wait
    said = [Step(str(i), "", [i], []) for i in range(2 * MAX_UNHEARD)]

    def noted(condition: threading.Condition, timeout: float | None = None) -> bool:
        if threading.current_thread().name == "worker":
            waits.release()
        return wait(condition, timeout)

    async def heard(ask: Any) -> list[Any]:
        job = Job(ask)
        worker = threading.Thread(target=lambda: [job.say(step) for step in said], name="worker")
        worker.daemon = True
        worker.start()
        parts = []
        for _ in said[MAX_UNHEARD:]:  # each of them finds the queue full
            assert await asyncio.to_thread(waits.acquire, timeout=20), "it does not go on"
            parts.append(await job.hear(20))
        return [*parts, *[await job.hear(20) for _ in said[MAX_UNHEARD:]]]

    monkeypatch.setattr(threading.Condition, "wait", noted)
    assert asyncio.run(heard(None)) == said
