"""The Metal kernels of an op's lazy result, run in the workbench."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

import workbench
from pyengine import _ext
from pyengine.ops.workbench import named, to_mlx

Results = mx.array | list[mx.array]


def launches_of(result: Results) -> list[_ext.Launch]:
    """What a GPU runs for it: one launch at least."""
    launches, _ = _ext.launches_of(result)
    assert launches, "no kernel takes these arguments"
    return launches


def launched(result: Results, **options: Any) -> tuple[list[mx.array], workbench.Report]:
    """What its kernels make of its inputs, in order and in the launches' shapes, and the report."""
    launches, inputs = launches_of(result), _ext.launches_of(result)[1]
    outputs, report = workbench.run(launches, named(launches, inputs), **options)
    written = _ext.launch_arguments(launches)[1]
    return [to_mlx(outputs[buffer.name], buffer.dtype) for buffer in written], report
