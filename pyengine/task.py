"""A generation that is asked for: its arguments, checked, and its answer as it comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pyengine import forked
from pyengine.arguments import flag, whole
from pyengine.checkpoint import memory
from pyengine.checkpoint.certificate import Certificate, read_certificate
from pyengine.checkpoint.defaults import OURS
from pyengine.doctor import first_use, profile
from pyengine.drafters import NAMES, exit_depth, first_of, is_name, new_drafter
from pyengine.drafters.drafter import MAX_BLOCK, Drafter
from pyengine.engine.controller import AUTO_BLOCK
from pyengine.engine.early_exit import EarlyRounds, Exit
from pyengine.engine.idle import Left, idle_of
from pyengine.engine.prefix import Prefix
from pyengine.engine.sequence import Round, check_tree_sampling, most_rows
from pyengine.engine.stats import Source, Stats
from pyengine.grammar.asked import source_of
from pyengine.grammar.tools import tools_source
from pyengine.model.config import LayerConfig
from pyengine.ops import dispatch
from pyengine.sampling.sampler import Logprob
from pyengine.sampling.settings import MOST_NODES, Sampling, seeded
from pyengine.text.output import Read, Reader, stop_strings
from pyengine.text.prompt import Prompt, encode_prompt
from pyengine.text.tool_calls import ToolCall
from pyengine.text.tools import Tool, ToolChoice, tool_use
from pyengine.untrusted import shown

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair
    from pyengine.grammar.compiled import Grammar
    from pyengine.grammar.matcher import GrammarMatcher

BlockSize = int | str | None  # a number or "auto", which None is too
EarlyExit = str | Path | Certificate | None  # of a calibration, or its file

DEFAULT_BLOCK = 4
DFLASH_BLOCK = 8  # others measured the best of their rounds at 6 to 8 rows
LOOKUP_BLOCK = 8  # its drafts cost nothing, and few rounds have any


@dataclass(frozen=True)
class Result:
    """The outcome of a generation.

    Attributes:
        text: The new text, without special tokens and without the stop string that ended it.
        tokens: Ids of the new tokens. The stop id that ended the text is among them; tokens that a
            round committed after a stop string are not.
        finish_reason: "stop" (a stop id or stop string), "tool_calls" (a stop id behind at least
            one tool call), "length" (``max_tokens`` or the context is used up), or None when the
            generation was abandoned.
        stats: Counts and seconds, see :class:`pyengine.engine.stats.Stats`.
        logprobs: One entry per token where the settings ask for them, see
            :class:`pyengine.sampling.sampler.Logprob`.
        thinking: The model's thoughts before its answer, where its template has a channel for them;
            else None.
        tool_calls: The calls that the model made, in order; see
            :class:`pyengine.text.tool_calls.ToolCall`.
        warning: A sentence for people where something is amiss: a tool call that is cut or cannot
            be read, and is therefore text. Else None.
        early_exit: Of an approximate text what bounds its error, with the sentence that says so
            under "label". Else None.
    """

    text: str
    tokens: list[int]
    finish_reason: str | None
    stats: Stats
    logprobs: list[Logprob] | None = None
    thinking: str | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)
    warning: str | None = None
    early_exit: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": self.finish_reason,
            "stats": self.stats.to_dict(),
            **({} if self.logprobs is None else {"logprobs": [x._asdict() for x in self.logprobs]}),
            **({} if self.thinking is None else {"thinking": self.thinking}),
            **({"tool_calls": [x._asdict() for x in self.tool_calls]} if self.tool_calls else {}),
            **({} if self.warning is None else {"warning": self.warning}),
            **({} if self.early_exit is None else {"early_exit": self.early_exit}),
        }


class Piece(NamedTuple):
    """Text and thoughts that one token made certain; of a character in several tokens the last
    one has it."""

    text: str
    thinking: str


class Step(NamedTuple):
    """What one round added to a result; both texts may be empty.

    Between two chunks of a long prompt there is one that adds nothing and has ``prompt_done``.

    Attributes:
        text: Text that is certain.
        thinking: Thoughts.
        tokens: Ids of its tokens.
        logprobs: One entry per token where the settings ask for them, else none.
        prompt_done: Number of prompt tokens processed so far; None after the prompt.
        tool_calls: Calls that are complete with this round.
        pieces: What each token made certain, text and thoughts; together they are those above.
        drafted: Drafts of a drafter that the round judged.
        accepted: Of them those that it kept; behind a stop string they are not among the tokens.
        sources: Where each token comes from, see :data:`pyengine.engine.stats.Source`; "budget" is
            the mark that ends thoughts whose budget is used up.
    """

    text: str
    thinking: str
    tokens: list[int]
    logprobs: list[Logprob]
    prompt_done: int | None = None
    tool_calls: list[ToolCall] = []  # noqa: RUF012 - nobody changes it
    pieces: Sequence[Piece] = ()
    drafted: int = 0
    accepted: int = 0
    sources: Sequence[Source | Literal["budget"]] = ()


@dataclass(frozen=True)
class Task:
    """What a generation is to do; made by :func:`new_task`, which checks it."""

    pair: Pair
    ids: list[int]
    max_tokens: int | None
    sampling: Sampling  # with a seed
    block_size: int  # the largest, where it is automatic
    drafter: str
    stops: tuple[str, ...]
    auto: bool = False  # whether each round has a block size of its own
    one_call: bool = False  # the text ends behind its first tool call
    grammar: Grammar | None = None
    early_exit: Certificate | None = None  # by which tokens leave early
    tree: int | None = None  # drafts of each round's

    @property
    def most_rows(self) -> int:
        """Rows of a round's block at most."""
        return most_rows(self.block_size, self.grammar is not None, self.tree)

    @property
    def arguments(self) -> dict[str, Any]:
        """What :func:`pyengine.engine.loop.decode` is asked, beside models, prompt and prefix."""
        own = self.pair
        return {
            "sampling": self.sampling,
            "block_size": self.block_size,
            "auto": self.auto,
            "tree": self.tree,
            "max_tokens": self.max_tokens,
            "stop_ids": frozenset((*own.generation.stop_ids, *own.tokenizer.answer_ends())),
        }

    def new_drafter(self) -> Drafter | None:
        pair = self.pair
        return new_drafter(self.drafter, pair.target, pair.assistant, pair.dflash)

    @property
    def layers(self) -> tuple[LayerConfig, ...]:
        """Of its drafter, whose keys and values are kept beside the target's."""
        drafter = self.new_drafter() if self.block_size > 1 else None
        return () if drafter is None else drafter.layers

    def new_matcher(self) -> GrammarMatcher | None:
        """What follows the grammar through one text; None where there is none."""
        if self.grammar is None:
            return None
        from pyengine.grammar.matcher import GrammarMatcher  # with NumPy, which others do without

        return GrammarMatcher(self.grammar, self.pair.tokenizer, self.ids)

    @property
    def exit(self) -> Exit | None:
        """Where its tokens may leave; None where they may not."""
        own = self.early_exit
        if own is None or own.threshold is None:
            return None
        return Exit(own.layer, own.threshold, own.decay, own.max_tokens)

    def at_work(self) -> AbstractContextManager[Left]:
        """What plays the rounds of one text, and where its keys and values go."""
        if self.exit is None:
            return idle_of(self.pair).work(self.pair.target, self.layers)
        return nullcontext(Left(EarlyRounds(self.exit), None))

    def check_memory(self, prefix: Prefix | None, there: int | None = None) -> None:
        """Refuse a prompt that does not fit the memory, see :func:`memory.check_prompt`."""
        target, count, rows = self.pair.target, len(self.ids), self.most_rows
        memory.check_prompt(target, count, self.max_tokens, rows, prefix, there, self.layers)


