"""The tests themselves: none that cannot fail, none that is left out without a reason.

What a machine can see of that, from their source. A list below names what is allowed, and why; an
entry that is not needed any more fails too.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = {str(path.relative_to(TESTS)): path for path in sorted(TESTS.rglob("*.py"))}
OWN = "project/test_tests.py"
Function = ast.FunctionDef | ast.AsyncFunctionDef

# Events are waited for, not times
SLEEPS = {
    "serve/test_browser.py": "a server that is slow enough for a page to stop it",
    "api/test_kept_prompts.py": "an engine that is idle gives no sign of having written",
    "mutate.py": "a child with a time limit is looked for",
    "ops/test_extension.py": "idle threads give no sign of having fallen asleep",
    "ranks/shaped.py": "a link of two namespaces, whose packets wait",
}
# Times are compared with each other, or bounded loosely where cost is the subject
CLOCKS = {
    "api/test_kept_prompts.py": "the deadline of an engine that writes when it is idle",
    "grammar/test_compiled.py": "the cost of hostile grammars is the subject; generous",
    "fuzz/fuzz_ops.py": "a command that runs for so long",
    "ranks/shaped.py": "a link of two namespaces, whose packets wait",
    "mutate.py": "a command that stops tests which a mutant made endless",
    "text/test_template_operations.py": "the cost of hostile templates is the subject; generous",
    "cli/test_chat_terminal.py": "the deadline of a terminal that says nothing",
    "checkpoint/test_hostile_cost.py": "the cost of hostile files is the subject; generous",
    "text/test_marks.py": "a ratio of two lengths of text, the best of some runs",
    "text/test_tokenizer_steps.py": "the cost of hostile tokenizers is the subject; generous",
}
# Files of which all tests are left out where something is missing
WHOLE_FILES = {
    "ops/test_planes.py": "few processors multiply bytes (VNNI, AMX); .ci/tiles.sh emulates tiles",
    "cli/test_cli_grammar.py": "grammars are the extra grammar's",
    "grammar/test_compiled.py": "grammars are the extra grammar's",
    "grammar/test_matcher.py": "grammars are the extra grammar's",
    "grammar/test_schemas.py": "grammars are the extra grammar's",
    "grammar/test_calls.py": "grammars are the extra grammar's",
    "parity/test_dflash_parity.py": "computes with torch and transformers",
    "parity/test_mlx_lm.py": "compares with mlx-lm",
    "parity/test_rounding_references.py": "computes with torch and transformers",
    "parity/test_templates.py": "compares with transformers",
    "parity/test_transformers.py": "compares with transformers",
    "project/test_mac_wheel.py": "reads Mach-O files and wheels by libraries of the extra lint",
    "clients/test_anthropic.py": "the official client asks",
    "clients/test_agents.py": "agents of others ask, and need node and what npm installs",
    "clients/test_npm.py": "clients in JavaScript ask, and need node and what npm installs",
    "clients/test_openai.py": "the official client asks",
    "helpers/reading.py": "requests are pydantic's models",
    "helpers/serving.py": "every test that imports it needs a server",
    "serve/test_browser.py": "drives a browser by a library of the extra browser",
    "serve/test_serve_metrics.py": "prometheus-client writes what it reads",
    "serve/test_evaluate.py": "lm-eval is what is tested; scores are test_score.py's",
    "api/test_forked.py": "forks",
    "serve/test_server.py": "the official client asks",
    OWN: "names it in its examples",
}
# Carry no text that could be compared
TEXTLESS = {"KeyboardInterrupt"}
# Errors that are caught and passed over
PASSED_OVER = {
    "ops/test_accept_law.py": "what is too close to decide by hand is not compared",
    "mutate.py": "a library that is absent cannot be read beforehand",
    "engine/test_state_between_calls.py": "the random history is interrupted where it may be",
    "engine/test_exactness_cells.py": "by hand it cannot be told; how many can has a floor",
    "engine/test_rounds_by_hand.py": "by hand it cannot be told; how many can has a floor",
    "helpers/serving.py": "a reset is an end of a connection too",
    "engine/test_prefix_window.py": "the random history is interrupted where it may be",
    "serve/test_serve_connections.py": "a server that turns away may have closed already",
}


def trees() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text()) for name, path in FILES.items()}


TREES = trees()


def functions(tree: ast.AST) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def cases(tree: ast.AST) -> list[Function]:
    return [f for f in functions(tree) if f.name.startswith("test_")]


def own_nodes(function: Function) -> Iterator[ast.AST]:
    """Of its body, without the functions defined in it."""
    waiting: list[ast.AST] = list(function.body)
    while waiting:
        node = waiting.pop()
        yield node
        if not isinstance(node, Function | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def name_of(call: ast.AST) -> str:
    return ast.unparse(call.func) if isinstance(call, ast.Call) else ""


def places(rule: Callable[[ast.Module], list[ast.AST]]) -> dict[str, list[int]]:
    """The lines that a rule finds, by file."""
    found = {name: [node.lineno for node in rule(tree)] for name, tree in TREES.items()}
    return {name: sorted(lines) for name, lines in found.items() if lines}


def check(rule: Callable[[ast.Module], list[ast.AST]], allowed: dict[str, str]) -> None:
    found = places(rule)
    assert {name: lines for name, lines in found.items() if name not in allowed} == {}
    assert set(allowed) <= set(found), "an entry of the list is not needed any more"


def calls(tree: ast.AST, *names: str) -> list[ast.AST]:
    """Calls whose last name is one of these, in source that is run from a string too."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if name_of(node).rpartition(".")[2] in names:
            found.append(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found += [node] * any(f"{name}(" in node.value for name in names)
    return found


def test_no_test_sleeps() -> None:
    check(lambda tree: calls(tree, "sleep"), {OWN: "names it", **SLEEPS})


def test_no_clock_is_read_but_for_a_stated_reason() -> None:
    names = ("perf_counter", "monotonic", "process_time", "thread_time")
    check(lambda tree: calls(tree, *names), CLOCKS)


def skips_a_file(tree: ast.Module) -> list[ast.AST]:
    """Statements of the module itself that may leave out all of it."""
    found: list[ast.AST] = []
    for statement in tree.body:
        if isinstance(statement, Function | ast.ClassDef):
            continue
        skips = calls(statement, "importorskip", "skip")
        marks = isinstance(statement, ast.Assign) and "pytestmark" in ast.unparse(statement)
        if skips or (marks and "skipif" in ast.unparse(statement)):
            found.append(statement)
    return found


def test_whole_files_are_left_out_for_a_stated_reason_only() -> None:
    check(skips_a_file, WHOLE_FILES)


def without_reason(tree: ast.Module) -> list[ast.AST]:
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        name = name_of(node)
        if not isinstance(node, ast.Call) or name not in SKIPS:
            continue
        texts = [k.value for k in node.keywords if k.arg == "reason"]
        texts += node.args[:1] if name in ("pytest.skip", "pytest.mark.native") else []
        said = [ast.unparse(text).strip("f'\"") for text in texts]
        if not any(len(text) > 8 for text in said):
            found.append(node)
    bare = ("pytest.mark.skip", "pytest.mark.native", "pytest.mark.xfail")
    for function in functions(tree):
        found += [d for d in function.decorator_list if ast.unparse(d) in bare]
    return found


SKIPS = (
    *("pytest.skip", "pytest.importorskip"),
    *(f"pytest.mark.{name}" for name in ("skip", "skipif", "xfail", "native")),
)


def test_what_is_skipped_says_why() -> None:
    check(without_reason, {})


def silent_ends(tree: ast.Module) -> list[ast.AST]:
    return [
        node
        for function in cases(tree)
        for node in own_nodes(function)
        if isinstance(node, ast.Return)
    ]


def test_no_test_returns() -> None:
    """One that does not apply is skipped; one that ends early has not tested the rest."""
    check(silent_ends, {})


def textless_errors(tree: ast.Module) -> list[ast.AST]:
    """`pytest.raises` without a text, and without one compared afterwards."""
    found: list[ast.AST] = []
    for function in functions(tree):
        body = ast.unparse(function)
        for node in ast.walk(function):
            for item in node.items if isinstance(node, ast.With) else []:
                call = item.context_expr
                if not isinstance(call, ast.Call) or name_of(call) != "pytest.raises":
                    continue
                matched = [k.value for k in call.keywords if k.arg == "match"]
                error = ast.unparse(call.args[0])
                if error in ("Exception", "BaseException"):
                    found.append(call)
                elif matched:
                    text = matched[0]
                    said = str(text.value) if isinstance(text, ast.Constant) else "a name's"
                    found += [call] if len(said.strip(".*^$")) < 4 else []
                elif item.optional_vars is not None:
                    said = f"{ast.unparse(item.optional_vars)}.value"
                    found += [] if said in body else [call]
                elif error not in TEXTLESS:
                    found.append(call)
    return found


def test_errors_are_known_by_their_text() -> None:
    check(textless_errors, {})


def never_false(tree: ast.Module) -> list[ast.AST]:
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assert):
            continue
        test = node.test
        parts = test.values if isinstance(test, ast.BoolOp) else [test]
        for part in parts:
            if isinstance(part, ast.Constant | ast.Tuple | ast.List | ast.Lambda):
                found.append(node)
            if isinstance(part, ast.Compare) and not any(map(name_of, ast.walk(part))):
                sides = [ast.unparse(side) for side in (part.left, *part.comparators)]
                # of one name twice in a row: `x is x` of a property is about the object
                if any(a == b for a, b in itertools.pairwise(sides)):
                    found += [] if isinstance(part.ops[0], ast.Is) else [node]
    return found


