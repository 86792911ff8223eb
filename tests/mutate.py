"""Plant small faults in the engine and see whether the nearest tests notice.

    python -m tests.mutate --count 300 --seed 0 --json mutants.json
    python -m tests.mutate --again mutants.json        # only those that survived there
    python -m tests.mutate --modules model/cache,engine/rounds --count 40

Each mutant changes one expression or statement of one module, in a copy of the tree; the tests of
that module run on it until one fails. A mutant that no test notices survives: either a test is
missing, or the change means nothing. The latter stand in ``mutants.json`` beside this file with the
reason, and are told apart.

mutmut and cosmic-ray would do the planting; what they lack is a seeded sample over several modules,
tests chosen by module, and verdicts kept by the text of a change, not by its line number.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERDICTS = Path(__file__).with_suffix(".json").with_name("mutants.json")

# Module -> its tests, nearest first. Quick ones come first: a mutant dies at the first failure.
NEAREST = {
    "engine/loop": "test_rounds_by_hand test_loop test_ends test_exactness_cells",
    "engine/sequence": "test_rounds_by_hand test_loop test_stats_numbers test_ends test_guided "
    "test_prefix test_state_between_calls test_exactness_cells",
    "engine/rounds": "test_rounds_by_hand test_loop test_together test_recorded test_guided",
    "engine/prefill": "test_prefill_left test_prefill_calls test_prefix test_streams",
    "engine/round": "test_rounds_by_hand test_loop test_round test_together test_recorded "
    "test_exactness_cells",
    "model/rows": "test_together",
    "engine/report": "test_round test_rounds_by_hand test_loop",
    "ops/recorded": "test_recorded test_round",
    "engine/stats": "test_stats_numbers test_loop",
    "drafters/assistant": "test_rounds_by_hand test_loop test_round test_pair test_exactness_cells",
    "drafters/lookup": "test_lookup test_round",
    "sampling/settings": "test_sampling test_settings_in_conflict test_arguments",
    "sampling/sampler": "test_sampling test_rounds_by_hand test_settings_in_conflict test_loop "
    "test_accept_rounds test_head",
    "model/cache": "test_cache test_cache_notes test_prefix test_prefix_window test_target "
    "test_state_between_calls test_exactness_cells",
    "engine/prefix": "test_prefix test_prefix_window test_prefill_left test_state_between_calls "
    "test_chat",
    "generation": "test_generate test_drafters test_settings_that_win test_ends test_arguments "
    "test_chat test_pair",
    "text/output": "test_output test_generate test_ends",
    "engine/score": "test_score test_score_state test_serve_prefill",
    "bench/gemma_mtp": "test_bench_numbers test_bench test_bench_printed test_bench_interrupted",
    "bench/report": "test_report_numbers test_bench_printed test_bench",
    "serve/server": "test_server test_serve_fields test_serve_log test_serve_admission "
    "test_serve_prefill",
    "serve/queue": "test_serve_queue test_server test_serve_end test_serve_prefill "
    "test_serve_admission",
    "serve/front": "test_serve_log test_serve_hosts test_server",
    "serve/access": "test_access test_page",
    "serve/web": "test_page",
    "serve/thinking": "test_serve_thinking test_responses",
    "serve/protocols/messages": "test_messages",
    "serve/protocols/responses": "test_responses",
    "serve/protocols/response_items": "test_responses",
    "serve/protocols/kept": "test_responses",
    "serve/protocols/chat": "test_serve_fields test_server test_openai",
    "serve/protocols/choices": "test_serve_fields test_usage_numbers test_server",
    "serve/protocols/completions": "test_serve_ends test_server",
    "serve/protocols/fields": "test_serve_fields test_messages test_responses",
    "serve/protocols/ask": "test_serve_fields test_usage_numbers test_server test_serve_ends "
    "test_settings_that_win",
}

# What the tests import that is not ours: read once, before the first fork
LIBRARIES = (
    *("mlx.core", "numpy", "scipy.stats", "tokenizers", "sentencepiece", "jinja2", "typer.testing"),
    *("rich.console", "hypothesis", "fastapi", "uvicorn", "httpx", "openai", "asyncio"),
)

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
CALLED = {"max": "min", "min": "max", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change: what stood there, what stands there now, and where."""

    module: str
    function: str
    before: str
    after: str
    line: int
    start: int  # bytes of the source that are replaced
    end: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it from others though lines move."""
        return self.module, self.function, self.before, self.after

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line} {self.function}: {self.before}  ->  {self.after}"


def mutants_of(module: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a module, in the order of its source."""
    lines = [0]
    for text in source.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(text))

    parameters: list[list[ast.arg]] = []

    def found(node: Any, where: tuple[str, ...]) -> Iterator[Mutant]:
        changes = _changes(node, parameters)
        if isinstance(node, (ast.If, ast.While)):
            node = node.test
            changes = iter((ast.UnaryOp(ast.Not(), node), ast.Constant(False)))
        for changed in changes:
            before, after = ast.unparse(node), ast.unparse(changed)
            if after == before:
                continue
            if isinstance(node, ast.expr) and not isinstance(node, ast.Slice):
                after = f"({after})"
            start = lines[node.lineno - 1] + node.col_offset
            end = lines[node.end_lineno - 1] + node.end_col_offset
            yield Mutant(module, ".".join(where), before, after, node.lineno, start, end)

    def walk(node: Any, where: tuple[str, ...]) -> Iterator[Mutant]:
        if isinstance(node, (ast.Raise, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.Assert)):
            return  # the words of a message are other tests' subject
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        inside = where
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if is_function or isinstance(node, ast.ClassDef):
            inside = (*where, node.name)
        if where:  # constants of a module are names for numbers, not decisions
            yield from found(node, where)
        if is_function:
            parameters.append([*node.args.args, *node.args.kwonlyargs])
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases", "type_params"):
                continue
            children = value if isinstance(value, list) else [value]
            for child in children:
                docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                if isinstance(child, ast.AST) and not docstring and not _asserts(node, child):
                    yield from walk(child, inside)
        if is_function:
            parameters.pop()

    yield from walk(ast.parse(source), ())


