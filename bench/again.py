"""Milliseconds of a text behind another one of its pair, by block size: python bench/again.py

Each block size has a pair for which nothing is left, so its first text records its rounds and the
ones behind it play them (`pyengine/engine/idle.py`). Medians of several pairs, by turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections import defaultdict

import pyengine

PROMPT = "Create a single-file HTML5 canvas Flappy Bird game."
BLOCKS: tuple[int | str, ...] = (1, 4, 6, "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    ask = {"max_tokens": options.tokens, "sampling": pyengine.Sampling(seed=1)}
    loaded = pyengine.load()
    pyengine.generate(PROMPT, pair=loaded, **ask)  # reads the files
    took = defaultdict[int | str, list[list[float]]](list)
    for _ in range(options.repeats):
        for block in BLOCKS:
            pair = dataclasses.replace(loaded)
            pair.tokenizer  # noqa: B018  # read when first asked for
            times = []
            for _ in range(3):
                start = time.perf_counter()
                pyengine.generate(PROMPT, pair=pair, block_size=block, **ask)
                times.append(1e3 * (time.perf_counter() - start))
            took[block].append(times)
    for block, runs in took.items():
        first, *rest = (statistics.median(own) for own in zip(*runs, strict=True))
        print(f"block {block}: first {first:.0f} ms, then", *(f"{ms:.0f}" for ms in rest))


if __name__ == "__main__":
    main()