def test_no_assertion_is_true_by_its_form() -> None:
    check(never_false, {})


def swallows(tree: ast.Module) -> list[ast.AST]:
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            empty = all(isinstance(s, ast.Pass | ast.Continue | ast.Break) for s in node.body)
            found += [node] if empty or node.type is None else []
        if name_of(node).endswith("suppress"):
            found.append(node)
    return found


def test_no_error_is_passed_over() -> None:
    check(swallows, PASSED_OVER)


def asserting() -> set[str]:
    """Names of functions of the tests that assert, or call one that does."""
    bodies: dict[str, list[ast.AST]] = {}
    for tree in TREES.values():
        for function in functions(tree):
            bodies.setdefault(function.name, []).append(function)
    ways = ("assert_", "raises", "fail", "check_call")

    def asserts(function: ast.AST) -> bool:
        nodes = list(ast.walk(function))
        names = [name_of(node).rpartition(".")[2] for node in nodes]
        return any(isinstance(node, ast.Assert) for node in nodes) or any(
            name in known or name.startswith(ways) for name in names
        )

    known: set[str] = set()
    while True:
        more = {name for name, all_ in bodies.items() if any(map(asserts, all_))} - known
        if not more:
            return known
        known |= more


def test_every_test_asserts() -> None:
    known = asserting()
    named = [(name, function.name) for name, tree in TREES.items() for function in cases(tree)]
    assert len(named) > 800
    assert [(name, test) for name, test in named if test not in known] == []


