"""Text in, text out."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from pyengine import forked
from pyengine.arguments import flag, whole
from pyengine.checkpoint import memory
from pyengine.checkpoint.defaults import OURS
from pyengine.doctor import first_use
from pyengine.drafters import NAMES, Name, new_drafter
from pyengine.drafters.drafter import MAX_BLOCK
from pyengine.engine.loop import decode
from pyengine.engine.prefix import Prefix, check_prefix
from pyengine.engine.stats import Stats
from pyengine.sampling.sampler import Logprob
from pyengine.sampling.settings import Sampling, seeded
from pyengine.text.output import Reader, stop_strings
from pyengine.text.prompt import Prompt, encode_prompt
from pyengine.untrusted import shown

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair

DEFAULT_BLOCK = 4
LOOKUP_BLOCK = 8  # its drafts cost nothing, and few rounds have any


@dataclass(frozen=True)
class Result:
    """The outcome of a generation.

    Attributes:
        text: The new text, without special tokens and without the stop string that ended it.
        tokens: Ids of the new tokens. The stop id that ended the text is among them; tokens that a
            round committed after a stop string are not.
        finish_reason: "stop" (a stop id or stop string), "length" (``max_tokens`` or the context
            is used up), or None when the generation was abandoned.
        stats: Counts and seconds, see :class:`pyengine.engine.stats.Stats`.
        logprobs: One entry per token where the settings ask for them, see
            :class:`pyengine.sampling.sampler.Logprob`.
        thinking: The model's thoughts before its answer, where its template has a channel for them;
            else None.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None
    stats: Stats
    logprobs: list[Logprob] | None = None
    thinking: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "stats": self.stats.to_dict(),
            **({} if self.logprobs is None else {"logprobs": [x._asdict() for x in self.logprobs]}),
            **({} if self.thinking is None else {"thinking": self.thinking}),
        }


def generate(
    prompt: Prompt,
    *,
    pair: Pair | None = None,
    max_tokens: int | None = None,
    sampling: Sampling | Mapping[str, Any] | None = None,
    block_size: int | None = None,
    drafter: str | None = None,
    stop: str | Sequence[str] | None = None,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
    prefix: Prefix | None = None,
) -> Result:
    """Generate text after a prompt by exact speculative decoding.

    Args:
        prompt: A string, messages, or token ids. A string is one user message, put through the
            chat template; where the pair has no template, or with ``raw``, it is continued as it
            stands after ``<bos>``. Messages are dicts with ``role`` (system, user, assistant,
            tool) and ``content``. Token ids are used as they are.
        pair: From :func:`pyengine.load`; the embedded pair when None.
        max_tokens: Maximum number of new tokens; None is the rest of the context.
        sampling: How tokens are chosen. None takes the pair's own defaults; a dict of fields of
            :class:`Sampling`, such as ``{"temperature": 0}``, changes these fields of them. Tokens
            that the pair suppresses stay suppressed either way.
        block_size: Primary token and its drafts, 2 to 128; 1 is plain decoding. None takes the
            pair's measured best, else what its assistant asks for, else 4.
        drafter: Where drafts come from. "assistant" (the default) is the pair's own; "lookup" takes
            what followed the newest tokens earlier in the text, needs no assistant, and pays where
            an answer repeats its prompt.
        stop: One string or several. The text ends before the first one that appears; no part of it
            is ever emitted. The pair's stop ids end the text in any case.
        raw: Continue a string prompt as plain text. Special tokens spelled in it take effect.
        variables: Further variables of the chat template, such as ``tools`` and
            ``enable_thinking``.
        prefix: Keys and values of earlier generations on this pair. Tokens at the beginning of the
            prompt that it holds are not processed again; the text is the same as without.

    Returns:
        Text, tokens, why it ended, and statistics.

    For each Python thread that generates, MLX keeps a thread of the operating system and about
    0.2 MB until the process ends. Use one thread or a pool, not a new thread each time.

    Raises:
        ValueError: The prompt or a setting is impossible, or the memory too small for the prompt;
            the message names it.
        RuntimeError: The weights gave logits that are not finite, the answer used up the memory,
            or the process was forked from one that had used MLX.
    """
    running = stream(
        prompt,
        pair=pair,
        max_tokens=max_tokens,
        sampling=sampling,
        block_size=block_size,
        drafter=drafter,
        stop=stop,
        raw=raw,
        variables=variables,
        prefix=prefix,
    )
    for _ in running:
        pass
    return running.result


