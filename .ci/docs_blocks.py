"""Run what README and CONTRIBUTING tell a reader to run, as they tell it.

    python .ci/docs_blocks.py                  every block, in this folder, with this environment
    python .ci/docs_blocks.py --first-screen   print the shell lines of README's first screen

Blocks are the indented shell lines and the ```python blocks of the two files, in their order. Run
it in the root of a fresh clone, in an environment with the extra `test`; CONTRIBUTING's lines leave
an editable installation in it. What cannot run as it stands:

* a line that also stands in .ci/run is run there;
* a folder in a command that does not exist is the reader's own, or a name on the hub: a copy of the
  embedded pair, or the part of it that fits, stands in for it, and `bench` is told that this is no
  published pair. For `convert`, which wants bfloat16, it is a tiny pair of the tests, and for
  `inspect`, whose context must be one that the model has, the context is left out;
* a pytest line has its tests collected, and must select some: their running takes minutes or hours;
* what gets the reader a machine and a clone, `apt` and `git clone`, is done by then.
"""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "pyengine" / "nano"
FOLDERS = {  # what a folder with weights stands behind, and the part of the pair that it is
    "--target": "target",
    "--assistant": "assistant",
    "--bundle": ".",
    "inspect": ".",
    "convert": "target",
}


def blocks(file: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, language and text of each block; of shell blocks, of each whole line."""
    python: list[str] | None = None
    held, start = "", 0
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if python is None:
                if line != "```python":
                    raise SystemExit(f"{file.name}:{number}: a fenced block must be Python")
                python, start = [], number
            else:
                yield start, "python", "\n".join(python)
                python = None
        elif python is not None:
            python.append(line)
        elif line.startswith("    ") and not line.lstrip().startswith("text ->"):
            start = start if held else number
            held += line.strip().removesuffix("\\")
            if not line.endswith("\\"):
                yield start, "shell", held
                held = ""


def first_screen() -> list[str]:
    """The shell lines of README before its first heading of the second level."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    end = text[: text.index("\n## ")].count("\n") + 1
    return [t for n, kind, t in blocks(ROOT / "README.md") if kind == "shell" and n <= end]


def stand_ins(words: list[str]) -> bool:
    """Make the folders that a command names and that do not exist; whether there were any."""
    made = False
    source = ROOT / "tests" / "fixtures" / "dense31" if "convert" in words else NANO
    for option, name in itertools.pairwise(words):
        if option in FOLDERS and not (ROOT / name).exists():
            shutil.copytree(source / FOLDERS[option], ROOT / name)
            made = True
    return made


def shell(line: str, run_elsewhere: set[str]) -> list[str] | str:
    """What is run in place of a line, or why nothing is."""
    line = line.split(" #")[0].rstrip()
    if line in run_elsewhere:
        return "run by .ci/run"
    words = shlex.split(line)
    if words[0] in ("apt", "git"):
        return "done by then"
    made = stand_ins(words)
    if made and "bench" in words:
        line += " --allow-unverified-gemma"
    if made and "inspect" in words:
        line = re.sub(r" --context \d+", "", line)
    if "pytest" in words:
        line += " --collect-only -q"
    return ["bash", "-euo", "pipefail", "-c", line]


def main() -> None:
    run_elsewhere = {
        line.split(" #")[0].strip()
        for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    }
    failed = 0
    for file in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for number, kind, text in blocks(file):
            where = f"{file.name}:{number}"
            command: list[str] | str = [sys.executable, "-c", text]
            if kind == "shell":
                command = shell(text, run_elsewhere)
            if isinstance(command, str):
                print(f"{where}: {command}: {text}")
                continue
            done = subprocess.run(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            print(f"{where}: {'ok' if done.returncode == 0 else 'FAILED'}: {text.splitlines()[0]}")
            if done.returncode:
                failed += 1
                print(done.stdout)
    sys.exit(f"{failed} blocks failed" if failed else 0)


if __name__ == "__main__":
    if sys.argv[1:] == ["--first-screen"]:
        print("\n".join(first_screen()))
    else:
        main()
