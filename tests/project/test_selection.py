"""Which tests run: those that take minutes only when -m names them, whatever else it says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MARKS = ("parity", "long", "soak", "clients", "npm", "slow")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One test of each mark and one of none, with this project's settings."""
    folder = tmp_path_factory.mktemp("suite")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", folder / "tests")
    tests = [f"@pytest.mark.{mark}\ndef test_{mark}(): pass" for mark in MARKS]
    text = "\n".join(["import pytest", *tests, "def test_plain(): pass"])
    (folder / "tests" / "test_it.py").write_text(text)
    (folder / "workbench").symlink_to(ROOT / "workbench")
    return folder


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ((), {"slow", "plain"}),
        (("-m", "not slow"), {"plain"}),
        (("-m", "slow"), {"slow"}),
        (("-m", "long"), {"long"}),
        (("-m", "parity or soak"), {"parity", "soak"}),
        (("-m", "not parity"), {"slow", "plain"}),
        (("--ops", "reference"), set()),
    ],
)
def test_minutes_are_spent_on_request_only(
    suite: Path, arguments: tuple[str, ...], names: set[str]
) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *arguments]
    done = subprocess.run(command, cwd=suite, capture_output=True, text=True)
    found = {line.split("::test_")[1] for line in done.stdout.splitlines() if "::test_" in line}
    assert found == names, done.stdout + done.stderr


def test_the_header_names_the_compiler_of_the_kernels(suite: Path) -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only"]
    done = subprocess.run(command, cwd=suite, capture_output=True, text=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("workbench: "))
    assert "clang" in line or "zig" in line or "runs on x86-64 Linux" in line
