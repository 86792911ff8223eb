"""transformers: ``generate`` in bfloat16, with ``assistant_model``, and as one padded batch."""

from __future__ import annotations

import time
from importlib import metadata

import torch
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM
from worker import InProcess, Job, Text, text_of


class Stamps:
    """A streamer that writes down when tokens came; the first that it is given is the prompt."""

    def __init__(self) -> None:
        self.stamped: list[tuple[float, list[int]]] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.stamped.append((time.perf_counter(), tokens.flatten().tolist()))

    def end(self) -> None:
        pass


class Engine(InProcess):
    def __init__(self, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self.job = job
        self.model = Gemma4ForCausalLM.from_pretrained(job.plain_target, dtype=torch.bfloat16)
        self.asked = {"do_sample": False, "eos_token_id": job.stop, "pad_token_id": 0}
        if job.drafts:
            assistant = Gemma4AssistantForCausalLM.from_pretrained(
                job.plain_assistant, dtype=torch.bfloat16
            )
            assistant.generation_config.num_assistant_tokens = job.drafts
            assistant.generation_config.num_assistant_tokens_schedule = "constant"
            self.asked["assistant_model"] = assistant

    def versions(self) -> dict[str, str]:
        return {name: metadata.version(name) for name in ("transformers", "torch")}

    def write(self, prompt: list[int], tokens: int) -> Text:
        stamps, begin = Stamps(), time.perf_counter()
        self.model.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, streamer=stamps, **self.asked
        )
        return text_of(stamps.stamped[1:], begin, tokens, self.job.stop)

    def write_together(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        seen = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        found = self.model.generate(ids, attention_mask=seen, max_new_tokens=tokens, **self.asked)
        return found[:, width:].tolist()
