"""What OpenAI's chat completions and text completions have in common: fields, choices, usage."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import field_validator

from pyengine.engine.stats import Stats, add_all
from pyengine.sampling.sampler import Logprob
from pyengine.serve.protocols.ask import Ask, Refused
from pyengine.serve.protocols.faces import approximate, data_event
from pyengine.serve.protocols.fields import Bias, Body, Object, only, wrong
from pyengine.task import Result, Step

DONE = "data: [DONE]\n\n"


class StreamOptions(Object):
    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = False


class ChoicesBody(Body):
    """Fields of both, but the prompt."""

    max_tokens: int | None = None
    n: int = 1
    stop: Any = ()
    stream_options: StreamOptions | None = None
    logit_bias: Bias | None = None
    # The caller's own labels, and what concerns others' servers: they change nothing here
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    @field_validator("stream_options")
    @classmethod
    def _with_stream(cls, value: Any, info: Any) -> Any:
        if value is not None and not info.data.get("stream"):
            raise wrong("must go with stream")
        return value

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling(self) -> dict[str, Any]:
        given = super().sampling()
        if self.logit_bias is not None:
            given["logit_bias"] = {int(key): value for key, value in self.logit_bias.items()}
        return given


class Choice(ABC):
    """One text of a reply.

    Log-probabilities are told of every new token, those of thoughts and the one that ended the
    text included, so there are as many as the usage counts.
    """

    def __init__(self, ask: Ask, index: int) -> None:
        self.ask, self.index = ask, index
        self.tokenizer = ask.pair.tokenizer

    @abstractmethod
    def whole(self, echoed: Step | None, result: Result) -> dict[str, Any]:
        """The text as one object."""

    @abstractmethod
    def parts(self, step: Step) -> Iterator[dict[str, Any]]:
        """What a round adds, for a stream."""

    @abstractmethod
    def end(self, result: Result) -> dict[str, Any]:
        """What comes last in a stream."""

    def part(
        self, part: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": self.index, **part, "finish_reason": reason, "logprobs": logprobs}


class ChoicesReply:
    """The objects for one request, of one text or several. Of approximate texts a stream's first
    chunk says so, since it may be the last, and the last one of each."""

    prefix: ClassVar[str]
    whole_name: ClassVar[str]
    chunk_name: ClassVar[str]
    choice: ClassVar[type[Choice]]
    done = DONE
    spell = staticmethod(data_event)

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": ask.pair.name,
        }
        self.choices = [self.choice(one, index) for index, one in enumerate(ask.all)]
        self._approximate, self._begun = approximate(ask), False

    def whole(self, echoed: Mapping[int, Step], results: Sequence[Result]) -> dict[str, Any]:
        choices = [
            choice.whole(echoed.get(choice.index), result)
            for choice, result in zip(self.choices, results, strict=True)
        ]
        usage = usage_of(self.ask, results)
        return {
            **self.head,
            "object": self.whole_name,
            "choices": choices,
            "usage": usage,
            **self._approximate,
        }

    def start(self) -> Iterator[dict[str, Any]]:
        return iter(())

    def chunks(self, index: int, step: Step) -> Iterable[dict[str, Any]]:
        return map(self._chunk, self.choices[index].parts(step))

    def end(self, index: int, result: Result) -> Iterator[dict[str, Any]]:
        yield {**self._chunk(self.choices[index].end(result)), **self._approximate}

    def close(self, results: Sequence[Result]) -> Iterator[dict[str, Any]]:
        """The usage, where it is wanted."""
        if self.ask.with_usage:
            yield {**self._chunk(), "usage": usage_of(self.ask, results)}

    def failed(self, error: Refused) -> Iterator[dict[str, Any]]:
        yield error_body(error)

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self.ask.with_usage else {}
        first = {} if self._begun else self._approximate
        self._begun = True
        return {**self.head, "object": self.chunk_name, "choices": list(choices), **usage, **first}


def spelled(ask: Ask, rows: Sequence[Logprob]) -> list[dict[str, Any]]:
    """Log-probabilities as a chat's choice and a response have them."""
    tokenizer = ask.pair.tokenizer

    def one(token: int, logprob: float) -> dict[str, Any]:
        name = tokenizer.spelling(token)
        spelling = tokenizer.token_bytes(token) or name.encode()
        return {"token": name, "logprob": logprob, "bytes": list(spelling)}

    return [
        {**one(row.token, row.logprob), "top_logprobs": [one(*pair) for pair in row.top]}
        for row in rows
    ]


def usage_of(ask: Ask, results: Sequence[Result]) -> dict[str, Any]:
    """Token counts of the protocol, and this engine's own: seed, acceptance and speed.

    A prompt with several texts counts once. The seed is that of the first text; speeds add up.
    """
    completion = sum(len(result.tokens) for result in results)
    known = {"cached_tokens": cached_tokens(ask, results)}
    return {
        "prompt_tokens": ask.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": ask.prompt_tokens + completion,
        **({"prompt_tokens_details": known} if ask.cached_tokens else {}),
        **own_usage(ask, results),
    }


def cached_tokens(ask: Ask, results: Sequence[Result]) -> int:
    """Tokens of the prompts that were known from earlier requests."""
    texts = ask.all
    first = [n for n, one in enumerate(texts) if n == 0 or one.ids is not texts[n - 1].ids]
    return sum(results[n].stats.reused_tokens for n in first)


def own_usage(ask: Ask, results: Sequence[Result]) -> dict[str, Any]:
    """What no protocol has a name for. With the seed and the block size a text is made again; at a
    block size "auto" it is the same at any."""
    stats = [result.stats for result in results]
    drafted, accepted = sum(s.drafted for s in stats), sum(s.accepted for s in stats)
    of_mix: dict[str, dict[str, int]] = {}
    for own in stats:
        add_all(of_mix, own.by_drafter)
    exits = sum((Counter(own.exits) for own in stats), Counter[int]())
    return {
        "seed": ask.sampling.seed,
        "block_size": stats[0].block_size,
        "drafted_tokens": drafted,
        "accepted_tokens": accepted,
        "acceptance": accepted / drafted if drafted else 0.0,
        "tok_s": sum(s.tok_s for s in stats),
        **({"by_drafter": of_mix} if of_mix else {}),
        **({"tree": stats[0].tree} if stats[0].tree is not None else {}),
        **({"mean_layers": Stats(exits=exits).mean_layers} if exits else {}),
    }


def error_body(error: Refused) -> dict[str, Any]:
    """An error in OpenAI's envelope."""
    if error.status == 401:
        kind = "authentication_error"
    else:
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
    told = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    return {"error": told}
