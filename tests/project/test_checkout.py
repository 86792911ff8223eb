"""Python started in a checkout, which holds no extension, uses the installed one, if it fits."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from pyengine import _ext
from pyengine.extension import SOURCES, digest_of_sources

ROOT = Path(__file__).resolve().parents[2]
IMPORT = "import pyengine; print(pyengine.__file__)"
SNIPPET = """
import pyengine
from pyengine import _ext
assert pyengine.generate("hello", max_tokens=3).text and pyengine._ext is _ext
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a clone has and the extension is built from; no extension is in its pyengine/."""
    tree = tmp_path / "clone"
    ignored = shutil.ignore_patterns("_ext*", "__pycache__")
    shutil.copytree(ROOT / "pyengine", tree / "pyengine", ignore=ignored)
    for source in (file for pattern in SOURCES for file in ROOT.glob(pattern)):
        target = tree / source.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
    return tree


class Environment:
    """A virtual environment with every package that is installed here, but without pyengine."""

    def __init__(self, folder: Path):
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        for path in map(Path, sys.path):
            for package in path.iterdir() if path.name == "site-packages" else ():
                own = package.name.startswith(("pyengine", "_pyengine", "__editable__"))
                here = self.site / package.name
                if not own and package.suffix != ".pth" and not here.exists():
                    here.symlink_to(package)

    def install(self) -> None:
        """What `pip install .` leaves: the package with its extension, and the distribution."""
        (self.site / "pyengine").mkdir()
        shutil.copy(_ext.__file__ or "", self.site / "pyengine")
        (self.site / "pyengine" / "__init__.py").write_text("raise SystemExit('not the checkout')")
        about = self.site / "pyengine_mlx-0.1.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text("Metadata-Version: 2.1\nName: pyengine-mlx\nVersion: 0\n")

    def run(self, checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.python, *arguments], cwd=checkout, capture_output=True, text=True
        )


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


def test_the_extension_here_was_built_from_these_sources() -> None:
    """Fails after a change to csrc/ or metal/ until the extension is built again."""
    assert _ext.built_from == digest_of_sources(ROOT)


def test_the_installed_extension_serves_a_checkout(
    checkout: Path, environment: Environment
) -> None:
    environment.install()
    for arguments in (
        ("-c", SNIPPET),
        ("-m", "pyengine", "--version"),
        ("-m", "pyengine", "doctor", "--quick", "--op", "softcap"),
    ):
        done = environment.run(checkout, *arguments)
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
    done = environment.run(checkout, "-c", IMPORT)
    assert done.stdout.startswith(str(checkout / "pyengine")), done.stderr


def test_pytest_runs_in_a_checkout(checkout: Path, environment: Environment) -> None:
    environment.install()
    (checkout / "test_it.py").write_text(
        "from pyengine import _ext, ops\nimport mlx.core as mx\n"
        "def test_it(): assert ops.softcap(mx.zeros((2, 16)), 30.0).shape == (2, 16)\n"
    )
    done = environment.run(checkout, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py")
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


@pytest.mark.parametrize("changed", ["csrc/cpu/pool.cpp", "metal/softcap.metal", "CMakeLists.txt"])
def test_an_extension_of_other_sources_is_refused(
    checkout: Path, environment: Environment, changed: str
) -> None:
    environment.install()
    with open(checkout / changed, "a") as file:
        file.write("\n")
    done = environment.run(checkout, "-m", "pyengine", "--version")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert "the extension must be built from the sources in" in done.stderr
    assert done.stderr.endswith(f"Run, in {checkout}: pip install .\n")


def test_nothing_installed_is_one_sentence(checkout: Path, environment: Environment) -> None:
    done = environment.run(checkout, "-m", "pyengine", "--version")
    assert done.returncode == 1
    assert done.stderr == (
        "pyengine: [pyengine] the extension must be built but pyengine-mlx is not installed in "
        f"{environment.python.parent.parent}. Run, in {checkout}: pip install .\n"
    )
    for first_use in ("pyengine.load", "pyengine.ops", "import pyengine.generation"):
        done = environment.run(checkout, "-c", f"import pyengine; {first_use}")
        assert done.returncode == 1
        assert "ImportError: [pyengine] the extension must be built but" in done.stderr


def test_a_renamed_source_changes_the_digest(checkout: Path) -> None:
    before = digest_of_sources(checkout)
    (checkout / "csrc" / "cpu" / "pool.h").rename(checkout / "csrc" / "cpu" / "pools.h")
    assert digest_of_sources(checkout) != before
