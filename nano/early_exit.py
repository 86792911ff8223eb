"""What an early exit of the embedded pair keeps and saves, and whether its guarantee holds.

    python nano/early_exit.py pages families python

Held-back text of three kinds, cut at random places; greedy answers of the engine with tokens that
may leave behind a layer, against those of the full model. Every threshold is run on all prompts.
Then the prompts are split at random many times: one half calibrates, and the mean loss of the
threshold it chose is taken on the other half. At most epsilon of the splits may exceed delta.
The control is an exit behind layer 3: there the answer must be "none".
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import statistics
import time
from typing import NamedTuple

from data import held_texts

import pyengine
from pyengine import Sampling
from pyengine.calibration import DECAY, Answered, Run
from pyengine.engine.early_exit import EarlyRounds, Exit
from pyengine.engine.loop import decode
from pyengine.engine.rounds import Rounds
from pyengine.risk import fixed_sequence, p_value
from pyengine.task import Task, new_task

THRESHOLDS = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.0)
KINDS = {"pages": "games", "families": "families", "python": "python"}
EPSILON = 0.05
LONGEST = 160  # tokens of a prompt
TURNS, TIMED = 5, 12


class Row(NamedTuple):
    """A threshold on all prompts."""

    threshold: float
    answers: list[Answered]

    def losses(self, binary: bool) -> list[float]:
        return [float(a.loss > 0) if binary else a.loss for a in self.answers]

    @property
    def layers(self) -> float:
        return sum(a.layers for a in self.answers) / sum(a.tokens for a in self.answers)


def prompts(pair: pyengine.Pair, kind: str, count: int) -> list[list[int]]:
    """The tokens before random places of held-back texts: text i gives prompts i, i + its count."""
    rng = random.Random(int(hashlib.sha256(kind.encode()).hexdigest()[:8], 16))
    encode, bos = pair.tokenizer.encode, pair.tokenizer.bos_id
    texts = [encode(text) for text in held_texts(KINDS[kind], min(count, 120))]
    found = []
    for i in range(count):
        ids = texts[i % len(texts)]
        at = rng.randrange(40, len(ids) - 40)
        found.append([bos, *ids[max(0, at - LONGEST + 1) : at]])
    return found


def split(rows: list[Row], delta: float, binary: bool, rng: random.Random) -> float | None:
    """Calibrate on a random half; the mean loss on the other, None where nothing passed."""
    places = list(range(len(rows[0].answers)))
    rng.shuffle(places)
    half = len(places) // 2

    def test(row: Row) -> float:
        losses = row.losses(binary)
        return p_value(math.fsum(losses[i] for i in places[:half]), half, delta, binary)

    passed = [row for row, p in fixed_sequence(rows, test, EPSILON) if p <= EPSILON]
    if not passed:
        return None
    losses = passed[-1].losses(binary)
    return statistics.fmean(losses[i] for i in places[half:])


def seconds(tasks: list[Task], rounds: Rounds) -> float:
    """Processor time of all tokens but the first of each answer, which are the prefill's."""
    taken = 0.0
    for task in tasks:
        played = decode(task.pair.target, None, task.ids, **task.arguments, rounds=rounds)
        next(played)
        began = time.process_time()
        for _ in played:
            pass
        taken += time.process_time() - began
    return taken


def speed(tasks: list[Task], exit: Exit) -> tuple[float, float, float]:
    """Decoding with the exit over the full model's, by processor time: least, median and greatest
    ratio of alternated turns."""
    full, early, ratios = Rounds(), EarlyRounds(exit), []
    for _ in range(1 + TURNS):
        ratios.append(seconds(tasks, full) / seconds(tasks, early))
    ratios = sorted(ratios[1:])  # the first one records graphs
    return ratios[0], statistics.median(ratios), ratios[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="+", choices=list(KINDS))
    parser.add_argument("--layer", type=int, default=6)
    parser.add_argument("--count", type=int, default=240, help="prompts of a kind")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--splits", type=int, default=50)
    parser.add_argument("--json", help="file for losses and figures")
    args = parser.parse_args()
    pair, report = pyengine.load(), {}
    for kind in args.kinds:
        began = time.perf_counter()
        tasks = [
            new_task(
                ids,
                pair=pair,
                sampling=Sampling(temperature=0.0, seed=0),
                max_tokens=args.tokens,
                block_size=1,
            )
            for ids in prompts(pair, kind, args.count)
        ]
        run = Run(tasks, "lcs", 0, lambda *_: None)
        rows = [
            Row(one, run.answers(Exit(args.layer, one, DECAY, args.tokens))) for one in THRESHOLDS
        ]
        print(f"\n{kind}: {args.count} prompts, answers of {args.tokens}, layer {args.layer}")
        print("lambda  layers   lcs R    p at .1  p at .05   differs R   p at .1")
        table = []
        for row in rows:
            lcs, other = math.fsum(row.losses(False)), math.fsum(row.losses(True))
            n = args.count
            own = [p_value(lcs, n, delta, False) for delta in (0.1, 0.05)]
            own.append(p_value(other, n, 0.1, True))
            print(
                f"{row.threshold:6g}  {row.layers:6.2f}  {lcs / n:6.4f}  {own[0]:9.2g} "
                f"{own[1]:9.2g}   {other / n:9.4f}  {own[2]:9.2g}"
            )
            table.append([row.threshold, row.layers, lcs / n, other / n, *own])
        told = {}
        for binary, delta in ((False, 0.1), (False, 0.05), (True, 0.1)):
            rng = random.Random(0)
            found = [split(rows, delta, binary, rng) for _ in range(args.splits)]
            means = [mean for mean in found if mean is not None]
            over = sum(mean > delta for mean in means)
            name = f"{'differs' if binary else 'lcs'}, delta {delta:g}"
            mean = f"{statistics.fmean(means):.4f}" if means else "-"
            print(
                f"{name}: {args.splits} splits, {args.splits - len(means)} answer none, mean loss "
                f"on the other half {mean}, above delta in {over}"
            )
            told[name] = found
        passed = [
            row
            for row, p in fixed_sequence(
                rows, lambda row: p_value(sum(row.losses(False)), args.count, 0.1, False), EPSILON
            )
            if p <= EPSILON
        ]
        ratio = None
        if passed:
            chosen = Exit(args.layer, passed[-1].threshold, DECAY, args.tokens)
            ratio = speed(tasks[:TIMED], chosen)
            print(
                f"lambda {chosen.threshold:g}: {ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f}) "
                f"times the full model's tokens per processor second, {TURNS} alternated turns of "
                f"{TIMED} prompts"
            )
        print(f"{time.perf_counter() - began:.0f} s")
        report[kind] = {"rows": table, "splits": told, "speed": ratio, "arguments": vars(args)}
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
