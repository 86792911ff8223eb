"""What a round of the embedded pair costs: rules in plain MLX, rules as ops, graph recorded.

The three take turns, so that a busy machine slows them alike; medians of rounds.

Run: python bench/round.py [--tokens 150] [--repeats 7] [--json]
"""

import argparse
import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import mlx.core as mx

from pyengine import ops
from pyengine.checkpoint.pair import Pair, load
from pyengine.drafters import new_drafter
from pyengine.engine import loop
from pyengine.engine import round as on_device
from pyengine.ops.recorded import Recorded
from pyengine.sampling.settings import Sampling

PROMPT = "Create a single-file HTML5 canvas Flappy Bird game."
RULES = ("filter_logits", "draw_token", "accept_block")
VARIANTS = ("rules in plain MLX", "rules as ops", "recorded")


@contextlib.contextmanager
def variant(name: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if name != "recorded":
            stack.enter_context(mock.patch.object(on_device, "recorded", lambda function: function))
        if name == "rules in plain MLX":
            for op in RULES:
                stack.enter_context(mock.patch.object(ops, op, getattr(ops, f"{op}_reference")))
        yield


def rounds(pair: Pair, block_size: int, tokens: int) -> tuple[list[int], list[float]]:
    """The text, and the milliseconds of each round behind the first."""
    prompt = pair.tokenizer.encode(PROMPT, bos=True)
    text: list[int] = []
    times = []
    start = time.perf_counter()
    for r in loop.decode(
        pair.target,
        new_drafter("assistant", pair.target, pair.assistant),
        prompt,
        sampling=Sampling(seed=1),
        block_size=block_size,
        max_tokens=tokens,
    ):
        now = time.perf_counter()
        times.append((now - start) * 1e3)
        text += r.tokens
        start = time.perf_counter()
    return text, times[2:]  # neither the prefill nor the round that is recorded


def nodes(pair: Pair, block_size: int) -> Counter[str]:
    """Of the recorded graph of a round, by name."""
    played: list[Recorded[..., Any]] = []

    def record(function: Callable[..., Any]) -> Recorded[..., Any]:
        played.append(Recorded(function))
        return played[-1]

    with mock.patch.object(on_device, "recorded", record):
        rounds(pair, block_size, 2)
    return Counter(played[0].nodes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pair = load()
    rows = []
    for block_size in (1, 4, 6):
        times: dict[str, list[float]] = {name: [] for name in VARIANTS}
        texts = {}
        for _ in range(options.repeats):
            for name in VARIANTS:
                with variant(name):
                    texts[name], new = rounds(pair, block_size, options.tokens)
                times[name] += new
        assert texts["recorded"] == texts["rules as ops"]
        row = {"block_size": block_size, "nodes": nodes(pair, block_size).total()}
        rows.append(row | {n: statistics.median(times[n]) for n in VARIANTS})
    if options.json:
        print(json.dumps({"mlx": mx.__version__, "unit": "ms per round, median", "rows": rows}))
        return
    print("block size", "nodes", *VARIANTS, "(ms per round, median; ratio to the first)", sep="  ")
    for row in rows:
        first, *_ = values = [row[name] for name in VARIANTS]
        cells = [f"{v:.2f} ({v / first:.2f})" for v in values]
        print(row["block_size"], row["nodes"], *cells, sep="  ")


if __name__ == "__main__":
    main()
