"""OpenAI's protocol: what a request asks of generate.py, and how a result is told.

Nothing a request asks for is silently ignored: what this engine has not is refused.
"""

from __future__ import annotations

import secrets
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyengine.files import kind, shown
from pyengine.generate import Result, Step, Stream, resolve_sampling, stream
from pyengine.messages import Prompt, prompt_ids
from pyengine.prefix import Prefix
from pyengine.sampling import MAX_SEED, Logprob, Sampling
from pyengine.score import prompt_logprobs

if TYPE_CHECKING:
    from pyengine.pair import Pair

MAX_STOPS = 16

# What the protocol knows and this engine has not, with the values that ask for nothing.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
}
# Of no consequence to the text.
IGNORED = {"user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"}
NUMBERS = {
    "temperature": float,
    "top_p": float,
    "min_p": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
    "top_k": int,
    "seed": int,
}
OTHERS = {"model", "stream", "stream_options", "stop", "max_tokens", "block_size", "logit_bias"}
OTHERS |= {"logprobs"}
WHOLE = "a whole number"
KINDS = {bool: "true or false", dict: "an object", list: "a list", int: WHOLE}
CHAT = {"messages", "tools", "max_completion_tokens", "chat_template_kwargs", "top_logprobs"}
TEXT = {"prompt", "echo"}


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Limits:
    """What a server takes on: waiting requests, bytes and new tokens of one."""

    waiting: int = 16
    body_bytes: int = 4 << 20
    max_tokens: int = 8192
    default_tokens: int = 512


@dataclass(frozen=True)
class Ask:
    """What a request comes to.

    Attributes:
        ids: The prompt, with a ``<bos>`` that was added here or without.
        echo: The prompt as it was given, where it shall come back.
        echo_from: Place in ``ids`` where that begins.
        max_tokens: May be 0 where there is an echo.
    """

    pair: Pair
    chat: bool
    ids: list[int]
    echo: str | None
    echo_from: int
    max_tokens: int
    sampling: Sampling
    block_size: int | None
    stop: str | Sequence[str]
    streamed: bool
    with_usage: bool

    def start(self, prefix: Prefix | None) -> Stream:
        return stream(
            self.ids,
            pair=self.pair,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            block_size=self.block_size,
            stop=self.stop,
            prefix=prefix,
        )

    def echoed(self, echo: str) -> Step:
        """The prompt as if a round had written it. Evaluates if its log-probabilities are wanted.

        The first of all tokens has none: nothing stands before it.
        """
        count = self.sampling.logprobs
        rows = [] if count is None else prompt_logprobs(self.pair, self.ids, count)
        return Step(echo, "", self.ids[self.echo_from :], rows)


def read_request(pair: Pair, body: Mapping[str, Any], limits: Limits, chat: bool) -> Ask:
    """What is asked; all of it is checked here, so that nothing wrong gets into the queue.

    Raises:
        Refused, ValueError: The request cannot be served; the message says why.
    """
    _check_fields(body, chat)
    prompt: Prompt = body.get("messages" if chat else "prompt", "")
    if chat and not (isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)):
        raise Refused(400, "[serve] messages must be a list of objects.")
    if not chat and isinstance(prompt, list) and len(prompt) == 1 and type(prompt[0]) is not int:
        prompt = prompt[0]  # a list of one prompt
    if not chat and not isinstance(prompt, str) and not _is_ids(prompt):
        raise Refused(400, "[serve] prompt must be one string or one list of token ids.")
    variables = dict(body.get("chat_template_kwargs", {}))
    if "tools" in body:
        variables["tools"] = body["tools"]
    is_text = not chat and isinstance(prompt, str)
    ids = prompt_ids(pair, prompt, raw=is_text, variables=variables)
    echo, echo_from = None, 0
    if body.get("echo"):
        echo = prompt if isinstance(prompt, str) else pair.tokenizer.decode(ids)
        echo_from = len(ids) - len(pair.tokenizer.encode(echo)) if is_text else 0
    ask = Ask(
        pair,
        chat,
        ids,
        echo,
        echo_from,
        max_tokens=body.get("max_completion_tokens", body.get("max_tokens", limits.default_tokens)),
        sampling=_sampling(pair, body, chat),
        block_size=body.get("block_size"),
        stop=_stop(body),
        streamed=bool(body.get("stream")),
        with_usage=bool(body.get("stream_options", {}).get("include_usage")),
    )
    if ask.max_tokens > limits.max_tokens:
        raise Refused(400, f"[serve] max_tokens must be at most {limits.max_tokens} here.")
    # Begun and ended at once: the rest of the checks, with nothing processed
    only_echo = ask.echo is not None and not ask.max_tokens
    (replace(ask, max_tokens=1) if only_echo else ask).start(None).close()
    return ask


