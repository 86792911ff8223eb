"""Text in, text out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import TYPE_CHECKING, Any, TypedDict, overload

from pyengine.engine.idle import Left
from pyengine.engine.loop import decode
from pyengine.engine.prefix import Prefix, check_prefix
from pyengine.engine.sequence import Round
from pyengine.sampling.settings import Sampling
from pyengine.streams import Engine, several
from pyengine.task import Answer, BlockSize, EarlyExit, Result, Step, Task, new_task
from pyengine.text.prompt import Prompt
from pyengine.text.template import Message
from pyengine.text.tools import Tool, ToolChoice

if TYPE_CHECKING:
    from typing import Unpack

    from pyengine.checkpoint.pair import Pair

Prompts = list[str] | list[list[Message]] | list[list[int]]
Settings = Sampling | Mapping[str, Any]


class Asked(TypedDict, total=False):
    """What may be asked beside a prompt, for type checkers."""

    pair: Pair | None
    max_tokens: int | None
    sampling: Settings | Sequence[Settings] | None
    block_size: BlockSize
    drafter: str | None
    stop: str | Sequence[str] | None
    raw: bool
    variables: Mapping[str, Any] | None
    tools: Sequence[Tool] | None
    tool_choice: ToolChoice
    parallel_tool_calls: bool
    response_format: Mapping[str, Any] | None
    grammar: str | None
    regex: str | None
    early_exit: EarlyExit
    tree: int | None
    prefix: Prefix | None
    sequences: int


@overload
def generate(prompt: Prompt, *, n: None = None, **asked: Unpack[Asked]) -> Result: ...


@overload
def generate(prompt: Prompt | Prompts, *, n: int, **asked: Unpack[Asked]) -> list[Result]: ...


@overload
def generate(prompt: Prompts, *, n: int | None = None, **asked: Unpack[Asked]) -> list[Result]: ...


def generate(
    prompt: Prompt | Prompts,
    *,
    pair: Pair | None = None,
    max_tokens: int | None = None,
    sampling: Settings | Sequence[Settings] | None = None,
    block_size: BlockSize = "auto",
    drafter: str | None = None,
    stop: str | Sequence[str] | None = None,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] | None = None,
    tool_choice: ToolChoice = "auto",
    parallel_tool_calls: bool = True,
    response_format: Mapping[str, Any] | None = None,
    grammar: str | None = None,
    regex: str | None = None,
    early_exit: EarlyExit = None,
    tree: int | None = None,
    prefix: Prefix | None = None,
    n: int | None = None,
    sequences: int = 8,
) -> Result | list[Result]:
    """Generate text after a prompt, or after each of several, by exact speculative decoding.

    Several texts are generated together, each the very one it is alone (:class:`pyengine.Engine`).

    Args:
        prompt: A string, messages, or token ids; a list of strings, or of lists, is several
            prompts. A string is one user message, put through the chat template; where the pair has
            no template, or with ``raw``, it is continued as it stands after ``<bos>``. Messages are
            dicts with ``role`` (system, user, assistant, tool) and ``content``. Token ids are used
            as they are.
        pair: From :func:`pyengine.load`; the embedded pair when None.
        max_tokens: Maximum number of new tokens; None is the rest of the context.
        sampling: How tokens are chosen. None takes the pair's own defaults; a dict of fields of
            :class:`Sampling`, such as ``{"temperature": 0}``, changes these fields of them. Tokens
            that the pair suppresses stay suppressed either way. A list has one for each prompt.
        block_size: Primary token and its drafts, 2 to 128; 1 is plain decoding. With "auto", greedy
            texts and those of the rule ``coupled`` take in each round the drafts that pay, up to
            seven, or none: no text depends on it. Under the other rules, where the text does, it is
            one number for all rounds, told in the statistics: the best by the profile of pair,
            drafter and machine, which is measured once (``pyengine doctor`` shows it); where there
            can be none, the pair's measured best, else what its assistant asks for, else 4; with
            "lookup" and "dflash" 8, with "early:6" 4. None is "auto".
        drafter: Where drafts come from. "assistant" (the default) is the pair's own, and so is
            "dflash", where it has one: a model that drafts a whole block in one pass; "lookup"
            takes what followed the newest tokens earlier in the text and pays where an answer
            repeats its prompt; "early:6", or another number of layers, drafts with the target's own
            first layers. The last two need no other model. "assistant+lookup", or another name in
            its place, leaves the rounds to lookup where the text repeats itself, and statistics
            tell which gave what.
        stop: One string or several. The text ends before the first one that appears; no part of it
            is ever emitted. The pair's stop ids end the text in any case.
        raw: Continue a string prompt as plain text. Special tokens spelled in it take effect.
        variables: Further variables of the chat template, such as ``enable_thinking``.
        tools: Functions that the model may call, in OpenAI's form: ``{"type": "function",
            "function": {"name": ..., "description": ..., "parameters": <a JSON Schema>}}``. The
            chat template shows them. Calls are read whether or not tools are given.
        tool_choice: "auto" lets the model decide. "none" shows it no tools and keeps it from
            calling. "required", or one function as ``{"type": "function", "function": {"name":
            ...}}``, makes it call.
        parallel_tool_calls: Whether it may make several calls; else the text ends with the first.
        response_format: The form of the answer, as OpenAI writes it: ``{"type": "json_object"}``,
            or ``{"type": "json_schema", "json_schema": {"schema": ...}}``. The text is the same
            at every block size as without one, for the distribution that the form leaves. Needs
            the extra ``grammar``; docs/grammar.md says what schemas may have.
        grammar: The same as a grammar of llguidance's Lark syntax.
        regex: The same as a regular expression of the whole answer.
        early_exit: A certificate of ``pyengine calibrate``, or its file: tokens then leave after
            its layer where these are sure, and the text is approximate, as ``early_exit`` of the
            result says. Without drafts, prefix or form; docs/early-exit.md.
        tree: With the drafter "dflash", so many drafts of each round, 1 to 15, as a tree: several
            may stand at one place, and the best paths of the block are verified at once. For greedy
            texts and the rule ``coupled``, without penalties, grammar or other forms; no text
            depends on it. ``block_size`` is then that of the block, 8 with "auto". None: no tree.
        prefix: Keys and values of earlier generations on this pair. Tokens at the beginning of the
            prompt that it holds are not processed again; the text is the same as without. Several
            texts take none.
        n: So many texts per prompt, with the seeds s, s + 1, ... from that of ``sampling`` on.
        sequences: Most texts under way at once, of several.

    Returns:
        Text, tokens, why it ended, and statistics. A list of those where there are several prompts
        or ``n`` is given, in order, the texts of a prompt one behind the other.

    For each Python thread that generates, MLX keeps a thread of the operating system and about
    0.2 MB until the process ends. Use one thread or a pool, not a new thread each time.

    Raises:
        ValueError: The prompt or a setting is impossible, or the memory too small for the prompt;
            the message names it.
        RuntimeError: The weights gave logits that are not finite, the answer used up the memory,
            or the process was forked from one that had used MLX.
    """
    asked: dict[str, Any] = {
        "max_tokens": max_tokens,
        "block_size": block_size,
        "drafter": drafter,
        "stop": stop,
        "raw": raw,
        "variables": variables,
        "tools": tools,
        "tool_choice": tool_choice,
        "parallel_tool_calls": parallel_tool_calls,
        "response_format": response_format,
        "grammar": grammar,
        "regex": regex,
        "early_exit": early_exit,
        "tree": tree,
    }
    batch = _is_batch(prompt)
    if n is None and not batch:
        one: Any = prompt, sampling
        running = stream(one[0], pair=pair, sampling=one[1], prefix=prefix, **asked)
        for _ in running:
            pass
        return running.result
    if prefix is not None:
        raise ValueError("[generate] prefix must be None with several prompts or n.")
    prompts: Any = prompt if batch else [prompt]
    settings = _each(sampling, len(prompts))
    with Engine(pair, sequences=sequences) as engine:
        tasks = [
            new_task(one, pair=engine.pair, sampling=own, **asked)
            for one, own in zip(prompts, settings, strict=True)
        ]
        requests = [
            request
            for task in tasks
            for request in engine.add_several([task] if n is None else several(task, n))
        ]
        for request in requests:
            for _ in request:
                pass
        return [request.result for request in requests]


def _is_batch(prompt: Any) -> bool:
    """Whether it is several prompts: messages are dicts and ids numbers."""
    several = isinstance(prompt, (list, tuple)) and len(prompt) > 0
    return several and all(isinstance(one, (str, list, tuple)) for one in prompt)


def _each(sampling: Any, count: int) -> list[Any]:
    """The settings of each of so many prompts."""
    if not isinstance(sampling, (list, tuple)):
        return [sampling] * count
    if len(sampling) != count:
        raise ValueError(
            f"[generate] sampling must be one or one per prompt but got {len(sampling)} for "
            f"{count}."
        )
    return list(sampling)


def stream(
    prompt: Prompt,
    *,
    pair: Pair | None = None,
    max_tokens: int | None = None,
    sampling: Sampling | Mapping[str, Any] | None = None,
    block_size: BlockSize = "auto",
    drafter: str | None = None,
    stop: str | Sequence[str] | None = None,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
    tools: Sequence[Tool] | None = None,
    tool_choice: ToolChoice = "auto",
    parallel_tool_calls: bool = True,
    response_format: Mapping[str, Any] | None = None,
    grammar: str | None = None,
    regex: str | None = None,
    early_exit: EarlyExit = None,
    tree: int | None = None,
    prefix: Prefix | None = None,
) -> Stream:
    """Like :func:`generate`, but yield the text as it comes.

    Returns:
        An iterator over pieces of text, one per round unless a round adds no whole character.
        Arguments are checked here; the prompt is processed when the first piece is requested.
        ``close()`` ends the generation early, and so does leaving it as a context manager.
    """
    check_prefix("generate", prefix)
    if prefix is not None and early_exit is not None:  # whose keys and values others would get
        raise ValueError("[early-exit] prefix must be None but got one.")
    task = new_task(
        prompt,
        pair=pair,
        max_tokens=max_tokens,
        sampling=sampling,
        block_size=block_size,
        drafter=drafter,
        stop=stop,
        raw=raw,
        variables=variables,
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        response_format=response_format,
        grammar=grammar,
        regex=regex,
        early_exit=early_exit,
        tree=tree,
    )
    return Stream(task, prefix)


class Stream(Iterator[str]):
    """Pieces of text as they are committed; made by :func:`stream`."""

    def __init__(self, task: Task, prefix: Prefix | None) -> None:
        self._task, self._prefix = task, prefix
        self._answer = Answer(task)
        self._drafter, self._matcher = task.new_drafter(), task.new_matcher()
        self._steps = self._run()

    def __next__(self) -> str:
        while True:
            step = next(self._steps)
            if step.text:
                return step.text

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> Iterator[Step]:
        """The rest of the generation, one step per round: text, thoughts, tokens.

        A long prompt also yields a step between two chunks, so that a caller can show progress or
        abandon it there.
        """
        return self._steps

    def close(self) -> None:
        """End the generation here. :attr:`result` keeps what was yielded."""
        self._steps.close()

    @property
    def result(self) -> Result:
        """The finished result; before the end, what was yielded so far."""
        return self._answer.result

    def _run(self) -> Generator[Step, None, None]:
        self._task.check_memory(self._prefix)  # what is refused here leaves the prefix as it is
        in_use = nullcontext() if self._prefix is None else self._prefix.in_use()
        with in_use, self._task.at_work() as left, closing(self._decode(left)) as rounds:
            for done in rounds:
                yield self._answer.add(done)
                if self._answer.finish_reason:
                    return

    def _decode(self, left: Left) -> Generator[Round, None, None]:
        task = self._task
        return decode(
            task.pair.target,
            self._drafter,
            task.ids,
            **task.arguments,
            stats=self._answer.stats,
            prefix=self._prefix,
            matcher=self._matcher,
            rounds=left.rounds,
            arena=left.arena,
        )