def test_no_test_hides_another_of_its_name() -> None:
    for name, tree in TREES.items():
        made = [f.name for f in tree.body if isinstance(f, Function)]
        assert sorted(made) == sorted(set(made)), name


def test_no_module_that_tests_import_hides_another() -> None:
    """Tests put folders of scripts before those of helpers: the first module of a name wins."""
    root = Path(__file__).parents[2]
    folders = [*(root / "tests").iterdir(), root / "bench", root / "bench/peers", root / ".ci"]
    paths = [path for folder in folders for path in folder.glob("*.py")]
    names = sorted(path.name for path in paths)
    apart = {"__init__.py", "conftest.py"}  # which pytest loads by their paths
    assert "compare_matmul.py" in names and "matmuls.py" in names
    assert [a for a, b in itertools.pairwise(names) if a == b and a not in apart] == []


def literal(file: str, name: str) -> set[str]:
    """The value that a module gives a name of its own: there are two modules called conftest."""
    for node in TREES[file].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


ON_REQUEST = literal("conftest.py", "ON_REQUEST")


def test_what_is_left_out_of_a_run_says_why_and_how_to_run_it(
    pytestconfig: pytest.Config,
) -> None:
    """pyproject's markers tell what conftest.py does with them."""
    lines = [line for line in pytestconfig.getini("markers") if line.split(": ")[1][:4] in WAYS]
    said = dict(line.split(": ", 1) for line in lines)
    for name, text in said.items():
        if name in ON_REQUEST:
            assert text.startswith("left out, ") and text.endswith(f": pytest -m {name}"), name
        else:
            assert text.startswith("runs, "), name
    assert set(said) >= ON_REQUEST
    used = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pytest.mark":
                used.add(node.attr)
    given = {"parametrize", "skip", "skipif", "usefixtures", "filterwarnings"}
    assert used - given == {name.partition("(")[0] for name in said}
    assert pytestconfig.getini("empty_parameter_set_mark") == "fail_at_collect"
    assert pytestconfig.getini("xfail_strict") is True


WAYS = ("left", "runs")  # pytest and its plugins have markers of their own

HOLLOW = {
    "sleep": ("import time\ndef test_x():\n    time.sleep(1)\n", lambda tree: calls(tree, "sleep")),
    "sleep in a string": ("S = 'import time; time.sleep(1)'", lambda tree: calls(tree, "sleep")),
    "whole file": ("pytest.importorskip('a', reason='b')", skips_a_file),
    "whole file by its mark": ("pytestmark = pytest.mark.skipif(A, reason='b')", skips_a_file),
    "no reason": ("@pytest.mark.skipif(A)\ndef test_x(): pass", without_reason),
    "bare skip": ("@pytest.mark.skip\ndef test_x(): pass", without_reason),
    "empty reason": ("def test_x():\n    pytest.skip('')", without_reason),
    "return": ("def test_x():\n    if A:\n        return\n    assert B", silent_ends),
    "any error": (
        "def test_x():\n    with pytest.raises(ValueError):\n        f()",
        textless_errors,
    ),
    "any text": (
        "def test_x():\n    with pytest.raises(ValueError, match='.*'):\n        f()",
        textless_errors,
    ),
    "an error that nobody reads": (
        "def test_x():\n    with pytest.raises(ValueError) as error:\n        f()",
        textless_errors,
    ),
    "Exception": (
        "def test_x():\n    with pytest.raises(Exception, match='text'):\n        f()",
        textless_errors,
    ),
    "assert True": ("def test_x():\n    assert True", never_false),
    "or True": ("def test_x():\n    assert a or True", never_false),
    "a tuple": ("def test_x():\n    assert (a, 'text')", never_false),
    "itself": ("def test_x():\n    assert a.b == a.b", never_false),
    "except and pass": ("try:\n    f()\nexcept ValueError:\n    pass", swallows),
    "suppress": ("with contextlib.suppress(ValueError):\n    f()", swallows),
}


@pytest.mark.parametrize("name", HOLLOW)
def test_each_rule_sees_what_it_is_for(name: str) -> None:
    source, rule = HOLLOW[name]
    assert len(rule(ast.parse(source))) >= 1
