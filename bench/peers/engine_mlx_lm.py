"""mlx-lm: plain decoding alone, and its batch generator."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.utils import load_model
from worker import InProcess, Job, Text, timed


class Engine(InProcess):
    def __init__(self, job: Job) -> None:
        self.job = job
        self.model, _ = load_model(Path(job.target))

    def versions(self) -> dict[str, str]:
        return {name: metadata.version(name) for name in ("mlx-lm", "mlx")}

    def write(self, prompt: list[int], tokens: int) -> Text:
        return timed(self._pieces(prompt, tokens), tokens, self.job.stop)

    def _pieces(self, prompt: list[int], tokens: int) -> Iterator[list[int]]:
        for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=tokens):
            yield [int(token)]

    def write_together(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        stop = [[token] for token in self.job.stop]
        generator = BatchGenerator(self.model, max_tokens=tokens, stop_tokens=stop)
        texts: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts)}
        going = set(texts)
        while going:
            for response in generator.next_generated():
                texts[response.uid].append(response.token)
                if response.finish_reason is not None:
                    going.discard(response.uid)
        generator.close()
        return list(texts.values())
