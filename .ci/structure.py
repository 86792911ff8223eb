"""Measure how the project hangs together: what a prompt crosses, lines, import time, cycles.

    python .ci/structure.py                     # of this checkout and the pyengine of this Python
    python .ci/structure.py --tree ../old       # of another: run by the Python it is installed for
    python .ci/structure.py --json

* A prompt's way: calls of Python functions of the package, on the embedded pair with blocks of 4,
  its template compiled before. A crossing is two calls in a row in different files.
* To add an op: the files named after an op, and those that name most of the ops, which a new one
  has to be entered in.
* Cycles: imports at the head of modules, those for types alone too.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

PROMPT = "Create a single-file HTML5 canvas Flappy Bird game."
BLOCK = 4
IMPORTS, ROUNDS = 5, 21  # the median of so many
STAGES = ("arguments and prompt", "prefill", "first round", "a later round")
IMPORT = "import time; a = time.process_time(); import pyengine; print(time.process_time() - a)"
# Names ops without having to: history, results
NO_LIST = ("CHANGELOG.md", "NOTES.md", "KERNELS.md", "op_bits.py", "mutants.json")
FOLDERS = (".ci", "bench", "cmake", "csrc", "docs", "metal", "pyengine", "tests")
KNOWN = 0.6  # of all ops: a file that names so many is a list of them


class Way:
    """Files of the package in which functions are called, in order."""

    def __init__(self, package: Path) -> None:
        self.package = str(package)
        self.files: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(self.package):
            self.files.append(file)

    @property
    def crossings(self) -> int:
        return sum(a != b for a, b in itertools.pairwise(self.files))


def way() -> dict[str, Any]:
    """What a prompt crosses on its way to the second round, with the pair loaded before."""
    import pyengine

    package = Path(pyengine.__file__).parent
    pair = pyengine.load()
    pyengine.stream(PROMPT, pair=pair)
    steps: Iterator[Any] = iter(())
    ways = []
    for stage in STAGES:
        seen = Way(package)
        sys.setprofile(seen)
        try:
            if stage == STAGES[0]:
                steps = pyengine.stream(PROMPT, pair=pair, block_size=BLOCK).steps()
            else:
                next(steps)
        finally:
            sys.setprofile(None)
        ways.append(seen)
    met = {file for seen in ways[:3] for file in seen.files}
    return {
        "modules": len(met),
        "modules_in_ops": sum(Path(file).parent.name == "ops" for file in met),
        "stages": {
            stage: {
                "calls": len(seen.files),
                "files": len(set(seen.files)),
                "crossings": seen.crossings,
            }
            for stage, seen in zip(STAGES, ways, strict=True)
        },
        "met": sorted(str(Path(file).relative_to(package)) for file in met),
    }


def first_round_ms() -> float:
    """Processor time of the thread that records a first round and waits for it; the median. Of a
    pair each, for a text leaves its recorded rounds to the next one of its pair."""
    import pyengine

    times = []
    for _ in range(ROUNDS):
        steps = pyengine.stream(PROMPT, pair=pyengine.load(), block_size=BLOCK).steps()
        next(steps)  # the prefill
        began = time.thread_time()
        next(steps)
        times.append(time.thread_time() - began)
    return round(1000 * statistics.median(times), 2)


def lines(tree: Path) -> dict[str, int]:
    def count(folder: str, *suffixes: str) -> int:
        paths = (tree / folder).rglob("*")
        files = [p for p in paths if p.suffix in suffixes and "workbench" not in p.parts]
        return sum(len(path.read_text().splitlines()) for path in files)

    parts = {
        "python": count("pyengine", ".py"),
        "csrc": count("csrc", ".h", ".cpp"),
        "metal": count("metal", ".h", ".metal"),
    }
    return {**parts, "product": sum(parts.values())}


def import_seconds() -> float:
    """Processor seconds of the import in a new process."""
    times = [
        float(subprocess.check_output([sys.executable, "-P", "-c", IMPORT], text=True))
        for _ in range(IMPORTS)
    ]
    return round(statistics.median(times), 3)


def op_names(tree: Path) -> list[str]:
    """Those with a reference."""
    files = (tree / "pyengine/ops").glob("*.py")
    found = (re.findall(r"^def (\w+)_reference\(", path.read_text(), re.M) for path in files)
    return sorted(itertools.chain.from_iterable(found))


def places(tree: Path) -> dict[str, list[str]]:
    """Files to write or edit for an op, for each of those that are there."""
    names = op_names(tree)
    inside = (path for folder in FOLDERS for path in sorted((tree / folder).rglob("*")))
    texts = {}
    for path in (*sorted(tree.glob("*")), *inside):  # not by git, which a machine may lack
        if path.suffix in (".py", ".h", ".cpp", ".md", ".txt", ".metal") and path.is_file():
            texts[path.relative_to(tree).as_posix()] = path.read_text()

    spellings = [{name, name.title().replace("_", ""), f"bind_{name}"} for name in names]

    def is_list(file: str) -> bool:
        text = texts[file]
        if file.endswith(NO_LIST) or "enerated" in text[:300]:
            return False
        words = set(re.findall(r"\w+", text))
        return sum(not forms.isdisjoint(words) for forms in spellings) >= KNOWN * len(names)

    lists = [file for file in texts if is_list(file)]
    ours = {}
    for name in names:
        stems = {name, f"{name}_cpu", f"{name}_params", f"test_{name}", f"bench_{name}"}
        stems |= {f"test_metal_{name}"}
        own = [file for file in texts if Path(file).stem in stems]
        ours[name] = [*own, *(file for file in lists if file not in own)]
    return ours


def module_imports(tree: Path) -> dict[str, set[str]]:
    """Modules of the package that each imports at its head, in `if TYPE_CHECKING:` too."""
    files = {}
    for path in (tree / "pyengine").rglob("*.py"):
        parts = path.relative_to(tree).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        found[name] = set()
        waiting: list[ast.stmt] = list(ast.parse(path.read_text()).body)
        while waiting:
            node = waiting.pop()
            if isinstance(node, ast.If | ast.Try):
                waiting += [*node.body, *node.orelse]
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = node.module or ""
                if node.level:
                    base = ".".join([*above, *([node.module] if node.module else [])])
                names = [
                    f"{base}.{alias.name}" if f"{base}.{alias.name}" in files else base
                    for alias in node.names
                    if alias.name != "_ext"  # compiled: it imports nothing of ours
                ]
            found[name] |= {other for other in names if other in files and other != name}
    return found


def cycles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach each other."""
    reached = {}
    for name in imports:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            for other in imports[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        reached[name] = seen
    groups = {
        tuple(sorted(b for b in reached[a] if a in reached[b])) for a in imports if a in reached[a]
    }
    return sorted(map(list, groups))


def measure(tree: Path) -> dict[str, Any]:
    import pyengine

    installed = Path(pyengine.__file__).parent
    if any(
        (installed / path.relative_to(tree / "pyengine")).read_bytes() != path.read_bytes()
        for path in (tree / "pyengine").rglob("*.py")
    ):
        raise SystemExit(f"[structure] {installed} must hold the files of {tree}/pyengine.")
    imports = module_imports(tree)
    op_places = places(tree)
    counts = [len(files) for files in op_places.values()]
    pattern = next(name for name in ("quantized_matmul", "q8_matmul") if name in op_places)
    return {
        "way": way(),
        "first_round_ms": first_round_ms(),
        "lines": lines(tree),
        "import_cpu_s": import_seconds(),
        "ops": len(op_places),
        "places_median": statistics.median(counts),
        "places_most": max(counts),
        "places": {pattern: op_places[pattern]},
        "modules": len(imports),
        "imports": sum(map(len, imports.values())),
        "cycles": cycles(imports),
    }


def show(found: dict[str, Any]) -> None:
    way, sizes = found["way"], found["lines"]
    print(f"a prompt crosses {way['modules']} modules, {way['modules_in_ops']} of them ops")
    for stage, row in way["stages"].items():
        print(
            f"  {stage}: {row['calls']} calls, {row['files']} files, {row['crossings']} crossings"
        )
    print(f"a first round is recorded in {found['first_round_ms']} ms, median of {ROUNDS}")
    print("lines: " + ", ".join(f"{name} {count}" for name, count in sizes.items()))
    print(f"import pyengine: {found['import_cpu_s']} s of the processor, median of {IMPORTS}")
    for name, files in found["places"].items():
        print(f"to add an op like {name}: {len(files)} files", *files, sep="\n  ")
    print(f"  median of {found['ops']} ops: {found['places_median']}, most {found['places_most']}")
    print(f"{found['modules']} modules, {found['imports']} imports among them")
    print(*(f"cycle: {', '.join(group)}" for group in found["cycles"] or [["none"]]), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--json", action="store_true", help="print the figures as one line")
    options = parser.parse_args()
    found = measure(options.tree.resolve())
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


if __name__ == "__main__":
    main()
