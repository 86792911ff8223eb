"""What a request asks of the engine, whatever protocol it came in; checked, and told as events.

A protocol reads a body into a :class:`Wish`; :func:`admit` makes an :class:`Ask` of it, which the
queue works on; a :class:`~pyengine.serve.protocols.faces.Reply` tells the client what is made.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pyengine.arguments import TooLong
from pyengine.engine.score import prompt_logprobs
from pyengine.sampling.settings import MAX_SEED, Sampling
from pyengine.streams import CACHE_DIR_BYTES
from pyengine.task import (
    Result,
    Step,
    Task,
    check_tree,
    early_exit_of,
    new_task,
    resolve_sampling,
)
from pyengine.text.output import Reader
from pyengine.text.prompt import Prompt
from pyengine.untrusted import shown

if TYPE_CHECKING:
    from pyengine.checkpoint.certificate import Certificate
    from pyengine.checkpoint.pair import Pair

MAX_STOPS = 16
THINKING = "enable_thinking"  # the variable of the published chat templates
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


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
        tree: Drafts of each round of every text, as a tree; None for no trees.
        early_exit: By which tokens of all texts leave early, which are approximate then.
        streams: Texts that are made at once; the memory may allow fewer.
        cache_bytes: Memory of keys and values; None for what is free.
        cache_dir: Where pages of prompts are kept for the next process; None for nowhere.
        cache_dir_bytes: Most bytes there.
        texts: Texts of one request: its prompts times ``n``.
        kept: Answers of the Responses API that are kept for those that follow on them.
        kept_bytes: Bytes of their conversations; the oldest are forgotten.

    Raises:
        ValueError: An early exit or a tree does not go with the rest.
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
    tree: int | None = None
    early_exit: Certificate | None = None
    streams: int = 8
    cache_bytes: int | None = None
    cache_dir: Path | None = None
    cache_dir_bytes: int = CACHE_DIR_BYTES
    texts: int = 32
    kept: int = 1_000
    kept_bytes: int = 64 << 20

    def __post_init__(self) -> None:
        check_tree(self.tree, None, self.drafter)
        own = early_exit_of(self.early_exit, None, self.drafter)
        if own is None:
            return
        if own.metric != "differs" and self.max_tokens < own.max_tokens:
            raise ValueError(
                f"[serve] max_tokens must be at least {own.max_tokens} under {own.metric}, which "
                f"judged whole answers, but got {self.max_tokens}."
            )
        if self.cache_dir is not None:
            raise ValueError(
                "[serve] --cache-dir must be left out with --early-exit, which processes every "
                "prompt for itself."
            )

    @property
    def length(self) -> int:
        """New tokens of one request: no more than were calibrated."""
        own = self.early_exit
        return self.max_tokens if own is None else min(self.max_tokens, own.max_tokens)


@dataclass(frozen=True)
class Wish:
    """A request in the engine's words, not checked beyond its types.

    Attributes:
        model: The name that it gives, if any.
        prompts: A conversation, or texts and token ids.
        place: The body's field that holds them, for errors.
        sampling: Fields of Sampling that it names.
        max_tokens: None for the server's.
        n: Texts of each prompt.
        raw: Texts are continued as they stand.
        thinking: Whether the model is to think; None for what its template does of itself.
        thinking_budget: Most tokens of thoughts; None for no bound.
        tools: Functions in OpenAI's form, which templates read.
        form: What the answer is held to: ``response_format``, ``regex`` or ``grammar``.
        own: What the protocol's reply has to know of the request.
    """

    model: str | None
    prompts: Sequence[Prompt]
    place: str
    sampling: Mapping[str, Any]
    max_tokens: int | None = None
    n: int = 1
    raw: bool = False
    echo: bool = False
    stop: str | Sequence[str] = ()
    block_size: int | None = None
    streamed: bool = False
    with_usage: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)
    thinking: bool | None = None
    thinking_budget: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    tool_choice: str | Mapping[str, Any] = "auto"
    parallel_tool_calls: bool = True
    form: Mapping[str, Any] = field(default_factory=dict)
    own: Any = None


@dataclass(frozen=True)
class Ask:
    """What a request comes to: a text, and perhaps others beside it.

    Attributes:
        work: What the engine is to do; where an echo is all that is wanted, for the checks alone.
        max_tokens: May be 0 where there is an echo.
        echo: The prompt as it was given, where it shall come back.
        echo_from: Place in ``ids`` where that begins.
        thinking_budget: Most tokens of thoughts, see :mod:`pyengine.serve.thinking`.
        others: Further texts: of other prompts or seeds, in the order of their indices.
        own: What the protocol's reply has to know of the request.
    """

    work: Task
    max_tokens: int
    echo: str | None
    echo_from: int
    streamed: bool
    with_usage: bool
    cached_tokens: bool = True
    thinking_budget: int | None = None
    others: tuple[Ask, ...] = ()
    own: Any = None

    @property
    def pair(self) -> Pair:
        return self.work.pair

    @property
    def ids(self) -> list[int]:
        """The prompt, with a ``<bos>`` that was added here or without."""
        return self.work.ids

    @property
    def sampling(self) -> Sampling:
        return self.work.sampling

    @property
    def all(self) -> tuple[Ask, ...]:
        """This text and the others."""
        return (self, *self.others)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts; one with several texts counts once."""
        return sum({id(one.ids): len(one.ids) for one in self.all}.values())

    def task(self) -> Task:
        return self.work

    def seeded(self, add: int) -> Ask:
        """The same with a seed so much above."""
        seed = ((self.sampling.seed or 0) + add) % (MAX_SEED + 1)
        return replace(self, work=replace(self.work, sampling=replace(self.sampling, seed=seed)))

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

    def stop_string(self, result: Result) -> str | None:
        """The stop string that ended a text; None if something else did."""
        ended_by_id = {*result.tokens[-1:]} & self.work.arguments["stop_ids"]
        if result.finish_reason != "stop" or ended_by_id:
            return None
        reader = Reader(self.pair.tokenizer, self.ids, ())
        text = "".join(reader.add(token)[0] for token in result.tokens) + reader.finish()[0]
        found = [stop for stop in self.work.stops if text.startswith(stop, len(result.text))]
        return min(found, key=len, default=None)


