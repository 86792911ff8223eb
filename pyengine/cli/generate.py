"""``pyengine generate``: a prompt in, text out as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from pyengine.cli import common, tables
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
    JsonSchema,
    LarkGrammar,
    LogitBias,
    Logprobs,
    MaxTokens,
    MinP,
    OpsName,
    Position,
    PresencePenalty,
    Regex,
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
    form_given,
    sampling_given,
    sampling_of,
    template_variables,
    tools_given,
)

if TYPE_CHECKING:
    from pyengine.checkpoint.pair import Pair
    from pyengine.task import Result


EXAMPLES = (
    'pyengine generate "Write a Pong game in one HTML file." --stats',
    "cat prompt.txt | pyengine generate --bundle ./pair --temperature 0",
    "pyengine generate --raw --block-size 1 --max-tokens 64 'import json'",
    'pyengine generate "Write a Snake game." --max-tokens 8 --json --logprobs 3',
    'pyengine generate "Rate Snake." --regex "[1-5] of 5"',
    'pyengine generate "Write a Pong game." --drafter dflash --tree 7 --verify coupled --stats',
    'pyengine generate --early-exit exit.json "Write a Snake game."',
    'pyengine generate --bundle ./pair --tools weather.json "Shall I take an umbrella?"',
)


def run(
    prompt: Annotated[
        str | None,
        typer.Argument(help="The prompt; '-' or no prompt reads standard input."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="System message before the prompt.", show_default=False)
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as plain text, without a template.")
    ] = False,
    think: Think = False,
    tools: Tools = None,
    tool_choice: Annotated[
        str | None,
        typer.Option(
            metavar="CHOICE",
            help="With --tools: auto, none, required, or the name of the function to call.",
            show_default="auto",
        ),
    ] = None,
    max_tokens: MaxTokens = None,
    block_size: BlockSize = AUTO,
    drafter: DrafterName = None,
    tree: Tree = None,
    early_exit: EarlyExitFile = None,
    stop: Stop = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print counts, speed and seed to standard error.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one line of JSON.")
    ] = False,
    logprobs: Logprobs = None,
    json_schema: JsonSchema = None,
    regex: Regex = None,
    grammar: LarkGrammar = None,
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
    position: Annotated[
        Position,
        typer.Option(
            help="Position of the assistant's query, for experiments.", rich_help_panel="Pair"
        ),
    ] = Position.last,
) -> None:
    """Answer a prompt; the text is streamed to standard output.

    Without --target or --bundle, the embedded demo pair answers: it knows single-file canvas games
    and a little Python. An answer ends where the model ends it, or when the context is full.
    """
    with common.sentences():
        text = read_prompt(prompt)
        if not text:
            raise ValueError("[generate] prompt must not be empty.")
        for option, there in (
            ("--system", system is not None),
            ("--think", think),
            ("--tools", tools is not None),
        ):
            if raw and there:
                raise ValueError(
                    f"[generate] {option} must go with the template but got --raw too."
                )
        from pyengine.generation import stream
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
        asked = tools_given(tools, tool_choice) | form_given(json_schema, regex, grammar)
        common.check_dflash(dflash, assistant, drafter)
        pair = common.load_pair(target, assistant, bundle, dtype, position, ops, dflash)
        common.introduce(pair)
        running = stream(
            text if system is None else [_turn("system", system), _turn("user", text)],
            pair=pair,
            max_tokens=max_tokens,
            sampling=sampling_of(pair, given),
            block_size=block_size,
            drafter=drafter,
            stop=stop,
            raw=raw,
            variables=template_variables(pair, think),
            early_exit=certificate,
            tree=tree,
            **asked,
        )
        if certificate is not None:
            max_tokens = certificate.max_tokens if max_tokens is None else max_tokens
            typer.echo(f"{certificate.label}.", err=True)
        printer = common.Printer(think)
        try:
            steps = running.steps()
            for step in common.after_prompt(steps, lambda: running.result.stats.prompt_tokens):
                if not as_json:
                    printer.show(step)
        finally:
            printer.end_thought()
            # After Ctrl-C or a failure too: what was generated so far is kept.
            if running.result.tokens:
                if not as_json:
                    printer.end(running.result.tool_calls)
                finish(pair, running.result, as_json, stats, max_tokens)


def read_prompt(prompt: str | None) -> str:
    """The argument, or all of standard input when there is none or it is ``-``."""
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise ValueError(
            "[generate] prompt must be an argument or come on standard input but got neither."
        )
    return common.read_input("generate").removeprefix("\ufeff")


def finish(pair: Pair, result: Result, as_json: bool, stats: bool, max_tokens: int | None) -> None:
    """Say what is amiss with the text that was streamed, or print the result in its place."""
    if as_json:
        typer.echo(json.dumps(common.result_dict(pair, result)))
    else:
        common.tell_cut(result, pair, max_tokens)
    if stats:
        print_stats(result)


def print_stats(result: Result, more: Mapping[str, str] | None = None) -> None:
    """Counts and speed of one generation, on standard error; ``more`` rows come last."""
    from pyengine.checkpoint import on_metal
    from pyengine.ops import dispatch

    s = result.stats
    rows = {
        "finish": result.finish_reason or "unfinished",
        "prompt": f"{s.prompt_tokens} tokens in {s.prefill_s:.2f} s",
        "generated": f"{s.generated_tokens} tokens in {s.decode_s:.2f} s, {s.tok_s:.1f} tok/s",
        "seed": s.seed,
        "block size": _block_size(result),
        "rounds": f"{s.rounds}, {s.tokens_per_round:.2f} tokens each",
    }
    if s.drafted:
        rows["acceptance"] = f"{s.acceptance:.3f} of {s.drafted} drafts"
        if s.tree is not None:
            rows["tree"] = f"{s.drafts_per_round:.1f} drafts per round, of which one path is kept"
        for name, own in s.by_drafter.items():
            rows[f"of {name}"] = (
                f"{own['rounds']} rounds, {own['accepted']} of {own['drafted']} drafts kept"
            )
        by_depth = s.acceptance_by_depth if s.tree is None else s.kept_by_depth
        shares = " ".join(f"{a:.2f}" for a in by_depth)
        rows["by depth"] = shares if s.tree is None else f"{shares} of the rounds"
    if s.mean_layers is not None:
        told = ", ".join(f"{count} behind layer {n}" for n, count in sorted(s.exits.items()))
        rows["exits"] = f"{told}; {s.mean_layers:.1f} layers per token"
    if s.forced:
        rows["forced"] = f"{s.forced} tokens by the grammar, without a draft"
    if not dispatch.exact():
        rows["ops"] = f"{plain_ops()}: not row-stable, so exactness is not promised"
    rows["peak memory"] = f"{s.peak_memory_bytes / 1e6:.0f} MB"
    if on_metal.wired_bytes():
        rows["wired memory"] = on_metal.wired_line()
    tables.two_columns(common.console(sys.stderr), "", {**rows, **(more or {})})


def _block_size(result: Result) -> str:
    """The block size; where each round had its own, their mean too."""
    s = result.stats
    rounds = s.drafted / s.rounds + 1 if s.rounds else 1
    return f"auto, {rounds:.1f} on average" if s.block_size == AUTO else str(s.block_size)


def plain_ops() -> str:
    """What runs in place of our kernels, and for which ops."""
    from pyengine.ops import dispatch

    chosen = dispatch.chosen()
    if chosen != "native":
        return chosen
    return "mlx for " + ", ".join(op for op in dispatch.OPS if dispatch.runs(op) != chosen)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
