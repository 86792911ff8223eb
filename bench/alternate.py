"""Two builds in turns: what a round and `bench gemma-mtp` cost in the new one, over the old one.

Each run is a process of its own; the build that begins changes from turn to turn. A ratio is the
median of the turns' own ratios, so that a busy machine slows both sides of one. Where its turns
differ by more than what is asked, the ratio of the best turns says more.

Run: python bench/alternate.py OLD_PYTHON OLD_TREE NEW_PYTHON [--turns 5] [--tokens 150] [--json]
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
BLOCKS = (1, 4, 6)
Figures = dict[str, float]  # milliseconds, by what was measured


def run(*command: str) -> str:
    """The last line of what a command prints, away from any checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, text=True, capture_output=True, cwd=folder, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout.splitlines()[-1]


def figures(python: str, tree: Path, tokens: int) -> Figures:
    """One turn of one build: a median round, and the time of a token over the embedded suite."""
    options = ["--tokens", str(tokens), "--repeats", "1", "--json"]
    rounds = json.loads(run(python, str(tree / "bench" / "round.py"), *options))
    found = {f"round, block {row['block_size']}": row["recorded"] for row in rounds["rows"]}
    blocks = ",".join(str(block) for block in BLOCKS if block > 1)
    # By its published name, which every build takes
    options = ["--draft-block-sizes", blocks, "--repeats", "1", "--max-tokens", str(tokens)]
    report = json.loads(run(python, "-m", "pyengine", "bench", "gemma-mtp", "--json", *options))
    for row in report["summary"]:
        found[f"gemma-mtp, block {row['block_size']}"] = 1e3 / row["tok_s"]
    return found


def compare(old: list[Figures], new: list[Figures]) -> list[dict[str, str | float]]:
    """A row per figure: medians; the median, least and greatest ratio of a turn; that of bests."""
    rows: list[dict[str, str | float]] = []
    for name in old[0]:
        ratios = [b[name] / a[name] for a, b in zip(old, new, strict=True)]
        rows.append(
            {
                "what": name,
                "old_ms": statistics.median(turn[name] for turn in old),
                "new_ms": statistics.median(turn[name] for turn in new),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "greatest": max(ratios),
                "bests": min(turn[name] for turn in new) / min(turn[name] for turn in old),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", metavar="OLD_PYTHON", help="a Python that the old build is in")
    parser.add_argument("old_tree", metavar="OLD_TREE", type=Path, help="its checkout")
    parser.add_argument("new", metavar="NEW_PYTHON", help="a Python that this checkout's is in")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=150, help="most new tokens per text")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # Not resolved: a virtual environment's Python is a link, and known by its place
    builds = [
        (os.path.abspath(options.old), options.old_tree.resolve()),
        (os.path.abspath(options.new), TREE),
    ]
    found: tuple[list[Figures], list[Figures]] = ([], [])
    for turn in range(options.turns):
        for side in (0, 1) if turn % 2 == 0 else (1, 0):
            found[side].append(figures(*builds[side], options.tokens))
    rows = compare(*found)
    if options.json:
        print(json.dumps({"turns": options.turns, "unit": "ms per round or token", "rows": rows}))
        return
    print("what", "old ms", "new ms", "new / old (least to greatest)", "of the bests", sep="  ")
    for row in rows:
        cells = {key: value if key == "what" else f"{value:.3f}" for key, value in row.items()}
        print(
            "{what}  {old_ms}  {new_ms}  {ratio} ({least} to {greatest})  {bests}".format(**cells)
        )


if __name__ == "__main__":
    main()
