"""Options shared by several commands, and the sampling settings they make."""

from __future__ import annotations

import math
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair
    from pyengine.sampling.settings import Sampling


class Dtype(str, Enum):
    """Storage types a pair can be loaded in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Verify(str, Enum):
    """Rules that accept drafts."""

    residual = "residual"
    block = "block"
    coupled = "coupled"


class Ops(str, Enum):
    """Implementations of the ops that a user may choose."""

    native = "native"
    mlx = "mlx"
    reference = "reference"


class Position(str, Enum):
    """Where the assistant's query stands, seen from the n committed tokens."""

    last = "n-1"
    before_last = "n-2"


PAIR, SAMPLING, FORM = "Pair", "Sampling", "Form"
AUTO = "auto"

# Strings and not paths: owner/name of the hub is none
TargetDir = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Target: a folder, or owner/name on the hub.",
        show_default=False,
        rich_help_panel=PAIR,
    ),
]
AssistantDir = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Assistant: a folder, or owner/name on the hub.",
        show_default=False,
        rich_help_panel=PAIR,
    ),
]
DFlashDir = Annotated[
    str | None,
    typer.Option(
        "--dflash",
        metavar="FOLDER",
        help="DFlash drafter, for --drafter dflash: a folder, or owner/name on the hub.",
        show_default=False,
        rich_help_panel=PAIR,
    ),
]
BundleDir = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="All in one folder, as target/, assistant/ and dflash/, or owner/name on the hub.",
        show_default=False,
        rich_help_panel=PAIR,
    ),
]
Storage = Annotated[
    Dtype | None,
    typer.Option(
        "--dtype",
        help="Storage type of weights that are not quantised, and of activations.",
        show_default="the checkpoint's",
        rich_help_panel=PAIR,
    ),
]
OpsName = Annotated[
    Ops | None,
    typer.Option(
        "--ops",
        help="What runs the ops: our kernels (native), MLX's own (mlx), a way on where one of ours "
        "fails, or their plain definitions (reference), which are slow. Only native is exact.",
        show_default="PYENGINE_OPS, else native",
        rich_help_panel=PAIR,
    ),
]


def read_block_size(text: str) -> int | str:
    """A block size as it is typed.

    Raises:
        ValueError: It is neither a number nor "auto".
    """
    return text if text == AUTO else int(text)


MaxTokens = Annotated[
    int | None,
    typer.Option(help="Maximum number of new tokens.", show_default="the rest of the context"),
]
BlockSize = Annotated[
    Any,
    typer.Option(
        metavar="N",
        parser=read_block_size,
        help="Tokens per block, the primary one and its drafts: 2 to 128; 1 is plain decoding. "
        "auto takes what is fastest: round by round up to 8 where the text is the same at any size "
        "(--temperature 0, --verify coupled), else the pair's best on this machine.",
    ),
]
DrafterName = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        metavar="NAME",
        help="Where drafts come from: assistant; dflash, the pair's DFlash model; lookup, in the "
        "text so far; early:N, the target's own first N layers; or one of them and lookup where "
        "the text repeats itself, as assistant+lookup. lookup and early:N need no assistant.",
        show_default="assistant",
    ),
]
Tree = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With --drafter dflash: each round's drafts are a tree of N, 1 to 15; several of them "
        "may stand at one place. For --temperature 0 and --verify coupled, without penalties and "
        "without a form of the answer.",
        show_default="off",
    ),
]
EarlyExitFile = Annotated[
    Path | None,
    typer.Option(
        "--early-exit",
        metavar="FILE",
        help="Let tokens leave early by this certificate of `pyengine calibrate`: the answer is "
        "approximate, and standard error says how far.",
        show_default=False,
    ),
]
Stop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT",
        help="End the answer before this text; may be given several times.",
        show_default=False,
    ),
]
Think = Annotated[
    bool,
    typer.Option("--think", help="Let the model think first; thoughts go to standard error."),
]
Tools = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Functions that the model may call: a JSON list in OpenAI's form.",
        show_default=False,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(help="0 is greedy.", show_default="the pair's", rich_help_panel=SAMPLING),
]
TopP = Annotated[
    float | None,
    typer.Option(help="1.0 is off.", show_default="the pair's", rich_help_panel=SAMPLING),
]
TopK = Annotated[
    int | None,
    typer.Option(help="0 is off.", show_default="the pair's", rich_help_panel=SAMPLING),
]
MinP = Annotated[
    float | None,
    typer.Option(help="0.0 is off.", show_default="the pair's", rich_help_panel=SAMPLING),
]
RepetitionPenalty = Annotated[
    float | None,
    typer.Option(
        help="Above 1.0, tokens already in the prompt or answer become less likely; 1.0 is off.",
        show_default="the pair's",
        rich_help_panel=SAMPLING,
    ),
]
PresencePenalty = Annotated[
    float | None,
    typer.Option(
        help="Subtracted from the logit of each token already in the answer; 0.0 is off.",
        show_default="the pair's",
        rich_help_panel=SAMPLING,
    ),
]
FrequencyPenalty = Annotated[
    float | None,
    typer.Option(
        help="Like the presence penalty, times the number of occurrences; 0.0 is off.",
        show_default="the pair's",
        rich_help_panel=SAMPLING,
    ),
]
LogitBias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ID=BIAS",
        help="Add BIAS to the logit of token ID; may be given several times.",
        show_default=False,
        rich_help_panel=SAMPLING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="Seed of the random numbers: the same seed gives the same text.",
        show_default="drawn at random",
        rich_help_panel=SAMPLING,
    ),
]
VerifyRule = Annotated[
    Verify,
    typer.Option(
        help="Rule that accepts drafts: block keeps more of them, coupled gives the same text as "
        "plain decoding with the same seed.",
        rich_help_panel=SAMPLING,
    ),
]
Logprobs = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With --json: log-probabilities of each token and of the N most likely in its place.",
        show_default=False,
    ),
]


