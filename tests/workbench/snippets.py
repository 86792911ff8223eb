"""Kernels of a few lines, for tests of the workbench itself."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

import workbench
from workbench.toolchain import CACHE

PREAMBLE = "#include <metal_stdlib>\nusing namespace metal;\n"
BUILTINS = """
    uint i [[thread_position_in_grid]],
    uint l [[thread_position_in_threadgroup]],
    uint lane [[thread_index_in_simdgroup]],
    uint g [[threadgroup_position_in_grid]]"""


def source(text: str) -> str:
    """A .metal file with this text, always under the same path, so that objects are reused."""
    folder = CACHE / "snippets"
    folder.mkdir(parents=True, exist_ok=True)
    path: Path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.metal"
    if not path.exists():
        path.write_text(text)
    return str(path)


def launch(
    body: str,
    *,
    n: int = 64,
    threads: int = 64,
    groups: int | None = None,
    before: str = "",
    arguments: str = "",
    buffers: tuple[workbench.Buffer, ...] = (),
    **attributes: Any,
) -> workbench.Launch:
    """A launch of one kernel with inputs a, floats, and n; output o, floats; and this body.

    The first line of the body is line 9 of the file.
    """
    text = (
        f"{PREAMBLE}{before}\nkernel void k(const device float* a [[buffer(0)]],"
        f" device float* o [[buffer(1)]], constant uint& n [[buffer(2)]]{arguments},"
        f"{BUILTINS}) {{\n{body}\n}}\n"
    )
    return workbench.Launch(
        library=source(text),
        kernel="k",
        grid=(groups or n // threads, 1, 1),
        threadgroup=(threads, 1, 1),
        buffers=(
            workbench.Buffer("a", "in", (n,), "float32"),
            workbench.Buffer("o", "out", (n,), "float32"),
            workbench.Buffer("n", "bytes", data=np.uint32(n).tobytes()),
            *buffers,
        ),
        **attributes,
    )


def run(
    body: str,
    *,
    a: np.ndarray[Any, Any] | None = None,
    arrays: dict[str, np.ndarray[Any, Any]] | None = None,
    mode: Any = "check",
    raising: bool = False,
    options: dict[str, Any] | None = None,
    **about: Any,
) -> tuple[dict[str, np.ndarray[Any, Any]], workbench.Report]:
    """Run `launch(body)`, checked; a counts up from 0 unless given."""
    one = launch(body, **about)
    given = {"a": np.arange(one.buffers[0].shape[0], dtype=np.float32) if a is None else a}
    given.update(arrays or {})
    return workbench.run(one, given, mode=mode, raising=raising, **(options or {}))
