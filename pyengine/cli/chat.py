"""``pyengine chat``: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pyengine.cli import common
from pyengine.cli.options import (
    AssistantDir,
    BlockSize,
    BundleDir,
    FrequencyPenalty,
    LogitBias,
    Logprobs,
    MinP,
    Position,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Stop,
    Storage,
    TargetDir,
    Temperature,
    Think,
    TopK,
    TopP,
    Verify,
    VerifyRule,
    check_limits,
    sampling_given,
    sampling_of,
    template_variables,
)

if TYPE_CHECKING:
    from pyengine.chat import Chat

EXAMPLES = (
    "pyengine chat",
    'pyengine chat --bundle ./pair --system "Answer in one sentence." --temperature 0',
    "printf 'Hello\\nAnd again?\\n' | pyengine chat --json",
)
WORDS = "/new begins anew, /bye or Ctrl-D ends, Ctrl-C stops an answer."


def run(
    system: Annotated[
        str | None, typer.Option(help="System message of the conversation.", show_default=False)
    ] = None,
    think: Think = False,
    max_tokens: Annotated[int, typer.Option(help="At most this many new tokens an answer.")] = 1024,
    block_size: BlockSize = None,
    stop: Stop = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON an answer.")
    ] = False,
    logprobs: Logprobs = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    logit_bias: LogitBias = None,
    seed: Seed = 0,
    verify: VerifyRule = Verify.residual,
    target: TargetDir = None,
    assistant: AssistantDir = None,
    bundle: BundleDir = None,
    dtype: Storage = None,
) -> None:
    """Talk with a pair; every line of standard input is a turn.

    The cache is kept between turns, so only what is new is processed. When the context is full the
    oldest turns are forgotten. /new begins anew, /bye or Ctrl-D ends, Ctrl-C stops an answer.
    """
    with common.sentences():
        from pyengine.chat import Chat

        given = sampling_given(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=logit_bias,
            seed=seed,
            verify=verify,
            logprobs=logprobs,
            as_json=as_json,
        )
        check_limits(max_tokens, block_size, stop)
        pair = common.load_pair(target, assistant, bundle, dtype, Position.last)
        chat = Chat(
            pair,
            system=system,
            max_tokens=max_tokens,
            sampling=sampling_of(pair, given),
            block_size=block_size,
            stop=stop,
            variables=template_variables(pair, think),
        )
        terminal = sys.stdin.isatty()
        if terminal:
            typer.echo(f"{pair.name}. {WORDS}", err=True)
        while (line := _next_line(terminal)) is not None:
            if line.strip() == "/bye":
                break
            if line.strip() == "/new":
                chat.clear()
            elif line.strip():
                _answer(chat, line, as_json, think, terminal)


def _next_line(terminal: bool) -> str | None:
    """The next turn, None at the end of the input."""
    if terminal:
        typer.echo("> ", nl=False, err=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise ValueError("[chat] standard input must be UTF-8 text but is not.") from error
    return line.rstrip("\n") if line else None


def _answer(chat: Chat, line: str, as_json: bool, think: bool, terminal: bool) -> None:
    forgotten, show = chat.forgotten, common.printer(think)
    try:
        for step in chat.steps(line):
            if not as_json:
                show(step)
    except KeyboardInterrupt:
        if not terminal:
            raise
        typer.echo(" ...", err=True)
    except ValueError as error:
        if not terminal:
            raise
        # At a terminal a wrong line is no reason to lose the conversation
        typer.echo(f"pyengine: {common.printable(str(error))}", err=True)
        return
    if as_json:
        typer.echo(
            json.dumps(
                {**common.result_dict(chat.pair, chat.result), "forgotten_turns": chat.forgotten}
            )
        )
    elif not chat.result.text.endswith("\n"):
        typer.echo()
    if chat.forgotten > forgotten:
        typer.echo("The context is full: the oldest turns were forgotten.", err=True)