def new_task(
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
) -> Task:
    """The arguments of :func:`pyengine.generate`, checked."""
    forked.check("generate")
    pair = embedded_pair() if pair is None else pair
    certificate = early_exit_of(early_exit, block_size, drafter)
    if certificate is not None:
        block_size = 1
    stops, form = stop_strings(stop), source_of(response_format, grammar, regex)
    check_tree(tree, block_size, drafter)
    block, source = check_settings(pair, max_tokens, block_size, drafter)
    flag("generate", "raw", raw)
    check_variables(variables)
    use = tool_use(tools, tool_choice, parallel_tool_calls)
    limit = None if max_tokens is None else int(max_tokens)
    ids = prompt_ids(pair, prompt, raw=raw, variables=variables, tools=use.shown)
    settings = seeded(resolve_sampling(pair, sampling))
    if use.choice == "none":
        free, settings = settings, without_calls(pair, settings)
        if certificate is not None and settings != free:
            raise ValueError(
                "[early-exit] tool_choice must be auto, since no answer was calibrated with tokens "
                "suppressed, but got none."
            )
    vocab = pair.target.config.vocab_size
    outside = [i for i in (*settings.suppress_tokens, *settings.logit_bias) if i >= vocab]
    if outside:
        raise ValueError(
            f"[generate] suppress_tokens and logit_bias must name ids up to {vocab - 1} but got "
            f"{outside[0]}."
        )
    form = tools_source(use, pair.tokenizer, form)
    if tree is not None:
        check_tree_round(pair, settings, form is not None)
    if certificate is not None:
        if form is not None:
            raise ValueError("[early-exit] the answer's form must be free but one is asked for.")
        certificate.check_pair(pair)
        limit = certificate.check_settings(settings, limit, bool(stops))
    compiled = None
    if form is not None:
        from pyengine.grammar.compiled import compile_grammar

        compiled = compile_grammar(pair, form)
    first_use.ready(pair)
    auto = block is None and tree is None and follows_load(settings)
    if auto:
        profile.kept(pair, drafter=first_of(source))  # which the first rounds go by
    if block is None:
        if tree is not None:
            block = default_block_size(pair, source)
        else:
            block = AUTO_BLOCK if auto else fixed_block(pair, source)
    one_call = not use.parallel
    return Task(
        pair,
        ids,
        limit,
        settings,
        block,
        source,
        stops,
        auto,
        one_call,
        compiled,
        certificate,
        tree,
    )


