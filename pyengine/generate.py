"""Text in, text out: the only file that knows tokenizer and engine both."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from pyengine.chat_template import Message
from pyengine.files import shown
from pyengine.prefix import Prefix
from pyengine.sampling import Logprob, Sampling
from pyengine.speculate import MAX_BLOCK, NonFinite, Stats, decode

if TYPE_CHECKING:
    from pyengine.pair import Pair

Prompt = str | Sequence[Message] | Sequence[int]

ROLES = ("system", "developer", "user", "assistant", "model", "tool")
DEFAULT_BLOCK = 4


@dataclass(frozen=True)
class Result:
    """What a generation gave.

    Attributes:
        text: The new text, without special tokens and without the stop string that ended it.
        tokens: Ids of the new tokens. The stop id that ended the text is among them; tokens a round
            committed behind a stop string are not.
        finish_reason: "stop" (a stop id or stop string), "length" (``max_tokens`` or the context
            is used up), or None when the generation was left early.
        stats: Counts and seconds, see :class:`pyengine.speculate.Stats`.
        logprobs: One entry a token where the settings ask for them, see
            :class:`pyengine.sampling.Logprob`.
        thinking: What the model thought before it answered, where its template has a channel for
            that; else None.
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
    max_tokens: int = 512,
    sampling: Sampling | None = None,
    block_size: int | None = None,
    stop: str | Sequence[str] | None = None,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
    prefix: Prefix | None = None,
) -> Result:
    """Generate text after a prompt, by exact speculative decoding.

    Args:
        prompt: A string, messages, or token ids. A string is one user message, put through the
            chat template; where the pair has no template, or with ``raw``, it is continued as it
            stands after ``<bos>``. Messages are dicts with ``role`` (system, user, assistant,
            tool) and ``content``. Token ids are used as they are.
        pair: From :func:`pyengine.load`; the embedded pair when None.
        max_tokens: At most this many new tokens.
        sampling: How tokens are chosen; None takes the pair's own defaults and seed 0. Tokens the
            pair suppresses stay suppressed either way.
        block_size: Primary token and its drafts, 2 to 128; 1 is plain decoding. None takes the
            pair's: its measured best, else what its assistant asks for, else 4.
        stop: One string or several. The text ends before the first that comes up; no part of it is
            ever emitted. The pair's stop ids end the text in any case.
        raw: Continue a string prompt as plain text. Special tokens spelled in it take effect.
        variables: Further variables of the chat template, such as ``tools`` and
            ``enable_thinking``.
        prefix: Keys and values of earlier generations on this pair. The tokens a prompt begins
            with and the prefix holds are not processed again; the text is the same as without.

    Returns:
        Text, tokens, why it ended, and statistics.

    Raises:
        ValueError: The prompt or a setting is impossible; the message names it.
        RuntimeError: The weights gave logits that are not finite.
    """
    running = stream(
        prompt,
        pair=pair,
        max_tokens=max_tokens,
        sampling=sampling,
        block_size=block_size,
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
    max_tokens: int = 512,
    sampling: Sampling | None = None,
    block_size: int | None = None,
    stop: str | Sequence[str] | None = None,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
    prefix: Prefix | None = None,
) -> Stream:
    """Like :func:`generate`, but hands out the text as it comes.

    Returns:
        An iterator over pieces of text, one a round unless it adds no certain character. Arguments
        are checked here; the prompt is read when the first piece is asked for. ``close()`` ends
        it early, as does leaving it as a context manager.
    """
    pair = embedded_pair() if pair is None else pair
    stops = _stop_strings(stop)
    block = check_settings(pair, max_tokens, block_size)
    ids = prompt_ids(pair, prompt, raw=raw, variables=variables)
    settings = resolve_sampling(pair, sampling)
    vocab = pair.target.config.vocab_size
    outside = [i for i in (*settings.suppress_tokens, *settings.logit_bias) if i >= vocab]
    if outside:
        raise ValueError(
            f"[generate] suppress_tokens and logit_bias must name ids up to {vocab - 1} but got "
            f"{outside[0]}."
        )
    return Stream(pair, ids, max_tokens, settings, block, stops, prefix)


def check_settings(pair: Pair, max_tokens: int, block_size: int | None) -> int:
    """The block size to use.

    Raises:
        ValueError: It or ``max_tokens`` is impossible with this pair.
    """
    block = default_block_size(pair) if block_size is None else block_size
    if not 1 <= block <= MAX_BLOCK:
        raise ValueError(f"[generate] block_size must be 1 to {MAX_BLOCK} but got {block}.")
    if block > 1 and pair.assistant is None:
        raise ValueError(f"[generate] block_size must be 1 without an assistant but got {block}.")
    if max_tokens < 1:
        raise ValueError(f"[generate] max_tokens must be at least 1 but got {max_tokens}.")
    return block