def _check_fields(body: Mapping[str, Any], chat: bool) -> None:
    for key, value in body.items():
        if key in NEUTRAL:
            if value not in NEUTRAL[key]:
                raise Refused(400, f"[serve] {key} is not offered here but got {shown(value)}.")
        elif key in NUMBERS:
            whole = NUMBERS[key] is int
            if not (type(value) is int if whole else _is_number(value)):
                rule = WHOLE if whole else "a number"
                raise Refused(400, f"[serve] {key} must be {rule} but got {shown(value)}.")
        elif key not in OTHERS | IGNORED | (CHAT if chat else TEXT):
            raise Refused(400, f"[serve] {shown(key)} is not known here.")
    for key, wanted in (
        ("stream", bool),
        ("echo", bool),
        ("stream_options", dict),
        ("tools", list),
        ("logit_bias", dict),
        ("top_logprobs", int),
        ("logprobs", bool if chat else int),
        ("chat_template_kwargs", dict),
        ("block_size", int),
        ("max_tokens", int),
        ("max_completion_tokens", int),
    ):
        if key in body and type(body[key]) is not wanted:
            said = shown(body[key]) if kind(body[key]) == "a number" else kind(body[key])
            raise Refused(400, f"[serve] {key} must be {KINDS[wanted]} but got {said}.")
    unknown = {*body.get("stream_options", {})} - {"include_usage", "include_obfuscation"}
    if unknown:
        raise Refused(400, f"[serve] stream_options holds {shown(min(unknown))}, not known here.")
    if "top_logprobs" in body and not body.get("logprobs"):
        raise Refused(400, "[serve] top_logprobs must go with logprobs.")


def _sampling(pair: Pair, body: Mapping[str, Any], chat: bool) -> Sampling:
    """The pair's settings with the request's; without a seed, another text each time."""
    given: dict[str, Any] = {key: cast(body[key]) for key, cast in NUMBERS.items() if key in body}
    given.setdefault("seed", secrets.randbelow(MAX_SEED + 1))
    if "logit_bias" in body:
        given["logit_bias"] = _bias(body["logit_bias"])
    if "logprobs" in body and body["logprobs"] is not False:
        given["logprobs"] = body.get("top_logprobs", 0) if chat else body["logprobs"]
    return replace(resolve_sampling(pair, None), **given)


def _stop(body: Mapping[str, Any]) -> str | Sequence[str]:
    stop: Any = body.get("stop", ())
    if not isinstance(stop, (str, list, tuple)):
        raise Refused(400, "[serve] stop must be a string or a list of strings.")
    if not isinstance(stop, str) and len(stop) > MAX_STOPS:
        raise Refused(400, f"[serve] stop must hold at most {MAX_STOPS} strings.")
    return stop


def _bias(values: Mapping[str, Any]) -> dict[int, float]:
    try:
        return {int(token): float(value) for token, value in values.items()}
    except (TypeError, ValueError, OverflowError):
        raise Refused(400, "[serve] logit_bias must map token ids to numbers.") from None


