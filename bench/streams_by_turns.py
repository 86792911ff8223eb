"""Many streams in two builds by turns: tokens per second, and those of many over those of one.

By the clock, and by processor time, in which other programs on the machine weigh little and a
second thread of a kernel counts like the first. Each turn of a build is a process of its own. The
prompts of the embedded suite, greedy, on an engine for that many; of five runs per turn the first
is not timed.

Run: python bench/streams_by_turns.py OLD_PYTHON NEW_PYTHON [--turns 5] [--tokens 96] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = ((1, 1), (8, 1), (1, 4), (8, 4))  # streams, block size
RUNS = 5
Figures = dict[str, float]


def measured(tokens: int) -> Figures:
    """One turn of the build that this Python has."""
    import pyengine
    from pyengine.bench import suite

    pair, cases = pyengine.load(), suite.load_suite(suite.EMBEDDED)
    found: Figures = {}
    for streams, block in SETTINGS:
        speeds, by_clock, prompts = [], [], []
        for _ in range(RUNS):
            with pyengine.Engine(pair, sequences=streams) as engine:
                for n in range(streams):
                    case = cases[n % len(cases)]
                    settings = {"sampling": {"temperature": 0}, "block_size": block}
                    engine.submit(case.content, raw=case.raw, max_tokens=tokens, **settings)
                in_rounds = seconds = in_prompts = 0.0
                while True:
                    rounds, start, at = engine.totals.rounds, time.process_time(), time.monotonic()
                    if not engine.step():
                        break
                    took = time.process_time() - start
                    if engine.totals.rounds > rounds:
                        in_rounds += took
                        seconds += time.monotonic() - at
                    else:
                        in_prompts += took
                tokens_of_rounds = engine.totals.tokens - streams
                speeds.append(tokens_of_rounds / in_rounds)
                by_clock.append(tokens_of_rounds / seconds)
                prompts.append(1e3 * in_prompts)
        found[f"{streams} streams, block {block}: tok/s"] = statistics.median(by_clock[1:])
        found[f"{streams} streams, block {block}: by processor"] = statistics.median(speeds[1:])
        found[f"{streams} streams, block {block}: prompts, ms"] = statistics.median(prompts[1:])
    for block in (1, 4):
        one, eight = (found[f"{n} streams, block {block}: tok/s"] for n in (1, 8))
        found[f"block {block}: 8 streams over one"] = eight / one
    return found


def turn(python: str, tokens: int) -> Figures:
    """One turn of a build, away from any checkout."""
    command = [python, os.path.abspath(__file__), "--once", "--tokens", str(tokens)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, text=True, capture_output=True, cwd=folder, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    read: Figures = json.loads(done.stdout.splitlines()[-1])
    return read


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "builds", metavar="PYTHON", nargs="*", help="the old build's, the new one's"
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=96, help="most new tokens per text")
    parser.add_argument("--once", action="store_true", help="one turn of this Python's build")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measured(options.tokens)))
        return
    builds = [str(Path(build).absolute()) for build in options.builds or [sys.executable]]
    found: list[list[Figures]] = [[] for _ in builds]
    for number in range(options.turns):
        order = range(len(builds)) if number % 2 == 0 else reversed(range(len(builds)))
        for side in order:
            found[side].append(turn(builds[side], options.tokens))
    rows = {name: [[figures[name] for figures in turns] for turns in found] for name in found[0][0]}
    if options.json:
        print(json.dumps(rows))
        return
    for name, sides in rows.items():
        each = [f"{statistics.median(own):.4g} ({min(own):.4g} to {max(own):.4g})" for own in sides]
        print(name, *each, sep="  ")


if __name__ == "__main__":
    main()
