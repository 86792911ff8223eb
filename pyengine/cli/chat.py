"""``pyengine chat``: a conversation in the terminal."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyengine.cli import common, generate, tables
from pyengine.cli.hosts import HostFile
from pyengine.cli.options import (
    AUTO,
    AssistantDir,
    BlockSize,
    BundleDir,
    DFlashDir,
    DrafterName,
    EarlyExitFile,
    FrequencyPenalty,
    LogitBias,
    Logprobs,
    MaxTokens,
    MinP,
    OpsName,
    Position,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Stop,
    Storage,
    TargetDir,
    Temperature,
    Think,
    Tools,
    TopK,
    TopP,
    Tree,
    Verify,
    VerifyRule,
    check_limits,
    sampling_given,
    sampling_of,
    template_variables,
    tools_given,
)
from pyengine.cli.output import check_output

if TYPE_CHECKING:
    from pyengine.chat import Chat
    from pyengine.task import Step

EXAMPLES = (
    "pyengine chat --early-exit exit.json",
    "pyengine chat",
    'pyengine chat --bundle ./pair --system "Answer in one sentence." --temperature 0',
    "pyengine chat --drafter dflash --tree 7 --verify coupled",
    "printf 'Write Pong.\\nNow Snake.\\n' | pyengine chat --json",
)
COMMANDS = {
    "/help": "list the commands",
    "/new": "begin a new conversation; the system message stays",
    "/stats": "show counts and speed of the last answer",
    "/save FILE": "write the conversation as JSON; FILE must be new, or this conversation's",
    "/load FILE": "continue a saved conversation, its system message included",
    "/bye": "end the chat",
}
COMMAND = re.compile(r"/[A-Za-z][^\s/]*(?=\s|$)")  # a path or a comment is text
SLASH = "To send text that looks like a command, put a space before it."
KEYS = (
    "Enter sends. Alt-Enter, or Enter after a backslash, begins a new line; pasted lines stay one "
    "turn. Up brings back earlier turns, Ctrl-R searches them; they are kept in memory only. "
    "Ctrl-C stops an answer or discards the line; at an empty line Ctrl-C or Ctrl-D ends."
)
SAVED = ("model", "messages")


def run(
    system: Annotated[
        str | None, typer.Option(help="System message of the conversation.", show_default=False)
    ] = None,
    think: Think = False,
    tools: Tools = None,
    max_tokens: MaxTokens = None,
    block_size: BlockSize = AUTO,
    drafter: DrafterName = None,
    tree: Tree = None,
    early_exit: EarlyExitFile = None,
    stop: Stop = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each answer as one line of JSON.")
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
    seed: Seed = None,
    verify: VerifyRule = Verify.residual,
    target: TargetDir = None,
    assistant: AssistantDir = None,
    dflash: DFlashDir = None,
    bundle: BundleDir = None,
    hostfile: HostFile = None,
    dtype: Storage = None,
    ops: OpsName = None,
) -> None:
    """Hold a conversation with a pair.

    In a terminal, /help lists the commands and keys. Otherwise every line of standard input is a
    turn or one of the same commands. The cache is kept between turns, so only new tokens are
    processed. When the context is full, the oldest turns are forgotten.

    With --tools an answer may call functions. What each call returned is asked for, then the model
    goes on: a JSON object, or text. On a pipe it is the next line.
    """
    with common.sentences():
        from pyengine.chat import Chat
        from pyengine.task import early_exit_of

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
        check_limits(max_tokens, block_size, stop, drafter, tree)
        certificate = early_exit_of(early_exit, block_size, drafter)
        asked = tools_given(tools, None)
        common.check_dflash(dflash, assistant, drafter)
        pair = common.load_pair(target, assistant, bundle, dtype, Position.last, ops, dflash)
        common.introduce(pair)
        chat = Chat(
            pair,
            system=system,
            max_tokens=max_tokens,
            sampling=sampling_of(pair, given),
            block_size=block_size,
            drafter=drafter,
            stop=stop,
            variables=template_variables(pair, think),
            tools=asked.get("tools"),
            early_exit=certificate,
            tree=tree,
        )
        terminal = sys.stdin.isatty()
        if terminal:
            typer.echo(f"{pair.name}. /help lists commands and keys, /bye ends.", err=True)
        read = _reader(terminal)
        talk = Talk(chat, as_json, think, terminal, read)
        while (text := read("> ")) is not None:
            if text.strip() and not talk.take(text):
                break


Read = Callable[[str], str | None]


def _reader(terminal: bool) -> Read:
    """What gives the next turn behind a prompt, and None at the end of the input."""
    if terminal and common.moves():
        from pyengine.cli.terminal import Editor

        return Editor().read
    begun = False

    def read(prompt: str) -> str | None:
        nonlocal begun
        if terminal:
            typer.echo(prompt, nl=False, err=True)
        line = common.read_input("chat", one_line=True)
        if not begun:
            line, begun = line.removeprefix("\ufeff"), True
            if not line:  # the mark was all there is
                return None
        return line.rstrip("\n") if line else None

    return read


class Talk:
    """A conversation and its commands."""

    def __init__(self, chat: Chat, as_json: bool, think: bool, terminal: bool, read: Read) -> None:
        self.chat = chat
        self.read = read
        self.as_json = as_json
        self.think = think
        self.terminal = terminal
        self.file: Path | None = None  # where it was last saved or loaded
        self.label: str | None = None  # of loaded answers whose tokens left early

    def take(self, text: str) -> bool:
        """Answer a turn or obey a command; False ends the conversation.

        Raises:
            ValueError: It cannot be answered or obeyed. In a terminal that is only told: a wrong
                line is no reason to lose the conversation.
        """
        try:
            command = COMMAND.match(text)
            if not command:
                self._answer(text)
                return True
            return self._obey(command[0], text[command.end() :].strip())
        except ValueError as error:
            said = common.sentence(error)
            if not self.terminal or said is None:
                raise
            typer.echo(f"pyengine: {said}", err=True)
            return True

    def _obey(self, name: str, rest: str) -> bool:
        forms = {form.split()[0]: form for form in COMMANDS}
        if name not in forms:
            near = difflib.get_close_matches(name, forms, 1)
            hint = f"did you mean {near[0]}?" if near else "/help lists the commands."
            raise ValueError(f"[chat] {name} is not a command; {hint} {SLASH}")
        if bool(rest) != (" " in forms[name]):
            got = f"{name} {rest}".rstrip()
            raise ValueError(f"[chat] the command must be {forms[name]} but got {got}.")
        if name == "/bye":
            return False
        if name == "/help":
            self._help()
        elif name == "/new":
            self.chat.clear()
            self.file = self.label = None
        elif name == "/stats":
            self._stats()
        elif name == "/save":
            self._save(Path(rest).expanduser())
        else:
            self._load(Path(rest).expanduser())
        return True

    def _help(self) -> None:
        tables.two_columns(common.console(sys.stderr), "", COMMANDS)
        for line in (SLASH, KEYS) if self.terminal else (SLASH,):
            tables.say(common.console(sys.stderr), line, indent="")

    def _stats(self) -> None:
        result = self.chat.result
        used = result.stats.prompt_tokens + result.stats.generated_tokens
        rows = {
            "context": f"{used} of {self.chat.pair.target.context} tokens",
            "turns": f"{len(self.chat.turns)}, {self.chat.forgotten} forgotten",
        }
        generate.print_stats(result, rows)

    def _save(self, path: Path) -> None:
        from pyengine.untrusted import write_whole

        if path.exists() and path != self.file:
            raise ValueError(f"[chat] FILE of /save must not exist yet but {path} does.")
        check_output("chat", path)
        said = {"model": self.chat.pair.name, "messages": self.chat.messages}
        label = self.label if self.chat.early_exit is None else self.chat.early_exit.label
        if label is not None:
            said["early_exit"] = label
        try:
            write_whole(path, json.dumps(said, indent=2) + "\n", 0o600)  # a conversation is private
        except OSError as error:
            raise ValueError(f"[chat] {path} cannot be written: {error.strerror}.") from error
        self.file = path
        typer.echo(f"Saved: {len(self.chat.turns)} turns to {path}", err=True)

    def _load(self, path: Path) -> None:
        from pyengine.untrusted import read_object

        saved = read_object(path, "chat")
        label = saved.get("early_exit")
        if set(saved) - {"early_exit"} != set(SAVED) or not isinstance(label, (str, NoneType)):
            raise ValueError(
                f"[chat] {path} must be a saved conversation, with {' and '.join(SAVED)}, but is "
                "not."
            )
        self.chat.resume(saved["messages"])
        self.file, self.label = path, label
        typer.echo(f"Loaded: {len(self.chat.turns)} turns from {path}", err=True)
        if label is not None:
            typer.echo(f"{common.printable(label)}.", err=True)

    def _answer(self, text: str) -> None:
        """Answer a turn, and go on as long as the model calls and is given results."""
        whole = self._show(self.chat.steps(text))
        while whole and self.chat.open_calls and (results := self._results()) is not None:
            whole = self._show(self.chat.give(results))

    def _results(self) -> list[str | dict[str, Any]] | None:
        """What the open calls returned; None where they are left open."""
        results = []
        try:
            for call in self.chat.open_calls:
                said = self.read(f"{call.name} = ")
                if said is None:
                    return None
                results.append(_result(said))
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            typer.echo("The calls have no results.", err=True)
            return None
        return results

    def _show(self, answer: Generator[Step, None, None]) -> bool:
        """Print an answer as it comes; whether it came to its end."""
        chat, printer = self.chat, common.Printer(self.think)
        forgotten, begun, whole = chat.forgotten, False, True
        try:
            with closing(answer) as steps:
                for step in common.after_prompt(steps, lambda: chat.result.stats.prompt_tokens):
                    begun = True
                    if not self.as_json:
                        printer.show(step)
        except KeyboardInterrupt:
            if not self.terminal:
                raise
            whole = False
            typer.echo(" ...", err=True)
        printer.end_thought()
        if not begun:
            return whole
        if self.as_json:
            said = common.result_dict(chat.pair, chat.result)
            typer.echo(json.dumps({**said, "forgotten_turns": chat.forgotten}))
        else:
            printer.end(chat.result.tool_calls)
            own = None if chat.early_exit is None else chat.early_exit.max_tokens
            common.tell_cut(chat.result, chat.pair, chat.max_tokens or own)
            if chat.result.early_exit is not None:
                typer.echo(f"{chat.result.early_exit['label']}.", err=True)
            if self.terminal and common.moves():
                self._tell_speed()
        if chat.forgotten > forgotten:
            typer.echo("The context is full: the oldest turns were forgotten.", err=True)
        return whole

    def _tell_speed(self) -> None:
        s = self.chat.result.stats
        said = [f"{s.generated_tokens} tokens"]
        if s.tok_s:
            said.append(f"{s.tok_s:.1f} tok/s")
        if s.drafted:
            said.append(f"acceptance {s.acceptance:.2f}")
        dim, plain = common.dimmed()
        typer.echo(f"{dim}{', '.join(said)}{plain}", err=True, color=True)


def _result(said: str) -> str | dict[str, Any]:
    """What a call returned: an object where it is one in JSON, else text."""
    from pyengine.untrusted import parse

    try:
        value = parse(said, "[chat] a result") if said.lstrip().startswith("{") else None
    except ValueError:
        value = None
    return value if isinstance(value, dict) else said
