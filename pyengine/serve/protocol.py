"""OpenAI's protocol: what a request asks of generation.py, and how a result is told.

Nothing a request asks for is silently ignored: what this engine has not is refused.
"""

from __future__ import annotations

import re
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pyengine.arguments import TooLong
from pyengine.engine.score import prompt_logprobs
from pyengine.sampling.sampler import Logprob
from pyengine.sampling.settings import MAX_SEED, Sampling
from pyengine.task import BlockSize, Result, Step, Task, new_task, prompt_ids, resolve_sampling
from pyengine.text.prompt import Prompt
from pyengine.untrusted import kind, shown

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

MAX_STOPS = 16

# What the protocol knows and this engine has not, with the values that ask for nothing beyond it.
# Fields that are in no list here are refused by name.
NEUTRAL: dict[str, tuple[Any, ...]] = {"store": (False,)}
NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "verbosity": ("medium",),
    "prompt_cache_retention": ("in_memory",),
}
NEUTRAL_TEXT: dict[str, tuple[Any, ...]] = {"best_of": (1,), "suffix": ("",)}
# The caller's own labels: they ask for nothing.
LABELS = {"user": str, "metadata": dict, "safety_identifier": str, "prompt_cache_key": str}
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
OTHERS |= {"logprobs", "n", "verify"}
WHOLE = "a whole number"
KINDS = {bool: "true or false", dict: "an object", list: "a list", int: WHOLE, str: "a string"}
CHAT = {"messages", "tools", "max_completion_tokens", "chat_template_kwargs", "top_logprobs"}
TEXT = {"prompt", "echo"}
_ID = re.compile(r"0|[1-9][0-9]{0,18}")


