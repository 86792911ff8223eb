"""Exact speculative decoding for Gemma 4 and its assistant, on MLX."""

from pyengine.start import as_command as _as_command

_as_command()

from importlib import metadata as _metadata

_BUILT_FOR = "0.32.4"
try:
    _found = _metadata.version("mlx")
except _metadata.PackageNotFoundError:
    _found = "none"

# libmlx has no stable ABI: another version would fail later, on an undefined symbol or worse.
if _found != _BUILT_FOR:
    raise ImportError(
        f"[pyengine] mlx must be {_BUILT_FOR} but got {_found}. "
        f"Run: pip install 'mlx=={_BUILT_FOR}'"
    )

from pyengine.extension import load_installed as _load_installed

_load_installed()

from pyengine import ops
from pyengine.checkpoint.pair import Pair, load
from pyengine.engine.loop import Stats
from pyengine.engine.prefix import Prefix
from pyengine.generation import Result, Stream, generate, stream
from pyengine.sampling.settings import Sampling

__version__ = "0.1.0"

__all__ = [
    "Pair",
    "Prefix",
    "Result",
    "Sampling",
    "Stats",
    "Stream",
    "generate",
    "load",
    "ops",
    "stream",
]
