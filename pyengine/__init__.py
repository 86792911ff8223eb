"""Exact speculative decoding for Gemma 4 and its assistant, on MLX.

A name is imported when it is first used (PEP 562). So ``import pyengine`` costs next to nothing,
and the ``pyengine`` command can answer Ctrl-C and an installation that does not fit.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "Pair",
    "Prefix",
    "Request",
    "Result",
    "Sampling",
    "Stats",
    "Stream",
    "ToolCall",
    "calibrate",
    "generate",
    "load",
    "ops",
    "stream",
]

if TYPE_CHECKING:  # for type checkers and editors; _HOMES says the same
    from pyengine import ops
    from pyengine.calibration import calibrate
    from pyengine.checkpoint.pair import Pair, load
    from pyengine.engine.prefix import Prefix
    from pyengine.engine.stats import Stats
    from pyengine.generation import Stream, generate, stream
    from pyengine.sampling.settings import Sampling
    from pyengine.streams import Engine, Request
    from pyengine.task import Result
    from pyengine.text.tool_calls import ToolCall
else:  # which would take any name for a public one
    _HOMES = {
        "Pair": "pyengine.checkpoint.pair",
        "load": "pyengine.checkpoint.pair",
        "Stats": "pyengine.engine.stats",
        "Prefix": "pyengine.engine.prefix",
        "Result": "pyengine.task",
        "Stream": "pyengine.generation",
        "generate": "pyengine.generation",
        "stream": "pyengine.generation",
        "Sampling": "pyengine.sampling.settings",
        "Engine": "pyengine.streams",
        "Request": "pyengine.streams",
        "ToolCall": "pyengine.text.tool_calls",
        "calibrate": "pyengine.calibration",
    }

    def __getattr__(name):
        if name == "_ext":
            value = _import_module("pyengine.extension").load()
        elif name == "ops":
            value = _import_module("pyengine.ops")
        elif name in _HOMES:
            value = getattr(_import_module(_HOMES[name]), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__():
        return sorted({*globals(), *__all__})
