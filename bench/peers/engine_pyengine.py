"""pyengine itself, on the embedded pair as it is installed."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from worker import InProcess, Job, Text, timed

import pyengine
from pyengine.sampling.settings import Sampling


class Engine(InProcess):
    def __init__(self, job: Job) -> None:
        self.job = job
        self.pair = pyengine.load(job.target, job.assistant)
        self.asked = {"sampling": Sampling(temperature=0.0), "block_size": job.drafts + 1}

    def versions(self) -> dict[str, str]:
        return {"pyengine": pyengine.__version__, "mlx": metadata.version("mlx")}

    def write(self, prompt: list[int], tokens: int) -> Text:
        return timed(self._pieces(prompt, tokens), tokens, self.job.stop)

    def _pieces(self, prompt: list[int], tokens: int) -> Iterator[list[int]]:
        with pyengine.stream(prompt, pair=self.pair, max_tokens=tokens, **self.asked) as running:
            yield from (step.tokens for step in running.steps() if step.tokens)

    def write_together(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        with pyengine.Engine(self.pair, sequences=len(prompts)) as engine:
            requests = [engine.submit(p, max_tokens=tokens, **self.asked) for p in prompts]
            while engine.step():
                pass
            return [request.result.tokens for request in requests]
