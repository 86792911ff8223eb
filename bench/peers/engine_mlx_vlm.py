"""mlx-vlm: its Gemma 4 and its assistant's rounds, alone and by its batch generator.

Its text-only model has no rounds with an assistant; the language model inside the one for pictures
has. So that one is built, with the smallest eye there is, which nothing looks through.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.generate.ar import BatchGenerator, generate_step
from mlx_vlm.models.gemma4 import Model, ModelConfig, TextConfig, VisionConfig
from mlx_vlm.speculative.drafters import load_drafter
from worker import InProcess, Job, Text, timed

EYE = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}


class Stops:
    """What its batch generator asks of a tokenizer."""

    def __init__(self, stop: list[int]) -> None:
        self.stopping_criteria = self
        self.stop = stop

    def add_eos_token_ids(self, ids: Any) -> None:
        pass

    def __call__(self, token: int) -> bool:
        return token in self.stop


class Engine(InProcess):
    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = self._target(Path(job.target))
        self.drafting: dict[str, Any] = {}
        if job.drafts:
            assistant, kind = load_drafter(job.assistant)
            self.drafting = {
                "draft_model": assistant,
                "draft_kind": kind,
                "draft_block_size": job.drafts + 1,
            }

    def _target(self, folder: Path) -> Model:
        config = json.loads((folder / "config.json").read_text())
        text, eye = TextConfig.from_dict(config), VisionConfig.from_dict(EYE)
        model = Model(ModelConfig(text_config=text, vision_config=eye))
        weights = mx.load(str(folder / "model.safetensors"))
        mode = config["quantization"]
        nn.quantize(
            model.language_model,
            group_size=mode["group_size"],
            bits=mode["bits"],
            class_predicate=lambda path, _: f"{path}.scales" in weights,
        )
        model.language_model.load_weights(list(weights.items()), strict=True)
        mx.eval(model.language_model.parameters())
        return model

    def versions(self) -> dict[str, str]:
        return {name: metadata.version(name) for name in ("mlx-vlm", "mlx")}

    def write(self, prompt: list[int], tokens: int) -> Text:
        return timed(self._pieces(prompt, tokens), tokens, self.job.stop)

    def _pieces(self, prompt: list[int], tokens: int) -> Iterator[list[int]]:
        ids = mx.array([prompt])
        asked = {"max_tokens": tokens, "temperature": 0.0, **self.drafting}
        for token, _ in generate_step(ids, self.model, None, None, **asked):
            yield [int(token)]

    def write_together(self, prompts: list[list[int]], tokens: int) -> list[list[int]]:
        generator = BatchGenerator(
            self.model.language_model,
            Stops(self.job.stop),
            max_tokens=tokens,
            prefill_batch_size=len(prompts),
            compute_logprobs=False,
            **self.drafting,
        )
        inputs = [self.model.get_input_embeddings(mx.array([ids])).to_dict() for ids in prompts]
        uids = generator.insert(prompts, tokens, prompt_kwargs=inputs)
        texts: dict[int, list[int]] = {uid: [] for uid in uids}
        while generator.has_work:
            _, responses = generator.next()
            for response in responses:
                texts[response.uid].append(int(response.token))
        generator.close()
        return list(texts.values())
