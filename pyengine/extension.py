"""Finds the compiled extension, ``pyengine._ext``, also for a checkout that it was not built into.

``pip install .`` leaves the extension in site-packages. Python started in the checkout imports the
``pyengine/`` that lies there, without it; then the installed extension serves, if it was built
from the checkout's own sources. CMake calls this file for the digest that tells so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import threading
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

MLX = "0.32.4"
DISTRIBUTION = "pyengine-mlx"
SOURCES = (
    *("CMakeLists.txt", "cmake/*.cmake", "cmake/*.py"),
    *("csrc/*.cpp", "csrc/*.h", "csrc/*/*.cpp", "csrc/*/*.h", "metal/*.metal", "metal/*.h"),
)
_NAME = "pyengine._ext"
_loading = threading.Lock()


def digest_of_sources(root: Path) -> str:
    """SHA-256 of everything below `root` that the extension is built from: names and contents."""
    digest = hashlib.sha256()
    for file in sorted(file for pattern in SOURCES for file in root.glob(pattern)):
        if file.is_file():
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def load() -> ModuleType:
    """The extension: what ``from pyengine import _ext`` gives.

    Raises:
        ImportError: MLX is another than it was built for; it is neither beside this file nor
            installed; or the installed one was built from other sources than these.
    """
    try:
        found = metadata.version("mlx")
    except metadata.PackageNotFoundError:
        found = "none"
    # libmlx has no stable ABI: another version would fail later, on an undefined symbol or worse.
    if found != MLX:
        raise ImportError(
            f"[pyengine] mlx must be {MLX} but got {found}. Run: pip install 'mlx=={MLX}'"
        )
    importlib.import_module("mlx.core")  # libmlx itself, which a checkout has not beside it
    with _loading:
        if importlib.util.find_spec(_NAME):
            return importlib.import_module(_NAME)
        return _load_installed()


def _load_installed() -> ModuleType:
    root = Path(__file__).resolve().parent.parent
    spec = _installed()
    if spec is None or spec.loader is None:
        raise ImportError(
            f"[pyengine] the extension must be built but {DISTRIBUTION} is not installed in "
            f"{sys.prefix}. Run, in {root}: pip install ."
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if getattr(module, "built_from", None) != digest_of_sources(root):
        raise ImportError(
            f"[pyengine] the extension must be built from the sources in {root} but "
            f"{spec.origin} was built from others. Run, in {root}: pip install ."
        )
    sys.modules[_NAME] = module
    return module


def _installed() -> ModuleSpec | None:
    try:
        folder = metadata.distribution(DISTRIBUTION).locate_file("pyengine")
    except metadata.PackageNotFoundError:
        return None
    return PathFinder.find_spec(_NAME, [str(folder)])


if __name__ == "__main__":
    _text = f'inline constexpr const char* built_from = "{digest_of_sources(Path(sys.argv[1]))}";'
    Path(sys.argv[2]).write_text(f"#pragma once\n\nnamespace pyengine {{\n{_text}\n}}\n")
