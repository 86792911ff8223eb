"""``pyengine bench``: time a pair against plain decoding; count what the Metal kernels move."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from pyengine.cli import common
from pyengine.cli.options import AssistantDir, Position, TargetDir

KERNELS_EXAMPLES = (
    "pyengine bench kernels --count",
    "pyengine bench kernels --count --json > counts.json",
)
EXAMPLES = (
    "pyengine bench gemma-mtp",
    "pyengine bench gemma-mtp --target-model ./target --assistant-model ./assistant "
    "--prompt-suite flappy.jsonl --max-tokens 1000 --draft-block-sizes 6 --output report.json",
)


def gemma_mtp(
    target_model: TargetDir = None,
    assistant_model: AssistantDir = None,
    prompt_suite: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of id, category, prompt, max_tokens.", show_default="the embedded suite"
        ),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Token budget of a case, if its own is not lower.")
    ] = 256,
    draft_block_sizes: Annotated[
        str, typer.Option(help="Block sizes to compare with plain decoding.")
    ] = "2,4,6",
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="1.0 is off.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 64,
    seed: Annotated[int, typer.Option(help="Case i of the suite uses this seed + i.")] = 0,
    verify: Annotated[
        str, typer.Option(help="Rules that accept drafts, compared side by side: residual,block.")
    ] = "residual",
    repeats: Annotated[int, typer.Option(help="Timed runs of each setting; medians count.")] = 3,
    allow_unverified_gemma: Annotated[
        bool,
        typer.Option(
            "--allow-unverified-gemma", help="Run pairs that are none of the published ones."
        ),
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Write the JSON report here.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="End with the report, without its rows, on one line.")
    ] = False,
) -> None:
    """Time exact speculative decoding against plain decoding, alternating in one process.

    Without model options the small pair inside the package runs the embedded suite. tok/s is
    decode only; speedup_vs_ar is over plain decoding; round cost is in plain steps.
    """
    with common.sentences():
        blocks = read_block_sizes(draft_block_sizes)
        from pyengine import bench, report, suite
        from pyengine.sampling import MAX_SEED, Sampling

        rules = verify.split(",")
        bench.check_settings(blocks, repeats, max_tokens, rules)
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        cases = suite.load_suite(prompt_suite or suite.EMBEDDED)
        if seed + len(cases) - 1 > MAX_SEED:
            raise ValueError(
                f"[bench] seed must be at most {MAX_SEED} in the last of {len(cases)} cases but "
                f"got {seed} for the first."
            )
        if output:
            report.check_output(output)
        pair = common.load_pair(target_model, assistant_model, None, None, Position.last)
        if not (pair.verified or pair.embedded or allow_unverified_gemma):
            raise ValueError(
                "[bench] the pair must be one of the five published geometries, or "
                "--allow-unverified-gemma must be given."
            )
        out, run_on = common.console(sys.stdout), report.environment()
        for line in report.heading(run_on, pair):
            typer.echo(line)
        with common.progress() as on_run:
            rows, summary = bench.gemma_mtp(
                pair,
                cases,
                max_tokens=max_tokens,
                block_sizes=blocks,
                sampling=sampling,
                repeats=repeats,
                rules=rules,
                on_run=on_run,
            )
        settings = {
            "command": sys.argv[1:],
            "prompt_suite": str(prompt_suite or suite.EMBEDDED.name),
            "max_tokens": max_tokens,
            "draft_block_sizes": blocks,
            "verify": rules,
            "repeats": repeats,
        }
        whole = report.make_report(run_on, pair, cases, rows, summary, settings, sampling)
        for case in cases:
            own = [row for row in rows if row["prompt_id"] == case.id]
            out.print(report.table(f"{case.id}, {own[0]['prompt_tokens']} prompt tokens", own))
        if len(cases) > 1:
            out.print(report.table(f"all {len(cases)} prompts", summary))
        if output:
            report.write_report(output, whole)
            typer.echo(f"Report: {output}", err=True)
        if as_json:
            typer.echo(json.dumps({k: v for k, v in whole.items() if k != "rows"}))


def kernels(
    count: Annotated[
        bool, typer.Option("--count", help="Count device bytes in the workbench; times nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of rows as JSON.")] = False,
) -> None:
    """Count what every Metal kernel reads and writes, beside MLX's own, without a GPU.

    From a checkout only: the kernels are compiled for the processor, run and watched there. Last
    come the launches of one round; with --json they are the rows whose source is "round".
    """
    with common.sentences():
        if not count:
            raise ValueError("[bench] --count must be given: nothing here times an Apple GPU.")
        from pyengine import attention_counts, kernel_counts, layer_counts, rule_counts

        counts = list(kernel_counts.count_kernels())
        attention = list(attention_counts.count_attention())
        layers = list(layer_counts.count_layers())
        rules, round_ = list(rule_counts.count_rules()), rule_counts.count_round()
        if as_json:
            parts = (counts, attention, layers, rules, round_)
            typer.echo(json.dumps([c.to_dict() for part in parts for c in part]))
        else:
            typer.echo(kernel_counts.markdown(counts))
            typer.echo(attention_counts.markdown(attention))
            typer.echo(layer_counts.markdown(layers))
            typer.echo(rule_counts.markdown(rules, round_))


def read_block_sizes(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"[bench] --draft-block-sizes must be whole numbers like 2,4,6 but got {text!r}."
        ) from None