def early_exit_of(
    early_exit: EarlyExit, block_size: BlockSize, drafter: str | None
) -> Certificate | None:
    """The certificate of an early exit, which goes with no drafts.

    Raises:
        ValueError: It is none, or cannot be read, or drafts are asked for.
    """
    if early_exit is None:
        return None
    if not isinstance(early_exit, (str, Path, Certificate)):
        raise ValueError(
            f"[early-exit] early_exit must be a certificate or its file but got "
            f"{shown(early_exit)}."
        )
    if drafter is not None or check_numbers(None, block_size) not in (None, 1):
        raise ValueError(
            "[early-exit] an early exit must go without drafts but some are asked for."
        )
    return early_exit if isinstance(early_exit, Certificate) else read_certificate(Path(early_exit))


def check_tree(tree: int | None, block_size: BlockSize, drafter: str | None) -> None:
    """Refuse, before a pair is there, what a tree does not go with.

    Raises:
        ValueError: As said.
    """
    if tree is None:
        return
    if not 1 <= whole("generate", "tree", tree) <= MOST_NODES:
        raise ValueError(f"[generate] tree must be 1 to {MOST_NODES} but got {tree}.")
    if (name := check_drafter(drafter)) != "dflash":
        raise ValueError(
            "[generate] drafter must be dflash with a tree, for it judges all places of a block at "
            f"once, but got {name}."
        )
    if check_numbers(None, block_size) == 1:
        raise ValueError("[generate] block_size must be at least 2 with a tree but got 1.")


