"""Run the steps of .github/workflows that Linux can run, as GitHub's runner would.

    python .ci/workflow_steps.py            all of them, in this folder; it writes here
    python .ci/workflow_steps.py --list     what would be run, and why the rest would not

A step's `run` goes to `bash --noprofile --norc -eo pipefail`, with the `env` of its workflow, job
and step. `uses` belongs to GitHub. What a step needs of an earlier one that is not run here lies in
this folder before: `.venv` with the package and the extra `test`, and a macOS wheel in `wheelhouse`
or where PYENGINE_MAC_WHEEL says. A step whose every line stands in .ci/run too is run there, and
NOT_HERE names the others that are left out; an entry that fits no step is an error.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
NOT_HERE = {
    ("ci.yml", "linux", "Everything"): "it is what runs this",
}


@dataclass
class Step:
    workflow: str
    job: str
    name: str
    run: str | None  # None: an action
    env: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.workflow}, {self.job}, {self.name}"


def steps(folder: Path) -> Iterator[Step]:
    """Every step of every workflow, in order.

    Raises:
        ValueError: A command holds an expression, which only GitHub could fill in.
    """
    for path in sorted(folder.glob("*.yml")):
        whole = yaml.safe_load(path.read_text(encoding="utf-8"))
        for job, content in whole["jobs"].items():
            for number, step in enumerate(content["steps"], 1):
                name = step.get("name") or step.get("uses") or f"step {number}"
                made = Step(path.name, job, name, step.get("run"), _env(whole, content, step))
                for text in (made.run or "", *made.env.values()):
                    if made.run and "${{" in text:
                        raise ValueError(f"{made}: run and env must hold no ${{{{ }}}} but do.")
                yield made


def _env(*levels: dict[str, Any]) -> dict[str, str]:
    return {name: str(value) for level in levels for name, value in level.get("env", {}).items()}


def reason_not_to(step: Step, ci_run: str) -> str | None:
    """Why a step is not run here; None if it is."""
    if step.run is None:
        return "an action of GitHub's"
    reason = NOT_HERE.get((step.workflow, step.job, step.name))
    if reason:
        return reason
    elsewhere = {line.strip() for line in ci_run.splitlines()}
    if all(line.strip() in elsewhere for line in step.run.splitlines() if line.strip()):
        return "run by .ci/run"
    return None


def check_reasons(all_steps: list[Step]) -> None:
    """Refuse a list that has outlived its steps.

    Raises:
        ValueError: An entry of NOT_HERE fits no step.
    """
    there = {(step.workflow, step.job, step.name) for step in all_steps}
    for entry in set(NOT_HERE) - there:
        raise ValueError(f"NOT_HERE must name steps that exist but has {', '.join(entry)}.")


def run(step: Step, folder: Path) -> subprocess.CompletedProcess[str]:
    """A step's commands, with their output in one."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as script:
        script.write(step.run or "")
        script.flush()
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", script.name],
            cwd=folder,
            env={**os.environ, **step.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def bring_mac_wheel(folder: Path) -> None:
    """The macOS wheel that a step checks: on a Mac the step before has built it."""
    wheel = os.environ.get("PYENGINE_MAC_WHEEL")
    if wheel:
        (folder / "wheelhouse").mkdir(exist_ok=True)
        shutil.copy(wheel, folder / "wheelhouse")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="run nothing")
    listed = parser.parse_args().list
    every = list(steps(ROOT / ".github" / "workflows"))
    check_reasons(every)
    ci_run = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    failed = done = 0
    if not listed:
        bring_mac_wheel(ROOT)
    for step in every:
        reason = reason_not_to(step, ci_run)
        if reason or listed:
            print(f"{step}: {reason or 'runs here'}", flush=True)
            continue
        start = time.monotonic()
        ended = run(step, ROOT)
        done += 1
        failed += ended.returncode != 0
        word = "FAILED" if ended.returncode else "ok"
        print(f"{step}: {word}, {time.monotonic() - start:.0f} s", flush=True)
        if ended.returncode:
            print(ended.stdout, flush=True)
    if not listed:
        print(f"{done} steps run, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