def _is_number(value: object) -> bool:
    """Whether it is one that a float can hold; JSON's may be longer."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and all(type(i) is int for i in prompt)


class Reply:
    """The protocol's objects for one request.

    Log-probabilities are told of every new token, those of thoughts and the one that ended the
    text included, so there are as many as the usage counts.
    """

    def __init__(self, ask: Ask) -> None:
        self.ask, self.chat = ask, ask.chat
        self.tokenizer = ask.pair.tokenizer
        self.head = {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": ask.pair.name,
        }
        self._place = self.tokenizer.detokenizer()
        self._offset = 0
        self._begun = False

    def whole(self, echoed: Step | None, result: Result) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": result.finish_reason or "stop"}
        if self.chat:
            message = {"role": "assistant", "content": result.text}
            if result.thinking is not None:
                message["reasoning_content"] = result.thinking
            choice["message"] = message
        else:
            choice["text"] = (echoed.text if echoed else "") + result.text
        before = ([], []) if echoed is None else (echoed.tokens, echoed.logprobs)
        rows = [*before[1], *(result.logprobs or ())]
        choice["logprobs"] = self._logprobs([*before[0], *result.tokens], rows)
        name = "chat.completion" if self.chat else "text_completion"
        usage = usage_of(self.ask, result)
        return {**self.head, "object": name, "choices": [choice], "usage": usage}

    def chunks(self, step: Step) -> Iterator[dict[str, Any]]:
        """What a round adds, for a stream; a round may add nothing that can be told yet."""
        if step.thinking and self.chat:
            yield self._chunk({"delta": self._delta(reasoning_content=step.thinking)}, None)
        if step.text or step.logprobs:
            text = step.text
            part = {"delta": self._delta(content=text)} if self.chat else {"text": text}
            yield self._chunk(part, None, self._logprobs(step.tokens, step.logprobs))

    def end(self, result: Result) -> Iterator[dict[str, Any]]:
        part: dict[str, Any] = {"delta": self._delta()} if self.chat else {"text": ""}
        yield self._chunk(part, result.finish_reason or "stop")
        if self.ask.with_usage:
            usage = usage_of(self.ask, result)
            yield {**self._chunk({}, None), "choices": [], "usage": usage}

    def _delta(self, **parts: str) -> dict[str, str]:
        """Clients put deltas together, so the role is told once."""
        begun, self._begun = self._begun, True
        return parts if begun else {"role": "assistant", **parts}

    def _chunk(
        self, part: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": 0, **part, "finish_reason": reason, "logprobs": logprobs}
        name = "chat.completion.chunk" if self.chat else "text_completion"
        usage = {"usage": None} if self.ask.with_usage else {}
        return {**self.head, "object": name, "choices": [choice], **usage}

    def _logprobs(self, tokens: Sequence[int], rows: Sequence[Logprob]) -> dict[str, Any] | None:
        if self.ask.sampling.logprobs is None:
            return None
        if self.chat:
            content = []
            for row in rows:
                best = [self._spelled(*pair) for pair in row.top]
                content.append({**self._spelled(row.token, row.logprob), "top_logprobs": best})
            return {"content": content}
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

    def _spelled(self, token: int, logprob: float) -> dict[str, Any]:
        name = self.tokenizer.spelling(token)
        spelled = self.tokenizer.token_bytes(token) or name.encode()
        return {"token": name, "logprob": logprob, "bytes": list(spelled)}


def usage_of(ask: Ask, result: Result) -> dict[str, Any]:
    """Token counts of the protocol, and this engine's own: seed, acceptance and speed."""
    stats, prompt = result.stats, len(ask.ids)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": len(result.tokens),
        "total_tokens": prompt + len(result.tokens),
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
        "seed": ask.sampling.seed,
        "drafted_tokens": stats.drafted,
        "accepted_tokens": stats.accepted,
        "acceptance": stats.acceptance,
        "tok_s": stats.tok_s,
    }
