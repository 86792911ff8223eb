"""The same pair in other engines, side by side: python bench/peers/run.py

Each engine has a virtual environment of its own, which --setup makes from PyPI; llama.cpp is built
from its source, tens of minutes on two cores. A run is one process: it loads, writes every prompt
alone, greedily, then several at once. All engines and modes have their turn once before any has it
again, and each turn begins one further in the list. Figures are medians over the turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import install
import report
from install import OURS, PEERS, Peer
from weights import write_plain
from worker import Job

from pyengine import _ext
from pyengine.bench import suite
from pyengine.bench.report import environment
from pyengine.checkpoint.pair import Pair, load
from pyengine.task import new_task

WORKER = Path(__file__).with_name("worker.py")
MORE_PROMPTS = Path(__file__).with_name("prompts.jsonl")
FOLDER = Path.home() / ".cache" / "pyengine-peers"
MOST_THREADS = 256  # pyengine takes no more


def not_installed(peer: Peer) -> str:
    return (
        f"{peer.name} is not installed: python bench/peers/run.py --setup {peer.name} "
        "installs it (from PyPI, into an environment of its own)."
    )


def prompts(pair: Pair, long_prompt: int) -> tuple[list[list[int]], list[int]]:
    """Ids of the embedded suite's and of some more, and so many ids of one long text."""
    cases = [*suite.load_suite(suite.EMBEDDED), *suite.load_suite(MORE_PROMPTS)]
    found = [list(new_task(case.content, pair=pair, raw=case.raw).ids) for case in cases]
    text = [token for ids in found for token in ids]
    return found, (text * (1 + long_prompt // len(text)))[:long_prompt]


def one_run(peer: Peer, job: Job, folder: Path, timeout: float) -> report.Outcome:
    """What the worker found, or the last line of what it complained of."""
    command = [str(peer.python(folder)), str(WORKER), peer.name]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if peer.name == OURS:  # this checkout's, wherever the command was given
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        environment["PYENGINE_THREADS"] = str(job.threads)
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,  # so that a server which it started ends with it
    )
    try:
        told, complaint = process.communicate(json.dumps(asdict(job)), timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {timeout:.0f} s"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode < 0:
        return {"error": f"ended by signal {-process.returncode}"}
    if process.returncode:
        return {"error": install.last_line(complaint)}
    return dict(json.loads(told.splitlines()[-1]))


def order(count: int, turn: int) -> list[int]:
    """Everyone once, beginning one further each turn."""
    return [(place + turn) % count for place in range(count)]


def make_report(
    turns: report.Turns,
    names: Sequence[tuple[str, int]],
    chosen: Sequence[Peer],
    missing: Sequence[str],
    settings: dict[str, Any],
    run_on: dict[str, Any],
) -> dict[str, Any]:
    return {
        "bench": "peers",
        **run_on,
        "settings": settings,
        "turns": len(turns),
        "rows": report.rows(turns, names, OURS, settings["long_prompt"]),
        "weights": {peer.name: peer.weights for peer in chosen},
        "missing": [*missing, *(peer.lacks for peer in chosen if peer.lacks)],
        "outcomes": turns,
    }


def compare(options: argparse.Namespace, chosen: Sequence[Peer], missing: Sequence[str]) -> None:
    run_on = environment()
    pair = load()
    texts, long_prompt = prompts(pair, options.long_prompt)
    texts = texts[: options.prompts]
    target = pair.target_path
    stop = json.loads((target / "generation_config.json").read_text())["eos_token_id"]
    settings = {
        "prompts": len(texts),
        "tokens": options.tokens,
        "drafts": options.drafts,
        "streams": options.streams,
        "long_prompt": options.long_prompt,
        "threads": options.threads,
    }
    names = [(peer.name, drafts) for peer in chosen for drafts in peer.modes(options.drafts)]
    by_name = {peer.name: peer for peer in chosen}
    turns: report.Turns = []
    with tempfile.TemporaryDirectory() as made:
        plain = Path(made)
        for part in ("target", "assistant"):
            write_plain(target.with_name(part), plain / part, target)
        if "llama.cpp" in by_name:
            install.convert(by_name["llama.cpp"], options.folder, plain)
        for turn in range(options.turns):
            turns.append({})
            for place in order(len(names), turn):
                name, drafts = names[place]
                peer = by_name[name]
                can = peer.batches[bool(drafts)]
                job = Job(
                    target=str(target),
                    assistant=str(target.with_name("assistant")),
                    plain_target=str(plain / "target"),
                    plain_assistant=str(plain / "assistant"),
                    home=str(peer.home(options.folder)),
                    prompts=texts,
                    long_prompt=long_prompt,
                    tokens=options.tokens,
                    stop=stop,
                    drafts=drafts,
                    streams=options.streams if can else [],
                    threads=options.threads,
                )
                outcome = one_run(peer, job, options.folder, options.timeout)
                turns[-1][report.key(name, drafts)] = outcome
                told = outcome.get("error") or f"{report.tok_s(outcome):.0f} tok/s"
                label = f"turn {turn + 1} of {options.turns}, {name}, {report.mode(drafts)}"
                print(f"{label}: {told}", file=sys.stderr, flush=True)
                made_of = make_report(turns, names, chosen, missing, settings, run_on)
                if options.output:
                    options.output.write_text(json.dumps(made_of) + "\n")
                if options.markdown:
                    options.markdown.write_text(report.markdown(made_of))
    print(report.markdown(made_of))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def add_threads(parser: argparse.ArgumentParser) -> None:
    """The option; its default is what pyengine takes by itself, in a container the container's."""
    parser.add_argument(
        "--threads",
        type=int,
        default=_ext.threads(),
        help=f"of each engine, 1 to {MOST_THREADS}; all cores without it",
    )


def check_threads(parser: argparse.ArgumentParser, bench: str, threads: int) -> None:
    if not 1 <= threads <= MOST_THREADS:
        parser.error(f"[{bench}] --threads must be 1 to {MOST_THREADS} but got {threads}.")


def main() -> None:
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("peers", nargs="*", metavar="ENGINE", help=f"of {', '.join(names)}")
    parser.add_argument("--setup", action="store_true", help="install them, and run nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where they are installed")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128, help="most new tokens of a text")
    parser.add_argument("--prompts", type=int, default=8, help="so many of the eight prompts")
    parser.add_argument("--drafts", type=numbers, default=[3], help="drafts a round: 3 or 3,5")
    parser.add_argument("--streams", type=numbers, default=[1, 4, 8], help="texts at once")
    parser.add_argument("--long-prompt", type=int, default=512, help="tokens of the prefill")
    add_threads(parser)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds of one run")
    parser.add_argument("--output", type=Path, help="a JSON file, written after every run")
    parser.add_argument("--markdown", type=Path, help="the tables, written after every run")
    options = parser.parse_args()
    for name in options.peers:
        if name not in names:
            parser.error(f"[peers] ENGINE must be of {', '.join(names)} but got {name!r}.")
    check_threads(parser, "peers", options.threads)
    wanted = [peer for peer in PEERS if not options.peers or peer.name in (*options.peers, OURS)]
    if options.setup:
        for peer in wanted:
            install.install(peer, options.folder.resolve())
        return
    options.folder = options.folder.resolve()
    chosen = [peer for peer in wanted if peer.is_installed(options.folder)]
    missing = [not_installed(peer) for peer in wanted if peer not in chosen]
    print(*missing, sep="\n", end="\n" if missing else "", file=sys.stderr)
    compare(options, chosen, missing)


if __name__ == "__main__":
    main()
