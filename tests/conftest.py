"""What all tests need: the workbench, which is no part of the package, Ctrl-C, and `--ops`."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyengine import ops

# Behind the installed packages, so that pyengine itself is still the installed one.
sys.path.append(str(Path(__file__).resolve().parent.parent))

# A shell lets what it starts in the background ignore SIGINT, and so would the commands that
# tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ops",
        choices=("native", "reference", "workbench"),
        default="native",
        help="run the engine's tests, and no others, on another implementation of the ops: without "
        "those marked slow, on the workbench only those marked short",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On another implementation: the tests of the engine; skip those that need the native ops."""
    implementation = config.getoption("--ops")
    if implementation == "native":
        return
    wanted = {"engine", "short"} if implementation == "workbench" else {"engine"}
    kept = []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if wanted <= marks and "slow" not in marks:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    for item in kept:
        if mark := item.get_closest_marker("native"):
            item.add_marker(pytest.mark.skip(reason=f"native ops only: {mark.args[0]}"))
    items[:] = kept


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation that `--ops` names, for this test."""
    name = request.config.getoption("--ops")
    if name != "native":
        ops.use(name)
    yield name
    if name != "native":
        ops.use("native")