def check_limits(
    max_tokens: int | None,
    block_size: int | str,
    stop: list[str] | None,
    drafter: str | None,
    tree: int | None,
) -> None:
    """Refuse, before the weights are read, what no pair allows."""
    from pyengine.task import check_drafter, check_numbers, check_tree
    from pyengine.text.output import stop_strings

    check_numbers(max_tokens, block_size)
    check_drafter(drafter)
    check_tree(tree, block_size, drafter)
    stop_strings(stop)


def sampling_given(
    *,
    verify: Verify,
    logit_bias: list[str] | None,
    logprobs: int | None,
    as_json: bool,
    **settings: float | None,
) -> dict[str, Any]:
    """Fields of Sampling that were given.

    Raises:
        ValueError: A value is outside its range.
    """
    from pyengine.sampling.settings import Sampling

    if logprobs is not None and not as_json:
        raise ValueError("[generate] --logprobs must go with --json but is alone.")
    given: dict[str, Any] = {key: value for key, value in settings.items() if value is not None}
    given |= {"verify": verify.value, "logprobs": logprobs}
    if logit_bias:
        given["logit_bias"] = dict(map(_bias, logit_bias))
    Sampling(**given)
    return given


def sampling_of(pair: Pair, given: dict[str, Any]) -> Sampling:
    """The pair's own settings with those that were given."""
    from pyengine.task import resolve_sampling

    return replace(resolve_sampling(pair, None), **given)


def _bias(text: str) -> tuple[int, float]:
    """One ID=BIAS."""
    token, equals, bias = text.partition("=")
    try:
        value = float(bias)
        if equals and math.isfinite(value):
            return int(token), value
    except ValueError:
        pass
    raise ValueError(f"[generate] --logit-bias must be ID=BIAS like 42=-5 but got {text!r}.")


def tools_given(file: Path | None, choice: str | None) -> dict[str, Any]:
    """The arguments ``tools`` and ``tool_choice`` of a generation.

    Raises:
        ValueError: The file holds something else, or there is none to choose from.
    """
    from pyengine.text.tools import CHOICES, tool_use
    from pyengine.untrusted import parse, read_text

    if file is None:
        if choice is not None:
            raise ValueError("[generate] --tool-choice must go with --tools but is alone.")
        return {}
    tools = parse(read_text(file, "generate"), f"[generate] {file}")
    chosen: Any = "auto" if choice is None else choice
    if chosen not in CHOICES:
        chosen = {"type": "function", "function": {"name": chosen}}
    tool_use(tools, chosen, True)
    return {"tools": tools, "tool_choice": chosen}


JsonSchema = Annotated[
    Path | None,
    typer.Option(
        "--json-schema",
        metavar="FILE",
        help="The answer is JSON of this schema. Needs the extra grammar, as do the next two.",
        show_default=False,
        rich_help_panel=FORM,
    ),
]
Regex = Annotated[
    str | None,
    typer.Option(
        metavar="REGEX",
        help="The whole answer matches this regular expression.",
        show_default=False,
        rich_help_panel=FORM,
    ),
]
LarkGrammar = Annotated[
    Path | None,
    typer.Option(
        "--grammar",
        metavar="FILE",
        help="The answer follows this grammar, in llguidance's Lark.",
        show_default=False,
        rich_help_panel=FORM,
    ),
]


def form_given(schema: Path | None, regex: str | None, grammar: Path | None) -> dict[str, Any]:
    """The arguments of a generation that say what form the answer has.

    Raises:
        ValueError: A file cannot be read, or two forms are given.
    """
    from pyengine.grammar.asked import MAX_BYTES, check_installed, source_of
    from pyengine.untrusted import parse, read_text

    form = None
    if schema is not None:
        text = read_text(schema, "generate", MAX_BYTES["json_schema"])
        inner = {"name": schema.stem, "schema": parse(text, f"[generate] {schema}")}
        form = {"type": "json_schema", "json_schema": inner}
    lark = None if grammar is None else read_text(grammar, "generate", MAX_BYTES["lark"])
    given: dict[str, Any] = {"response_format": form, "regex": regex, "grammar": lark}
    if source_of(**given) is not None:
        check_installed()
    return given


def template_variables(pair: Pair, think: bool) -> dict[str, Any] | None:
    """What the options ask of the chat template.

    Raises:
        ValueError: The model has no channel for thoughts.
    """
    if not think:
        return None
    if not pair.tokenizer.channel_ids():
        raise ValueError(
            "[generate] --think must go with a chat template that has a channel for thoughts but "
            f"{pair.name}'s has none."
        )
    return {"enable_thinking": True}
