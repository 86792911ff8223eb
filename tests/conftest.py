"""What all tests need: the workbench, which is no part of the package, Ctrl-C, what runs when."""

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.pop("PYENGINE_OPS", None)  # `--ops` is what chooses here
os.environ.pop("PYENGINE_INSTRUCTIONS", None)
os.environ.pop("PYENGINE_THREADS", None)
# The references that torch computes were stored without AMX, whose bfloat16 rounds otherwise
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")

from pyengine import ops
from pyengine.doctor import first_use, quarantine

# What `pyengine doctor` found on this machine counts for no test, and no GPU is examined unasked
quarantine.folder = lambda: Path(os.devnull) / "pyengine"
first_use.EXAMINED_ON = ()

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


def pytest_report_header() -> str:
    """The compiler that the Metal kernels are tested with."""
    from workbench import toolchain

    try:
        return f"workbench: {toolchain.compiler().identity.splitlines()[0]}"
    except RuntimeError as error:
        return f"workbench: {error}"


# Run only if an expression given to -m names them; one in addopts would be replaced by any other.
ON_REQUEST = {"parity", "long", "ranks", "soak", "clients", "npm", "agents", "browser"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what runs on request; on another implementation, what is no test of the engine."""
    implementation = config.getoption("--ops")
    unwanted = ON_REQUEST - set(re.findall(r"\w+", config.getoption("-m")))
    wanted = set()
    if implementation != "native":
        wanted = {"engine", "short"} if implementation == "workbench" else {"engine"}
        unwanted |= {"slow"}
    kept = []
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if wanted <= marks and not unwanted & marks:
            kept.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept
    if implementation != "native":
        for item in kept:
            if mark := item.get_closest_marker("native"):
                item.add_marker(pytest.mark.skip(reason=f"native ops only: {mark.args[0]}"))


@pytest.fixture(autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The implementation that `--ops` names, for this test."""
    name = request.config.getoption("--ops")
    if name != "native":
        ops.use(name)
    yield name
    if name != "native":
        ops.use("native")
