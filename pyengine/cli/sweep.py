"""``pyengine bench sweep``: drafters by rules by block sizes, up to the longest, as a graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pyengine.cli import common, tables
from pyengine.cli.bench import (
    AnyPair,
    AsJson,
    Drafters,
    FirstSeed,
    Output,
    Plot,
    PromptSuite,
    Repeats,
    Rules,
    Temperature,
    Tokens,
    TopK,
    TopP,
    Trees,
    compare,
    drafts_of,
)
from pyengine.cli.options import AssistantDir, BundleDir, DFlashDir, OpsName, Position, TargetDir

if TYPE_CHECKING:
    from rich.console import Console

    from pyengine.bench.gemma_mtp import Row

EXAMPLES = (
    "pyengine bench sweep --plot sweep.png",
    "pyengine bench sweep --drafter assistant,early:6 --block-sizes 4,16,64,100 --verify coupled",
    "pyengine bench sweep --bundle ./pair --drafter assistant,lookup,assistant+lookup",
    "pyengine bench sweep --drafter dflash --verify greedy --block-sizes 2,4,8 --tree 3,7,15",
)
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 99, 127)  # drafts that the table of depths has


def run(
    target: TargetDir = None,
    assistant: AssistantDir = None,
    dflash: DFlashDir = None,
    bundle: BundleDir = None,
    ops: OpsName = None,
    drafter: Drafters = "assistant,lookup",
    block_sizes: Annotated[
        str, typer.Option(help="Block sizes to compare with plain decoding, 2 to 128.")
    ] = "2,4,6,8,12,16,32,64,100,128",
    tree: Trees = None,
    verify: Rules = "residual",
    prompt_suite: PromptSuite = None,
    max_tokens: Tokens = 256,
    temperature: Temperature = 1.0,
    top_p: TopP = 0.95,
    top_k: TopK = 64,
    seed: FirstSeed = 0,
    repeats: Repeats = 3,
    allow_unverified_gemma: AnyPair = False,
    plot: Plot = None,
    output: Output = None,
    as_json: AsJson = False,
) -> None:
    """Measure how many drafts pay: each drafter and rule at block sizes up to 128.

    Runs as bench gemma-mtp does, of which it is the wide form: plain decoding in the same process,
    all settings by turns, medians, greedy and coupled texts compared with plain ones. --plot draws
    tokens per second, the multiple of plain decoding, a round's cost, tokens per round and
    acceptance by block size, and acceptance by draft. Longer blocks draft more, of which ever fewer
    are kept, and cost more. --tree adds trees of drafts, drawn as lines of their own, by the rows
    that they verify. Ctrl-C keeps the finished rows, and draws them.
    """
    with common.sentences():
        common.check_dflash(dflash, assistant, drafter)
        compare(
            "sweep",
            lambda: common.load_pair(target, assistant, bundle, None, Position.last, ops, dflash),
            prompt_suite=prompt_suite,
            max_tokens=max_tokens,
            block_sizes=block_sizes,
            sampling={"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed},
            verify=verify,
            drafter=drafter,
            tree=tree,
            repeats=repeats,
            allow_unverified_gemma=allow_unverified_gemma,
            output=output,
            as_json=as_json,
            plot=plot,
            show_more=_show_depths,
        )
        if not plot:
            typer.echo("--plot FILE draws this.", err=True)


def _show_depths(out: Console, summary: list[Row]) -> None:
    """Acceptance by draft, of the longest block of each drafter and rule, and the largest tree."""
    from pyengine.bench.sweep_picture import by_depth, longest

    rows = longest(summary)
    deepest = max((len(by_depth(row)) for row in rows), default=0)
    depths = [depth for depth in DEPTHS if depth <= deepest]
    cells = []
    for row in rows:
        rates = [by_depth(row)[depth - 1 : depth] for depth in depths]
        said = ["-" if not rate or rate[0] is None else f"{rate[0]:.2f}" for rate in rates]
        cells.append((f"{drafts_of(row)} {row['drafter']}", row["verify"], *said))
    heads = ("block", "verify", *map(str, depths))
    title = "acceptance by draft, longest block of each"
    if any(row["tree"] is not None for row in rows):
        title += "; of trees, rounds that kept one there"
    tables.show(out, title, heads, cells, right=True)