class Refused(Exception):
    """A request that is answered with an error: its status, and OpenAI's words for it if any.

    ``retry`` says that the same request may be served a little later.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry: bool = False,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry = status, code, param, retry


@dataclass(frozen=True)
class Limits:
    """What a server takes on, and what it tells.

    Attributes:
        waiting: Requests that may wait while one is served; more are refused.
        body_bytes: Bytes of one request.
        max_tokens: New tokens of one request, and what it gets if it names no number.
        messages: Messages of one request, the parts of their contents and tool calls counted.
        tools: Tools of one request.
        any_model: Serve a request whatever model it names.
        cached_tokens: Tell how many of a prompt's tokens were known from earlier requests.
        keep_alive_s: A stream that has nothing to say for so long sends a comment.
        drafter: Where drafts come from, for all requests; None for the assistant.
        streams: Texts that are made at once; the memory may allow fewer.
        texts: Texts of one request: its prompts times ``n``.
    """

    waiting: int = 16
    body_bytes: int = 4 << 20
    max_tokens: int = 8192
    messages: int = 10_000
    tools: int = 1_000
    any_model: bool = False
    cached_tokens: bool = True
    keep_alive_s: float = 5.0
    drafter: str | None = None
    streams: int = 8
    texts: int = 32


@dataclass(frozen=True)
class Ask:
    """What a request comes to: a text, and perhaps others beside it.

    Attributes:
        ids: The prompt, with a ``<bos>`` that was added here or without.
        echo: The prompt as it was given, where it shall come back.
        echo_from: Place in ``ids`` where that begins.
        max_tokens: May be 0 where there is an echo.
        others: Further texts: of other prompts or seeds, in the order of their indices.
    """

    pair: Pair
    chat: bool
    ids: list[int]
    echo: str | None
    echo_from: int
    max_tokens: int
    sampling: Sampling
    block_size: BlockSize
    stop: str | Sequence[str]
    streamed: bool
    with_usage: bool
    cached_tokens: bool = True
    drafter: str | None = None
    others: tuple[Ask, ...] = ()

    @property
    def all(self) -> tuple[Ask, ...]:
        """This text and the others."""
        return (self, *self.others)

    def task(self) -> Task:
        """What the engine is to do; where an echo is all that is wanted, for the checks alone."""
        only_echo = self.echo is not None and not self.max_tokens
        return new_task(
            self.ids,
            pair=self.pair,
            max_tokens=1 if only_echo else self.max_tokens,
            sampling=self.sampling,
            block_size=self.block_size,
            drafter=self.drafter,
            stop=self.stop,
        )

    def echoed(self, echo: str, progress: Callable[[int, int], None]) -> Step:
        """The prompt as if a round had written it. Evaluates if its log-probabilities are wanted;
        ``progress`` hears of every chunk and may raise.

        The first of all tokens has none: nothing stands before it.
        """
        count = self.sampling.logprobs
        rows = []
        if count is not None:
            rows = prompt_logprobs(self.pair, self.ids, count, progress=progress)
        return Step(echo, "", self.ids[self.echo_from :], rows)


def read_request(pair: Pair, body: Mapping[str, Any], limits: Limits, chat: bool) -> Ask:
    """What is asked; all of it is checked here, so that nothing wrong gets into the queue.

    Raises:
        Refused, ValueError: The request cannot be served; the message says why.
    """
    _check_fields(body, chat)
    _check_model(pair, body, limits)
    prompts = _prompts(body, chat)
    count = body.get("n", 1)
    if not 1 <= count * len(prompts) <= limits.texts:
        raise Refused(
            400,
            f"[serve] n times the number of prompts must be 1 to {limits.texts} but got "
            f"{count * len(prompts)}.",
        )
    sampling = _sampling(pair, body, chat)
    texts = [
        replace(ask, sampling=replace(sampling, seed=((sampling.seed or 0) + i) % (MAX_SEED + 1)))
        for ask in (_ask(pair, body, limits, chat, prompt, sampling) for prompt in prompts)
        for i in range(count)
    ]
    ask = replace(texts[0], others=tuple(texts[1:]))
    if ask.max_tokens > limits.max_tokens:
        raise Refused(400, f"[serve] max_tokens must be at most {limits.max_tokens} here.")
    for text in ask.all:
        text.task()  # the rest of the checks
    return ask


def _prompts(body: Mapping[str, Any], chat: bool) -> list[Prompt]:
    prompt: Any = body.get("messages" if chat else "prompt", "")
    if chat:
        if not (isinstance(prompt, list) and all(isinstance(m, dict) for m in prompt)):
            raise Refused(400, "[serve] messages must be a list of objects.")
        return [prompt]
    many = isinstance(prompt, list) and bool(prompt) and not _is_ids(prompt)
    prompts = prompt if many else [prompt]
    if not all(isinstance(one, str) or _is_ids(one) for one in prompts):
        raise Refused(400, "[serve] prompt must be strings or lists of token ids, or one of them.")
    return list(prompts)


def _ask(
    pair: Pair,
    body: Mapping[str, Any],
    limits: Limits,
    chat: bool,
    prompt: Prompt,
    sampling: Sampling,
) -> Ask:
    """What is asked behind one prompt."""
    _check_size(pair, body if chat else {**body, "prompt": prompt}, limits)
    variables = dict(body.get("chat_template_kwargs", {}))
    if "tools" in body:
        _check_tools(body["tools"])
        if body.get("tool_choice") != "none":  # a model that sees no tools calls none
            variables["tools"] = body["tools"]
    is_text = not chat and isinstance(prompt, str)
    try:
        ids = prompt_ids(pair, prompt, raw=is_text, variables=variables)
    except TooLong as error:
        raise _too_long(str(error), chat) from None
    echo, echo_from = None, 0
    if body.get("echo"):
        echo = prompt if isinstance(prompt, str) else pair.tokenizer.decode(ids)
        echo_from = len(ids) - len(pair.tokenizer.encode(echo)) if is_text else 0
    return Ask(
        pair,
        chat,
        ids,
        echo,
        echo_from,
        max_tokens=body.get("max_completion_tokens", body.get("max_tokens", limits.max_tokens)),
        sampling=sampling,
        block_size=body.get("block_size", "auto"),
        stop=_stop(body),
        streamed=bool(body.get("stream")),
        with_usage=bool(body.get("stream_options", {}).get("include_usage")),
        cached_tokens=limits.cached_tokens,
        drafter=limits.drafter,
    )


def _check_fields(body: Mapping[str, Any], chat: bool) -> None:
    neutral = NEUTRAL | (NEUTRAL_CHAT if chat else NEUTRAL_TEXT)
    for key, value in body.items():
        if key in neutral:
            if not any(type(value) is type(v) and value == v for v in neutral[key]):
                words = " or ".join(map(shown, neutral[key]))
                raise Refused(400, f"[serve] {key} must be {words} here but got {shown(value)}.")
        elif key in NUMBERS:
            whole = NUMBERS[key] is int
            if not (type(value) is int if whole else _is_number(value)):
                rule = WHOLE if whole else "a number"
                raise Refused(400, f"[serve] {key} must be {rule} but got {shown(value)}.")
        elif key not in OTHERS | LABELS.keys() | (CHAT if chat else TEXT):
            raise Refused(400, f"[serve] {shown(key)} is not known here.")
    for key, wanted in (
        *LABELS.items(),
        ("model", str),
        ("stream", bool),
        ("echo", bool),
        ("stream_options", dict),
        ("tools", list),
        ("logit_bias", dict),
        ("top_logprobs", int),
        ("logprobs", bool if chat else int),
        ("chat_template_kwargs", dict),
        ("block_size", int),
        ("n", int),
        ("verify", str),
        ("max_tokens", int),
        ("max_completion_tokens", int),
    ):
        if (key, body.get(key)) == ("block_size", "auto"):
            continue
        if key in body and type(body[key]) is not wanted:
            said = shown(body[key]) if kind(body[key]) == "a number" else kind(body[key])
            raise Refused(400, f"[serve] {key} must be {KINDS[wanted]} but got {said}.")
    for key, other in (("stream_options", "stream"), ("top_logprobs", "logprobs")):
        if key in body and not body.get(other):
            raise Refused(400, f"[serve] {key} must go with {other}.")
    if "max_tokens" in body and "max_completion_tokens" in body:
        raise Refused(400, "[serve] max_tokens must not go with max_completion_tokens.")
    _check_stream_options(body.get("stream_options", {}))


def _check_stream_options(options: Mapping[str, Any]) -> None:
    unknown = {*options} - {"include_usage", "include_obfuscation"}
    if unknown:
        raise Refused(400, f"[serve] stream_options holds {shown(min(unknown))}, not known here.")
    if type(options.get("include_usage", False)) is not bool:
        said = shown(options["include_usage"])
        raise Refused(400, f"[serve] include_usage must be true or false but got {said}.")
    if options.get("include_obfuscation", False) is not False:
        said = shown(options["include_obfuscation"])
        raise Refused(400, f"[serve] include_obfuscation must be False here but got {said}.")


def _check_model(pair: Pair, body: Mapping[str, Any], limits: Limits) -> None:
    name = body.get("model", pair.name)
    if name != pair.name and not limits.any_model:
        raise no_such_model(pair, name)


def no_such_model(pair: Pair, name: str) -> Refused:
    message = f"[serve] the model must be {pair.name} but got {shown(name)}."
    return Refused(404, message, code="model_not_found", param="model")


def _check_tools(tools: Sequence[Any]) -> None:
    for number, tool in enumerate(tools, 1):
        where = f"[serve] tool {number} must"
        if not isinstance(tool, dict) or tool.get("type") != "function":
            said = shown(tool.get("type")) if isinstance(tool, dict) else kind(tool)
            raise Refused(400, f"{where} be of type 'function' but got {said}.")
        function = tool.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Refused(400, f"{where} hold a function with a name but has none.")
        # None of the arguments the model writes are held to a schema
        if function.get("strict") not in (None, False):
            raise Refused(400, f"{where} have strict False here but got {shown(True)}.")


def _check_size(pair: Pair, body: Mapping[str, Any], limits: Limits) -> None:
    """Refuse before time is spent on it what is too much to read, or cannot fit the context.

    No token covers more of a text than the longest piece, so characters bound the tokens from
    below. The template may trim the blanks around a message's text, so they do not count.
    """
    messages = body.get("messages", [])
    lists = [m[key] for m in messages for key in ("content", "tool_calls") if key in m]
    count = len(messages) + sum(len(x) for x in lists if isinstance(x, list))
    for what, number, most in (
        ("messages and their parts", count, limits.messages),
        ("tools", len(body.get("tools", [])), limits.tools),
    ):
        if number > most:
            raise Refused(400, f"[serve] {what} must be at most {most} but got {number}.")
    context, longest = pair.target.context, pair.tokenizer.longest_piece
    prompt = body.get("prompt", "")
    if isinstance(prompt, list) and len(prompt) >= context and _is_ids(prompt):
        message = f"[serve] prompt must be shorter than the context of {context} tokens"
        raise _too_long(f"{message} but got {len(prompt)}.", "messages" in body)
    tools = body.get("tools", []) if body.get("tool_choice") != "none" else []
    chars = _chars([messages, tools]) + (len(prompt) if isinstance(prompt, str) else 0)
    if longest is not None and chars >= context * longest:
        raise _too_long(
            f"[serve] prompt must be shorter than the context of {context} tokens but got {chars} "
            f"characters, of which a token holds at most {longest}.",
            "messages" in body,
        )


def _too_long(message: str, chat: bool) -> Refused:
    param = "messages" if chat else "prompt"
    return Refused(400, message, code="context_length_exceeded", param=param)


def _chars(value: Any) -> int:
    """Characters of all strings inside but their blanks at both ends."""
    count, inside = 0, [value]
    while inside:
        value = inside.pop()
        if isinstance(value, str):
            count += len(value.strip())
        elif isinstance(value, (dict, list)):
            inside += value.values() if isinstance(value, dict) else value
    return count


def _sampling(pair: Pair, body: Mapping[str, Any], chat: bool) -> Sampling:
    """The pair's settings with the request's; without a seed, another text each time.

    The rule is ``coupled`` where none is named: then seed and settings alone give the text,
    whatever the block size.
    """
    given: dict[str, Any] = {key: cast(body[key]) for key, cast in NUMBERS.items() if key in body}
    given["verify"] = body.get("verify", "coupled")
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
    for key, value in values.items():
        if not _ID.fullmatch(key):
            raise Refused(400, f"[serve] logit_bias must name token ids but got {shown(key)}.")
        if not _is_number(value):
            raise Refused(
                400,
                f"[serve] logit_bias must map token ids to numbers but {key} goes to "
                f"{shown(value)}.",
            )
    return {int(key): float(value) for key, value in values.items()}


def _is_number(value: object) -> bool:
    """Whether it is one that a float can hold; JSON's may be longer."""
    return type(value) is float or (type(value) is int and abs(value) <= sys.float_info.max)


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, list) and all(type(i) is int for i in prompt)