class Stream(Iterator[str]):
    """Pieces of text as they are committed; made by :func:`stream`."""

    def __init__(
        self,
        pair: Pair,
        ids: list[int],
        max_tokens: int,
        sampling: Sampling,
        block_size: int,
        stops: tuple[str, ...],
        prefix: Prefix | None,
    ) -> None:
        self._stats = Stats()
        self._prompt = ids
        self._prefix = prefix
        self._rounds = decode(
            pair.target,
            pair.assistant,
            ids,
            sampling=sampling,
            block_size=block_size,
            max_tokens=max_tokens,
            stop_ids=frozenset(pair.generation.stop_ids),
            stats=self._stats,
            prefix=prefix,
        )
        self._detokenizer = pair.tokenizer.detokenizer()
        self._scanner = StopScanner(stops)
        self._marks = pair.tokenizer.channel_ids()
        opened = [token for token in ids if token in self._marks]
        self._thinks = bool(opened) and opened[-1] == self._marks[0]
        self._thoughts = pair.tokenizer.detokenizer()
        self._thought: list[str] = [""] if self._thinks else []
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[Logprob] | None = None if sampling.logprobs is None else []
        self._finish_reason: str | None = None
        self._pieces = self._run()

    def __next__(self) -> str:
        return next(self._pieces)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the generation here. What was handed out stays in :attr:`result`."""
        self._pieces.close()

    @property
    def result(self) -> Result:
        """The finished result; before the end, what was handed out so far."""
        logprobs = self._logprobs
        return Result(
            "".join(self._text),
            list(self._tokens),
            self._finish_reason,
            replace(self._stats),
            None if logprobs is None else logprobs[: len(self._tokens)],
            self.thinking,
        )

    @property
    def thinking(self) -> str | None:
        """What was thought so far, without the channel's name; None when no thought began."""
        if not self._thought:
            return None
        return "\n".join(thought.partition("\n")[2] for thought in self._thought)

    def _run(self) -> Generator[str, None, None]:
        prefix = self._prefix
        if prefix is not None:
            if prefix.busy:
                raise ValueError("[generate] prefix must serve one generation at a time.")
            prefix.busy = True
        try:
            for tokens, reason, _, _, logprobs in self._rounds:
                if self._logprobs is not None:
                    self._logprobs += logprobs or ()
                piece, found = self._read(tokens, ended=reason == "stop")
                if prefix is not None:
                    # The newest token is not processed yet
                    prefix.keep([*self._prompt, *self._tokens[:-1]])
                if reason and not found:
                    rest, found = self._scanner.add(self._detokenizer.finish())
                    piece += rest if found else rest + self._scanner.finish()
                self._finish_reason = "stop" if found else reason
                if piece:
                    self._text.append(piece)
                    yield piece
                if self._finish_reason:
                    return
        except Exception:
            if prefix is not None:
                prefix.forget()
            raise
        finally:
            self._rounds.close()
            if prefix is not None:
                prefix.busy = False

    def _read(self, tokens: list[int], ended: bool) -> tuple[str, bool]:
        """Text of a round's tokens that may be shown, and whether a stop string was met."""
        shown: list[str] = []
        for i, token in enumerate(tokens):
            self._tokens.append(token)
            if ended and i + 1 == len(tokens):
                break  # a stop id is not text, whatever its spelling
            if token in self._marks:
                self._thinks = token == self._marks[0]
                self._thought += [""] * self._thinks
                continue
            if self._thinks:
                self._thought[-1] += self._thoughts.add(token)
                continue
            text, found = self._scanner.add(self._detokenizer.add(token))
            shown.append(text)
            if found:
                return "".join(shown), True
        return "".join(shown), False


SCORE_BLOCK = 16  # rows of one call, each row [V] of logits