def admit(pair: Pair, wish: Wish, limits: Limits) -> Ask:
    """What is asked; all of it is checked here, so that nothing wrong gets into the queue.

    Raises:
        Refused, ValueError: The request cannot be served; the message says why.
    """
    if wish.model not in (None, pair.name) and not limits.any_model:
        raise no_such_model(pair, wish.model)
    count = wish.n * len(wish.prompts)
    if not 1 <= count <= limits.texts:
        raise Refused(
            400,
            f"[serve] n times the number of prompts must be 1 to {limits.texts} but got {count}.",
        )
    if wish.max_tokens is not None and wish.max_tokens > limits.length:
        here = "here" if limits.length == limits.max_tokens else "as calibrated"
        raise Refused(400, f"[serve] max_tokens must be at most {limits.length} {here}.")
    budget = wish.thinking_budget
    if budget is not None and budget < 1:
        raise Refused(400, f"[serve] the thinking budget must be at least 1 but got {budget}.")
    if budget is not None and limits.early_exit is not None:
        raise Refused(
            400, f"[early-exit] the thinking budget must be none, as calibrated, but got {budget}."
        )
    sampling = _sampling(pair, wish, limits)
    if budget is not None and sampling.logprobs is not None:
        # The mark that closes the thoughts is not drawn: it has no probability
        raise Refused(400, "[serve] logprobs must not go with a thinking budget.")
    asks = [_ask(pair, wish, limits, prompt, sampling) for prompt in wish.prompts]
    texts = [ask.seeded(i) for ask in asks for i in range(wish.n)]
    return replace(texts[0], others=tuple(texts[1:]))


def _ask(pair: Pair, wish: Wish, limits: Limits, prompt: Prompt, sampling: Sampling) -> Ask:
    """What is asked behind one prompt."""
    _check_size(pair, wish, limits, prompt)
    max_tokens = limits.length if wish.max_tokens is None else wish.max_tokens
    is_text = wish.raw and isinstance(prompt, str)
    try:
        task = new_task(
            prompt,
            pair=pair,
            max_tokens=1 if wish.echo and not max_tokens else max_tokens,
            sampling=sampling,
            block_size=wish.block_size,
            drafter=limits.drafter,
            tree=limits.tree,
            stop=_stop(wish.stop),
            raw=is_text,
            variables=_variables(wish),
            tools=wish.tools or None,
            tool_choice=wish.tool_choice,
            parallel_tool_calls=wish.parallel_tool_calls,
            # A prompt that only comes back is the full model's to score
            early_exit=limits.early_exit if max_tokens else None,
            **wish.form,
        )
    except TooLong as error:
        raise _too_long(str(error), wish) from None
    echo, echo_from = None, 0
    if wish.echo:
        echo = prompt if isinstance(prompt, str) else pair.tokenizer.decode(task.ids)
        echo_from = len(task.ids) - len(pair.tokenizer.encode(echo)) if is_text else 0
    return Ask(
        task,
        max_tokens,
        echo,
        echo_from,
        streamed=wish.streamed,
        with_usage=wish.with_usage,
        cached_tokens=limits.cached_tokens,
        thinking_budget=wish.thinking_budget,
        own=wish.own,
    )