class Reply:
    """The protocol's objects for one request, of one text or several."""

    def __init__(self, ask: Ask) -> None:
        self.ask = ask
        self.head = {
            "id": f"{'chatcmpl' if ask.chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": ask.pair.name,
        }
        self.choices = [Choice(one, index) for index, one in enumerate(ask.all)]

    def whole(self, echoed: Mapping[int, Step], results: Sequence[Result]) -> dict[str, Any]:
        """The answer; ``echoed`` are prompts that shall come back, by index."""
        choices = [
            choice.whole(echoed.get(choice.index), result)
            for choice, result in zip(self.choices, results, strict=True)
        ]
        name = "chat.completion" if self.ask.chat else "text_completion"
        usage = usage_of(self.ask, results)
        return {**self.head, "object": name, "choices": choices, "usage": usage}

    def chunks(self, index: int, step: Step) -> Iterator[dict[str, Any]]:
        """What a round adds to a text, for a stream; it may add nothing that can be told yet."""
        return map(self._chunk, self.choices[index].parts(step))

    def end(self, index: int, result: Result) -> dict[str, Any]:
        """The end of a text, for a stream."""
        return self._chunk(self.choices[index].end(result))

    def usage(self, results: Sequence[Result]) -> Iterator[dict[str, Any]]:
        """What a stream tells in the end, where it is wanted."""
        if self.ask.with_usage:
            yield {**self._chunk(), "usage": usage_of(self.ask, results)}

    def _chunk(self, *choices: dict[str, Any]) -> dict[str, Any]:
        name = "chat.completion.chunk" if self.ask.chat else "text_completion"
        usage = {"usage": None} if self.ask.with_usage else {}
        return {**self.head, "object": name, "choices": list(choices), **usage}