def _changes(node: ast.AST, parameters: list[list[ast.arg]]) -> Iterator[ast.AST]:
    """The node with one thing changed, for each thing that can be."""

    def other(**fields: object) -> ast.AST:
        new = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare():
            for i, op in enumerate(node.ops):
                ops = [*node.ops]
                ops[i] = COMPARED[type(op)]()
                yield other(ops=ops)
        case ast.BoolOp():
            yield other(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
            for i in range(len(node.values)):
                rest = node.values[:i] + node.values[i + 1 :]
                yield other(values=rest) if len(rest) > 1 else rest[0]
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.BinOp() if type(node.op) in COMPUTED and not _text(node.left, node.right):
            yield other(op=COMPUTED[type(node.op)]())
        case ast.AugAssign() if type(node.op) in COMPUTED:
            yield other(op=COMPUTED[type(node.op)]())
            yield ast.Pass()
        case ast.Constant(value=bool()):
            yield ast.Constant(not node.value)
        case ast.Constant(value=int() | float()):
            yield ast.Constant(node.value + 1)
        case ast.Constant(value=str()) if node.value.isidentifier() and len(node.value) > 1:
            yield ast.Constant(f"{node.value}_")
        case ast.IfExp():
            yield other(body=node.orelse, orelse=node.body)
        case ast.Continue():
            yield ast.Break()
        case ast.Break():
            yield ast.Continue()
        case ast.Expr(value=ast.Call() | ast.Yield()):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Return(value=ast.expr()) if ast.unparse(node) != "return None":
            yield other(value=None)
        case ast.Slice():
            if node.lower is not None:
                yield other(lower=None)
            if node.upper is not None:
                yield other(upper=None)
        case ast.Call():
            if isinstance(node.func, ast.Name) and node.func.id in CALLED:
                yield other(func=ast.Name(CALLED[node.func.id]))
            for i in range(len(node.keywords)):
                if not _asserts(node, node.keywords[i]):
                    yield other(keywords=node.keywords[:i] + node.keywords[i + 1 :])
        case ast.Name(ctx=ast.Load()) if parameters:
            yield from (ast.Name(name) for name in _alike(node.id, parameters[-1]))
        case _:
            return


def _asserts(call: Any, keyword: Any) -> bool:
    """Whether it is zip's ``strict``, which no list of ours ever breaks."""
    strict = isinstance(keyword, ast.keyword) and keyword.arg == "strict"
    return strict and isinstance(call, ast.Call) and ast.unparse(call.func) == "zip"


def _text(*nodes: ast.expr) -> bool:
    """Whether one is a string: joining and formatting are not arithmetic."""
    strings = (ast.JoinedStr,)
    return any(
        isinstance(n, strings) or (isinstance(n, ast.Constant) and isinstance(n.value, str))
        for n in nodes
    )


def _alike(name: str, parameters: list[ast.arg]) -> list[str]:
    """Another parameter of the same type, which may stand there by mistake."""
    types = {a.arg: ast.unparse(a.annotation) for a in parameters if a.annotation}
    return [n for n, kind in types.items() if n != name and kind == types.get(name)][:1]


class Copy:
    """A copy of the tree in which one file at a time is changed; lives in a process of its own.

    That process has read the large libraries and nothing of pyengine, and forks once per run.
    """

    here: Copy  # the one of this process

    def __init__(self, folder: Path, extension: Path) -> None:
        self.root = folder / str(os.getpid())
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        files = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
        for name in files.stdout.splitlines():
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.root / name)
        shutil.copy(extension, self.root / "pyengine")
        # An editable install would lead `import pyengine` back to the checkout
        unhook = (
            "sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in str(type(f))]"
        )
        (self.root / "sitecustomize.py").write_text(f"import sys\n{unhook}\n")
        exec(unhook)
        for name in LIBRARIES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)

    def tests(self, module: str, seconds: float | None = None) -> str:
        """Run a module's tests: "passed", "failed" or "slow"."""
        child = os.fork()
        if not child:
            files = {path.stem: str(path) for path in (self.root / "tests").rglob("test_*.py")}
            self._run([files[name] for name in NEAREST[module].split()])
        end = time.monotonic() + (seconds or 3600)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "slow"
            time.sleep(0.02)
        return "failed" if ended[1] else "passed"

    def _run(self, files: list[str]) -> NoReturn:
        os.setsid()  # so that all it starts can be ended
        os.chdir(self.root)
        out = os.open("out.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        for number, handle in enumerate((os.open(os.devnull, os.O_RDONLY), out, out)):
            os.dup2(handle, number)
        sys.path[:0] = [str(self.root)]
        os.environ["PYTHONPATH"] = str(self.root)
        # A mutant may be as long and as old as the one before: no bytecode to take for its own
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        sys.dont_write_bytecode = True
        code = 1
        try:
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files]))
        finally:
            os._exit(code)

    def judge(self, mutant: Mutant, seconds: float) -> str:
        path = self.root / "pyengine" / f"{mutant.module}.py"
        source = path.read_bytes()
        changed = source[: mutant.start] + mutant.after.encode() + source[mutant.end :]
        path.write_bytes(changed)
        try:
            ast.parse(changed)
            verdict = self.tests(mutant.module, seconds)
        except SyntaxError:
            verdict = "failed"
        finally:
            path.write_bytes(source)
        return "survived" if verdict == "passed" else verdict


