"""One run of one engine: python worker.py NAME, a job as JSON on standard input.

Runs in the engine's own environment and so needs the standard library only, and the file
``engine_NAME.py`` beside it. The last line that it prints is the outcome as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Job:
    """What a run does; all prompts are token ids, so that no tokenizer makes a difference.

    Attributes:
        target: Folder of the target as MLX reads it.
        assistant: Folder of its assistant.
        plain_target: The target's weights as float32, in Hugging Face's form.
        plain_assistant: Those of the assistant.
        home: Folder of what the engine has installed.
        prompts: Each is continued alone; the first n of them at once.
        long_prompt: Only its time to the first token is of interest.
        tokens: Most new tokens of a text.
        stop: Tokens that end a text.
        drafts: Drafts a round; 0 is plain decoding.
        streams: Numbers of prompts that are continued at once; none where the engine cannot.
        threads: Processor threads, where an engine can be told.
    """

    target: str
    assistant: str
    plain_target: str
    plain_assistant: str
    home: str
    prompts: list[list[int]]
    long_prompt: list[int]
    tokens: int
    stop: list[int]
    drafts: int
    streams: list[int]
    threads: int


@dataclass(frozen=True)
class Text:
    """Tokens, seconds to the first of them, and seconds from there to the last."""

    tokens: list[int]
    first_s: float
    decode_s: float


class Engine(Protocol):
    """What a file ``engine_NAME.py`` calls ``Engine``; built with the job, it loads the models."""

    def versions(self) -> dict[str, str]: ...

    def write(self, prompt: list[int], tokens: int) -> Text:
        """One text alone."""
        ...

    def ready_for(self, streams: int) -> None:
        """What must be done before so many texts are written at once, and is not timed."""
        ...

    def write_together(self, prompts: list[list[int]], tokens: int) -> list[list[int]]: ...

    def processor_s(self) -> float | None:
        """Seconds of processor time that the engine has used; None where the system is silent."""
        ...

    def peak_bytes(self) -> int | None:
        """Most memory that its process had at once; None where the system does not tell."""
        ...

    def close(self) -> None: ...


class InProcess:
    """What is alike for engines that run in the worker's own process."""

    def ready_for(self, streams: int) -> None:
        pass

    def processor_s(self) -> float:
        return time.process_time()

    def peak_bytes(self) -> int | None:
        return peak_bytes("self")

    def close(self) -> None:
        pass


def timed(pieces: Iterable[Sequence[int]], tokens: int, stop: Sequence[int]) -> Text:
    """Of tokens as they come, no more than asked and none behind one that ends the text."""
    begin = time.perf_counter()
    return text_of(((time.perf_counter(), piece) for piece in pieces), begin, tokens, stop)


def text_of(
    stamped: Iterable[tuple[float, Sequence[int]]], begin: float, tokens: int, stop: Sequence[int]
) -> Text:
    """Of tokens with the times at which they came."""
    first = last = begin
    text: list[int] = []
    for at, piece in stamped:
        if not text:
            first = at
        for token in piece[: tokens - len(text)]:
            text.append(token)
            if token in stop:
                break
        last = at
        if len(text) >= tokens or (text and text[-1] in stop):
            break
    return Text(text, first - begin, last - first)


def until_stop(tokens: Sequence[int], stop: Sequence[int]) -> list[int]:
    """A text without the token that ends it and what is behind; engines differ in giving those."""
    ends = [place for place, token in enumerate(tokens) if token in stop]
    return list(tokens[: ends[0]] if ends else tokens)


def peak_bytes(process: str) -> int | None:
    """The most memory of a process, by its id or "self"."""
    status = Path(f"/proc/{process}/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    if process != "self":
        return None
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def run(engine: Engine, job: Job) -> dict[str, Any]:
    """Each prompt alone, the long one, then several at once; memory is that of the first two."""
    engine.write(job.prompts[0], WARM_UP_TOKENS)
    before = engine.processor_s()
    texts = [engine.write(prompt, job.tokens) for prompt in job.prompts]
    after = engine.processor_s()
    engine.write(job.long_prompt, 1)
    outcome: dict[str, Any] = {
        "versions": engine.versions(),
        "texts": [{**asdict(text), "text": until_stop(text.tokens, job.stop)} for text in texts],
        "processor_s": None if before is None or after is None else after - before,
        "long_first_s": engine.write(job.long_prompt, 1).first_s,
        "peak_bytes": engine.peak_bytes(),
        "together": [],
    }
    for count in job.streams:
        prompts = [job.prompts[i % len(job.prompts)] for i in range(count)]
        engine.ready_for(count)
        engine.write_together(prompts, WARM_UP_TOKENS)
        begin = time.perf_counter()
        found = engine.write_together(prompts, job.tokens)
        seconds = time.perf_counter() - begin
        own = [until_stop(tokens, job.stop) for tokens in found]
        outcome["together"].append({"streams": count, "seconds": seconds, "texts": own})
    return outcome


def main() -> None:
    job = Job(**json.load(sys.stdin))
    module = importlib.import_module("engine_" + sys.argv[1].replace("-", "_").replace(".", "_"))
    engine = module.Engine(job)
    try:
        outcome = run(engine, job)
    finally:
        engine.close()
    print("\n" + json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main()