def check_tree_round(pair: Pair, settings: Sampling, has_form: bool) -> None:
    """Refuse a pair or settings whose rounds can have no tree.

    Raises:
        ValueError: Other processes share the target, no tree can be verified under the settings, or
            the answer has a form.
    """
    check_tree_sampling("generate", settings)
    if has_form:
        raise ValueError(
            "[generate] the answer's form must be free with a tree but one is asked for; leave out "
            "the format, regex, grammar, strict tool or tool_choice that asks for it, or the tree "
            "(a server's is its --tree)."
        )
    pair.target.check_alone("tree")


class Answer:
    """The text of a task, put together from its rounds."""

    def __init__(self, task: Task) -> None:
        block = "auto" if task.auto else task.block_size
        self.stats = Stats(block, task.sampling.seed, len(task.ids))
        self.finish_reason: str | None = None
        self._reader = Reader(task.pair.tokenizer, task.ids, task.stops)
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._tokens: list[int] = []
        self._calls: list[ToolCall] = []
        self._one_call, self._early_exit = task.one_call, task.early_exit
        self._logprobs: list[Logprob] | None = None if task.sampling.logprobs is None else []

    @property
    def result(self) -> Result:
        """The finished result; before the end, what was yielded so far."""
        return Result(
            "".join(self._text),
            list(self._tokens),
            self.finish_reason,
            deepcopy(self.stats),  # its lists go on
            None if self._logprobs is None else list(self._logprobs),
            "".join(self._thoughts) if self._reader.has_thought else None,
            list(self._calls),
            self._reader.warning,
            None if self._early_exit is None else self._early_exit.told(),
        )

    def add(self, done: Round) -> Step:
        """What a round says, noted in the result; ``finish_reason`` is set where it ends."""
        if done.prompt_done is not None:
            return Step("", "", [], [], done.prompt_done)
        step, self.finish_reason = self._read(done)
        return step

    def _read(self, done: Round) -> tuple[Step, str | None]:
        """What a round's tokens say, noted in the result, and why the text ends with them."""
        tokens, reason = done.tokens, done.finish_reason
        reads, count, found = [], 0, False
        for count, token in enumerate(tokens, 1):
            if reason == "stop" and count == len(tokens):
                break  # a stop id is not text, whatever its spelling
            reads.append(read := self._reader.add(token))
            found = read.found
            if found or (read.call and self._one_call):
                reason = "stop"
                break
        if reason and not found:
            reads.append(read := self._reader.finish())
            found = read.found
        step = Step(
            "".join([read.text for read in reads]),
            "".join([read.thought for read in reads]),
            tokens[:count],
            [] if done.logprobs is None else done.logprobs[:count],
            tool_calls=[read.call for read in reads if read.call],
            pieces=_pieces(reads, count),
            drafted=done.num_drafted,
            accepted=done.num_accepted,
            sources=done.sources[:count],
        )
        self._text.append(step.text)
        self._thoughts.append(step.thinking)
        self._tokens += step.tokens
        self._calls += step.tool_calls
        if self._logprobs is not None:
            self._logprobs += step.logprobs
        if found:
            return step, "stop"
        return step, "tool_calls" if reason == "stop" and self._calls else reason


def _pieces(reads: Sequence[Read], count: int) -> list[Piece]:
    """What each of a round's tokens said; its end belongs to the last one."""
    said = [Piece(read.text, read.thought) for read in reads]
    if len(said) > count > 0:
        *said, last, end = said
        said.append(Piece(last.text + end.text, last.thinking + end.thinking))
    return said


