"""Metal kernels on the processor, for ops.use("workbench"): development only."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from pyengine import _ext

if TYPE_CHECKING:  # its import costs more processor time than all of pyengine's
    import numpy as np

_ROOT = Path(__file__).parents[2]


def load() -> Any:
    """The workbench, which is no part of the package: of the checkout that the package or the
    process stands in, or on ``sys.path``.

    Raises:
        RuntimeError: There is no checkout in any of these places.
    """
    for root in (_ROOT, Path.cwd()):
        if (root / "workbench").is_dir() and str(root) not in sys.path:
            sys.path.append(str(root))
    try:
        return importlib.import_module("workbench")
    except ModuleNotFoundError as error:
        if error.name not in ("workbench",):
            raise
        raise RuntimeError(
            "[use] the workbench needs a checkout of the repository: run from its root, or install "
            "it with `pip install --no-build-isolation -e .`."
        ) from None


def run(launches: list[_ext.Launch], *inputs: mx.array) -> list[mx.array]:
    """Run launches on the processor, in order. Evaluates their inputs.

    A buffer that one launch writes and a later one reads is neither input nor output.

    Returns:
        The outputs; they and the inputs are in the order in which buffers are first named.
    """
    outputs, _ = load().run(launches, named(launches, inputs))
    written = _ext.launch_arguments(launches)[1]
    return [to_mlx(outputs[buffer.name], buffer.dtype) for buffer in written]


def named(launches: list[_ext.Launch], inputs: Sequence[mx.array]) -> dict[str, np.ndarray]:
    """Inputs of launches as the workbench takes them: by the names of buffers, in their shapes."""
    read, _ = _ext.launch_arguments(launches)
    pairs = zip(read, inputs, strict=True)
    return {buffer.name: to_numpy(a.reshape(buffer.shape)) for buffer, a in pairs}


def to_numpy(a: mx.array) -> np.ndarray:
    """The workbench's form of an array, which it evaluates: bfloat16 travels as its bits."""
    import numpy as np

    a = mx.contiguous(a)
    return np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)


def to_mlx(a: np.ndarray, dtype: str) -> mx.array:
    return mx.array(a).view(mx.bfloat16) if dtype == "bfloat16" else mx.array(a)