def stream(
    prompt: Prompt,
    *,
    pair: Pair | None = None,
    max_tokens: int | None = None,
    sampling: Sampling | Mapping[str, Any] | None = None,
    block_size: int | None = None,
    drafter: str | None = None,
    stop: str | Sequence[str] | None = None,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
    prefix: Prefix | None = None,
) -> Stream:
    """Like :func:`generate`, but yield the text as it comes.

    Returns:
        An iterator over pieces of text, one per round unless a round adds no whole character.
        Arguments are checked here; the prompt is processed when the first piece is requested.
        ``close()`` ends the generation early, and so does leaving it as a context manager.
    """
    forked.check("generate")
    pair = embedded_pair() if pair is None else pair
    stops = stop_strings(stop)
    block, source = check_settings(pair, max_tokens, block_size, drafter)
    flag("generate", "raw", raw)
    check_variables(variables)
    check_prefix("generate", prefix)
    limit = None if max_tokens is None else int(max_tokens)
    ids = prompt_ids(pair, prompt, raw=raw, variables=variables)
    settings = seeded(resolve_sampling(pair, sampling))
    vocab = pair.target.config.vocab_size
    outside = [i for i in (*settings.suppress_tokens, *settings.logit_bias) if i >= vocab]
    if outside:
        raise ValueError(
            f"[generate] suppress_tokens and logit_bias must name ids up to {vocab - 1} but got "
            f"{outside[0]}."
        )
    first_use.ready(pair)
    return Stream(pair, ids, limit, settings, block, source, stops, prefix)


