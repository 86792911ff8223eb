"""The model class for lm-eval. Needs the extra ``eval``.

This is lm-eval's own command with the model in its registry:

    python -m pyengine.evaluate --model pyengine --model_args bundle=./pair --tasks hellaswag

Releases of lm-eval after 0.4.13 find the model themselves, by our entry point in
``lm_eval.models``: there ``lm_eval --model pyengine`` does the same.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ModuleNotFoundError as error:
    line = f'{sys.executable} -m pip install "pyengine-mlx[eval]"'
    missing = f"[evaluate] {error.name} must be installed but is not; run: {line}."
    if __name__ != "__main__":
        raise ModuleNotFoundError(missing) from None
    print(f"pyengine: {missing}", file=sys.stderr)
    sys.exit(2)

from pyengine.checkpoint.pair import load
from pyengine.doctor import first_use
from pyengine.engine.prefix import Prefix
from pyengine.engine.score import score
from pyengine.sampling.settings import Sampling
from pyengine.streams import Engine, Request
from pyengine.task import BlockSize, check_settings, resolve_sampling

MAX_NEW_TOKENS = 256  # lm-eval's own default


@register_model("pyengine")
class PyengineLM(TemplateLM):  # type: ignore[misc]
    """A pair as lm-eval sees it: scores by the target, text by speculative decoding."""

    def __init__(
        self,
        target: str | None = None,
        assistant: str | None = None,
        bundle: str | None = None,
        dflash: str | None = None,
        drafter: str | None = None,
        block_size: BlockSize = "auto",
        sequences: int = 8,
        **_: Any,
    ) -> None:
        super().__init__()
        self.pair = load(target, assistant, bundle, dflash=dflash)
        self.block_size = "auto" if block_size in (None, "auto") else int(block_size)
        check_settings(self.pair, None, self.block_size, drafter)
        self.drafter = drafter
        first_use.ready(self.pair)  # scoring does not go through generate
        self.sequences = int(sequences)
        self.prefix = Prefix()

    @property
    def eot_token_id(self) -> int:
        return self.pair.generation.stop_ids[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.pair.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.pair.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self.pair.tokenizer.encode(string, bos=add_special_tokens is not False)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.pair.tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.pair.name if chat_template else None

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        out = []
        for key, context, continuation in tqdm(requests, disable=disable_tqdm):
            # As lm-eval's own models: the oldest tokens go where the context is too short
            room = self.pair.target.context - len(continuation) - 1
            logprobs, greedy = score(self.pair, context[-room:], continuation, prefix=self.prefix)
            out.append((sum(logprobs), greedy))
            self.cache_hook.add_partial("loglikelihood", key, out[-1])
        return out

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Each token given all before it that fit, windows side by side."""
        out = []
        for request in tqdm(requests, disable=disable_tqdm):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            room = self.pair.target.context - 2
            total, newest = 0.0, self.prefix_token_id
            for at in range(0, len(ids), room):
                window = ids[at : at + room]
                total += sum(score(self.pair, [newest], window)[0])
                newest = window[-1]
            out.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return out

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """All of them are under way together, as many as ``sequences`` and the memory allow."""
        out = []
        with Engine(self.pair, sequences=self.sequences) as engine:
            running = [self._submit(engine, *request.args) for request in requests]
            each = zip(tqdm(requests, disable=disable_tqdm), running, strict=True)
            for request, text in each:
                out.append("".join(text))
                self.cache_hook.add_partial("generate_until", request.args, out[-1])
        return out

    def _submit(self, engine: Engine, prompt: str, settings: dict[str, Any]) -> Request:
        until = settings.get("until") or []
        return engine.submit(
            prompt,
            raw=True,
            max_tokens=int(settings.get("max_gen_toks", MAX_NEW_TOKENS)),
            sampling=_sampling(settings, resolve_sampling(self.pair, None)),
            block_size=self.block_size,
            drafter=self.drafter,
            stop=[until] if isinstance(until, str) else [text for text in until if text],
        )


def _sampling(settings: dict[str, Any], own: Sampling) -> Sampling:
    """Greedy unless the task samples."""
    if not settings.get("do_sample", False):
        return Sampling(temperature=0.0)
    return replace(
        own,
        temperature=float(settings.get("temperature", own.temperature)),
        top_p=float(settings.get("top_p", own.top_p)),
        top_k=int(settings.get("top_k", own.top_k)),
        seed=0,  # a task gives the same figures every time
    )


if __name__ == "__main__":
    cli_evaluate()