def prompt_ids(
    pair: Pair,
    prompt: Prompt,
    *,
    raw: bool = False,
    variables: Mapping[str, Any] | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Token ids of a prompt, as :func:`generate` reads it; errors as :func:`encode_prompt`."""
    return encode_prompt(
        prompt,
        pair.tokenizer,
        context=pair.target.context,
        vocab=pair.target.config.vocab_size,
        raw=raw,
        variables=variables,
        tools=tools,
    )


def without_calls(pair: Pair, sampling: Sampling) -> Sampling:
    """The same, and no token that opens a tool call is ever chosen."""
    marks = pair.tokenizer.call_ids()[:1]
    return replace(sampling, suppress_tokens=tuple(sorted({*sampling.suppress_tokens, *marks})))


def check_settings(
    pair: Pair, max_tokens: int | None, block_size: BlockSize, drafter: str | None
) -> tuple[int | None, str]:
    """The block size, None for "auto", and the drafter to use.

    Raises:
        ValueError: One of them or ``max_tokens`` is impossible with this pair.
    """
    if not hasattr(pair, "target"):
        raise ValueError(f"[generate] pair must come from pyengine.load but got {shown(pair)}.")
    name = check_drafter(drafter)
    if drafter is None and pair.assistant is None and pair.dflash is not None:
        name = "dflash"
    if drafter is not None and first_of(name) == "assistant" and pair.assistant is None:
        raise ValueError(
            f"[generate] drafter must be lookup or early:N without an assistant but got {name}."
        )
    if first_of(name) == "dflash" and pair.dflash is None:
        raise ValueError(
            f"[generate] drafter must be one that the pair has but got {name}; load it with "
            "dflash=."
        )
    if (depth := exit_depth(first_of(name))) is not None and depth >= (
        layers := len(pair.target.layers)
    ):
        raise ValueError(
            f"[generate] drafter must leave a layer of the target's {layers} out but got {name}."
        )
    block = check_numbers(max_tokens, block_size)
    if name == "assistant" and pair.assistant is None:
        if block is not None and block > 1:
            raise ValueError(
                f"[generate] block_size must be 1 without an assistant but got {block}."
            )
        block = 1
    return block, name


def check_drafter(drafter: str | None) -> str:
    """The drafter of that name; the assistant where none is given.

    Raises:
        ValueError: There is none of that name.
    """
    if drafter is None:
        return "assistant"
    if not is_name(drafter):
        names = ", ".join(NAMES[:-1]) + f" or {NAMES[-1]}"
        raise ValueError(f"[generate] drafter must be {names} but got {shown(drafter)}.")
    return drafter


def check_numbers(max_tokens: int | None, block_size: BlockSize) -> int | None:
    """What can be said of the two before a pair is there: the block size, None for "auto".

    Raises:
        ValueError: One is impossible with any pair.
    """
    auto = block_size is None or (isinstance(block_size, str) and block_size == "auto")
    block = None if auto else whole("generate", "block_size", block_size)
    if max_tokens is not None:
        whole("generate", "max_tokens", max_tokens)
    if block is not None and not 1 <= block <= MAX_BLOCK:
        raise ValueError(f"[generate] block_size must be 1 to {MAX_BLOCK} but got {block}.")
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"[generate] max_tokens must be at least 1 but got {max_tokens}.")
    return block


def follows_load(sampling: Sampling) -> bool:
    """Whether no text can tell the block sizes of its rounds, so that each may have its own."""
    return dispatch.exact() and (sampling.greedy or sampling.verify == "coupled")


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


@lru_cache(maxsize=1)
def embedded_pair() -> Pair:
    """The pair inside the package, read once per process."""
    from pyengine.checkpoint.pair import load

    return load()


def fixed_block(pair: Pair, drafter: str = "assistant") -> int:
    """What "auto" is for a whole text, whose rounds must be alike: the best by the profile of pair
    and machine, or without one :func:`default_block_size`."""
    drafter = first_of(drafter)
    known = profile.ready(pair, drafter=drafter)
    return default_block_size(pair, drafter) if known is None else known.best_block


def default_block_size(pair: Pair, drafter: str = "assistant") -> int:
    """Of the assistant the pair's measured best, else its own wish and the primary, else 4; of
    lookup 8; of DFlash 8, or what it was trained with if that is less; of the target's own layers
    4; of a mix that of the other than lookup."""
    drafter = first_of(drafter)
    if drafter == "lookup":
        return LOOKUP_BLOCK
    if drafter == "dflash" and pair.dflash is not None:
        return min(pair.dflash.config.block_size, DFLASH_BLOCK)
    if exit_depth(drafter) is not None:
        return DEFAULT_BLOCK
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
