"""``pyengine chat``: a conversation in the terminal."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pyengine.cli import common
from pyengine.cli.common import AssistantDir, BundleDir, Dtype, Position, Seed, TargetDir

if TYPE_CHECKING:
    from pyengine.chat import Chat

EXAMPLES = (
    "pyengine chat",
    'pyengine chat --bundle ./pair --system "Answer in one sentence." --temperature 0',
    "printf 'Hello\\nAnd again?\\n' | pyengine chat --json",
)
WORDS = "/new begins anew, /bye or Ctrl-D ends, Ctrl-C stops an answer."


def run(
    target: TargetDir = None,
    assistant: AssistantDir = None,
    bundle: BundleDir = None,
    system: Annotated[
        str | None, typer.Option(help="System message of the conversation.", show_default=False)
    ] = None,
    think: Annotated[
        bool, typer.Option("--think", help="Let the model think first, where its template can.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="At most this many new tokens an answer.")] = 1024,
    temperature: Annotated[
        float | None, typer.Option(help="0 is greedy.", show_default="the pair's")
    ] = None,
    seed: Seed = 0,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Primary token and its drafts, 2 to 128; 1 is plain decoding.",
            show_default="the pair's",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one line of JSON an answer.")
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Storage type of the activations.", show_default="the checkpoint's"),
    ] = None,
) -> None:
    """Talk with a pair; every line of standard input is a turn.

    The cache is kept between turns, so only what is new is processed. When the context is full the
    oldest turns are forgotten. /new begins anew, /bye or Ctrl-D ends, Ctrl-C stops an answer.
    """
    with common.sentences():
        from dataclasses import replace

        from pyengine.chat import Chat
        from pyengine.generate import check_settings, resolve_sampling

        pair = common.load_pair(target, assistant, bundle, dtype, Position.last)
        if not pair.tokenizer.has_chat_template:
            raise ValueError("[chat] the checkpoint must have a chat template but has none.")
        sampling = replace(resolve_sampling(pair, None), seed=seed)
        if temperature is not None:
            sampling = replace(sampling, temperature=temperature)
        check_settings(pair, max_tokens, block_size)
        chat = Chat(
            pair,
            system=system,
            max_tokens=max_tokens,
            sampling=sampling,
            block_size=block_size,
            variables={"enable_thinking": True} if think else None,
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
                _answer(chat, line, as_json, terminal)


def _next_line(terminal: bool) -> str | None:
    """The next turn, None at the end of the input."""
    if terminal:
        typer.echo("> ", nl=False, err=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise ValueError("[chat] standard input must be UTF-8 text but is not.") from error
    return line.rstrip("\n") if line else None


def _answer(chat: Chat, line: str, as_json: bool, terminal: bool) -> None:
    forgotten = chat.forgotten
    try:
        for piece in chat.ask(line):
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
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
        typer.echo(json.dumps({**chat.result.to_dict(), "forgotten_turns": chat.forgotten}))
    elif not chat.result.text.endswith("\n"):
        typer.echo()
    if chat.forgotten > forgotten:
        typer.echo("The context is full: the oldest turns were forgotten.", err=True)