def _variables(wish: Wish) -> dict[str, Any]:
    """Those of the chat template."""
    variables = dict(wish.variables)
    if wish.thinking is not None:
        if THINKING in variables:
            raise Refused(400, f"[serve] {THINKING} must not go with another field for thoughts.")
        variables[THINKING] = wish.thinking
    return variables


def no_such_model(pair: Pair, name: str | None) -> Refused:
    message = f"[serve] the model must be {pair.name} but got {shown(name)}."
    return Refused(404, message, code="model_not_found", param="model")


def wants_thoughts(effort: Effort | None) -> bool | None:
    """What an effort of reasoning means here: to think or not to; None for no word of it."""
    return None if effort is None else effort not in ("none", "minimal")


def _check_size(pair: Pair, wish: Wish, limits: Limits, prompt: Prompt) -> None:
    """Refuse before time is spent on it what is too much to read, or cannot fit the context.

    No token covers more of a text than the longest piece, so characters bound the tokens from
    below. The template may trim the blanks around a message's text, so they do not count.
    """
    context, longest = pair.target.context, pair.tokenizer.longest_piece
    if wish.raw and not isinstance(prompt, str):
        if len(prompt) >= context:
            message = f"[serve] prompt must be shorter than the context of {context} tokens"
            raise _too_long(f"{message} but got {len(prompt)}.", wish)
        return
    chars = len(prompt) if wish.raw else _chars([prompt, wish.tools])
    if not wish.raw:
        _check_counts(wish, limits, prompt)
    if longest is not None and chars >= context * longest:
        raise _too_long(
            f"[serve] prompt must be shorter than the context of {context} tokens but got {chars} "
            f"characters, of which a token holds at most {longest}.",
            wish,
        )


def _check_counts(wish: Wish, limits: Limits, prompt: Sequence[Any]) -> None:
    lists = [m[key] for m in prompt for key in ("content", "tool_calls") if key in m]
    count = len(prompt) + sum(len(x) for x in lists if isinstance(x, list))
    for what, number, most in (
        ("messages and their parts", count, limits.messages),
        ("tools", len(wish.tools), limits.tools),
    ):
        if number > most:
            raise Refused(400, f"[serve] {what} must be at most {most} but got {number}.")


def _too_long(message: str, wish: Wish) -> Refused:
    return Refused(400, message, code="context_length_exceeded", param=wish.place)


def _chars(value: Any) -> int:
    """Characters of all strings inside but their blanks at both ends."""
    count, inside = 0, [value]
    while inside:
        value = inside.pop()
        if isinstance(value, str):
            count += len(value.strip())
        elif isinstance(value, (dict, list, tuple)):
            inside += value.values() if isinstance(value, dict) else value
    return count


def _sampling(pair: Pair, wish: Wish, limits: Limits) -> Sampling:
    """The pair's settings, or those that were calibrated, with the request's; without a seed,
    another text each time.

    The rule is ``coupled`` where none is named: then seed and settings alone give the text,
    whatever the block size.
    """
    drawn = {"verify": "coupled", "seed": secrets.randbelow(MAX_SEED + 1)}
    own = None if limits.early_exit is None else limits.early_exit.sampling
    return replace(resolve_sampling(pair, own), **{**drawn, **wish.sampling})


def _stop(stop: Any) -> str | Sequence[str]:
    if not isinstance(stop, (str, list, tuple)):
        raise Refused(400, "[serve] stop must be a string or a list of strings.")
    if not isinstance(stop, str) and len(stop) > MAX_STOPS:
        raise Refused(400, f"[serve] stop must hold at most {MAX_STOPS} strings.")
    return stop