def score(
    pair: Pair,
    context: Sequence[int],
    continuation: Sequence[int],
    *,
    prefix: Prefix | None = None,
) -> tuple[list[float], bool]:
    """How likely the target finds given tokens after a context, before any sampling filter.

    Args:
        pair: From :func:`pyengine.load`.
        context: Token ids, at least one.
        continuation: Token ids to be scored.
        prefix: Keys and values of earlier calls on this pair, and for later ones.

    Returns:
        The natural logarithm of each token's probability, and whether greedy decoding would write
        these very tokens.

    Raises:
        ValueError: The context is empty, or both together do not fit the target's.
        RuntimeError: The weights gave logits that are not finite.
    """
    prefix = Prefix() if prefix is None else prefix
    whole = prompt_ids(pair, [*context, *continuation])
    if not context:
        raise ValueError("[score] context must hold at least one token but got none.")
    target, logprobs, greedy = pair.target, [], True
    cache, known = prefix.open(target, context, SCORE_BLOCK)
    # The newest token of the context goes with the continuation: its logits are the first scored
    begin = len(context) - 1
    if known < begin:
        target.prefill(whole[known:begin], cache)
    prefix.mark(begin)
    for at in range(begin, len(whole) - 1, SCORE_BLOCK):
        block = mx.array(whole[at : at + SCORE_BLOCK][: len(whole) - 1 - at], dtype=mx.int32)
        following = mx.array(whole[at + 1 : at + 1 + block.size], dtype=mx.int32)
        rows, _ = target.verify(block, cache)
        cache.commit(mx.array(block.size, dtype=mx.int32), cache.bound + block.size)
        chosen = mx.take_along_axis(rows, following[:, None], axis=-1)[:, 0]
        found = chosen - mx.logsumexp(rows, axis=-1)
        best = mx.argmax(rows, axis=-1) == following
        mx.eval(found, best, cache.length)
        if not mx.isfinite(found).all():
            raise NonFinite("[score] logits must be finite but got NaN or infinity.")
        logprobs += cast("list[float]", found.tolist())
        greedy = greedy and bool(best.all())
    prefix.keep(whole[:-1])
    return logprobs, greedy


class StopScanner:
    """Cuts a stream of text before the first stop string, wherever the pieces' borders fall.

    First is the one that is complete first; of two that end together, the longer. Text that may be
    the start of a stop string is held back until it is known.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Text that is certain, and whether a stop string came up; nothing follows then."""
        text = self._held + piece
        starts = [(text.find(stop), stop) for stop in self._stops]
        found = [(at + len(stop), at) for at, stop in starts if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], False

    def finish(self) -> str:
        """What was held back, once it is known that no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` and is not all of it."""
    longest = min(len(stop) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@lru_cache(maxsize=1)
def embedded_pair() -> Pair:
    """The pair inside the package, read once per process."""
    from pyengine.pair import load

    return load()


def default_block_size(pair: Pair) -> int:
    """The pair's measured best block size, else its assistant's wish and the primary, else 4."""
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


def resolve_sampling(pair: Pair, sampling: Sampling | None) -> Sampling:
    """Settings to use: the given ones or the pair's, always with the pair's suppressed tokens."""
    own = pair.generation
    if sampling is None:
        sampling = Sampling(temperature=own.temperature, top_p=own.top_p, top_k=own.top_k)
    suppressed = {*sampling.suppress_tokens, *own.suppress_tokens}
    return replace(sampling, suppress_tokens=tuple(sorted(suppressed)))


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
    ids = _encode(pair, prompt, raw, dict(variables or {}))
    context = pair.target.context
    if not ids:
        raise ValueError("[generate] prompt must not be empty.")
    if len(ids) >= context:
        raise ValueError(
            f"[generate] prompt must be shorter than the context of {context} tokens "
            f"but got {len(ids)}."
        )
    return ids


def _encode(pair: Pair, prompt: Prompt, raw: bool, variables: dict[str, Any]) -> list[int]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("[generate] prompt must not be empty.")
        tokenizer = pair.tokenizer
        if raw or not tokenizer.has_chat_template:
            return tokenizer.encode(prompt, bos=True)
        return tokenizer.encode_chat([{"role": "user", "content": prompt}], **variables)
    ids = [item for item in prompt if isinstance(item, int)]
    messages = [item for item in prompt if isinstance(item, dict)]
    if len(ids) + len(messages) < len(prompt) or (ids and messages):
        raise ValueError("[generate] prompt must be a string, messages or token ids but is mixed.")
    if not messages:
        vocab = pair.target.config.vocab_size
        wrong = [i for i in ids if not 0 <= i < vocab]
        if wrong:
            raise ValueError(f"[generate] token ids must be 0 to {vocab - 1} but got {wrong[0]}.")
        return ids
    if raw:
        raise ValueError("[generate] raw must go with a string prompt but got messages.")
    for number, message in enumerate(messages, 1):
        check_message(message, f"[generate] message {number}")
    return pair.tokenizer.encode_chat([_plain_system(message) for message in messages], **variables)


def _plain_system(message: Message) -> Message:
    """Gemma's templates print a system message as it is, so its parts must be one string."""
    if message["role"] in ("system", "developer") and isinstance(message["content"], list):
        return {**message, "content": "".join(part["text"] for part in message["content"])}
    return message


def check_message(message: Message, where: str) -> None:
    """Refuse a message this engine cannot read; ``where`` begins the error.

    Raises:
        ValueError: The role is unknown, or the content is not text.
    """
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where} must have a role of {', '.join(ROLES)} but got {shown(role)}.")
    if isinstance(content, list):
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"{where} must hold text only but got a part of type {shown(kind)}."
                )
    elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise ValueError(f"{where} must have text as its content but got {shown(content)}.")


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(f"[generate] stop must hold strings of text but got {text!r}.")
    return stops
