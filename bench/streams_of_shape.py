"""Rounds of several sequences on a published shape, with weights that are made in memory.

How much a round of Q sequences costs over one of one, by turns: what many streams gain where the
weights weigh. At a block size above 1 drafts are made and verified; how many are kept is no matter.

Run: python bench/streams_of_shape.py --shape 12b --layers 6 [--block-size 1] [--streams 1,2,4,8]
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import mlx.core as mx

from pyengine.bench import generated
from pyengine.drafters import new_drafter
from pyengine.engine.rounds import Rounds
from pyengine.engine.sequence import TokenSequence
from pyengine.sampling.settings import Sampling

PROMPT_TOKENS, WARM_UP = 64, 2


class Streams:
    """So many sequences of one pair, ready for rounds."""

    def __init__(self, pair: Any, count: int, block_size: int, most: int) -> None:
        self.arena, self.rounds = pair.target.new_arena(), Rounds()
        self.sequences = [self._sequence(pair, n, block_size, most) for n in range(count)]
        for sequence in self.sequences:
            for _ in sequence.prefill():
                pass

    def _sequence(self, pair: Any, seed: int, block_size: int, most: int) -> TokenSequence:
        drafter = None
        if block_size > 1:
            drafter = new_drafter("assistant", pair.target, pair.assistant)
        prompt = mx.random.randint(10, 1000, (PROMPT_TOKENS,), key=mx.random.key(seed)).tolist()
        sampling = Sampling(seed=seed, verify="coupled")
        return TokenSequence(
            pair.target,
            drafter,
            prompt,  # type: ignore[arg-type]
            sampling=sampling,
            block_size=block_size,
            max_tokens=most,
            arena=self.arena,
        )

    def play(self) -> float:
        """The seconds of one round of all."""
        start = time.perf_counter()
        for done in self.rounds.play(self.sequences):
            if isinstance(done, Exception):
                raise done
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="12b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--block-size", type=int, default=1)
    parser.add_argument("--streams", default="1,2,4,8")
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    counts = [int(part) for part in asked.streams.split(",")]
    rounds = WARM_UP + asked.rounds
    most = PROMPT_TOKENS + rounds * asked.block_size + 1
    plan = generated.plan(asked.shape, asked.layers)
    pair = generated.make(plan, most * max(counts), asked.block_size)
    streams = {n: Streams(pair, n, asked.block_size, most) for n in counts}
    took: dict[int, list[float]] = {n: [] for n in counts}
    for _ in range(rounds):
        for n in counts:
            took[n].append(streams[n].play())
    print(f"{plan.title}; blocks of {asked.block_size}")
    print("| sequences | ms a round | over one | gain |")
    print("| --: | --: | --: | --: |")
    one = statistics.median(took[counts[0]][WARM_UP:]) / counts[0]
    for n in counts:
        median = statistics.median(took[n][WARM_UP:])
        print(f"| {n} | {1e3 * median:.1f} | {median / one:.2f} | {n * one / median:.2f} |")


if __name__ == "__main__":
    main()