def prompt_ids(
    pair: Pair,
    prompt: Prompt,
    *,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a prompt, as :func:`generate` reads it.

    Raises:
        ValueError: The prompt is empty, longer than the context, or of no known form.
    """
    return encode_prompt(
        prompt,
        pair.tokenizer,
        context=pair.target.context,
        vocab=pair.target.config.vocab_size,
        raw=raw,
        variables=variables,
    )


def check_settings(
    pair: Pair, max_tokens: int | None, block_size: int | None, drafter: str | None
) -> tuple[int, Name]:
    """The block size and the drafter to use.

    Raises:
        ValueError: One of them or ``max_tokens`` is impossible with this pair.
    """
    if not hasattr(pair, "target"):
        raise ValueError(f"[generate] pair must come from pyengine.load but got {shown(pair)}.")
    name = check_drafter(drafter)
    if drafter == "assistant" and pair.assistant is None:
        raise ValueError(
            "[generate] drafter must be lookup without an assistant but got assistant."
        )
    block = default_block_size(pair, name) if block_size is None else block_size
    check_numbers(max_tokens, block)
    block = int(block)
    if block > 1 and name == "assistant" and pair.assistant is None:
        raise ValueError(f"[generate] block_size must be 1 without an assistant but got {block}.")
    return block, name


def check_drafter(drafter: str | None) -> Name:
    """The drafter of that name; the assistant where none is given.

    Raises:
        ValueError: There is none of that name.
    """
    found = next((name for name in NAMES if drafter == name), None)
    if drafter is not None and found is None:
        names = " or ".join(NAMES)
        raise ValueError(f"[generate] drafter must be {names} but got {shown(drafter)}.")
    return found or "assistant"


def check_numbers(max_tokens: int | None, block_size: int) -> None:
    """What can be said of the two before a pair is there.

    Raises:
        ValueError: One is impossible with any pair.
    """
    whole("generate", "block_size", block_size)
    if max_tokens is not None:
        whole("generate", "max_tokens", max_tokens)
    if not 1 <= block_size <= MAX_BLOCK:
        raise ValueError(f"[generate] block_size must be 1 to {MAX_BLOCK} but got {block_size}.")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"[generate] max_tokens must be at least 1 but got {max_tokens}.")


def check_variables(variables: Any) -> None:
    """Refuse what cannot be variables of a template.

    Raises:
        ValueError: It is no dict of names, nor None.
    """
    named = isinstance(variables, Mapping) and all(isinstance(key, str) for key in variables)
    if variables is not None and not named:
        raise ValueError(
            f"[generate] variables must be a dict of names or None but got {shown(variables)}."
        )


class Step(NamedTuple):
    """What one round added to a result; both texts may be empty.

    Between two chunks of a long prompt there is one that adds nothing and has ``prompt_done``.

    Attributes:
        text: Text that is certain.
        thinking: Thoughts.
        tokens: Ids of its tokens.
        logprobs: One entry per token where the settings ask for them, else none.
        prompt_done: Number of prompt tokens processed so far; None after the prompt.
    """

    text: str
    thinking: str
    tokens: list[int]
    logprobs: list[Logprob]
    prompt_done: int | None = None


class Stream(Iterator[str]):
    """Pieces of text as they are committed; made by :func:`stream`."""

    def __init__(
        self,
        pair: Pair,
        ids: list[int],
        max_tokens: int | None,
        sampling: Sampling,
        block_size: int,
        drafter: Name,
        stops: tuple[str, ...],
        prefix: Prefix | None,
    ) -> None:
        self._stats = Stats(block_size, sampling.seed, len(ids))
        self._wanted = pair.target, len(ids), max_tokens, block_size, prefix
        self._prefix = prefix
        self._rounds = decode(
            pair.target,
            new_drafter(drafter, pair.target, pair.assistant),
            ids,
            sampling=sampling,
            block_size=block_size,
            max_tokens=max_tokens,
            stop_ids=frozenset((*pair.generation.stop_ids, *pair.tokenizer.answer_ends())),
            stats=self._stats,
            prefix=prefix,
        )
        self._reader = Reader(pair.tokenizer, ids, stops)
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[Logprob] | None = None if sampling.logprobs is None else []
        self._finish_reason: str | None = None
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
        return Result(
            "".join(self._text),
            list(self._tokens),
            self._finish_reason,
            deepcopy(self._stats),  # its lists go on
            None if self._logprobs is None else list(self._logprobs),
            "".join(self._thoughts) if self._reader.has_thought else None,
        )

    def _run(self) -> Generator[Step, None, None]:
        memory.check_prompt(*self._wanted)  # what is refused here leaves the prefix as it is
        in_use = nullcontext() if self._prefix is None else self._prefix.in_use()
        with in_use, closing(self._rounds) as rounds:
            for tokens, reason, _, _, logprobs, prompt_done in rounds:
                if prompt_done is not None:
                    yield Step("", "", [], [], prompt_done)
                    continue
                step, found = self._read(tokens, logprobs or [], reason)
                self._finish_reason = "stop" if found else reason
                yield step
                if self._finish_reason:
                    return

    def _read(
        self, tokens: list[int], logprobs: list[Logprob], reason: str | None
    ) -> tuple[Step, bool]:
        """What a round's tokens say, noted in the result, and whether a stop string came up."""
        texts, thoughts, count, found = [], [], 0, False
        for count, token in enumerate(tokens, 1):
            if reason == "stop" and count == len(tokens):
                break  # a stop id is not text, whatever its spelling
            text, thought, found = self._reader.add(token)
            texts.append(text)
            thoughts.append(thought)
            if found:
                break
        if reason and not found:
            text, thought, found = self._reader.finish()
            texts.append(text)
            thoughts.append(thought)
        step = Step("".join(texts), "".join(thoughts), tokens[:count], logprobs[:count])
        self._text.append(step.text)
        self._thoughts.append(step.thinking)
        self._tokens += step.tokens
        if self._logprobs is not None:
            self._logprobs += step.logprobs
        return step, found


@lru_cache(maxsize=1)
def embedded_pair() -> Pair:
    """The pair inside the package, read once per process."""
    from pyengine.checkpoint.pair import load

    return load()


def default_block_size(pair: Pair, drafter: Name = "assistant") -> int:
    """Of the assistant the pair's measured best, else its own wish and the primary, else 4; of
    lookup 8."""
    if drafter == "lookup":
        return LOOKUP_BLOCK
    if pair.assistant is None:
        return 1
    best = pair.manifest.get("benchmark", {}).get("best_block_size")
    if best is not None:
        if type(best) is not int:
            raise ValueError(
                f"[generate] the pair's best_block_size must be a whole number but got {best!r}."
            )
        return best
    drafts = pair.generation.num_draft
    return DEFAULT_BLOCK if drafts is None else drafts + 1


def resolve_sampling(pair: Pair, sampling: Sampling | Mapping[str, Any] | None) -> Sampling:
    """Settings to use: the given ones, or the pair's with the fields that were given; always with
    the pair's suppressed tokens.

    Raises:
        ValueError: ``sampling`` is of another type, names no field, or sets one out of range.
    """
    own = pair.generation
    if sampling is None or isinstance(sampling, Mapping):
        given = dict(sampling or {})
        unknown = [key for key in given if key not in Sampling.__dataclass_fields__]
        if unknown:
            raise ValueError(
                f"[generate] sampling must hold fields of Sampling but got {shown(unknown[0])}."
            )
        sampling = Sampling(**{**{key: getattr(own, key) for key in OURS}, **given})
    if not isinstance(sampling, Sampling):
        raise ValueError(
            "[generate] sampling must be a Sampling or a dict of its fields but got "
            f"{shown(sampling)}."
        )
    suppressed = {*sampling.suppress_tokens, *own.suppress_tokens}
    return replace(sampling, suppress_tokens=tuple(sorted(suppressed)))
