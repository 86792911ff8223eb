"""OpenAI's text completions, ``/v1/completions``: texts and token ids, continued as they stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pyengine.sampling.sampler import Logprob
from pyengine.serve.protocols.ask import Ask, Limits, Refused, Wish, admit
from pyengine.serve.protocols.choices import Choice, ChoicesBody, ChoicesReply
from pyengine.serve.protocols.fields import checked, only
from pyengine.task import Result, Step
from pyengine.text.prompt import Prompt

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair


class CompletionBody(ChoicesBody):
    prompt: Any = ""
    echo: bool = False
    logprobs: int | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    best_of: Annotated[Any, only(1)] = 1
    suffix: Annotated[Any, only("")] = ""


class Completions:
    """The protocol: bodies in, objects out."""

    path = "/v1/completions"

    def __init__(self, pair: Pair, limits: Limits) -> None:
        self._pair, self._limits = pair, limits

    def read(self, given: Mapping[str, Any]) -> Ask:
        """What is asked.

        Raises:
            Refused, ValueError: The request cannot be served; the message says why.
        """
        body = checked(CompletionBody, given)
        sampling = body.sampling()
        if body.logprobs is not None:
            sampling["logprobs"] = body.logprobs
        wish = Wish(
            model=body.model,
            prompts=_prompts(body.prompt),
            place="prompt",
            sampling=sampling,
            max_tokens=body.max_tokens,
            n=body.n,
            raw=True,
            echo=body.echo,
            stop=body.stop,
            block_size=body.block_size,
            form=body.form(),
            streamed=body.stream,
            with_usage=body.with_usage,
        )
        return admit(self._pair, wish, self._limits)

    def reply(self, ask: Ask) -> CompletionReply:
        return CompletionReply(ask)


def _prompts(prompt: Any) -> list[Prompt]:
    many = isinstance(prompt, list) and bool(prompt) and not _is_ids(prompt)
    prompts = prompt if many else [prompt]
    if not all(isinstance(one, str) or _is_ids(one) for one in prompts):
        raise Refused(400, "[serve] prompt must be strings or lists of token ids, or one of them.")
    return list(prompts)


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and all(type(i) is int for i in prompt)


class TextChoice(Choice):
    def __init__(self, ask: Ask, index: int) -> None:
        super().__init__(ask, index)
        self._place = self.tokenizer.detokenizer()
        self._offset = 0

    def whole(self, echoed: Step | None, result: Result) -> dict[str, Any]:
        before = ([], []) if echoed is None else (echoed.tokens, echoed.logprobs)
        rows = [*before[1], *(result.logprobs or ())]
        return {
            "index": self.index,
            "finish_reason": result.finish_reason or "stop",
            "text": (echoed.text if echoed else "") + result.text,
            "logprobs": self._logprobs([*before[0], *result.tokens], rows),
        }

    def parts(self, step: Step) -> Iterator[dict[str, Any]]:
        if step.text or step.logprobs:
            logprobs = self._logprobs(step.tokens, step.logprobs)
            yield self.part({"text": step.text}, None, logprobs)

    def end(self, result: Result) -> dict[str, Any]:
        return self.part({"text": ""}, result.finish_reason or "stop")

    def _logprobs(self, tokens: Sequence[int], rows: Sequence[Logprob]) -> dict[str, Any] | None:
        if self.ask.sampling.logprobs is None:
            return None
        unknown = [None] * (len(tokens) - len(rows))
        return {
            "tokens": [self.tokenizer.spelling(token) for token in tokens],
            "token_logprobs": [*unknown, *(row.logprob for row in rows)],
            "top_logprobs": [*unknown, *map(self._best, rows)],
            "text_offset": [self._offset_of(token) for token in tokens],
        }

    def _best(self, row: Logprob) -> dict[str, float]:
        """Best first, the chosen one among them; of tokens that are spelled alike, the best."""
        best: dict[str, float] = {}
        for token, logprob in [*row.top, (row.token, row.logprob)]:
            best.setdefault(self.tokenizer.spelling(token), logprob)
        return best

    def _offset_of(self, token: int) -> int:
        """Where in the text a token begins; those before it have been asked for."""
        at = self._offset
        self._offset += len(self._place.add(token))
        return at


class CompletionReply(ChoicesReply):
    prefix = "cmpl"
    whole_name = chunk_name = "text_completion"
    choice = TextChoice
