"""``pyengine calibrate``: how far an early exit may go, tested on prompts."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pyengine.cli import common, tables
from pyengine.cli.options import (
    AssistantDir,
    BundleDir,
    FrequencyPenalty,
    LogitBias,
    MinP,
    OpsName,
    Position,
    PresencePenalty,
    RepetitionPenalty,
    Storage,
    TargetDir,
    Temperature,
    TopK,
    TopP,
    Verify,
    sampling_given,
    sampling_of,
)
from pyengine.cli.output import check_output

if TYPE_CHECKING:
    from pyengine.checkpoint.certificate import Certificate

EXAMPLES = (
    "pyengine calibrate prompts.jsonl --layer 6 --output exit.json",
    "pyengine calibrate prompts.jsonl --layer 6 --delta 0.05 --metric differs --temperature 0 "
    "--max-tokens 128 --output exit.json --json",
    'pyengine generate --early-exit exit.json "Write a Snake game."',
)
HEADS = ("lambda", "risk", "p", "layers per token", "")


class MetricName(str, Enum):
    """How an answer may differ from the full model's."""

    lcs = "lcs"
    differs = "differs"


def run(
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Prompts as JSONL: id, category, prompt, max_tokens (not read)."
        ),
    ],
    layer: Annotated[
        int, typer.Option(metavar="N", help="Tokens may leave behind the target's first N layers.")
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="Where to write the certificate.")],
    delta: Annotated[float, typer.Option(help="Bound of the mean loss.")] = 0.1,
    epsilon: Annotated[
        float, typer.Option(help="The bound is wrong with this probability at most.")
    ] = 0.05,
    metric: Annotated[
        MetricName,
        typer.Option(
            help="Loss of an answer: lcs is 1 - ROUGE-L with the full model's, differs is 1 if it "
            "is another."
        ),
    ] = MetricName.lcs,
    lambdas: Annotated[
        str,
        typer.Option(
            help="Confidences that a token must have to leave, in the order of the tests: from 1, "
            "the safest, down to 0.",
            show_default="0.95,0.9,0.8,0.7, ... 0.1,0",
        ),
    ] = "",
    decay: Annotated[
        float,
        typer.Option(help="How fast the confidence asked for falls along an answer; 0: not."),
    ] = 4.0,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.")] = 64,
    seed: Annotated[
        int, typer.Option(help="Seed of the first prompt; each further prompt adds 1.")
    ] = 0,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    logit_bias: LogitBias = None,
    target: TargetDir = None,
    assistant: AssistantDir = None,
    bundle: BundleDir = None,
    dtype: Storage = None,
    ops: OpsName = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Also print what was tested, as one line.")
    ] = False,
) -> None:
    """Test how far an early exit may go, for `pyengine generate --early-exit`.

    Each prompt is answered by the full model, and with every lambda by its first layers where these
    are sure enough. A lambda passes if the losses say: on prompts like these, answers differ by at
    most delta on average, with confidence 1 - epsilon. The first that does not pass ends the test;
    the last that passed goes into the certificate, with what it is bound to: weights, tokenizer,
    sampler, answer length.

    The confidence holds for prompts drawn as those that are to come, and for options that were
    chosen before any result was seen. Exit code 1 if no lambda passes: then nothing is written.
    """
    with common.sentences():
        from pyengine import calibration
        from pyengine.bench.suite import load_suite
        from pyengine.risk import too_few
        from pyengine.task import prompt_ids

        thresholds = calibration.THRESHOLDS if not lambdas else read_lambdas(lambdas)
        calibration.check_settings(
            layer, delta, epsilon, metric.value, thresholds, decay, max_tokens
        )
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
            verify=Verify.residual,
            logprobs=None,
            as_json=as_json,
        )
        cases = load_suite(prompts)
        check_output("calibrate", output)
        if warning := too_few(len(cases), delta, epsilon):
            typer.echo(f"Warning: {warning}", err=True)
        pair = common.load_pair(target, assistant, bundle, dtype, Position.last, ops)
        with common.progress("calibration", 10) as on_answer:
            found = calibration.calibrate(
                [prompt_ids(pair, case.content, raw=case.raw) for case in cases],
                layer=layer,
                pair=pair,
                delta=delta,
                epsilon=epsilon,
                metric=metric.value,
                thresholds=thresholds,
                decay=decay,
                max_tokens=max_tokens,
                sampling=sampling_of(pair, given),
                on_answer=on_answer,
            )
        _show(found, len(pair.target.layers))
        if as_json:
            typer.echo(json.dumps(found.to_dict()))
        if found.threshold is None:
            typer.echo("None: no lambda passed, and nothing was written.", err=True)
            raise typer.Exit(common.BROKEN)
        found.write(output)
        typer.echo(f"Certificate: {output}", err=True)


def _show(found: Certificate, layers: int) -> None:
    """What was tested, as a table."""
    rows = [
        (
            f"{one.threshold:g}",
            f"{one.total / found.n:.4f}",
            f"{one.p_value:.3g}",
            "-" if one.mean_layers is None else f"{one.mean_layers:.1f} of {layers}",
            "passed" if one.p_value <= found.epsilon else "not passed",
        )
        for one in found.tested
    ]
    title = (
        f"exit behind layer {found.layer}, {found.n} prompts, {found.metric}, delta "
        f"{found.delta:g}, epsilon {found.epsilon:g}"
    )
    out = common.console(sys.stdout)
    tables.show(out, title, HEADS, rows, right=True)
    if found.threshold is not None:
        tables.say(out, f"lambda {found.threshold:g}: {found.label}")


def read_lambdas(text: str) -> list[float]:
    """Numbers between commas.

    Raises:
        ValueError: A part is none.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"[calibrate] --lambdas must be numbers like 0.9,0.8,0.7 but got {text!r}."
        ) from None