class Choice:
    """One text of a reply.

    Log-probabilities are told of every new token, those of thoughts and the one that ended the
    text included, so there are as many as the usage counts.
    """

    def __init__(self, ask: Ask, index: int) -> None:
        self.ask, self.chat, self.index = ask, ask.chat, index
        self.tokenizer = ask.pair.tokenizer
        self._place = self.tokenizer.detokenizer()
        self._offset = 0
        self._begun = False

    def whole(self, echoed: Step | None, result: Result) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": self.index,
            "finish_reason": result.finish_reason or "stop",
        }
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
        return choice

    def parts(self, step: Step) -> Iterator[dict[str, Any]]:
        """What a round adds, for a stream."""
        if step.thinking and self.chat:
            yield self._part({"delta": self._delta(reasoning_content=step.thinking)}, None)
        if step.text or step.logprobs:
            text = step.text
            part = {"delta": self._delta(content=text)} if self.chat else {"text": text}
            yield self._part(part, None, self._logprobs(step.tokens, step.logprobs))

    def end(self, result: Result) -> dict[str, Any]:
        part: dict[str, Any] = {"delta": self._delta()} if self.chat else {"text": ""}
        return self._part(part, result.finish_reason or "stop")

    def _delta(self, **parts: str) -> dict[str, str]:
        """Clients put deltas together, so the role is told once."""
        begun, self._begun = self._begun, True
        return parts if begun else {"role": "assistant", **parts}

    def _part(
        self, part: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": self.index, **part, "finish_reason": reason, "logprobs": logprobs}

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


def usage_of(ask: Ask, results: Sequence[Result]) -> dict[str, Any]:
    """Token counts of the protocol, and this engine's own: seed, acceptance and speed.

    A prompt with several texts counts once. The seed is that of the first text; speeds add up. With
    the seed and the block size a text is made again; at a block size "auto" it is the same at any.
    """
    stats = [result.stats for result in results]
    first = [n for n, one in enumerate(ask.all) if n == 0 or one.ids is not ask.all[n - 1].ids]
    prompt = sum(len(ask.all[n].ids) for n in first)
    completion = sum(len(result.tokens) for result in results)
    drafted, accepted = sum(s.drafted for s in stats), sum(s.accepted for s in stats)
    known = {"cached_tokens": sum(stats[n].reused_tokens for n in first)}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        **({"prompt_tokens_details": known} if ask.cached_tokens else {}),
        "seed": ask.sampling.seed,
        "block_size": stats[0].block_size,
        "drafted_tokens": drafted,
        "accepted_tokens": accepted,
        "acceptance": accepted / drafted if drafted else 0.0,
        "tok_s": sum(s.tok_s for s in stats),
    }