def begin(folder: Path, extension: Path) -> None:
    Copy.here = Copy(folder, extension)


def baseline(module: str) -> float:
    """Seconds that a module's tests take as they are."""
    start = time.monotonic()
    if Copy.here.tests(module) != "passed":
        said = (Copy.here.root / "out.txt").read_text()[-2000:]
        raise RuntimeError(f"{module}: its tests fail without a mutant:\n{said}")
    return time.monotonic() - start


def judged(mutant: Mutant, seconds: float) -> tuple[Mutant, str]:
    return mutant, Copy.here.judge(mutant, seconds)


def sample(modules: list[str], count: int, seed: int) -> list[Mutant]:
    """Mutants of all modules, as many of each as of the others while there are enough."""
    numbers = random.Random(seed)
    left = []
    for module in modules:
        source = (ROOT / "pyengine" / f"{module}.py").read_text()
        own = sorted(set(mutants_of(module, source)), key=lambda m: (m.start, m.end, m.after))
        left.append(numbers.sample(own, len(own)))
    chosen: list[Mutant] = []
    while len(chosen) < count and any(left):
        for own in left:
            if own and len(chosen) < count:
                chosen.append(own.pop())
    return chosen


def verdicts() -> dict[tuple[str, str, str, str], str]:
    """Why a surviving mutant means nothing, by its key."""
    if not VERDICTS.exists():
        return {}
    rows = json.loads(VERDICTS.read_text())
    return {(r["module"], r["function"], r["before"], r["after"]): r["why"] for r in rows}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutate",
        description="Plant small faults in the engine; see whether the nearest tests notice.",
    )
    parser.add_argument("--modules", default=",".join(NEAREST), help="default: all of them")
    parser.add_argument("--count", type=int, default=300, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write what became of each mutant")
    parser.add_argument("--again", type=Path, help="only the survivors of an earlier --json")
    asked = parser.parse_args()
    modules = asked.modules.split(",")
    unknown = [name for name in modules if name not in NEAREST]
    if unknown:
        parser.error(f"--modules must be of {', '.join(NEAREST)} but got {unknown[0]}")
    if asked.again:
        rows = json.loads(asked.again.read_text())
        wanted = {tuple(r["key"]) for r in rows if r["outcome"] == "survived"}
        everything = sample(list(NEAREST), 10**9, 0)
        chosen = list({m.key: m for m in everything if m.key in wanted}.values())
    else:
        chosen = sample(modules, asked.count, asked.seed)

    known = verdicts()
    outcomes: dict[Mutant, str] = {}
    ask = [
        sys.executable,
        "-c",
        "from pyengine import _ext; print(_ext.__file__)",
    ]
    where = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=True)
    extension = Path(where.stdout.strip())
    with (
        tempfile.TemporaryDirectory(prefix="mutate-") as folder,
        ProcessPoolExecutor(
            asked.jobs, get_context("fork"), begin, (Path(folder), extension)
        ) as pool,
    ):
        used = sorted({m.module for m in chosen})
        limits = dict(zip(used, pool.map(baseline, used), strict=True))
        runs = [pool.submit(judged, m, 30 + 3 * limits[m.module]) for m in chosen]
        for run in as_completed(runs):
            mutant, outcome = run.result()
            outcomes[mutant] = outcome
            note = " (equivalent)" if outcome == "survived" and mutant.key in known else ""
            print(f"[{len(outcomes)}/{len(chosen)}] {outcome}{note}: {mutant}", flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(_rows(outcomes), indent=1))

    by_module: dict[str, Counter[str]] = {m: Counter() for m in used}
    for mutant, outcome in outcomes.items():
        if outcome == "survived" and mutant.key in known:
            outcome = "equivalent"
        by_module[mutant.module][outcome] += 1
    print(f"\n{'module':16} mutants  failed  slow  equivalent  survived")
    total: Counter[str] = Counter()
    for module, row in [*by_module.items(), ("all", total)]:
        told = [row[x] for x in ("failed", "slow", "equivalent", "survived")]
        print("{:16} {:7} {:7} {:5} {:11} {:9}".format(module, sum(told), *told))
        if row is not total:
            total.update(row)
    return 1 if total["survived"] else 0


def _rows(outcomes: dict[Mutant, str]) -> list[dict[str, object]]:
    return [{**asdict(m), "key": list(m.key), "outcome": o} for m, o in outcomes.items()]


if __name__ == "__main__":
    sys.exit(main())
