"""Block size "auto" against plain decoding and every fixed block: python bench/auto.py

The suite's prompts, in one process, all settings by turns. Where other programs run, seconds say
little: --processor-time counts those of this process alone, for "auto" too. Beside the medians each
setting has what its rounds would have taken had each been as long as the median one of its size in
all runs of the prompt, recordings included. That tells how well "auto" chose.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from typing import Any

from pyengine.bench import suite
from pyengine.checkpoint.pair import Pair, load
from pyengine.engine.controller import AUTO_BLOCK
from pyengine.engine.sequence import TokenSequence
from pyengine.sampling import Sampling
from pyengine.task import new_task

Timed = list[tuple[int, bool, float]]  # of each round: its drafts, whether it was recorded, seconds


def run(pair: Pair, case: suite.Case, block: int | str, tokens: int) -> tuple[Timed, list[int]]:
    """The rounds of one text, and its tokens."""
    task = new_task(
        case.content,
        pair=pair,
        raw=case.raw,
        block_size=block,
        max_tokens=tokens,
        sampling=Sampling(seed=0, verify="coupled"),
    )
    timed: Timed = []
    with task.at_work() as (rounds, arena):
        asked = (pair.target, task.new_drafter(), task.ids)
        own = TokenSequence(*asked, **task.arguments, arena=arena)
        text = [token for done in own.prefill() for token in done.tokens]
        while own.finish_reason is None:
            before = own.stats.decode_s
            rounds.choose([own])
            [done] = rounds.play([own])
            if isinstance(done, Exception):
                raise done
            timed.append((own.k, rounds.recorded_now, own.stats.decode_s - before))
            text += done.tokens
        own.release()
    return timed, text


def compare(pair: Pair, case: suite.Case, tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of each setting: medians, and of usual rounds."""
    settings: list[int | str] = [*range(1, AUTO_BLOCK + 1), "auto"]
    runs: dict[int | str, list[Timed]] = defaultdict(list)
    every: dict[tuple[int, bool], list[float]] = defaultdict(list)
    texts = []
    for repeat in range(repeats + 1):
        for place in range(len(settings)):
            block = settings[(place + repeat) % len(settings)]
            timed, text = run(pair, case, block, tokens)
            texts.append(text)
            for k, recorded, took in timed:
                every[k, recorded].append(took)
            if repeat:
                runs[block].append(timed)
    assert all(text == texts[0] for text in texts)
    usual = {shape: statistics.median(each) for shape, each in every.items()}
    count = len(texts[0]) - 1
    row: dict[str, Any] = {"prompt": case.id, "tokens": count}
    for block, own in runs.items():
        took = statistics.median(sum(s for _, _, s in timed) for timed in own)
        usual_s = statistics.median(sum(usual[k, r] for k, r, _ in timed) for timed in own)
        rounds = statistics.median(len(timed) for timed in own)
        row[str(block)] = {"tok_s": count / took, "usual_tok_s": count / usual_s, "rounds": rounds}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processor-time", action="store_true")
    options = parser.parse_args()
    if options.processor_time:
        time.perf_counter = time.process_time
    pair = load()
    for case in suite.load_suite(suite.EMBEDDED):
        row = compare(pair, case, options.tokens, options.repeats)
        fixed = [str(block) for block in range(1, AUTO_BLOCK + 1)]
        best = max(row[block]["usual_tok_s"] for block in fixed)
        part = row["auto"]["usual_tok_s"] / best
        cells = [f"{row[b]['tok_s']:.0f} ({row[b]['usual_tok_s']:.0f})" for b in (*fixed, "auto")]
        print(row["prompt"], *cells, f"{part:.2f} of the best", sep=" | ", flush=True)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
